"""Steps of tezo-gn: those of the oracle, replayed without a forward, and refusals."""

from __future__ import annotations

import pytest
import torch
from gauss_newton_oracle import run
from inner_states import WORDS, one_label
from once import once
from tiny import HEADS, SIZES, make_batch, tiny
from torch import Tensor
from torch.nn import functional as F
from transformers import GraniteConfig, GraniteForCausalLM

import tezo_ds
from tezo_ds.errors import ConfigError
from tezo_ds.output_layer.term import BIAS, TOKENS, WEIGHT

FIELDS = {"method": "tezo-gn", "rank": 3, "seed": 7, "rho": 1e-2, "queries": 4, "damping": 0.2}
STEPS = 6
CHOICES = torch.arange(5, 61)  # all that occur


def batch_of(step: int) -> dict[str, Tensor]:
    return make_batch(7, seed=step)


@once
def expected(recall: bool = True, choices: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the oracle's weights after STEPS of a model in float64, and the biases of so many choices."""
    model = tiny("llama", tied=False).double()

    def logits(step: int, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        batch = batch_of(step)
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        found = torch.func.functional_call(model, weights, (), inputs).logits[:, :-1].flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        found, labels = found[labels != -100], labels[labels != -100]
        return (found[:, CHOICES], labels - CHOICES[0]) if choices else (found, labels)

    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    with torch.no_grad():
        scales = (0.25, 0.5, 1.0)
        *_, last = run(weights, logits, STEPS, 4, 3, 7, 1e-2, 0.2, scales, recall, choices)
    return last


def assert_the_oracles(
    found: dict[str, Tensor], close: float = 1e-5, recall: bool = True, choices: int = 0
) -> None:
    before = tiny("llama", tied=False).double().state_dict()
    for name, weight in expected(recall, choices)[0].items():
        change, theirs = found[name] - before[name], weight - before[name]
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(change, theirs, rtol=0, atol=close * float(theirs.abs().max()))


def started(**fields: object) -> tezo_ds.Engine:
    return tezo_ds.initialize(tiny("llama", tied=False).double(), {**FIELDS, **fields})


@pytest.mark.parametrize(("micro_batch", "recall"), [(0, True), (3, True), (0, False)])
def test_steps_are_the_oracles(micro_batch: int, recall: bool) -> None:
    engine = started(micro_batch=micro_batch, recall=recall)
    reports = [engine.step(batch_of(step)) for step in range(STEPS)]
    assert_the_oracles(engine.state_dict(), recall=recall)
    assert {len(report.kappa) for report in reports} == {4, 4 + recall}
    # Replayed by what was solved for, to the bit.
    again = started(recall=recall)
    for report in reports:
        again.replay(report.step, report.kappa, report.lr, report.rho, report.solved)
    assert all(torch.equal(again.state()[k], part) for k, part in engine.state().items())
    with pytest.raises(ConfigError, match="disagree on solved"):
        again.replay(STEPS, [1.0] * 4, 1.0, 1e-2)
    with pytest.raises(ConfigError, match="3 numbers were solved for, and a step of this run has"):
        again.replay(STEPS, [1.0] * 4, 1.0, 1e-2, [1.0] * 3)


def with_biases(engine: tezo_ds.Engine, choices: Tensor = CHOICES) -> tezo_ds.Engine:
    """Gives an engine choices, whose words have biases of 0."""
    engine.objective.choices = choices
    zeros = {WEIGHT: torch.zeros(len(choices), 22), BIAS: torch.zeros(len(choices))}
    engine.output_layer.load({TOKENS: choices, **zeros})
    return engine


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_biases_of_words_are_columns_of_the_solve(micro_batch: int) -> None:
    engine = with_biases(started(micro_batch=micro_batch))
    reports = [engine.step(batch_of(step)) for step in range(STEPS)]
    weights = {name: p for name, p in merged_weights(engine).items()}
    assert_the_oracles(weights, 1e-4, choices=len(CHOICES))  # biases are float32
    _, biases = expected(True, len(CHOICES))
    assert biases.abs().max() > 0.1
    torch.testing.assert_close(engine.output_layer.state[BIAS].double(), biases, rtol=0, atol=1e-5)
    again = with_biases(started())
    for report in reports:
        again.replay(report.step, report.kappa, report.lr, report.rho, report.solved)
    assert all(torch.equal(again.state()[k], part) for k, part in engine.state().items())


def merged_weights(engine: tezo_ds.Engine) -> dict[str, Tensor]:
    """Returns the body's weights with what was learnt, without the term of the output layer."""
    term = engine.output_layer.state
    engine.output_layer.load({})
    merged = engine.state_dict()
    engine.output_layer.load(term)
    return merged


def test_one_sided_differences_and_choices_go_down() -> None:
    for difference in ("central", "forward"):
        engine = tezo_ds.initialize(tiny("llama"), {**FIELDS, "difference": difference})
        engine.objective.choices = CHOICES
        batch = make_batch(16)
        before = engine.loss(batch)
        for _ in range(8):
            engine.step(batch)
        assert engine.loss(batch) < before - 0.01


def test_late_layers_step_alike_with_and_without_their_trunk() -> None:
    found = []
    for shared in (True, False):
        fields = {**FIELDS, "include": ("last:1",), "shared_trunk": shared}
        engine = tezo_ds.initialize(tiny("llama").double(), fields)
        for step in range(3):
            engine.step(make_batch(200, seed=step))
        found.append(engine.method.coefficients)
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)


def test_a_model_that_is_wrong_and_sure_of_it_does_not_stand_still() -> None:
    """At scales of the solve's own order its loss, which hardly curves, overshoots."""
    engine, batch = with_biases(started(), WORDS), one_label(200)
    engine.output_layer.move_biases(torch.tensor([5.0, -5.0, 0.0]))
    losses = [engine.step(batch).loss for _ in range(STEPS)]
    assert losses[0] > 3 and losses[-1] < 2


def test_the_first_step_of_a_model_that_changes_its_logits_counts_none_twice() -> None:
    """Results of its output layer are seen before it shows that they are not its logits."""
    found = []
    for known in (False, True):
        torch.manual_seed(0)
        config = GraniteConfig(
            **{**SIZES, "hidden_size": 24}, **HEADS, intermediate_size=37, logits_scaling=0.25,
            initializer_range=0.1,
        )  # fmt: skip
        engine = tezo_ds.initialize(GraniteForCausalLM(config).double().eval(), FIELDS)
        if known:
            engine.loss(make_batch(200))
        assert any(engine.step(make_batch(200)).solved)
        found.append(engine.method.coefficients)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=0)


def test_what_it_cannot_do_is_refused() -> None:
    for field, value in {
        "probe": "inplace", "placement": "per_rank", "branch_chunk": 2, "memory_budget": 1.0,
        "clip_kappa": 0.9,
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=f"{field}: tezo-gn needs all branches"):
            tezo_ds.initialize(tiny(), {**FIELDS, field: value})
    with pytest.raises(
        ConfigError, match="tezo-gn needs all branches of a step in one forward; ex"
    ):
        tezo_ds.initialize(tiny("mixtral"), FIELDS)
    tezo_ds.initialize(tiny("mixtral"), {**FIELDS, "exclude": ("*experts*", "*gate*")})
    assert tezo_ds.TezoConfig(method="tezo-gn").lr == 1.0
    assert tezo_ds.TezoConfig(method="tezo-gn", lr=0.5).lr == 0.5
    assert tezo_ds.TezoConfig().lr == 1e-6


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    engine = tezo_ds.initialize(tiny(), {**FIELDS, "rho": 1e39})
    report = engine.step(make_batch(4))
    assert report.dropped == 4 and report.solved == (0.0,) * 4
    assert not engine.method.coefficients.any()


def test_a_loss_fns_losses_give_the_fisher_matrix() -> None:
    """A step by hand, of per-example losses in float64, from the formula."""

    def loss_fn(outputs: object, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        wanted = batch["labels"][:, 1:]
        flat = outputs.logits[:, :-1].flatten(0, 1)
        losses = F.cross_entropy(flat, wanted.flatten(), ignore_index=-100, reduction="none")
        return losses.view(wanted.shape).sum(dim=1), wanted.ne(-100).sum(dim=1)

    batch, rho, damping = batch_of(0), 1e-2, 0.2
    model = tiny("llama", tied=False).double()
    engine = tezo_ds.initialize(model, FIELDS, loss_fn)
    taus = engine.space.taus(0, range(4)).double()
    with torch.no_grad():
        sums = []
        for sign in (1, -1):
            for tau in taus:
                engine.method.coefficients.copy_(sign * rho * tau)
                with engine.applied():
                    inputs = {k: v for k, v in batch.items() if k != "labels"}
                    sums.append(loss_fn(model(**inputs), batch)[0])
    engine.method.coefficients.zero_()
    kappa = (torch.stack(sums[:4]) - torch.stack(sums[4:])) / (2 * rho)  # (Q, examples)
    n = int((batch["labels"][:, 1:] != -100).sum())
    H, g = kappa @ kappa.t() / n, kappa.sum(dim=1) / n
    inverse = torch.linalg.inv(H + damping * H.diagonal().mean() * torch.eye(4).double())
    w = -(1 - float((inverse @ H).trace()) / n / float(g @ inverse @ g)) * (inverse @ g)
    report = engine.step(batch)
    solved = torch.tensor(report.solved, dtype=torch.float64)
    scale = float(-solved[0] / w[0])
    assert scale in (pytest.approx(0.25), pytest.approx(0.5), pytest.approx(1.0))
    torch.testing.assert_close(-solved / scale, w, rtol=1e-6, atol=0)
    before = engine.loss(batch)
    for _ in range(6):
        engine.step(batch)
    assert engine.loss(batch) < before - 0.01


def test_steps_in_bfloat16_go_down_as_far_as_in_float32() -> None:
    """At a ρ at which the logits' changes are above their own rounding, which at 1e-4 they are not."""
    went = {}
    for dtype in (torch.float32, torch.bfloat16):
        for rho in (1e-2, 1e-4):
            engine = tezo_ds.initialize(tiny("llama").to(dtype), {**FIELDS, "rho": rho})
            batch = make_batch(200)
            before = engine.loss(batch)
            for _ in range(8):
                engine.step(batch)
            went[dtype, rho] = before - engine.loss(batch)
    assert went[torch.float32, 1e-2] > 0.01
    assert went[torch.bfloat16, 1e-2] > 0.8 * went[torch.float32, 1e-2]
    assert went[torch.bfloat16, 1e-4] < 0.5 * went[torch.float32, 1e-4]
