"""What of a model of one's own may be left out, by what its code does."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from deep import WHOLE, assert_alike, steps
from torch import Tensor, nn

import tezo_ds


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return hidden + torch.tanh(self.inner(hidden))


class Shared(nn.Module):
    """A model that may read more of the trunk, after its blocks, than hidden states."""

    def __init__(self, leaks: bool, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(61, 8)
        self.layers = nn.ModuleList(block() for _ in range(4))
        self.head = nn.Linear(8, 61, bias=False)
        self._leaks = leaks

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        start = hidden = self.table(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask)
        return self.head(hidden + start if self._leaks else hidden)


def test_what_else_of_the_trunk_is_read_later(caplog: pytest.LogCaptureFixture) -> None:
    for leaks in (True, False):
        fields = {"include": ("layers.2.*", "layers.3.*"), "queries": 2, "rank": 3, "rho": 1e-2}
        engine = tezo_ds.initialize(Shared(leaks), fields)
        plain = tezo_ds.initialize(Shared(leaks), {**fields, **WHOLE})
        with caplog.at_level(logging.WARNING):
            assert_alike(steps(engine), steps(plain))
        trunk = engine.objective.trunk
        assert trunk is not None and (trunk.found is None) == leaks
        assert ("shared_trunk: every branch runs all blocks (Shared: later" in caplog.text) == leaks
        caplog.clear()


class Mixing(nn.Module):
    """An attention that may use its last map twice, or change what it gave."""

    def __init__(self, does: str) -> None:
        super().__init__()
        self.out, self._does = nn.Linear(8, 8), does

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        real = mask[..., None].to(hidden.dtype)
        mixed = (hidden * real).cumsum(dim=1) / real.cumsum(dim=1).clamp(min=1)
        if self._does == "twice":
            mixed = torch.tanh(self.out(mixed))
        mapped = self.out(mixed)
        return torch.tanh(mapped) if self._does == "more" else mapped


class MixingBlock(nn.Module):
    def __init__(self, does: str) -> None:
        super().__init__()
        self.attention, self.inner = Mixing(does), nn.Linear(8, 8)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden + self.attention(hidden, mask)
        return hidden + torch.tanh(self.inner(hidden))


@pytest.mark.parametrize(("does", "ends"), [("once", True), ("twice", False), ("more", False)])
def test_an_attentions_last_map_runs_on_labelled_positions_where_it_ends_there(
    does: str, ends: bool
) -> None:
    fields = {"include": ("layers.2.*", "layers.3.*"), "queries": 2, "rank": 3, "rho": 1e-2}
    engine = tezo_ds.initialize(Shared(False, lambda: MixingBlock(does)), fields)
    plain = tezo_ds.initialize(Shared(False, lambda: MixingBlock(does)), {**fields, **WHOLE})
    assert_alike(steps(engine), steps(plain))
    trunk = engine.objective.trunk
    assert trunk is not None and trunk.rest.way.tail is not None
    assert (trunk.rest.way.tail.last is not None) == ends


@pytest.mark.parametrize("halves", [False, True])
def test_a_model_that_reads_all_positions_behind_its_blocks_gets_them(halves: bool) -> None:
    fields = {"include": ("layers.3.*",), "queries": 2, "rank": 3, "rho": 1e-2}
    models = [Shared(False, lambda: MixingBlock("once")) for _ in range(2)]
    for model in models:
        if halves:  # the output layer's input is another tensor than the last block gave
            model.head.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))
    engine, plain = (
        tezo_ds.initialize(model, {**fields, **more})
        for model, more in zip(models, ({}, WHOLE), strict=True)
    )
    assert_alike(steps(engine), steps(plain))
    trunk = engine.objective.trunk
    assert (
        trunk is not None
        and trunk.rest.way.tail is not None
        and trunk.rest.way.tail.last is not None
    )
    assert trunk.rest.way.tail.alike == (not halves)
