"""Terms of value projections: what heads gather, what logits answer to, and the fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inner_states import WORDS, one_label, states_of
from reducing import Reduce, alone, by_ranks
from tiny import tiny
from torch import Tensor
from transformers.cache_utils import DynamicLayer

import tezo_ds
from tezo_ds.errors import ConfigError
from tezo_ds.output_layer import answering
from tezo_ds.output_layer import fit as fitting
from tezo_ds.output_layer.attending import coordinates
from tezo_ds.output_layer.fit import Fitted, fit
from tezo_ds.output_layer.inner import tensors_of
from tezo_ds.output_layer.problem import States
from tezo_ds.output_layer.value_rows import value_rows
from tezo_ds.output_layer.values import HALF, Gathered

# What enters the map that gives values, and that map: of values alone, of queries and keys in order, and of
# each head's in turn.
ENTERS = {
    "llama": ("model.layers.1.input_layernorm", "v_proj"),
    "opt": ("model.decoder.layers.1.self_attn_layer_norm", "v_proj"),
    "gpt2": ("transformer.h.1.ln_1", "c_attn"),
    "neox": ("gpt_neox.layers.1.input_layernorm", "query_key_value"),
}


@pytest.mark.parametrize("kind", ENTERS)
def test_what_heads_gather_and_what_logits_answer_to_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "PUSH", 1e-4)
    model: Any = tiny(kind).double()
    engine = tezo_ds.initialize(model, {"rank": 2})
    batch = one_label(7)
    _, inner = engine.output_layer.inner.of_blocks("layers:0-1", "values")
    enters, name = ENTERS[kind]
    assert inner.path.endswith(name) and inner.heads is not None
    assert inner.heads.groups == (1 if kind == "llama" else 2)
    _, found = states_of(engine, batch, "layers:0-1", maps="values").inner
    assert isinstance(found, Gathered)
    rows, places = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    # The reference: attention weights as the eager implementation returns them, and backpropagation.
    entered: list[Tensor] = []
    last = inner.heads.last
    push = torch.zeros(7, inner.heads.count * inner.heads.size).double().requires_grad_()

    def add(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        at = push.new_zeros(*args[0].shape).index_put((rows, places), push)
        return (args[0] + at,)

    model.set_attn_implementation("eager")
    norm = model.get_submodule(enters)
    with (
        norm.register_forward_hook(lambda _, __, output: entered.append(output)),
        last.register_forward_pre_hook(add),
    ):
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        outputs = model(**inputs, output_attentions=True)
    weights = outputs.attentions[1][rows, :, places]  # (7, H, T)
    gathered = weights @ entered[0][rows]  # (7, H, width)
    torch.testing.assert_close(found.inputs, gathered.detach(), rtol=1e-4, atol=1e-6)
    logits = outputs.logits[rows, places][:, WORDS]  # (7, C)
    asked = coordinates(batch, rows, places, len(WORDS), push.shape[1])
    sums, counts = torch.zeros_like(found.sums), torch.zeros_like(found.counts)
    for c in range(len(WORDS)):
        (slopes,) = torch.autograd.grad(logits[:, c].sum(), push, retain_graph=True)
        for row, chosen in enumerate(asked.tolist()):
            for place in chosen:
                sums[c, place] += slopes[row, place]
                counts[place] += c == 0
    assert torch.equal(found.counts, counts) and counts.sum() == 7 * len(WORDS)
    assert float(sums.abs().max()) > 1e-2
    torch.testing.assert_close(found.sums, sums, rtol=1e-2, atol=1e-4)


def test_an_example_is_asked_the_same_in_any_batch() -> None:
    batch = one_label(7)
    rows, places = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    whole = coordinates(batch, rows, places, 3, 20)
    pad = torch.zeros(7, 2, dtype=torch.int64)
    longer = {key: torch.cat([pad, value], dim=1) for key, value in batch.items()}  # on the left
    assert torch.equal(coordinates(longer, rows[4:], places[4:] + 2, 3, 20), whole[4:])
    assert whole.shape == (7, 3) and len(set(map(tuple, whole.tolist()))) > 2
    assert all(len(set(row)) == 3 for row in whole.tolist())
    assert coordinates(batch, rows, places, 3, 4096).shape == (7, 32)
    assert coordinates(batch, rows, places, 9, 5).shape == (7, 5)


def made(n: int = 91, inputs: int = 17) -> States:
    """Makes states of which the words follow in part, and more from what four heads gather, in two groups."""
    generator = torch.Generator().manual_seed(3)
    words, width, heads, size = 3, 4, 4, 5
    hidden = torch.randn(n, width, generator=generator)
    p = torch.randn(n, heads, inputs, generator=generator) * torch.logspace(-1, 1, inputs)
    answers = torch.randn(words, heads, size, generator=generator).double()
    change = torch.randn(2, size, inputs, generator=generator) / torch.logspace(-1, 1, inputs)
    exact = torch.einsum("chs,hsd,nhd->nc", answers.float(), change.repeat_interleave(2, dim=0), p)
    noise = torch.randn(n, words, generator=generator)
    truth = (exact / exact.std() * 3 + noise).argmax(dim=1)
    counts = torch.arange(heads * size).double() + 1
    others = torch.randn(2 * n, 2, generator=generator) @ torch.randn(
        2, inputs, generator=generator
    )
    rows = torch.arange(10) + 3  # of 14 numbers, as queries and keys are given, too
    known = Gathered(p, answers.flatten(1) * counts, counts, others, 2, rows, 14)
    return States(hidden, torch.zeros(n, words), truth, torch.arange(n) % 5 == 4, (known,))


def share(states: States, index: int, parts: int) -> States:
    n = len(states.truth)
    rows = slice(n * index // parts, n * (index + 1) // parts)
    (x,) = states.inner
    assert isinstance(x, Gathered)
    others = x.others[2 * rows.start : 2 * rows.stop]
    known = replace(
        x, inputs=x.inputs[rows], sums=x.sums / parts, counts=x.counts / parts, others=others
    )
    own = (states.hidden[rows], states.logits[rows], states.truth[rows], states.held[rows])
    return States(*own, (known,))


def in_parts(states: States, parts: int) -> list[Fitted]:
    def rank(index: int, reduce: Reduce) -> Fitted:
        return fit(share(states, index, parts), False, reduce)

    return by_ranks(parts, rank)


def test_the_fit_is_the_least_of_the_loss_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "LOOSELY", (fitting.ROUGHLY, fitting.EXACTLY))
    states = made()
    found = fit(states, False, alone)
    (known,), ((U, A),) = states.inner, found.inner
    assert isinstance(known, Gathered)
    answers = (known.sums / known.counts).view(3, 4, 5)
    # U: directions that logits answer to most, of each group, whatever moves all of them alike.
    centred = answers - answers.mean(dim=0)
    J = []
    assert U.shape == (14, 6) and not U[:3].any() and not U[13:].any()
    U = U[3:13]
    assert not U[:5, 3:].any() and not U[5:, :3].any()
    for h in range(4):
        g = h // 2
        own = U[5 * g : 5 * g + 5, 3 * g : 3 * g + 3].double()
        rows = centred[:, 2 * g : 2 * g + 2].flatten(0, 1)
        leading = torch.linalg.svd(rows).Vh[:3]
        torch.testing.assert_close(own @ own.t(), leading.t() @ leading, rtol=0, atol=1e-3)
        J.append(answers[:, h] @ own)
    J = torch.stack(J)  # (H, C, K)
    # A, of which the half is taken: the least of the loss among what is silent along the others.
    p = known.inputs.double()
    units = p.square().mean(dim=(0, 1)).sqrt()
    units = (units + 1e-2 * units.mean()) * J.square().sum(dim=(1, 2)).mean().sqrt() / 2
    hidden, point = states.hidden.double(), (A.double() / HALF).requires_grad_()
    logits = hidden @ found.weight.t().double() + found.bias
    each = point.view(2, 3, -1).repeat_interleave(2, dim=0)
    logits = logits + torch.einsum("hck,hkd,nhd->nc", J, each, p)
    variance = hidden.var(dim=0, correction=0).mean()
    assert found.strength is not None
    ridge = found.strength * (point * units).square().sum() / variance
    (slopes,) = torch.autograd.grad(F.cross_entropy(logits, states.truth) + ridge, point)
    slopes = slopes / units
    span = torch.linalg.qr((known.others[:2].double() / units).t()).Q
    assert float((slopes - slopes @ span @ span.t()).abs().max()) < 1e-5 < float(slopes.abs().max())
    assert float((known.others.double() @ A.double().t()).abs().max()) < 1e-4
    assert float(A.abs().max()) > 0.01
    nothing = States(states.hidden, states.logits, states.truth, states.held)
    assert found.after.loss < fit(nothing, False, alone).after.loss - 0.05


def test_ranks_find_the_same_bits() -> None:
    one, several = fit(made(), False, alone), in_parts(made(), 3)
    for found in several:
        for ours, first, its in zip(found.inner[0], several[0].inner[0], one.inner[0], strict=True):
            assert torch.equal(ours, first)
            torch.testing.assert_close(ours, its, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_a_term_is_worth_what_was_foreseen_where_it_is_small(kind: str) -> None:
    """The whole chain, from forwards to forwards: the logits move as the fit says they do, less what follows
    from other positions."""
    model: Any = tiny(kind).double()
    engine = tezo_ds.initialize(model, {"rank": 2})
    batch = one_label(60)
    states = states_of(engine, batch, "layers:1", maps="values")
    ((U, A),) = fit(states, False, alone).inner
    (known,) = states.inner
    assert isinstance(known, Gathered)
    (inner,) = engine.output_layer.inner.of_blocks("layers:1", "values")
    share = 1e-3 / float(A.abs().max())
    engine.output_layer.load(tensors_of([inner.path], [(U, share * A)]))
    true = states_of(engine, batch, "none").logits - states.logits
    engine.output_layer.load({})
    answers = (known.sums / known.counts.clamp(min=1)).view(3, 2, -1)
    gathered = torch.einsum("kd,nhd->nhk", share * A.double(), known.inputs)
    own = U[known.rows].double().view(known.groups, -1, len(A)).repeat(2 // known.groups, 1, 1)
    foreseen = torch.einsum("chs,hsk,nhk->nc", answers, own, gathered)
    true, foreseen = (x - x.mean(dim=1, keepdim=True) for x in (true.double(), foreseen))
    # Only in the last block nothing but the labelled position counts; J is the mean over examples.
    correlation = F.cosine_similarity(true.flatten(), foreseen.flatten(), dim=0)
    assert correlation > 0.8
    assert 0.5 < float((true * foreseen).sum() / foreseen.square().sum()) < 2


def test_a_block_of_which_no_map_gives_values_is_refused() -> None:
    model: Any = tiny("gpt2")
    model.transformer.h[1].attn.other = model.transformer.h[1].attn.c_attn
    del model.transformer.h[1].attn.c_attn
    engine = tezo_ds.initialize(model, {"rank": 2})
    with pytest.raises(
        ConfigError, match=r"inner_maps: transformer.h.1 of GPT2LMHeadModel has no .*use"
    ):
        engine.output_layer.inner.of_blocks("layers:1", "values")


def test_values_that_are_not_what_the_map_gives_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    update = DynamicLayer.update

    def scaled(self: Any, keys: Tensor, values: Tensor, *rest: Any, **more: Any) -> Any:
        return update(self, keys, 1.5 * values, *rest, **more)

    monkeypatch.setattr(DynamicLayer, "update", scaled)
    engine = tezo_ds.initialize(tiny("neox"), {"rank": 2, "include": ("*mlp*",)})
    with pytest.raises(ConfigError, match=r"keeps other values than .*query_key_value gives"):
        states_of(engine, one_label(7), "layers:1", maps="values")


def test_places_of_values_are_found_by_what_they_are() -> None:
    given = torch.randn(9, 31).bfloat16()
    rows = torch.tensor([30, 2, 17, 5])
    found = value_rows(given, given[:, rows])
    assert found is not None and torch.equal(found, rows)
    assert value_rows(given, given[:, rows] + (torch.arange(4) == 2)) is None
    given[:, 2] = given[:, 5]  # the same number twice: either
    found = value_rows(given, given[:, rows])
    assert found is not None and torch.equal(given[:, found], given[:, rows])


def test_heads_that_do_not_gather_values_are_refused() -> None:
    model: Any = tiny()
    project = model.model.layers[1].self_attn.o_proj
    project.register_forward_pre_hook(lambda _, args: (args[0] ** 2,))
    engine = tezo_ds.initialize(model, {"rank": 2, "include": ("*mlp*",)})
    with pytest.raises(ConfigError, match=r"heads that give something else than what they gather"):
        states_of(engine, one_label(7), "layers:1", maps="values")
