"""The output layer fitted on several ranks: the term of one process, on every rank the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import world_fsdp2
import world_fsdp_runs
from command_line import Run, flags
from once import once
from test_multiplier import DIVISOR, granite
from tiny import make_batch, part_of, tiny
from torch import Tensor, nn
from traffic import Traffic
from world_everywhere import WAYS
from world_replicated import FIELDS, assert_equal_on_all_ranks
from world_zero3 import ZERO3
from worlds import World, case

import tezo_ds
from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError, ShardingError
from tezo_ds.files.tensors import load
from tezo_ds.output_layer import fit as fitting
from tezo_ds.output_layer import problem
from tezo_ds.output_layer.choosing import FOLD
from tezo_ds.output_layer.entry import Late
from tezo_ds.output_layer.fit import Fitted, fit
from tezo_ds.output_layer.inner import tensors_of
from tezo_ds.output_layer.language import TokenStates, fit_tokens
from tezo_ds.output_layer.problem import States
from tezo_ds.output_layer.states import collect, collect_tokens
from tezo_ds.output_layer.term import BIAS, term_of
from tezo_ds.output_layer.values import Gathered
from tezo_ds.plan.output_layer import fit_of
from tezo_ds.run.terms import path_of
from tezo_ds.sharding import zero3

WORDS = torch.tensor([7, 40, 12])
EXAMPLES = 31  # divides by nothing


def examples() -> dict[str, Tensor]:
    """Makes a batch of examples with one label each, among the words."""
    batch = make_batch(EXAMPLES)
    batch["labels"][:] = -100
    chosen = WORDS[batch["input_ids"][:, 4] % 3]
    batch["input_ids"][:, 5] = batch["labels"][:, 5] = chosen
    return batch


def engine_of(model: nn.Module) -> tezo_ds.Engine:
    engine = tezo_ds.initialize(model, FIELDS)
    engine.objective.choices = WORDS
    generator = torch.Generator().manual_seed(1)
    engine.method.coefficients.normal_(std=0.02, generator=generator)
    return engine


def collected(
    engine: tezo_ds.Engine, rank: int, size: int, chosen: str = "none", late: Late | None = None,
    maps: str = "last",
) -> States:  # fmt: skip
    """Returns a rank's states of the examples, and what is known of chosen inner layers."""
    batch, held = part_of(examples(), rank, size), torch.arange(EXAMPLES) % FOLD == FOLD - 1
    batches = [(batch, held.tensor_split(size)[rank])]
    layer = engine.output_layer.layer
    assert layer is not None
    with engine.applied():
        inner = engine.output_layer.inner.of_blocks(chosen, maps)
        return collect(engine.objective, layer, batches, WORDS, inner, late)


def fitted(
    engine: tezo_ds.Engine, rank: int, size: int, chosen: str = "none", late: Late | None = None,
    maps: str = "last",
) -> tuple[States, Fitted]:  # fmt: skip
    """Fits the term, and those of chosen inner layers, to the examples of all ranks, and gives them to the
    engine."""
    inner = engine.output_layer.inner.of_blocks(chosen, maps)
    with engine.output_layer.off():
        states = collected(engine, rank, size, chosen, late, maps)
    found = fit(states, False, engine.sharding.all_reduce)
    theirs = tensors_of([x.path for x in inner], found.inner)
    engine.output_layer.load({**term_of(WORDS, found), **theirs})
    return states, found


def ways(kind: str = "llama") -> dict[str, Callable[[bool], nn.Module]]:
    return {
        "replicated": lambda tied: tiny(kind, tied),
        "zero3": lambda tied: zero3.wrap(tiny(kind, tied), ZERO3),
        "fsdp2": lambda tied: world_fsdp2.shard(tiny(kind, tied)),
    }


def words_to_tell() -> dict[str, Tensor]:
    batch = make_batch(7)
    batch["labels"] = torch.where(batch["labels"] < 0, -100, WORDS[batch["labels"] % 3])
    return batch


@once
def of_one_process(tied: bool) -> tuple[Fitted, tezo_ds.StepReport]:
    """Returns the term that one process finds, and its next step."""
    alone = engine_of(tiny("llama", tied))
    _, found = fitted(alone, 0, 1)
    return found, alone.step(words_to_tell())


@case(worlds=(1, 2, 3))
def every_sharding_finds_the_term_of_one_process(world: World) -> None:
    for tied in (True, False):
        expected, theirs = of_one_process(tied)
        assert float(expected.weight.abs().max()) > 1e-3
        batch = words_to_tell()
        for name, make in ways().items():
            engine = engine_of(make(tied))
            _, found = fitted(engine, world.rank, world.size)
            for part, its in ((found.weight, expected.weight), (found.bias, expected.bias)):
                assert_equal_on_all_ranks(part)
                torch.testing.assert_close(part, its, rtol=1e-3, atol=1e-4, msg=name)
            assert found.examples == EXAMPLES
            engine.check()
            share = {
                key: value.tensor_split(world.size)[world.rank] for key, value in batch.items()
            }
            ours = engine.step(share)
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-4), name
            assert ours.kappa == pytest.approx(theirs.kappa, rel=2e-2, abs=1e-2), name


@case(worlds=(1, 2, 3))
def every_sharding_finds_the_terms_of_inner_layers(world: World) -> None:
    """With more ranks than some have examples for, and labels at places that differ."""
    alone = engine_of(tiny())
    alone.sharding.world_size = 1
    states, expected = fitted(alone, 0, 1, "layers:0-1")
    assert all(float(A.abs().max()) > 1e-3 for _, A in expected.inner)
    batch = examples()
    theirs = alone.step(batch)
    for name, make in ways().items():
        engine = engine_of(make(True))
        own, found = fitted(engine, world.rank, world.size, "layers:0-1")
        assert_equal_on_all_ranks(own.directions)
        for mine, whole in zip(own.inner, states.inner, strict=True):
            share = part_of({"x": whole.responses}, world.rank, world.size)["x"]
            torch.testing.assert_close(mine.responses, share, rtol=1e-2, atol=1e-3, msg=name)
        for (_, part), (_, its) in zip(found.inner, expected.inner, strict=True):
            assert_equal_on_all_ranks(part)
            torch.testing.assert_close(part, its, rtol=2e-2, atol=2e-3, msg=name)
        engine.check()
        ours = engine.step(part_of(batch, world.rank, world.size))
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-3), name
        assert ours.kappa == pytest.approx(theirs.kappa, rel=2e-2, abs=1e-2), name


@case(worlds=(1, 2, 3))
def every_sharding_finds_the_terms_of_value_projections(world: World) -> None:
    finds_the_terms_of_value_projections(world, "llama")


@case(worlds=(2,))
def every_sharding_finds_values_beside_queries_and_keys(world: World) -> None:
    finds_the_terms_of_value_projections(world, "neox")


def finds_the_terms_of_value_projections(world: World, kind: str) -> None:
    alone = engine_of(tiny(kind))
    alone.sharding.world_size = 1
    states, expected = fitted(alone, 0, 1, "layers:0-1", maps="values")
    (known, _), batch = states.inner, examples()
    assert isinstance(known, Gathered) and known.sums.abs().max() > 1e-2
    assert all(float(A.abs().max()) > 1e-3 for _, A in expected.inner)
    theirs = alone.step(batch)
    for name, make in ways(kind).items():
        engine = engine_of(make(True))
        own, found = fitted(engine, world.rank, world.size, "layers:0-1", maps="values")
        mine = own.inner[0]
        assert isinstance(mine, Gathered)
        share = part_of({"x": known.inputs}, world.rank, world.size)["x"]
        torch.testing.assert_close(mine.inputs, share, rtol=1e-3, atol=1e-4, msg=name)
        sums, counts = (engine.sharding.all_reduce(x.clone()) for x in (mine.sums, mine.counts))
        assert torch.equal(counts, known.counts), name
        torch.testing.assert_close(sums, known.sums, rtol=1e-2, atol=1e-2, msg=name)
        for ours, its in zip(found.inner, expected.inner, strict=True):
            for part in ours:
                assert_equal_on_all_ranks(part)
            changes = [left @ right for left, right in (ours, its)]
            torch.testing.assert_close(*changes, rtol=2e-2, atol=4e-3, msg=name)
        engine.check()
        report = engine.step(part_of(batch, world.rank, world.size))
        assert report.loss == pytest.approx(theirs.loss, rel=1e-3), name


@case(worlds=(1, 2, 3))
def every_sharding_begins_at_the_first_term(world: World) -> None:
    for name, make in ways().items():
        engine, late = engine_of(make(True)), Late()
        plain, _ = fitted(engine, world.rank, world.size, "layers:1", late)
        assert late.nbytes > 0, name
        whole = collected(engine, world.rank, world.size)
        begun = collected(engine, world.rank, world.size, late=late)
        assert torch.equal(begun.hidden, whole.hidden), name
        assert torch.equal(begun.logits, whole.logits), name
        assert not len(whole.hidden) or not torch.equal(plain.hidden, whole.hidden), name
        again = collected(engine, world.rank, world.size)  # forwards are whole ones again
        assert torch.equal(again.logits, whole.logits), name


@case(worlds=(1, 3))
def ranks_agree_on_what_logits_are_multiplied_by(world: World) -> None:
    """One of three has no label that could tell it."""
    batch = examples()
    if world.rank == 1:
        batch["labels"][:] = -100
    for wrap in (lambda model: model, lambda model: zero3.wrap(model, ZERO3)):
        engine = engine_of(wrap(granite()))
        layer, held = engine.output_layer.layer, torch.zeros(EXAMPLES, dtype=torch.bool)
        assert layer is not None
        states = collect(engine.objective, layer, [(batch, held)], WORDS)
        assert states.multiplier == 1 / DIVISOR
        assert len(states.hidden) == (0 if world.rank == 1 else EXAMPLES)


def fitted_to_tokens(engine: tezo_ds.Engine, rank: int, size: int) -> tuple[TokenStates, Fitted]:
    """Fits a term of rank 5 for a language-model loss to the examples of all ranks, and gives it to the
    engine."""
    batch, held = make_batch(EXAMPLES), torch.arange(EXAMPLES) % FOLD == FOLD - 1
    words = batch["labels"][batch["labels"] >= 0].unique()
    layer = engine.output_layer.layer
    assert layer is not None
    batches = [(part_of(batch, rank, size), held.tensor_split(size)[rank])]
    with engine.applied(), engine.output_layer.off():
        states = collect_tokens(engine.objective, layer, batches, words)
    found = fit_tokens(states, 5, engine.sharding.all_reduce)
    assert found.basis is not None
    engine.output_layer.load(term_of(words, found))
    return states, found


def with_all_tokens(model: nn.Module) -> tezo_ds.Engine:
    engine = engine_of(model)
    engine.objective.choices = None
    return engine


@once
def of_one_process_over_all_tokens(tied: bool) -> tuple[Tensor, Fitted, tezo_ds.StepReport]:
    """Returns the output layer's rows, the term that one process finds, and its next step."""
    alone = with_all_tokens(tiny("llama", tied))
    states, found = fitted_to_tokens(alone, 0, 1)
    return states.rows, found, alone.step(make_batch(7))


@case(worlds=(2, 3))
def every_sharding_finds_the_term_over_all_tokens(world: World) -> None:
    for tied in (True, False):
        rows, expected, theirs = of_one_process_over_all_tokens(tied)
        assert expected.basis is not None and float(expected.bias.abs().max()) > 1e-2
        assert float((expected.weight @ expected.basis).abs().max()) > 1e-3
        for name, make in ways().items():
            engine = with_all_tokens(make(tied))
            own, found = fitted_to_tokens(engine, world.rank, world.size)
            torch.testing.assert_close(own.rows, rows, rtol=1e-4, atol=1e-5, msg=name)
            assert found.basis is not None and found.strength == pytest.approx(expected.strength)
            for part in (found.weight, found.bias, found.basis):
                assert_equal_on_all_ranks(part)
            wholes = found.weight @ found.basis, expected.weight @ expected.basis
            torch.testing.assert_close(*wholes, rtol=1e-2, atol=1e-3, msg=name)
            engine.check()
            share = part_of(make_batch(7), world.rank, world.size)
            ours = engine.step(share)
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-3), name
            assert ours.kappa == pytest.approx(theirs.kappa, rel=2e-2, abs=1e-2), name


@case(worlds=(2,))
def a_fit_over_all_tokens_sends_what_it_says(world: World) -> None:
    engine = with_all_tokens(tiny())
    states, _ = fitted_to_tokens(engine, world.rank, world.size)
    with Traffic() as traffic:
        found = fit_tokens(states, 5, engine.sharding.all_reduce)
    assert len(traffic.calls) == found.messages
    largest = max(call.nbytes for call in traffic.calls)
    assert largest == found.message_bytes == 8 * len(states.rows) * 6
    config = TezoConfig(output_layer="fit", output_layer_rank=5)
    planned = fit_of(tiny(), config, world.size, EXAMPLES, 8, None, 0)
    assert planned is not None
    assert planned.words >= len(states.rows) and planned.message >= largest


@case(worlds=(2, 3), bits=True)
def shardings_find_the_same_bits_from_the_same_states(world: World) -> None:
    found = [fitted(engine_of(make(False)), world.rank, world.size)[1] for make in ways().values()]
    for other in found[1:]:
        assert torch.equal(other.weight, found[0].weight) and torch.equal(other.bias, found[0].bias)


@case(worlds=(2,))
def a_fit_sends_what_it_says_and_steps_send_nothing_more(world: World) -> None:
    engine = engine_of(tiny())
    states, _ = fitted(engine, world.rank, world.size)
    with Traffic() as traffic:
        found = fit(states, False, engine.sharding.all_reduce)
    assert len(traffic.calls) == found.messages
    assert max(call.nbytes for call in traffic.calls) == found.message_bytes == 8 * 3 * 23
    batch = part_of(examples(), world.rank, world.size)
    sent = []
    for loaded in (engine.output_layer.state, {}):
        engine.output_layer.load(loaded)
        engine.step(batch)
        with Traffic() as traffic:
            engine.step(batch)
        sent.append([(call.op, call.nbytes) for call in traffic.calls])
    assert sent[0] == sent[1]


@case(worlds=(2, 3))
def a_term_that_differs_stops_all_ranks(world: World) -> None:
    engine = engine_of(tiny())
    fitted(engine, world.rank, world.size)
    term = engine.output_layer.state
    if world.rank == 1:
        term[BIAS] = term[BIAS] + 1e-7
    engine.output_layer.load(term)
    with pytest.raises(ShardingError, match=f"{BIAS} of the label words on rank "):
        engine.check()


@case(worlds=(4,))
def tensor_parallelism_is_refused(world: World) -> None:
    model, _ = next(way for way in WAYS if way.share > 1).model(world)
    engine = tezo_ds.initialize(model, FIELDS)
    with pytest.raises(ConfigError, match="output_layer: tensor parallelism splits"):
        engine.output_layer.refuse_unfit()


@contextmanager
def roughly() -> Iterator[None]:
    """Context manager: a fit ends early, where its bits count and not what it finds."""
    with (
        mock.patch.object(problem, "GRID", problem.GRID[2:4]),
        mock.patch.object(fitting, "EXACTLY", fitting.ROUGHLY),
    ):
        yield


@case(worlds=(2,), bits=True)
def runs_resume_and_are_evaluated_as_they_were_trained(world: World) -> None:
    """Runs by the command line under FSDP2 and ZeRO-3: the same numbers, resumed and in one process."""
    given, config = world_fsdp_runs.given_to(world), world.folder / "zero3.json"
    if world.rank == 0:
        config.write_text(json.dumps({**ZERO3, "tezo": {}}))
    dist.barrier()
    options = {"output_layer": "fit", "objective": "choices", "output_layer_every": 4}
    words = {"fsdp": ["--fsdp"], "zero3": ["--deepspeed", str(config)]}
    runs = {}
    for name, switches in words.items():
        for steps in ((2, 4), (4,)):
            folder = world.folder / f"output-layer-{name}-{len(steps)}"
            for until in steps:
                arguments = given.train(folder, steps=until, **options)
                with roughly():
                    out = world_fsdp_runs.call(*arguments, *switches)
            if world.rank == 0:
                assert "messages of" in out and "output layer: fit to 22 examples" in out
            runs[name, len(steps)] = Run(folder)
    if world.rank == 0:
        for name in words:
            whole, resumed = runs[name, 1], runs[name, 2]
            for done in (0, 4):
                one, other = (load(path_of(run.path, done))[0] for run in (whole, resumed))
                assert all(torch.equal(one[key], other[key]) for key in one), (name, done)
            assert whole.summary["accuracy_after"] == resumed.summary["accuracy_after"]
    dist.barrier()
    for name, switches in words.items():
        after = runs[name, 1].summary["accuracy_after"]
        for how in ([], switches):
            out = world_fsdp_runs.call("evaluate", "--run", runs[name, 1].path, *how)
            if world.rank == 0:
                assert json.loads(out)["accuracy"] == after, (name, how)
        adapter = world.folder / f"adapter-{name}"
        words_of = flags({"run": runs[name, 1].path, "adapter": adapter})
        world_fsdp_runs.call("export", *words_of)
        assert (adapter / "generation_config.json").exists()
