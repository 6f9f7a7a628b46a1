"""Layers that share a product: known before the first loss, whatever a process does first."""

from __future__ import annotations

import logging
from typing import Any
from unittest import mock

import pytest
import torch
from other_kernels import OtherKernels
from tiny import make_batch, tiny
from torch import Tensor, nn
from trained import shared

import tezo_ds
from tezo_ds.probes import shared_inputs, sites
from tezo_ds.probes.fused import FusedProbe

FIELDS = {"rank": 3, "rho": 1e-2, "lr": 1e-4, "queries": 2}
QKV, GATE = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]


def made(kind: str = "llama", **fields: Any) -> tezo_ds.Engine:
    return tezo_ds.initialize(tiny(kind), {**FIELDS, **fields})


def at_coefficients(engine: tezo_ds.Engine) -> tezo_ds.Engine:
    engine.method.coefficients.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    return engine


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", [QKV, GATE] * 2),
        ("opt", [["q_proj", "k_proj", "v_proj"]] * 2),
        ("roberta", [["query", "key", "value"]] * 2),
        ("gpt2", []),
        ("neox", []),
    ],
)
def test_models_of_each_kind(kind: str, expected: list[list[str]]) -> None:
    found = []
    for batch in (make_batch(3), make_batch(7, length=5), make_batch(1, length=7)):
        engine = at_coefficients(made(kind))
        engine.loss(batch)  # an evaluation comes first, of few examples or many
        found.append(shared(engine))
    assert [[sorted(run) for run in runs] for runs in found] == [
        [sorted(run) for run in expected]
    ] * 3


def test_models_that_are_alike_are_looked_at_once() -> None:
    """Whatever the number of examples, which a run without values has its own of."""
    hollow = shared_inputs.Hollow
    with (
        mock.patch.object(shared_inputs, "_FOUND", {}),
        mock.patch.object(shared_inputs, "Hollow", side_effect=hollow) as looked,
    ):
        for batch, times in ((make_batch(3), 1), (make_batch(7), 1), (make_batch(3, length=12), 2)):
            engine = at_coefficients(made())
            engine.loss(batch)
            assert shared(engine) and looked.call_count == times


def test_no_forward_of_the_model_is_spent() -> None:
    engine, calls = made(), []
    engine.objective.checked(make_batch(3))  # whose forward, once a run, is no step's
    engine.settle(make_batch(3))  # likewise
    engine.sharding.module.register_forward_hook(lambda *_: calls.append(1))
    engine.step(make_batch(3))
    assert len(calls) == 1 and shared(engine)


def test_generation_may_be_the_first_forward() -> None:
    prompt, found = make_batch(3)["input_ids"][:, :5], []
    for forwards_before in (0, 1):
        engine = made()
        at_coefficients(engine)
        with engine.applied():
            for _ in range(forwards_before):
                engine.sharding.module(prompt)
            words = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
            found.append(engine.sharding.module.generate(prompt, **words).tolist())
        assert shared(engine)
    assert found[0] == found[1] and len(found[0][0]) > 5


def losses(engine: tezo_ds.Engine) -> list[float]:
    """Returns the losses of the same batch four times, as a run's first steps and as evaluations."""
    at_coefficients(engine)
    found = []
    for _ in range(2):
        found.append(engine.loss(make_batch(3)))
        with engine.applied():
            ids = make_batch(3)["input_ids"]
            found.append(engine.sharding.module(ids).logits.double().sum().item())
    return found


def test_the_first_loss_is_that_of_all_later_ones() -> None:
    with OtherKernels("shapes") as kernels:
        first, plain, again, plainly = losses(made())
        assert (first, plain) == (again, plainly)
        before = kernels.products
        reports = [made(lr=0.0) for _ in range(2)]
        reports[1].loss(make_batch(5))  # another history
        kappas = [[engine.step(make_batch(3)).kappa for _ in range(3)] for engine in reports]
        assert kappas[0] == kappas[1]
    assert kernels.products > before > 0


def test_groups_that_are_found_late_change_bits() -> None:
    """Hazard: a process that finds groups late would begin with products that it never makes again."""
    join, late = FusedProbe._join, []

    def join_late(self: FusedProbe, args: Any, kwargs: Any) -> None:
        late.append(1)
        if len(late) > 1:
            join(self, args, kwargs)

    with OtherKernels("shapes"), mock.patch.object(FusedProbe, "_join", join_late):
        first, plain, again, plainly = losses(made())
    assert first != again or plain != plainly


class Asking(nn.Module):
    """A model whose code looks at values, which a run on tensors without values has not."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.asks = nn.Embedding(61, 12), asks
        self.a, self.b, self.head = nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(10, 61)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        if self.asks and bool((x > 1e9).any()):
            x = x * 2
        return self.head(self.a(x) * self.b(x))


def test_code_that_asks_for_values_keeps_products_apart(caplog: pytest.LogCaptureFixture) -> None:
    engines = [tezo_ds.initialize(Asking(asks), FIELDS) for asks in (False, True)]
    with caplog.at_level(logging.WARNING):
        kappas = [[engine.step(make_batch(3)).kappa for _ in range(3)] for engine in engines]
    assert [shared(engine) for engine in engines] == [[["a", "b"]], []]
    torch.testing.assert_close(kappas[1], kappas[0], rtol=1e-3, atol=1e-3)
    (said,) = [r.message for r in caplog.records if "product of its own" in r.message]
    assert "DataDependent" in said and "\n" not in said


class Twice(nn.Module):
    """A model in which two layers read x, one of them a second time; two more read a table that all
    examples share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.table = nn.Embedding(61, 12), nn.Parameter(torch.randn(1, 12))
        self.a, self.b, self.c, self.d = (nn.Linear(12, 12) for _ in range(4))
        self.head = nn.Linear(12, 61)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        y = self.a(x) * self.b(x) + self.c(self.table[None]) * self.d(self.table[None])
        return self.head(self.a(y.tanh()))


def test_who_reads_twice_or_what_all_share_stays_alone() -> None:
    engine = tezo_ds.initialize(Twice(), {**FIELDS, "exclude": ("table",)})
    for step in range(3):
        engine.step(make_batch(3, seed=step))
    assert shared(engine) == []


def handed(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hands a layer another Python object, as hooks for a backward pass do, of the same memory."""
    return tuple(x.detach() for x in given)


def test_a_group_shares_products_behind_hooks_of_others() -> None:
    engine = at_coefficients(made())
    for layer in engine.sharding.module.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(handed)
    for _ in range(3):
        engine.loss(make_batch(7))
    with mock.patch.object(sites, "scaled", side_effect=sites.scaled) as scaled:
        engine.loss(make_batch(7))
    widths = [len(call.args[1]) for call in scaled.call_args_list]
    assert widths.count(9) == widths.count(6) == 2, widths  # 2 blocks of (q, k, v) and (gate, up)
