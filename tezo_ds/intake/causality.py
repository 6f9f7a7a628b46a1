"""Refusal of models that would see the answers which they are to predict."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from tezo_ds.engine.engine import Engine
from tezo_ds.errors import ConfigError
from tezo_ds.models.structure import is_classifier, is_encoder_decoder
from tezo_ds.sharding.base import Sharding
from tezo_ds.tasks.encoding import mask_token

TOKENS = 8  # few, so that each has much weight for the others


def refuse_seen_answers(engine: Engine, tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    """Refuses a model whose input holds what it is to predict: a masked one without a mask token, or one
    that is taken for causal, and of which another last token moves earlier logits. All ranks must call
    this, as it makes a forward.

    Args:
        engine: the model.
        tokenizer: the model's tokenizer.
        prompt: text of the task, the same on all ranks.

    Raises:
        ConfigError: the model is refused.
    """
    module = engine.sharding.module
    if is_classifier(module) or mask_token(module, tokenizer) is not None:
        return
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    if engine.sharding.maxima([int(looks_ahead(engine, ids))])[0]:
        raise ConfigError(_advice(engine))


@torch.no_grad()
def looks_ahead(engine: Engine, ids: list[int]) -> bool:
    """Returns whether another last token, of a decoder's where there is one, moves earlier logits, by one
    forward of two short rows of `ids`."""
    row = (ids * TOKENS)[:TOKENS]
    other = next((i for i in ids if i != row[-1]), abs(row[-1] - 1))
    pair = torch.tensor([row, [*row[:-1], other]])  # (2, T)
    engine.sharding.module.eval()
    batch = {"input_ids": pair, "attention_mask": torch.ones_like(pair)}
    if is_encoder_decoder(engine.sharding.module):
        batch |= {"input_ids": pair[:1].repeat(2, 1), "decoder_input_ids": pair}
    logits = engine.sharding.forward(**engine.objective.inputs(batch)).logits[:, :-1]
    one, two = finite(logits)  # (T - 1, vocabulary) each
    return bool((one - two).abs().max() > rounding(engine.sharding) * one.abs().max())


def finite(logits: Tensor) -> Tensor:
    """Returns logits in float32, 0 where they are not finite: some models give -inf to words never meant."""
    return logits.float().nan_to_num(0.0, 0.0, 0.0)


def rounding(sharding: Sharding) -> float:
    """Returns what part of the largest logit may be rounding: rows of a batch may be summed unlike."""
    dtypes = {sharding.compute_dtype(p) for p in sharding.module.parameters()}
    return min(0.05, max(32 * torch.finfo(d).eps for d in dtypes if d.is_floating_point))


def _advice(engine: Engine) -> str:
    module = engine.sharding.module
    kind = str(getattr(getattr(module, "config", None), "model_type", None))
    masked = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(kind)
    cure = f', or write "architectures": ["{masked}"] into its config.json' if masked else ""
    return (
        f"{type(module).__name__} is not causal: it sees the answer that it is to predict, as another last "
        f"token changes its earlier logits; use a causal model{cure}"
    )
