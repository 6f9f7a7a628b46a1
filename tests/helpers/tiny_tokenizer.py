"""A byte-level BPE tokenizer made on the fly, so that tests need neither network nor files, and a model
folder with one."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(
    texts: list[str], *, bos: bool = True, eos: bool = False, vocab_size: int = 400
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer on `texts`; <s>, </s>, <pad> are ids 0, 1, 2, and any text at all can be encoded.

    `bos` and `eos` choose which of <s> and </s> are put around a text by default.
    """
    specials = ["<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    single = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save_tiny_llama(folder: Path, texts: list[str], **config: int) -> None:
    """Writes a randomly initialised model with a tokenizer trained on `texts`; config as of `tiny`'s, but
    for what is given."""
    tokenizer = tiny_tokenizer(texts)
    tokenizer.save_pretrained(folder)
    changed = tiny().config
    for name, value in {"vocab_size": len(tokenizer), **config}.items():
        setattr(changed, name, value)
    torch.manual_seed(0)
    LlamaForCausalLM(changed).save_pretrained(folder)


def with_chat_template(folder: Path) -> None:
    """Gives a model folder's tokenizer a chat template, that marks no answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
