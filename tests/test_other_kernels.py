"""The emulation of other kernels, and the setting that makes MKL's products independent of addresses."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from command_line import call
from other_kernels import OtherKernels

from tezo_ds import repeatable

GENERATOR = torch.Generator().manual_seed(0)
X, W = torch.randn(9, 22, generator=GENERATOR), torch.randn(15, 22, generator=GENERATOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_move_the_last_bit_alone(dtype: torch.dtype) -> None:
    x, w = X.to(dtype), W.to(dtype)
    plain = F.linear(x, w)
    with OtherKernels("shapes") as kernels:
        once, again, rows = F.linear(x, w), F.linear(x.clone(), w.clone()), F.linear(x[:4], w)
        wide = F.linear(x, torch.cat([w, w]))[:, :15]
    assert kernels.products == 4
    assert torch.equal(once, again)
    for other in (plain, rows, wide):
        assert not torch.equal(once[: len(other)], other)
    apart = (once.double() - plain.double()).abs() / plain.double().abs()
    assert 0 < apart.max() <= torch.finfo(dtype).eps
    share = 0.5 if dtype != torch.bfloat16 else 0.03
    assert 0.5 * share < (apart > 0).double().mean() < 2 * share


def test_attention_and_products_in_place_are_moved_too() -> None:
    q, out = torch.randn(4, 2, 11, 10, generator=GENERATOR), torch.zeros(9, 15)
    plain = F.scaled_dot_product_attention(q, q, q, is_causal=True), out.clone().addmm_(X, W.t())
    with OtherKernels("shapes"):
        moved = F.scaled_dot_product_attention(q, q, q, is_causal=True), out.addmm_(X, W.t())
    for one, other in zip(plain, moved, strict=True):
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other)


def test_what_depends_on_addresses_is_noticed() -> None:
    with OtherKernels("addresses"):
        assert repeatable.products().results > 1


def test_this_machines_products_do_not_depend_on_addresses() -> None:
    """MKL's products do not depend on addresses with what conftest.py sets; without MKL_CBWR they do, with
    MKL on AMD's CPUs."""
    found = repeatable.products()
    assert found.results == 1, found


def test_the_command_line_asks_mkl_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for before, after in ((None, "AUTO"), ("COMPATIBLE", "COMPATIBLE")):
        monkeypatch.delenv(repeatable.VARIABLE)
        if before:
            monkeypatch.setenv(repeatable.VARIABLE, before)
        assert call("--help") == 0
        assert os.environ[repeatable.VARIABLE] == after
