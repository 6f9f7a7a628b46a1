"""Model folders of the kinds of model that are not plain causal ones, with a tokenizer that has a mask."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tiny_tokenizer import tiny_tokenizer

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**SIZES, "intermediate_size": 37, "max_position_embeddings": 64, "initializer_range": 0.1}
CONFIGS = {
    "Bert": BERT,
    "Roberta": {**BERT, "type_vocab_size": 1},
    "Electra": {**BERT, "embedding_size": 24},
    "Albert": {**BERT, "embedding_size": 12},
    "DistilBert": {"dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 37, "initializer_range": 0.1},
    "XLNet": {"d_model": 24, "n_layer": 2, "n_head": 2, "d_inner": 37, "initializer_range": 0.1},
    "GPT2": {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "Llama": {**SIZES, "num_key_value_heads": 1, "intermediate_size": 37},
    "Bart": {
        "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "init_std": 0.1,
        "max_position_embeddings": 64,
    },
    "T5": {
        "d_model": 24, "d_kv": 12, "d_ff": 37, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0,
    },
}  # fmt: skip


def tiny_of(name: str, vocabulary: int, **more: object) -> torch.nn.Module:
    """Makes a model of transformers by its class's name, such as BertForMaskedLM."""
    family = next(family for family in CONFIGS if name.startswith(family))
    config = getattr(transformers, f"{family}Config")
    torch.manual_seed(0)
    model: torch.nn.Module = getattr(transformers, name)(
        config(vocab_size=vocabulary, **{**CONFIGS[family], **more})
    )
    return model.eval()


def save(
    folder: Path,
    name: str,
    texts: list[str],
    mask: bool = True,
    fields: dict[str, object] | None = None,
) -> Path:
    """Writes a model of a class with a tokenizer trained on `texts`.

    Args:
        folder: where to.
        name: class of transformers.
        texts: texts that the tokenizer has words of.
        mask: whether the tokenizer has a mask token.
        fields: fields of config.json to set; None as a value takes the field away.
    """
    tokenizer = tiny_tokenizer(texts, eos=mask)
    if mask:
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(folder)
    tiny_of(name, len(tokenizer)).save_pretrained(folder)
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **(fields or {})}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder
