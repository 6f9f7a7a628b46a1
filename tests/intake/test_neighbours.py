"""Examples one after another in a row: models that know them apart give padded rows' losses, others are
refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from architectures import tiny_of
from tiny import VOCABULARY, tiny
from torch import Tensor, nn

import tezo_ds
from tezo_ds.errors import ConfigError
from tezo_ds.intake import checked_engine, neighbours
from tezo_ds.tasks import encoded as encoding
from tezo_ds.tasks.encoded import Encoded, collate, end_to_end, rows_of

FIELDS = {"rank": 2, "rho": 1e-2, "lr": 1e-3, "queries": 2}


def encoded() -> list[Encoded]:
    """Makes sequences of unequal lengths, some of which are labels from the first token on."""
    found = []
    for length, start in ((3, 0), (9, 2), (5, 1), (7, 6)):
        ids = torch.randint(
            5, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)
        )
        found.append(Encoded(ids.tolist(), start, None))
    return found


def test_rows_without_padding() -> None:
    rows = encoded()[:3]
    batch = end_to_end(rows, 0, rows[0])
    assert batch["input_ids"].tolist() == [[token for row in rows for token in row.input_ids]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, *range(9), *range(5)]]
    assert batch["labels"][0, :5].tolist() == [-100, *rows[0].input_ids[1:], -100, -100]
    padded = collate(rows, 0)["labels"][:, 1:]  # what is predicted
    assert (batch["labels"] != -100).sum() == (padded != -100).sum()
    empty = end_to_end([], 0, rows[1])
    assert empty["input_ids"].tolist() == [rows[1].input_ids] and (empty["labels"] == -100).all()


def test_rows_are_about_as_long_as_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_of([5]) == [[0]] and rows_of([300, 300]) == [[0], [1]]
    assert rows_of([600, 100, 100, 100, 100, 100, 100]) == [[0], [1, 2, 3, 4, 5, 6]]
    lengths = [10 + i * 7 % 31 for i in range(90)]
    rows = rows_of(lengths)
    assert sorted(i for row in rows for i in row) == list(range(90))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert len(rows) == sum(lengths) // 256
    assert len(rows) * max(filled) < 1.03 * sum(lengths)

    monkeypatch.setattr(encoding, "ROW", 9)
    few = encoded()
    batch = end_to_end(few, 2, few[0])  # of 3, 9, 5 and 7 tokens
    assert batch["input_ids"].tolist() == [
        [*few[0].input_ids, *few[1].input_ids], [*few[2].input_ids, *few[3].input_ids]
    ]  # fmt: skip
    batch = end_to_end(few[:3], 2, few[0])
    assert batch["input_ids"].shape == (1, 17)
    few[2].input_ids.append(7)
    batch = end_to_end(few[:3], 2, few[0])
    assert batch["input_ids"].tolist() == [few[1].input_ids, [*few[0].input_ids, *few[2].input_ids]]


@pytest.mark.parametrize("row", [256, 9])
@pytest.mark.parametrize("include", ["*", "last:1"])
@pytest.mark.parametrize("kind", ["llama", "neox", "gpt2", "mixtral"])
def test_losses_are_those_of_padded_rows(
    kind: str, include: str, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "ROW", row)
    rows, config = encoded(), {**FIELDS, "include": [include]}
    flat, padded = (tezo_ds.initialize(tiny(kind), config) for _ in range(2))
    for _ in range(3):
        found, expected = flat.step(end_to_end(rows, 0, rows[0])), padded.step(collate(rows, 0))
        assert found.loss == pytest.approx(expected.loss, abs=1e-6)
        assert found.kappa == pytest.approx(expected.kappa, abs=1e-4)


class Blind(nn.Module):
    """A Llama that is not told of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny("llama")

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize(
    "make", [lambda: tiny("opt"), Blind, lambda: tiny_of("BertLMHeadModel", VOCABULARY)]
)
def test_a_model_that_does_not_know_them_apart_is_refused(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = encoded()
    engine = tezo_ds.initialize(make(), FIELDS)
    with pytest.raises(ConfigError, match="examples of one row see each other, or count"):
        engine.step(end_to_end(rows, 0, rows[0]))
    assert engine.step(collate(rows, 0)).loss > 0

    monkeypatch.setattr(checked_engine, "refuse_seen_neighbours", lambda *_: None)
    wrong = tezo_ds.initialize(make(), FIELDS)
    flat, padded = wrong.step(end_to_end(rows, 0, rows[0])).loss, tezo_ds.initialize(make(), FIELDS)
    assert abs(flat - padded.step(collate(rows, 0)).loss) > 1e-3  # what would have gone unseen


def by_lengths(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
) -> Any:
    """Attention as flash kernels compute it: of rows end to end, where it is told the examples' lengths, and
    else of each row as one example."""
    assert mask is None
    heads = query.shape[1] // key.shape[1]
    rows = [
        x.transpose(1, 2) for x in (query, *(x.repeat_interleave(heads, 1) for x in (key, value)))
    ]
    bounds = given.get("cu_seq_lens_q")
    if bounds is not None:
        assert (
            given["max_length_k"] == max(bounds.diff()) and bounds[-1] == rows[0][..., 0, 0].numel()
        )
        rows = [x.flatten(0, 1)[None] for x in rows]
    lengths = [rows[0].shape[1]] if bounds is None else bounds.diff().tolist()
    parts = zip(*(x.transpose(1, 2).split(lengths, dim=2) for x in rows), strict=True)
    found = [
        nn.functional.scaled_dot_product_attention(*part, is_causal=True, scale=given["scaling"])
        for part in parts
    ]
    whole = torch.cat(found, dim=2).transpose(1, 2)
    return whole.reshape(query.shape[0], query.shape[2], *whole.shape[2:]), None


@pytest.mark.parametrize("row", [256, 9])
@pytest.mark.parametrize("include", ["*", "last:1"])
def test_flash_attention_is_told_the_lengths_of_all_branches(
    include: str, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "ROW", row)
    transformers.AttentionInterface.register("flash_of_tests", by_lengths)
    rows, config = encoded(), {**FIELDS, "include": [include]}

    def model() -> Any:
        model: Any = tiny("llama")
        model.config._attn_implementation = "flash_of_tests"
        return model

    bounds = torch.tensor([0, 3, 12, 17, 24], dtype=torch.int32)
    of_trl = {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": 9,
        "max_length_k": 9,
    }
    flat, padded = tezo_ds.initialize(model(), config), tezo_ds.initialize(tiny("llama"), config)
    for more in ({}, of_trl, {}):
        found = flat.step({**end_to_end(rows, 0, rows[0]), **more})
        assert found.loss == pytest.approx(padded.step(collate(rows, 0)).loss, abs=1e-6)
    assert len(flat.sharding.module.base_model._forward_pre_hooks) == 1

    monkeypatch.setattr(neighbours, "tell_lengths", lambda *_: None)
    with pytest.raises(ConfigError, match="examples of one row see each other"):
        tezo_ds.initialize(model(), config).step(end_to_end(rows, 0, rows[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_sight(dtype: torch.dtype) -> None:
    rows = encoded()
    engine = tezo_ds.initialize(tiny("llama").to(dtype), FIELDS)
    for ids in (rows[0].input_ids, [5], [5, 5], [0]):
        row = Encoded(ids, 0, None)
        assert engine.loss(end_to_end([row, rows[1]], 0, row)) > 0
        engine.objective.first = tezo_ds.initialize(tiny("llama").to(dtype), FIELDS).objective.first


def test_positions_before_a_mask_are_no_rows_of_many() -> None:
    """Left-padded rows, as generation makes them, count from their first token on."""
    rows = encoded()
    batch = collate(rows, 0)
    left = {key: value.flip(1) for key, value in batch.items()}
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    engine = tezo_ds.initialize(tiny("opt"), FIELDS)
    assert engine.loss(left) > 0
