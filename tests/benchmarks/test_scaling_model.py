"""The model of scaling: its limits, its fit to rows whose constants are known, and its page."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import scaling_model
from parts.scaling.report import save
from parts.scaling_model.calibration import calibration
from parts.scaling_model.fit import FORMS, RING, Fit, fit, left_out, terms, typical, usable
from parts.scaling_model.points import (
    OURS,
    Point,
    efficiency,
    hybrid,
    job_at,
    limit,
    line_of,
    points,
)
from parts.scaling_model.report import MARKERS
from scaling_rows import row
from transformers import OPTConfig

from tezo_ds.plan import timing, traffic
from tezo_ds.plan.columns import columns
from tezo_ds.plan.dry_run import Counted
from tezo_ds.plan.hardware import GPUS
from tezo_ds.plan.shapes import skeleton

NVLINK = GPUS["h100-80g"].nvlink
TREE, ONE, OWN = FORMS[1:]


def given(*words: str) -> argparse.Namespace:
    """Parses arguments of 1, 2 and 8 nodes."""
    return scaling_model.checked(["--worlds", "8", "16", "64", *words])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Makes a folder with the shapes of OPT-13B, but of three blocks."""
    folder = tmp_path_factory.mktemp("opt")
    OPTConfig(
        vocab_size=50272, hidden_size=5120, word_embed_proj_dim=5120, ffn_dim=20480, num_hidden_layers=3,
        num_attention_heads=40,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.fixture(scope="module")
def found(model: str) -> list[Point]:
    """Models every way of sharding on 1, 2 and 8 nodes."""
    return points(model, given())


def gathers(ranks: int, **more: Any) -> dict[str, Any]:
    """Makes a row of one world on one machine, each rank with a processor of its own."""
    return row(gather_ranks=ranks, world=ranks, workers=ranks, **more)


def made(form: Any, alpha: float, beta: float, noise: float = 0.0) -> list[dict[str, Any]]:
    """Makes rows of a machine of four processors whose hop takes alpha and whose byte takes beta."""
    draw, rows = random.Random(0), []
    true = Fit(form, np.array([alpha, 0, beta, 0]))
    for sharding, calls in (("fsdp2", 31), ("zero3", 272)):
        for world in (2, 3, 4, 8):
            for times, probe in ((1, "fused"), (2, "inplace")):
                record = row(
                    sharding=sharding, probe=probe, world=world, workers=min(4, world), gather_ranks=world,
                    gather_calls=times * calls, gather_bytes=times * 6_000_000,
                )  # fmt: skip
                seconds = true.seconds(record) * (1 + draw.uniform(-noise, noise))
                rows.append({**record, "gathers_alone_s": seconds})
    return rows


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_seconds_of_a_gather(form: Any) -> None:
    """A gather takes no time on one rank, n / B for many bytes, and never less on more ranks."""
    model = Fit(form, np.array([50e-6, 900e-6, 1 / 2e9, 1 / 1e8]))
    assert model.seconds(gathers(1)) == 0
    wide = replace(model, constants=np.array([0, 0, 1 / 2e9, 0]))
    assert wide.seconds(gathers(1000, gather_bytes=10**10)) == pytest.approx(10**10 / 2e9, rel=2e-3)
    by_ranks = [model.seconds(gathers(n)) for n in range(1, 65)]
    assert by_ranks == sorted(by_ranks) and by_ranks[1] > 0
    crossing = model.seconds(gathers(8, nodes=2))
    assert crossing > model.seconds(gathers(8)) and crossing == pytest.approx(
        terms(gathers(8, nodes=2), form) @ model.constants
    )


def test_processors_that_are_shared_take_turns() -> None:
    own, shared = gathers(4), {**gathers(4), "workers": 2}
    assert terms(shared, RING) == pytest.approx(2 * terms(own, RING))
    assert terms(shared, OWN) == pytest.approx(terms(own, OWN))
    half = {**gathers(4), "gather_ranks": 2, "nodes": 2}  # hybrid: a copy on each machine
    assert list(terms(half, RING)) == [3, 0, 200, 0]


def test_the_form_is_the_planners(model: str) -> None:
    """Measurements are fitted to the form by which the planner models steps, but for `BASE` a collective."""
    args, module = given(), skeleton(model, "bfloat16")
    for world in (8, 64):
        job = replace(job_at(module, args, world, 400), sharding="fsdp2")
        moved = traffic.engine(job)
        calls = moved.times * (job.shape.layers + 1)
        record = gathers(
            world, nodes=job.cluster.nodes, gather_calls=calls, gather_bytes=moved.gathered
        )
        cluster = job.cluster
        stated = [cluster.latency_inside, cluster.latency_between, 1 / NVLINK, 1 / cluster.link]
        alone = terms(record, RING) @ np.array(stated) + calls * timing.BASE
        assert timing.engine(job, moved, True).gather == pytest.approx(alone)


def test_constants_are_found_again_in_noise() -> None:
    rows = made(RING, 50e-6, 1 / 2e9, noise=0.03)
    constants = fit(rows, RING).constants
    assert constants[[0, 2]] == pytest.approx([50e-6, 1 / 2e9], rel=0.03)
    assert not constants[[1, 3]].any(), "nothing went between machines"
    errors = [each.error for each in left_out(rows, RING)]
    assert len(errors) == len(rows) and max(map(abs, errors)) < 0.06


def test_a_wrong_form_shows() -> None:
    rows = made(RING, 50e-6, 1 / 2e9, noise=0.03)
    right = typical(fit(rows, RING).errors(rows))
    for wrong in (TREE, ONE, OWN):
        assert typical(fit(rows, wrong).errors(rows)) > 4 * right
        assert typical([each.error for each in left_out(rows, wrong)]) > 4 * right
    assert "No other form predicts" in calibration(rows)
    assert f"**{TREE.name}** predicts" in calibration(made(TREE, 50e-6, 1 / 2e9, noise=0.03))


def test_no_constant_is_below_zero() -> None:
    rows = made(RING, 0.0, 1 / 2e9)
    for record in rows:  # the more gathers, the quicker: a plain fit has α below 0
        record["gathers_alone_s"] *= 0.8 if record["sharding"] == "zero3" else 1.0
    constants = fit(rows, RING).constants
    assert constants[0] == 0 and constants[2] == pytest.approx(1 / 2e9, rel=0.3)


def test_rows_that_tell_too_little() -> None:
    twice = [r for r in made(RING, 5e-5, 1e-9) if r["world"] == 2 and r["sharding"] == "fsdp2"]
    with pytest.raises(ValueError, match="2 rows with gathers do not tell hops from bytes"):
        fit(twice, RING)
    assert usable([row(), gathers(2)]) == [gathers(2)]
    with pytest.raises(ValueError, match="no row has gathers between ranks"):
        calibration([row()])
    two = [r for r in made(RING, 5e-5, 1e-9) if r["world"] == 2]
    assert left_out(two, RING) == [] and "Nothing could be left out" in calibration(two)


def test_a_step_is_what_overlap_leaves(found: list[Point]) -> None:
    for point in found:
        spent = point.timing
        beside = max(spent.compute, spent.gather - spent.exposed)
        assert spent.step == pytest.approx(spent.exposed + beside + spent.update + spent.scalars)
        assert point.waits == (beside > spent.compute)


def test_a_hybrid_is_the_planners_and_never_slower(model: str, found: list[Point]) -> None:
    zero3, plain, mixed = (line_of(found, model, 400, way) for way in OURS)
    assert [p.group for p in plain] == [8, 16, 64] and [p.group for p in mixed] == [8, 8, 8]
    job = replace(job_at(skeleton(model, "bfloat16"), given(), 64, 400), sharding="fsdp2-hybrid")
    column = columns(job)[0]
    assert mixed[-1].timing == column.timing and mixed[-1].column.memory == column.memory
    assert mixed[-1].directions == 64 and mixed[-1].tokens == pytest.approx(column.tokens)
    for copies, one in zip(mixed, plain, strict=True):
        assert copies.fits and one.fits and copies.timing.step <= one.timing.step
    for line in (zero3, plain, mixed):
        steps = [p.timing.step for p in line]
        assert steps == sorted(steps)
    assert mixed[-1].timing.step < zero3[-1].timing.step / 2
    assert efficiency(plain[0], plain) == 1 and efficiency(plain[-1], plain) < 0.5


def test_a_copy_is_on_as_few_nodes_as_hold_it(model: str, found: list[Point]) -> None:
    plain = {p.world: p for p in line_of(found, model, 100, "FSDP2")}
    plain[8] = replace(plain[8], fits=False)
    point = hybrid(plain, 64)
    assert (point.group, point.world, point.directions, point.fits) == (16, 64, 64, True)
    assert point.timing.gather == plain[16].timing.gather
    assert point.timing.scalars == plain[64].timing.scalars > plain[16].timing.scalars
    assert not hybrid({8: plain[8]}, 8).fits


def test_what_would_hide_gathers_does(model: str, found: list[Point]) -> None:
    end = limit(line_of(found, model, 400, "FSDP2"), NVLINK)
    assert (end.fits, end.waits) == (8, 16) and end.gbit is not None

    def waits(*words: str) -> bool:
        return line_of(points(model, given(*words)), model, *at)[-1].waits

    at: tuple[float, str] = (400, "FSDP2")
    assert not waits("--gbit", "400", "--examples", str(end.examples))
    assert waits("--gbit", "400", "--examples", str(end.examples - 1))
    for share, expected in ((1.01, False), (0.99, True)):
        at = (share * end.gbit, "FSDP2")
        assert waits("--gbit", str(at[0])) is expected
    inside = limit(line_of(found, model, 400, "hybrid"), NVLINK)
    assert inside.waits is None and inside.gbit is None
    assert limit(line_of(found, model, 400, "FSDP2"), 1e9).gbit is None, "NVLink would be slower"


def stretched(point: Point, world: int, compute: float) -> Point:
    """Stretches a step to a world of ranks, with hops of 1 ms a rank in gathers and 0.1 ms in scalars."""
    hops = 1e-3 * world
    spent = replace(
        point.timing, compute=compute, gather=1 + hops, exposed=0.0, scalars=1e-4 * world
    )
    return replace(point, world=world, timing=spent, latency=hops)


@pytest.mark.parametrize("compute", [0.1, 30.0])
def test_half_of_the_most_tokens(found: list[Point], compute: float) -> None:
    end = limit([stretched(found[0], world, compute) for world in (8, 16)], NVLINK)
    assert stretched(found[0], round(end.half), compute).tokens / end.ceiling == pytest.approx(
        0.5, rel=0.01
    )
    assert stretched(found[0], 10**8, compute).tokens / end.ceiling == pytest.approx(1, rel=0.01)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "scaling.md"
    path.write_text(f"before\n{MARKERS[0]}\noutdated\n{MARKERS[1]}\nafter\n")
    yield path
    assert path.read_text().startswith("before\n") and path.read_text().endswith("\nafter\n")


def test_the_page(page: Path, model: str) -> None:
    csv = page.with_name("rows.csv")
    save(csv, [], made(RING, 50e-6, 1 / 2e9))
    words = ["--models", model, "--worlds", "8", "16", "--no-count", "--page", str(page)]
    scaling_model.main([*words, "--calibrate", str(csv)])
    text = page.read_text()
    assert "outdated" not in text and "Not calibrated" not in text
    assert f"| {RING.name} | 50 µs | – | 2 | – | 0 % | 0 % | 0 % | 0 % |" in text
    assert "Hops leave half" in text and f"| {model} | any | hybrid | 8 |" in text
    for label in ("measured", "counted", "modelled"):
        assert label in text
    for stem in ("step", "tokens"):
        assert page.with_name(f"scaling-model-{stem}.png").stat().st_size > 5000
    save(csv, [], [row()])
    with pytest.raises(SystemExit, match=r"error: no row has gathers"):
        scaling_model.main([*words, "--calibrate", str(csv)])


def test_late_layers_alone(page: Path, model: str, found: list[Point]) -> None:
    late, cached = (
        points(model, given("--include", "last:1", *more)) for more in ((), ("--cached",))
    )
    block = 2 * (12 * 5120**2 + 13 * 5120)  # bytes; the tied embedding is gathered all the same
    for way in OURS:
        all_, shared, last = (line_of(p, model, 400, way) for p in (found, late, cached))
        for a, b, c in zip(all_, shared, last, strict=True):
            assert a.column.traffic.total == b.column.traffic.total
            saved = b.column.traffic.total - c.column.traffic.total
            assert saved == pytest.approx(2 * block, rel=1e-3)
            assert c.timing.compute < b.timing.compute < a.timing.compute
    for way in ("MeZO in place", "Adam"):
        steps = [[p.timing for p in line_of(each, model, 400, way)] for each in (found, cached)]
        assert steps[0] == steps[1]
    words = ["--models", model, "--worlds", "8", "16", "--no-count", "--page", str(page)]
    scaling_model.main([*words, "--include", "last:1", "--cached"])
    assert "trains last:1, with the layers before cached" in page.read_text()
    with pytest.raises(SystemExit, match="'last:4': the model has 3 layers"):
        scaling_model.main([*words, "--include", "last:4"])


def test_a_model_that_is_not_known() -> None:
    with pytest.raises(SystemExit, match=r"scaling_model: error: --model gpt-5: no such folder"):
        scaling_model.main(["--models", "gpt-5"])


def test_dry_runs_and_no_measurements(model: str, found: list[Point]) -> None:
    args = given("--models", model)
    with mock.patch("scaling_model.count", return_value=Counted(4, 5, 6, 7)) as counts:
        text = scaling_model.page(args, found)
    jobs = [call.args[0] for call in counts.call_args_list]
    assert [(job.sharding, job.cluster.world) for job in jobs] == [
        ("zero3", 64), ("fsdp2-hybrid", 64),
    ]  # fmt: skip
    assert f"| {model} on 64 GPUs, fsdp2-hybrid | all-gathers | 4 | 4 | yes |" in text
    assert f"| bytes of scalars | {64 * 2 * 16 + 8:,} | 6 | **no** |" in text
    assert "**Not calibrated.**" in text


@pytest.mark.parametrize("worlds", [["8"], ["8", "12"]])
def test_worlds_are_whole_nodes(worlds: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scaling_model.checked(["--worlds", *worlds])
    assert "each of whole nodes of 8 GPUs" in capsys.readouterr().err
