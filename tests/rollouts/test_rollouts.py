"""Steps on rewards of what each branch generates, beside dense weights, a prompt and a token at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from deep import deep
from rewarding import MOST, TOKENIZER, WANTED, batch_of, ending, engine_of, judge, steps_in_a_loop
from tiny import HEADS, SIZES, tiny
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

import tezo_ds
from tezo_ds.errors import ConfigError, DataError, ProbeError, RewardFailed
from tezo_ds.probes.fused import FusedProbe
from tezo_ds.rollouts.judged import Rewarded
from tezo_ds.rollouts.objective import RewardObjective

FIELDS = {"rank": 3, "rho": 5e-2, "lr": 3e-3, "seed": 11, "queries": 2}
ROWS = [[0, 1, 2, 3], [2, 0]]

Make = Callable[[], nn.Module]


def steps(make: Make, left: bool = False, **fields: Any) -> list[tezo_ds.StepReport]:
    engine = engine_of(ending(make()), {**FIELDS, **fields})
    return [engine.step(batch_of(rows, left)) for rows in ROWS]


@lru_cache
def expected(make: Make, method: str = "tezo", **fields: Any) -> list[list[float]]:
    records = steps_in_a_loop(ending(make()), {**FIELDS, **fields}, method, ROWS)
    return [record.kappas for record in records]


def agree(found: list[tezo_ds.StepReport], kappas: list[list[float]]) -> None:
    assert any(kappa != 0 for of_step in kappas for kappa in of_step)
    for report, right in zip(found, kappas, strict=True):
        torch.testing.assert_close(report.kappa, tuple(right), rtol=1e-6, atol=1e-6)


def llama() -> nn.Module:
    return tiny("llama")


def gemma() -> nn.Module:
    """Makes a model that goes on to change its logits, with a layer that forgets all but five tokens."""
    torch.manual_seed(0)
    sizes = {**SIZES, **HEADS, "initializer_range": 0.2, "num_key_value_heads": 1, "head_dim": 12}
    config = Gemma2Config(**sizes, intermediate_size=37, sliding_window=5, query_pre_attn_scalar=12)
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("make", [llama, partial(tiny, "gpt2"), gemma])
def test_all_branches_generate_as_each_by_itself(make: Make) -> None:
    right = expected(make)
    agree(steps(make), right)
    agree(steps(make, left=True, branch_chunk=4, micro_batch=3), right)


def test_in_place_and_dense_directions() -> None:
    agree(steps(llama, method="mezo"), expected(llama, "mezo"))
    agree(steps(llama, probe="inplace"), expected(llama))


def test_tokens_are_drawn_alike_in_all_branches() -> None:
    right = expected(llama, temperature=0.7)
    agree(steps(llama, temperature=0.7, branch_chunk=2), right)
    assert right != expected(llama)


def test_what_comes_before_the_first_trained_layer_runs_once() -> None:
    late = {"include": ("*.2.*", "*.3.*")}
    split = engine_of(ending(deep()), {**FIELDS, **late})
    whole = engine_of(ending(deep()), {**FIELDS, **late, "shared_trunk": False})
    for rows in ROWS:
        agree([split.step(batch_of(rows))], [list(whole.step(batch_of(rows)).kappa)])
    trunk = split.objective.trunk
    assert trunk is not None and trunk.found is not None and trunk.found.first == 2
    seen = []
    block: Any = split.sharding.module.get_submodule("model.layers.0")
    block.register_forward_hook(lambda _, args, out: seen.append(tuple(args[0].shape[:2])))
    split.step(batch_of([0, 1]))
    assert seen[0] == (2, 4) and seen[1] == (8, 1), "the prompts once, then a token of every branch"


@pytest.mark.parametrize("more", [{"train_vectors": True}, {"adapter": "tt", "bottleneck": 4}])
def test_vectors_and_adapters_follow_their_rows(more: dict[str, Any]) -> None:
    """A single prompt in a single branch at a time has no row that must find its branch."""
    fields = {**FIELDS, **more, "lr": 0.0, "rho": 0.3}
    together = engine_of(ending(llama()), fields).step(batch_of([0, 1, 2]))
    alone = engine_of(ending(llama()), {**fields, "branch_chunk": 1})
    each = []
    for row in (0, 1, 2):
        alone.step_index = 0
        each.append(torch.tensor(alone.step(batch_of([row])).rewards))
    found = torch.tensor(together.rewards)
    torch.testing.assert_close(found, torch.stack(each).mean(dim=0), rtol=1e-6, atol=1e-6)
    assert len(set(found.tolist())) > 1


def test_rows_that_are_not_seated_see_other_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    right = [list(report.kappa) for report in steps(llama)]
    seat = FusedProbe.seat
    shuffled = lambda probe, rows: seat(probe, None if rows is None else rows.flip(0))  # noqa: E731
    monkeypatch.setattr(FusedProbe, "seat", shuffled)
    with pytest.raises(AssertionError):
        agree(steps(llama), right)


def test_reports_and_samples() -> None:
    engine = engine_of(ending(llama()), FIELDS)
    report = engine.step(batch_of([0, 1, 2]))
    assert report.rewards is not None and len(report.rewards) == 4
    assert report.loss == pytest.approx(-sum(report.rewards) / 4, abs=1e-9) and not report.tied
    assert isinstance(engine.objective, RewardObjective)
    with engine.applied():
        samples = engine.objective.samples(batch_of([0, 1, 2]))
    given = judge(["", "", ""], [s.completion for s in samples], {"wanted": WANTED[:3]})
    assert [s.reward for s in samples] == given
    assert engine.loss(batch_of([0, 1, 2])) == pytest.approx(-sum(given) / 3, abs=1e-9)


def test_stop_texts_end_a_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, tokens = batch_of([0, 1, 2, 3]), []
    plain = engine_of(llama(), FIELDS)
    with plain.applied():
        whole = plain.objective.samples(batch)
    stop = next(s.completion for s in whole if len(s.completion) > 2)[1:3]
    text = Rewarded.text
    monkeypatch.setattr(Rewarded, "text", lambda r, ids: tokens.append(ids) or text(r, ids))
    stopping = engine_of(llama(), FIELDS, stop=(stop, "never"))
    with stopping.applied():
        cut = stopping.objective.samples({**batch, "prompt": [""] * 4})
    assert [s.completion for s in cut] == [s.completion.split(stop)[0] for s in whole]
    assert any(len(ids) < 6 for ids in tokens), "no token is generated after the stop"


def test_equal_rewards_count_as_a_step() -> None:
    engine = engine_of(
        llama(), FIELDS, judge=lambda prompts, completions, _: [0.1] * len(completions)
    )
    before = engine.coefficients()
    report = engine.step(batch_of([0, 1, 2]))
    assert report.tied and report.kappa == (0.0, 0.0) and engine.step_index == 1
    assert all(torch.equal(part, before[name]) for name, part in engine.coefficients().items())


def test_a_reward_that_is_no_number_drops_its_direction() -> None:
    def first_is_none(prompts: list[str], completions: list[str], columns: Any) -> list[float]:
        return [float("nan"), *(float(len(text)) for text in completions[1:])]

    report = engine_of(llama(), FIELDS, judge=first_is_none).step(batch_of([0, 1]))
    assert report.dropped == 1 and [k != k for k in report.kappa] == [True, False]


def test_logits_that_are_no_numbers_drop_their_directions() -> None:
    engine = engine_of(llama(), FIELDS)
    engine.method.coefficients.fill_(float("nan"))
    assert engine.step(batch_of([0, 1])).dropped == 2
    mask = batch_of([])["attention_mask"] > 0
    engine.objective.samples({**batch_of([]), "attention_mask": mask})
    assert not mask.any(), "a user's mask is left as it was"


def test_a_judge_that_fails_leaves_the_engine_as_it_was() -> None:
    broken = [True]

    def failing(prompts: list[str], completions: list[str], columns: Any) -> list[float]:
        if broken:
            raise RewardFailed("reward broken (file.py:3): raised ValueError")
        return judge(prompts, completions, columns)

    engine, other = (engine_of(llama(), FIELDS, judge=j) for j in (failing, judge))
    with pytest.raises(RewardFailed, match="broken"):
        engine.step(batch_of([0, 1]))
    broken.clear()
    assert engine.step(batch_of([0, 1])).kappa == other.step(batch_of([0, 1])).kappa


def test_batches_and_configs_that_are_refused() -> None:
    engine = engine_of(llama(), FIELDS)
    with pytest.raises(DataError, match="no input_ids"):
        engine.step({"labels": torch.zeros(2, 3)})
    with pytest.raises(DataError, match="wanted is no column of 2 items"):
        engine.step({**batch_of([0, 1]), "wanted": [1]})
    with pytest.raises(ProbeError, match="no prompt on any rank"):
        engine.step(batch_of([]))
    for name, value in {
        "rho": "auto", "method": "tezo-gn", "placement": "per_example", "compile": True,
        "memory_budget": 1.0, "trunk_cache": "memory",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=f"^{name}: "):
            engine_of(llama(), {**FIELDS, name: value})
    with pytest.raises(ConfigError, match="take a causal model"):
        engine_of(tiny("roberta"), FIELDS)


def test_the_python_api_takes_a_reward_function() -> None:
    def reward(completions: list[str], wanted: list[int], **_: Any) -> list[float]:
        return judge(completions, completions, {"wanted": wanted})

    given = {"reward_fn": reward, "tokenizer": TOKENIZER, "max_new_tokens": MOST}
    engine = tezo_ds.initialize(llama(), FIELDS, **given)
    other = engine_of(llama(), FIELDS)
    batch = batch_of([0, 1, 2])
    batch["wanted"] = torch.tensor(batch["wanted"])
    assert engine.step(batch).kappa == other.step(batch_of([0, 1, 2])).kappa
    for wrong, words in (
        ({"tokenizer": None}, "no tokenizer"), ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"loss_fn": lambda outputs, batch: (outputs, batch)}, "keep one"),
        ({"reward_fn": "nowhere:function"}, "nowhere"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            tezo_ds.initialize(llama(), FIELDS, **{**given, **wrong})
