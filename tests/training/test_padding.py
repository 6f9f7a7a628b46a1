"""How much of what training computes is padding, and runs of batches of like lengths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_fixtures import with_ragged_films
from command_line import Given, Run, call
from test_resume import killed_after, same

from tezo_ds.output_layer.choosing import FOLD
from tezo_ds.run.folder import JOURNAL
from tezo_ds.run.journal import read_journal
from tezo_ds.tasks.batches import batch_indices
from tezo_ds.tasks.encoded import Encoded
from tezo_ds.training.output_layer import OutputLayerFits
from tezo_ds.training.step_batches import Padding, StepBatches

pytest_plugins = ("cli_fixtures",)
Captured = pytest.CaptureFixture[str]


def batches(lengths: list[int], size: int, world: int, **settings: Any) -> StepBatches:
    config = SimpleNamespace(trunk_cache="off", seed=0)
    sharding = SimpleNamespace(rank=0, world_size=world)
    engine = SimpleNamespace(config=config, sharding=sharding)
    asked = SimpleNamespace(**{"group_by_length": False, "padding_free": False, **settings})
    session: Any = SimpleNamespace(engine=engine, settings=asked, pad_id=0)
    return StepBatches(session, [Encoded([1] * n, 0, None) for n in lengths], size)


def test_padding_is_counted_over_all_ranks() -> None:
    lengths = [2, 3, 5, 9]
    assert batches(lengths, 4, 1).tokens(0) == (4 * 9 - 19, 36)
    padding, computed = batches(lengths, 4, 2).tokens(0)  # each rank's own longest
    assert computed - padding == 19 and computed in (2 * 3 + 2 * 9, 2 * 5 + 2 * 9)
    assert batches(lengths, 4, 4).tokens(0) == (0, 19)
    alone = batches(lengths, 1, 3)  # two ranks have but the filler, example 0
    padding, computed = alone.tokens(0)
    assert padding == 2 * 2 and computed - padding in lengths
    flat = batches(lengths, 4, 2, padding_free=True)
    assert flat.tokens(0) == (0, 19) and flat(0)["input_ids"].shape[0] == 1
    assert batches([100, 150, 300, 290], 4, 1, padding_free=True).tokens(0) == (40, 880)
    assert batches([100, 150, 300, 50], 4, 1, padding_free=True).tokens(0) == (0, 600)
    assert batches([100, 150, 300, 90], 4, 1, padding_free=True).tokens(0) == (40, 680)
    padding, computed = batches(lengths, 1, 3, padding_free=True).tokens(0)  # two with the filler
    assert padding == 2 * 2 and computed - padding in lengths
    taken = batches(lengths, 4, 1)(0)["attention_mask"]
    assert (taken.numel() - int(taken.sum()), taken.numel()) == (17, 36)


@pytest.mark.parametrize("cache", ["off", "memory"])
@pytest.mark.parametrize("world", [1, 3])
def test_fits_take_batches_of_like_lengths_of_the_first_examples(world: int, cache: str) -> None:
    examples = [Encoded([1] * (1 + 7 * i % 40), 0, None) for i in range(40)]  # as long as 1 to 40
    order = batch_indices(40, 37, 0, 5, 0, 1)
    held, lengths, computed, rounds = set(), [], 0, set()
    for rank in range(world):
        config = SimpleNamespace(trunk_cache=cache, seed=5, output_layer_examples=37)
        engine = SimpleNamespace(
            config=config, sharding=SimpleNamespace(rank=rank, world_size=world)
        )
        session: Any = SimpleNamespace(
            engine=engine, settings=SimpleNamespace(eval_batch_size=4), pad_id=0
        )
        fits = OutputLayerFits(session, examples, None, SimpleNamespace(), batch_size=4)  # type: ignore[arg-type]
        found = list(fits.batches())
        rounds.add(len(found))
        for batch, out in found:
            labelled = (batch["labels"] != -100).any(dim=1)  # not those of a filler
            sizes = batch["attention_mask"].sum(dim=1)[labelled]
            lengths += sizes.tolist()
            held |= set(sizes[out[labelled]].tolist())
            computed += batch["labels"][labelled].numel()
    assert len(rounds) == 1
    assert sorted(lengths) == sorted(len(examples[i].input_ids) for i in order)
    assert held == {len(examples[i].input_ids) for i in order[FOLD - 1 :: FOLD]}
    assert computed < 1.3 * sum(lengths)  # and 1.6 in the order of the data


def test_much_padding_is_told() -> None:
    lengths = [3 if i % 2 else 30 for i in range(400)]
    said = batches(lengths, 4, 1).told(100)
    assert said is not None and "--group-by-length makes batches of like lengths" in said
    assert said.endswith("and --padding-free leaves next to none")
    masked = batches(lengths, 4, 1)
    masked._examples = [replace(each, mask=4) for each in masked._examples]
    assert str(masked.told(100)).endswith("--group-by-length makes batches of like lengths")
    assert batches(lengths, 4, 1, group_by_length=True).told(100) is None
    assert batches([5] * 9, 4, 1).told(100) is None
    assert Padding().share is None


@pytest.mark.parametrize("grouped", [False, True])
def test_a_resumed_run_counts_all_its_steps(
    given: Given, grouped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    films = with_ragged_films(given, tmp_path / "films.jsonl")
    options = {"group_by_length": grouped, "batch_size": 2, "steps": 8}
    assert call(*films.train(whole, **options)) == 0
    share = Run(whole).summary["padding_share"]
    assert 0 < share < 0.1 if grouped else share > 0.15
    out = capfd.readouterr().out
    assert f"padding  {share:.1%} of the tokens of training batches".split() == next(
        line.split() for line in out.splitlines() if line.strip().startswith("padding  ")
    )
    killed_after(3, films.train(run, **options), monkeypatch)
    assert call(*films.train(run, **options)) == 0
    assert Run(run).summary["padding_share"] == share and same(run, whole)
    steps = [line["padding"] for line in read_journal(run / JOURNAL).steps]
    assert round(sum(p for p, _ in steps) / sum(c for _, c in steps), 4) == share
    assert call(*films.train(run, **{**options, "group_by_length": not grouped, "steps": 9})) == 2
    assert f"holds a run of group_by_length {grouped}, not {not grouped}" in capfd.readouterr().err


def test_steps_that_noted_nothing_are_counted_as_on_these_ranks(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert call(*given.train(whole)) == 0
    with monkeypatch.context() as older:
        older.setattr(StepBatches, "tokens", lambda *_: None)
        older.setattr(Padding, "add", lambda *_: None)
        older.setattr(StepBatches, "told", lambda *_: None)
        assert call(*given.train(run, steps=3)) == 0
    assert call(*given.train(run)) == 0
    assert Run(run).summary["padding_share"] == Run(whole).summary["padding_share"]


def test_groups_do_not_go_with_lanes(given: Given, tmp_path: Path, capfd: Captured) -> None:
    options = {"group_by_length": True, "include": "*.layers.1.*", "trunk_cache": "memory"}
    assert call(*given.train(tmp_path / "run", **options)) == 2
    assert (
        "--group-by-length: with trunk_cache an example keeps its place" in capfd.readouterr().err
    )
