"""The benchmark of peers: its loops move along what they measured, its runs resume, its page is written."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from parts.methods.report import Record, Results
from parts.peers.loops import EggrollLoop, LozoLoop, MezoLoop, chosen
from parts.peers.measure import pace
from parts.peers.report import MARKERS, report, rows
from parts.peers.ways import ALL, VALUES, WAYS, Started, merged_lora
from peft import LoraConfig, get_peft_model
from rich.console import Console
from tiny import make_batch, tiny
from torch import Tensor, nn

from tezo_ds.methods import reference

STEPS, RHO, LR = 7, 1e-3, 1e-3
RANK, NU = 3, 3
KINDS: dict[str, Callable[..., MezoLoop]] = {
    "mezo": MezoLoop,
    "lozo": lambda *args: LozoLoop(*args, rank=RANK, nu=NU),
}


def loss_of(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    def loss(batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = model(**batch).loss
        return found

    return loss


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def drawn(kind: str, parameters: dict[str, nn.Parameter], seed: int) -> dict[tuple[str, int], Any]:
    """Draws Z, or U and V, of each name and step from torch's generator, in the order in which a loop
    draws."""
    seeds, found, rights = random.Random(seed), {}, {}
    for step in range(STEPS):
        if kind == "lozo" and step % NU == 0:
            torch.manual_seed(seeds.randrange(10**9))
            for name, p in parameters.items():
                if p.dim() > 1:
                    rights[name] = torch.randn(p.shape[1], RANK, dtype=p.dtype)
        torch.manual_seed(seeds.randrange(10**9))
        for name, p in parameters.items():
            if name in rights:
                found[name, step] = torch.randn(p.shape[0], RANK, dtype=p.dtype), rights[name]
            else:
                found[name, step] = torch.randn(p.shape, dtype=p.dtype)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_is_the_algorithm_with_torchs_normals(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop takes the steps of the oracle in `reference`, which is given the normals that the loop draws;
    vectors train, too. Seven steps see V change twice."""
    model = tiny("opt").double()
    parameters = dict(chosen(model, ["*fc1*", "*v_proj*"]))
    assert {p.dim() for p in parameters.values()} == {1, 2}
    normals = drawn(kind, parameters, seed=5)
    copy = tiny("opt").double()

    @torch.no_grad()
    def oracle_loss(step: int, weights: dict[str, Tensor]) -> float:
        found = torch.func.functional_call(copy, weights, kwargs=make_batch(3, seed=step))
        return float(found.loss)

    def right(name: str, shape: Any, rank: int, period: int) -> tuple[None, Tensor]:
        return None, normals[name, min(period * NU, STEPS - 1)][1]

    monkeypatch.setattr(reference, "dense", lambda name, seed, step, *_: normals[name, step])
    monkeypatch.setattr(reference, "tau", lambda name, n, seed, step, q: normals[name, step])
    monkeypatch.setattr(
        reference, "fresh_left", lambda name, r, seed, step, *_: normals[name, step][0]
    )
    monkeypatch.setattr(reference, "factors", right)
    more = {"rank": RANK, "nu": NU} if kind == "lozo" else {}
    expected = list(reference.run(kind, parameters, oracle_loss, STEPS, LR, RHO, **more))
    before = weights_of(model)
    loop = KINDS[kind](list(parameters.values()), loss_of(model), LR, RHO, 5)
    for record in expected:
        kappa = loop.step(make_batch(3, seed=record.step))
        assert kappa == pytest.approx(record.kappas[0], rel=1e-6)
        for name, parameter in parameters.items():
            moved = (record.weights[name] - before[name]).norm()
            away = (parameter.detach() - record.weights[name]).norm()
            assert away < 1e-6 * moved, (name, record.step)
    others = before.keys() - parameters.keys()
    assert all(torch.equal(before[name], model.get_parameter(name)) for name in others)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_restores_the_weights_up_to_rounding(kind: str) -> None:
    model = tiny()
    before = weights_of(model)
    loop = KINDS[kind](list(model.parameters()), loss_of(model), 0.0, RHO, 5)
    kappas = [loop.step(make_batch(3, seed=step)) for step in range(3)]
    assert len(set(kappas)) == 3 and all(kappas)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, before[name], rtol=0, atol=1e-6), name


class ReleasedLozo(LozoLoop):
    """A LOZO loop that draws V within the walks that perturb, as the authors' trainer does."""

    def _begin(self, step: int) -> None:
        self._renews, self._walks = step % self._nu == 0, 0

    def _walk(self, seed: int, scale: float) -> None:
        self._walks += 1
        super()._walk(seed, scale)

    def _direction(self, index: int, parameter: nn.Parameter) -> Tensor:
        if self._renews and self._walks < 4:
            right = torch.randn(parameter.shape[1], self._rank, dtype=parameter.dtype)
            self._rights[index] = right
        return super()._direction(index, parameter)


@pytest.mark.parametrize("kind", [LozoLoop, ReleasedLozo])
def test_lozo_on_a_linear_loss_moves_by_the_slope_that_it_measured(kind: type[LozoLoop]) -> None:
    """⟨G, Δ⟩ = -ηκ² at every step; where V is drawn within a walk, only at steps without a new V."""
    weight, gradient = nn.Parameter(torch.zeros(7, 5).double()), torch.randn(7, 5).double()
    loop = kind([weight], lambda _: (weight * gradient).sum(), LR, RHO, 0, rank=2, nu=2)
    for step in range(5):
        before = weight.detach().clone()
        kappa = loop.step({})
        moved = ((weight.detach() - before) * gradient).sum().item()
        right = moved == pytest.approx(-LR * kappa**2, rel=1e-6)
        assert right == (kind is LozoLoop or step % 2 == 1), step


def test_lora_is_judged_by_the_weights_that_it_stands_for() -> None:
    model = tiny()
    layers = LoraConfig(r=3, lora_alpha=6, target_modules=["v_proj"], init_lora_weights=False)
    get_peft_model(model, layers)
    layer = model.get_submodule("model.layers.1.self_attn.v_proj")
    x = torch.randn(4, 22)
    with torch.no_grad():
        expected, plain = layer(x), x @ layer.get_base_layer().weight.T
        assert torch.allclose(x @ merged_lora(layer).T, expected, atol=1e-6)
        assert not torch.allclose(plain, expected, atol=1e-2)


def test_eggroll_es_moves_what_is_targeted() -> None:
    pytest.importorskip("eggroll", reason="eggroll-es is of the extras group bench")
    model = tiny()
    before = weights_of(model)
    EggrollLoop(model, "v_proj", loss_of(model), 0.1, 0).evolve([make_batch(2), make_batch(2, 1)])
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, _ in chosen(model, VALUES)}


class Counted(Started):
    """A way that takes 3 s for a plain forward and 6 s for a step, by a clock that nothing else moves."""

    def __init__(self) -> None:
        self.now, self.seen = 0.0, []

    def plain(self, batches: Sequence[Any]) -> None:
        self.now += 3 * len(batches)

    def train(self, batches: Sequence[Any]) -> None:
        self.now += 6 * len(batches)
        self.seen.append(len(batches))

    def changed(self) -> Any:
        yield from ()


def test_a_pace_leaves_the_first_of_each_turn_out(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Counted()
    job: Any = type("Job", (), {"batch": lambda self, step, rank: {}})()
    monkeypatch.setattr("parts.peers.measure.time.perf_counter", lambda: started.now)
    monkeypatch.setattr("parts.peers.measure.gathered", lambda seconds: [seconds, seconds / 2])
    found = pace(started, job, 0)
    assert (found["plain_seconds"], found["step_seconds"], found["ratio"]) == (3, 6, 2)
    assert started.seen == [1, 2] * 3


def made_up(key: Record) -> Record:
    """Makes up the record of a run."""
    if key["way"] == "no training":
        return {**key, "accuracy": 0.24, "loss": 1.9, "n": 200, "machine": "made up"}
    found = {**key, "peak_bytes": 280_000_000 * key["copies"], "machine": "made up"}
    if key["way"] == "inference":
        return found
    found |= {"peak_bytes": 560_000_000, "step_seconds": 0.5, "plain_seconds": 0.4, "ratio": 1.25}
    found["ratio_range"] = [1.2, 1.3]
    if key["budget"]:
        found |= {"steps": 120, "seconds": 61.0, "accuracy": 0.5, "loss": None, "n": 200}
    return found


def test_finished_runs_are_not_wanted_again_and_are_reported(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", Results(tmp_path / "results.jsonl")
    page.write_text(f"by hand\n{MARKERS[0]}\n{MARKERS[1]}\n")
    quiet = Console(quiet=True)
    args = peers.checked(["--report", "--lr", "MeZO loop=1e-4"], quiet)
    benchmark = peers.Peers(args, results)
    wanted = list(benchmark.wanted(WAYS))
    assert benchmark.left() == wanted
    named = [(key["way"], tuple(key["include"])) for key in wanted if key["way"] in WAYS]
    assert sorted(named) == sorted((name, i) for name, way in WAYS.items() for i in way.includes)
    assert [bool(key["budget"]) for key in wanted if key["way"] == "tezo"] == [True, False]
    for key in wanted[:-1]:
        results.add(made_up(key))
    assert peers.Peers(args, Results(tmp_path / "results.jsonl")).left() == wanted[-1:]
    one = peers.Peers(
        peers.checked(["--report", "--only", "tezo", "--lr", "MeZO loop=1e-4"], quiet), results
    )
    assert one.left() == [] and one.finished() == benchmark.finished(), "the page keeps the others"
    report(benchmark.finished(), page, quiet)
    text = page.read_text()
    assert text.startswith("by hand") and "not finite" in text and "24.0 %" in text
    mezo = next(line for line in text.splitlines() if line.startswith("| MeZO loop | value"))
    assert "| 0.0001 | 120 | 61 | 50.0 |" in mezo
    cost = next(line for line in text.splitlines() if line.startswith("| MeZO loop | 1"))
    assert "| 2 forwards of 8 | 0.50 | 1.25 |" in cost and "| 560 | 280 | +280 | 2.00 |" in cost
    lines = rows(benchmark.finished())
    tezo = next(line for line in lines if line["way"] == "tezo, ZeRO-3")
    assert tezo["plain_bytes"] == 560_000_000 and tezo["include"] == VALUES[0]
    csv = (tmp_path / "page.csv").read_text().splitlines()
    assert len(csv) == 1 + len(lines) and (tmp_path / "page.png").stat().st_size > 1000
    other = peers.Peers(peers.checked(["--report", "--lr", "MeZO loop=2e-4"], quiet), results)
    assert [k["way"] for k in other.left() if k["include"] != [ALL[0]]] == ["MeZO loop"]


@pytest.mark.parametrize("rate", ["MeZO=1", "MeZO loop", "tezo=fast"])
def test_a_rate_of_nobody_is_refused(rate: str) -> None:
    with pytest.raises(SystemExit):
        peers.checked(["--report", "--lr", rate], Console(quiet=True))
