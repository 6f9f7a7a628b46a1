"""Terms of inner layers: what logits answer, the fit, the term in forwards and in what is exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inner_states import MAPS, WORDS, one_label, states_of
from peft import PeftModel
from reducing import Reduce, alone, by_ranks
from tiny import make_batch, tiny
from torch import Tensor
from trained import logits

import tezo_ds
from tezo_ds.errors import ConfigError, ProbeError
from tezo_ds.export.adapter import save_adapter
from tezo_ds.output_layer.answering import refuse_unfit
from tezo_ds.output_layer.columns import Answers
from tezo_ds.output_layer.fit import Fitted, choice, fit, gain
from tezo_ds.output_layer.inner import InnerLayer, directions, tensors_of
from tezo_ds.output_layer.problem import States
from tezo_ds.output_layer.term import BIAS, TOKENS, WEIGHT


def term(inner: InnerLayer, seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    m, n = inner.sizes
    U, A = (torch.randn(*s, generator=generator) * 0.3 for s in ((m, 3), (3, n)))
    words = {TOKENS: WORDS, WEIGHT: torch.zeros(3, 22), BIAS: torch.zeros(3)}
    return {**words, **tensors_of([inner.path], [(U, A)])}


def with_change(model: Any, path: str, state: dict[str, Tensor]) -> Any:
    """Writes U A into a model's weight: the reference."""
    U, A = (state[f"inner_layers.{path}.{side}"] for side in ("left", "right"))
    weight = model.get_submodule(path).weight
    with torch.no_grad():
        weight += (U @ A).view(len(U), -1) if weight.shape == (len(U), A.shape[1]) else (U @ A).t()
    return model


@pytest.mark.parametrize(
    ("kind", "maps"),
    [
        *((kind, "last") for kind in sorted(MAPS.keys() - {"mixtral"})),
        *((kind, "values") for kind in ("llama", "opt", "gpt2", "neox")),
    ],
)
@pytest.mark.parametrize("probe", ["fused", "inplace"])
def test_the_term_is_a_change_of_the_weight_to_every_branch(
    kind: str, maps: str, probe: str, tmp_path: Path
) -> None:
    fields = {
        "rank": 3,
        "rho": 1e-2,
        "lr": 1e-3,
        "queries": 2,
        "probe": probe,
        "include": ("*mlp*", "*fc*"),
    }
    mine = tezo_ds.initialize(tiny(kind), fields)
    (inner,) = mine.output_layer.inner.of_blocks("layers:1", maps)
    state = term(inner)
    mine.output_layer.load(state)
    reference = with_change(tiny(kind), inner.path, state)
    its = tezo_ds.initialize(reference, fields)
    plain = tezo_ds.initialize(tiny(kind), fields)
    assert abs(mine.loss(make_batch(4)) - plain.loss(make_batch(4))) > 1e-3
    for seed in range(3):
        one, other = (engine.step(make_batch(4, seed=seed)) for engine in (mine, its))
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
        assert one.kappa == pytest.approx(other.kappa, rel=1e-2, abs=1e-3)
    with mine.output_layer.off():
        assert mine.loss(make_batch(4)) != pytest.approx(its.loss(make_batch(4)), abs=1e-4)
    # What it exports.
    save_adapter(mine, tmp_path / "adapter", "the base")
    with mine.applied():
        expected = logits(mine.sharding.module).clone()
    adapted = logits(PeftModel.from_pretrained(tiny(kind), tmp_path / "adapter"))
    torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-5)
    other = tezo_ds.initialize(tiny(kind), fields)
    other.load_state(mine.state(), written=False)
    assert torch.equal(other.output_layer.state[f"inner_layers.{inner.path}.right"], inner.term[1])
    for name, weight in merged(mine).items():
        torch.testing.assert_close(weight, merged(its)[name], rtol=0, atol=1e-6)


def merged(engine: tezo_ds.Engine) -> dict[str, Tensor]:
    """Returns merged weights without the output layer's own term, which tied models refuse."""
    state = engine.output_layer.state
    engine.output_layer.load({k: v for k, v in state.items() if k.startswith("inner_layers.")})
    found = engine.state_dict()
    engine.output_layer.load(state)
    return found


def test_bfloat16() -> None:
    engine = tezo_ds.initialize(tiny().bfloat16(), {"rank": 2})
    (inner,) = engine.output_layer.inner.of_blocks("layers:1")
    before = logits(engine.sharding.module).clone()
    engine.output_layer.load(term(inner))
    found = logits(engine.sharding.module)
    expected = logits(with_change(tiny().bfloat16(), inner.path, term(inner)))
    assert found.dtype == torch.bfloat16 and (found - before).abs().max() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)
    states = states_of(engine, one_label(5), "layers:1")
    assert states.inner[0].inputs.dtype == torch.bfloat16 and states.inner[0].responses.any()


def test_directions_are_unit_rows_without_their_mean() -> None:
    rows = torch.randn(4, 9)
    U = directions(rows)
    centred = rows - rows.mean(dim=0)
    torch.testing.assert_close(U, (centred / centred.norm(dim=1, keepdim=True)).t())
    assert not directions(torch.ones(2, 3)).any()


def made(n: int = 91, words: int = 3, width: int = 4, inputs: int = 6) -> States:
    """Makes states of which the words follow in part, and more from what enters an inner layer."""
    generator = torch.Generator().manual_seed(3)
    hidden, x = (torch.randn(n, k, generator=generator) for k in (width, inputs))
    x = x * torch.logspace(-1, 1, inputs)
    J = torch.randn(words, 2, generator=generator) + 0.2 * torch.randn(
        n, words, 2, generator=generator
    )
    A = torch.randn(2, inputs, generator=generator) / torch.logspace(-1, 1, inputs)
    noise = torch.randn(n, words, generator=generator)
    truth = (torch.einsum("nck,nk->nc", J, x @ A.t()) + noise).argmax(dim=1)
    held = torch.arange(n) % 5 == 4
    answers = (Answers(x, J, x[:0]),)
    return States(hidden, torch.zeros(n, words), truth, held, answers, torch.zeros(width, 2))


def with_others(states: States, others: Tensor) -> States:
    (answers,) = states.inner
    return replace(states, inner=(replace(answers, others=others),))


def share(states: States, index: int, parts: int) -> States:
    n = len(states.truth)
    rows = slice(n * index // parts, n * (index + 1) // parts)
    own = (states.hidden[rows], states.logits[rows], states.truth[rows], states.held[rows])
    answers = [Answers(x.inputs[rows], x.responses[rows], x.others[rows]) for x in states.inner]
    return States(*own, answers, states.directions)


def in_parts(states: States, parts: int) -> list[Fitted]:
    return by_ranks(parts, lambda index, reduce: fit(share(states, index, parts), False, reduce))


def test_the_fit_is_the_least_of_the_loss_as_it_is_written() -> None:
    states = made()
    found = fit(states, False, alone)
    (answers,), ((_, A),) = states.inner, found.inner
    x, J = answers.inputs.double(), answers.responses.double()
    rms = x.square().mean(dim=0).sqrt()
    units = (rms + 1e-2 * rms.mean()) * J.square().sum(dim=(1, 2)).mean().sqrt()
    hidden = states.hidden.double()
    variance = hidden.var(dim=0, correction=0).mean()

    def loss(weight: Tensor, bias: Tensor, A: Tensor) -> Tensor:
        logits = hidden @ weight.t() + bias + torch.einsum("nck,nk->nc", J, x @ A.t())
        ridge = weight.square().sum() + (A * units).square().sum() / variance
        assert found.strength is not None
        return F.cross_entropy(logits, states.truth) + found.strength * ridge

    point = [part.double().requires_grad_() for part in (found.weight, found.bias, A)]
    slopes = torch.autograd.grad(loss(*point), point)
    assert slopes[0].abs().max() < 1e-5 and slopes[2].div(units).abs().max() < 1e-5
    assert A.abs().max() > 0.05
    # What enters the layer says more of the words than the states do.
    alone_held = fit(
        States(*(states.hidden, states.logits, states.truth, states.held)), False, alone
    )
    assert found.after.loss < alone_held.after.loss - 0.05


def test_ranks_find_the_same_bits() -> None:
    one, several = fit(made(), False, alone), in_parts(made(), 3)
    for found in several:
        assert torch.equal(found.weight, several[0].weight)
        assert torch.equal(found.inner[0][1], several[0].inner[0][1])
        torch.testing.assert_close(found.inner[0][1], one.inner[0][1], rtol=1e-4, atol=1e-6)
        assert found.message_bytes == 8 * (3 * 5 + 2 * 6)


def test_the_term_is_silent_where_most_inputs_before_the_labelled_position_lie() -> None:
    states = made(inputs=16)
    generator = torch.Generator().manual_seed(8)
    along = torch.randn(2, 16, generator=generator)
    others = torch.randn(91, 2, generator=generator) @ along
    states = with_others(states, others)
    found = fit(states, False, alone)
    (answers,), ((_, A),) = states.inner, found.inner
    size = (answers.inputs @ A.t()).square().mean().sqrt()
    assert float((others @ A.t()).abs().max()) < 1e-4 * float(size)
    assert (
        float((others @ fit(made(inputs=16), False, alone).inner[0][1].t()).std()) > float(size) / 4
    )
    # Of all that is silent there it is the least of the loss.
    x, J = answers.inputs.double(), answers.responses.double()
    rms = x.square().mean(dim=0).sqrt()
    units = (rms + 1e-2 * rms.mean()) * J.square().sum(dim=(1, 2)).mean().sqrt()
    hidden = states.hidden.double()
    point = A.double().requires_grad_()
    logits = hidden @ found.weight.t().double() + found.bias
    logits = logits + torch.einsum("nck,nk->nc", J, x @ point.t())
    variance = hidden.var(dim=0, correction=0).mean()
    assert found.strength is not None
    ridge = found.strength * (point * units).square().sum() / variance
    (slopes,) = torch.autograd.grad(F.cross_entropy(logits, states.truth) + ridge, point)
    slopes = slopes / units  # in the units in which directions are orthonormal
    span = torch.linalg.qr((along.double() / units).t()).Q
    assert float((slopes - slopes @ span @ span.t()).abs().max()) < 1e-5 < float(slopes.abs().max())
    for part in in_parts(states, 3):
        torch.testing.assert_close(part.inner[0][1], A, rtol=1e-4, atol=1e-6)
        assert part.message_bytes == 8 * (3 * 5 + 2 * 16)


def test_what_was_foreseen_comes_true_where_the_term_acts_everywhere() -> None:
    engine = tezo_ds.initialize(tiny().double(), {"rank": 2})
    errors = []
    for silent in (True, False):
        batch = one_label(40)
        batch["input_ids"] = batch["input_ids"].clone()
        for row, place in (batch["labels"] != -100).nonzero().tolist():
            batch["input_ids"][row, : place - 1] = 3  # a prompt that all have, but for one token
        states = states_of(engine, batch, "layers:0")
        if not silent:
            states = with_others(states, states.inner[0].others[:0])
        found = fit(states, False, alone)
        (answers,), ((_, A),) = states.inner, found.inner
        foreseen = states.logits + torch.einsum(
            "nck,nk->nc", answers.responses.double(), answers.inputs.double() @ A.double().t()
        )
        path = engine.output_layer.inner.of_blocks("layers:0")[0].path
        engine.output_layer.load(tensors_of([path], [(states.directions, A)]))
        true = states_of(engine, batch, "layers:0").logits
        engine.output_layer.load({})
        errors.append(float((true - foreseen).norm() / (foreseen - states.logits).norm()))
    assert errors[0] < 0.6 * errors[1]


def test_the_gain_of_a_term_and_what_chance_leaves_of_it() -> None:
    states = made(400)
    parts = [replace(states, inner=()), states]
    less, more = (choice(part, False, alone) for part in parts)
    mean, error = gain(less, more)
    assert mean == pytest.approx(less.after.loss - more.after.loss)
    d = less._problem.losses(less._x) - more._problem.losses(more._x)
    assert len(d) == 80 and error == pytest.approx(float(d.std() / 80**0.5), rel=1e-6)
    assert mean > 2 * error > 0  # words follow from what enters the inner layer

    def rank(index: int, reduce: Reduce) -> tuple[float, float]:
        mine = [share(part, index, 3) for part in parts]
        return gain(*(choice(part, False, reduce) for part in mine))

    for found in by_ranks(3, rank):
        assert found == pytest.approx((mean, error), rel=1e-3)
    noise = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    nothing = replace(states, inner=(replace(states.inner[0], inputs=noise),))
    better, chance = gain(less, choice(nothing, False, alone))
    assert better <= chance


def test_what_is_not_finite_is_refused() -> None:
    states = made()
    states.inner[0].responses[5, 1, 0] = torch.nan
    with pytest.raises(ProbeError, match="not finite"):
        fit(states, False, alone)


def test_models_that_cannot_have_them_are_refused() -> None:
    engine = tezo_ds.initialize(tiny("roberta"), {"rank": 2})
    with pytest.raises(ConfigError, match="inner_layers: RobertaForMaskedLM is no causal model"):
        refuse_unfit(engine.objective)
    engine = tezo_ds.initialize(tiny(), {"rank": 2})
    of_blocks = engine.output_layer.inner.of_blocks
    for pattern, what in (("layers:2", "their indices are 0 to 1"), ("20", "not of the form")):
        with pytest.raises(ConfigError, match=f"inner_layers: '{pattern}'.*{what}"):
            of_blocks(pattern)
    assert [inner.path[:14] for inner in of_blocks("auto")] == ["model.layers.1"]
    (inner,) = of_blocks("last:1")
    for other in (
        {**term(inner), f"inner_layers.{inner.path}.left": torch.zeros(23, 3)},
        unknown(inner),
    ):
        with pytest.raises(ConfigError, match=r"inner_layers: .*; use the run's own model"):
            engine.output_layer.load(other)


def unknown(inner: InnerLayer) -> dict[str, Tensor]:
    return {name.replace("layers.1", "layers.7"): part for name, part in term(inner).items()}
