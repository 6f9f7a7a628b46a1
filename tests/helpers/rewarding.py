"""Prompts, a judge and engines for objectives of what a model generates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor, nn

import tezo_ds
from tezo_ds.config import TezoConfig
from tezo_ds.intake.checked_engine import checked_engine
from tezo_ds.methods import reference
from tezo_ds.rollouts.judged import Rewarded
from tezo_ds.rollouts.prompts import ends_of
from tezo_ds.rollouts.reference import completion
from tezo_ds.sharding import sharding_of

TOKENIZER = tiny_tokenizer(["a tiny text", "another one"])
MOST = 6
ENDS = [1, 8, 15, 22, 29, 36, 43, 50, 57]  # enough of 61 words that many texts end early
ENDS = [1, 8, 15, 22, 29, 36, 43, 50, 57]  # enough of 61 words that many texts end early
PROMPTS = [[5, 9, 17, 30], [44, 7], [12, 12, 50, 8, 21, 33], [6, 40, 3]]
WANTED = [3, 9, 14, 27]  # a column: a reward goes by its remainder


def judge(
    prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]
) -> list[float]:
    """Rewards by every character and the column, in thirds and sevenths, which binary numbers round."""
    assert len(prompts) == len(completions) == len(columns["wanted"])
    return [
        sum(map(ord, text)) % (3 + wanted) / 3 + len(text) / 7
        for text, wanted in zip(completions, columns["wanted"], strict=True)
    ]


def batch_of(rows: list[int], left: bool = False) -> dict[str, Any]:
    """Returns some of the prompts as a batch; without rows, one that carries no prompt."""
    chosen = [PROMPTS[row] for row in rows] or [[0]]
    width = max(map(len, chosen))
    ids, mask = (
        torch.full((len(chosen), width), 2),
        torch.zeros(len(chosen), width, dtype=torch.int64),
    )
    for row, prompt in enumerate(chosen):
        start = width - len(prompt) if left else 0
        ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        mask[row, start : start + len(prompt)] = int(bool(rows))
    wanted = [WANTED[row] for row in rows] or [0]
    return {"input_ids": ids, "attention_mask": mask, "wanted": wanted}


def ending(model: Any) -> Any:
    """Has a model's texts end at any of many tokens, so that rows leave the batch at all times."""
    model.generation_config.eos_token_id = ENDS
    return model


def engine_of(model: nn.Module, fields: Mapping[str, Any], **more: Any) -> tezo_ds.Engine:
    """Makes an engine whose objective is the judge's reward."""
    rewarded = Rewarded(**{"judge": judge, "tokenizer": TOKENIZER, "most": MOST, **more})
    config = TezoConfig(**fields)
    return checked_engine(sharding_of(model, None), config, rewarded=rewarded)


def reward_in_a_loop(
    model: nn.Module, weights: Mapping[str, Tensor], rows: list[int], **drawn: Any
) -> float:
    """Returns the mean reward of some prompts at some weights, by the definition."""
    ends = ends_of(model, TOKENIZER)
    found = [completion(model, weights, PROMPTS[row], MOST, ends, **drawn) for row in rows]
    texts = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in found]
    given = judge([""] * len(rows), texts, {"wanted": [WANTED[row] for row in rows]})
    return sum(given) / len(given)


def steps_in_a_loop(
    model: nn.Module, fields: Mapping[str, Any], method: str, rows_of: list[list[int]]
) -> list[reference.Record]:
    """Returns steps of a method's oracle on the rewards of some prompts a step."""

    def loss(step: int, weights: dict[str, Tensor]) -> float:
        narrow = {name: tensor.float() for name, tensor in weights.items()}
        drawn = {
            "temperature": fields.get("temperature", 0.0),
            "seed": fields["seed"],
            "step": step,
        }
        return -reward_in_a_loop(model, narrow, rows_of[step], **drawn)

    known = reference.Fields.__dataclass_fields__
    options = {name: value for name, value in fields.items() if name in known}
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    with torch.no_grad():
        return list(
            reference.run(
                method, weights, loss, len(rows_of), fields["lr"], fields["rho"], **options
            )
        )
