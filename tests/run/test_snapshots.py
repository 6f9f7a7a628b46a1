"""Files of shards, element for element; and refusals of snapshots that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import make_batch, tiny
from torch import Tensor

import tezo_ds
from tezo_ds.directions import lowrank
from tezo_ds.methods import mezo
from tezo_ds.run import shardfiles
from tezo_ds.run.shardfiles import Stored, common_numel, copy_common, stored_in, write_file
from tezo_ds.run.snapshots import checked_shards, save_shards
from tezo_ds.sharding import ShardView

FIELDS = {"method": "mezo-adam", "rho": 1e-2, "lr": 1e-2, "include": ["*layers.0*"]}
SHAPE = (13, 7)
RANGES = [(0, 91, None), (0, 40, None), (17, 20, None), (40, 51, None), (91, 0, None)]
RANGES += [(0, 39, range(0, 3)), (5, 21, range(0, 3)), (8, 44, range(3, 7)), (0, 0, range(3, 7))]


def whole(dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


def cut(W: Tensor, start: int, numel: int, columns: range | None) -> ShardView:
    held = W if columns is None else W[:, columns.start : columns.stop]
    return ShardView("w", SHAPE, start, held.flatten()[start : start + numel].clone(), columns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("block", [1, 16, 1 << 20])
def test_every_range_takes_what_it_has_in_common_with_any_other(
    dtype: torch.dtype, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments of four bytes lie beside weights of an odd number of two bytes, which would else leave them
    unaligned."""
    monkeypatch.setattr(shardfiles, "BLOCK_NUMEL", block)
    monkeypatch.setattr(shardfiles, "_AT_ONCE", 5)
    W, M = whole(dtype), whole(torch.float32) + 1
    for number, theirs in enumerate(cut(W, *place) for place in RANGES):
        file = tmp_path / f"{number}.safetensors"
        parts = {"weight": theirs, "moment": cut(M, *RANGES[number])}
        tensors = [Stored(kind, view, file) for kind, view in parts.items()]
        write_file(
            file, tensors, lambda put, p=parts: [put(v.key, k, v.local) for k, v in p.items()]
        )
        assert torch.equal(load_file(file)["w:weight"], theirs.local)
        found = {stored.kind: stored for stored in stored_in(file)}
        for kind, view in parts.items():
            stored = found[kind].view
            assert (stored.key, stored.local.dtype) == (view.key, view.local.dtype)
        for mine in RANGES:
            for kind, source in (("weight", W), ("moment", M)):
                target = cut(torch.zeros_like(source), *mine)
                with safe_open(file, framework="pt") as opened:
                    copy_common(opened.get_slice(f"w:{kind}"), found[kind].view, target)
                both = covered(theirs) & covered(target)
                expected = torch.where(both, source, torch.zeros_like(source))
                assert torch.equal(target.local, cut(expected, *mine).local)
                assert common_numel(theirs, target) == int(both.sum())


def covered(view: ShardView) -> Tensor:
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    for piece in view.pieces(100):
        rows, columns = piece.rows, piece.columns
        mask[rows.start : rows.stop, columns.start : columns.stop] = True
    return mask


def engine(dtype: torch.dtype = torch.float32, mlp: int = 37, **fields: object) -> tezo_ds.Engine:
    return tezo_ds.initialize(tiny(mlp=mlp).to(dtype), {**FIELDS, **fields})


def trained(dtype: torch.dtype = torch.float32, **fields: object) -> tezo_ds.Engine:
    made = engine(dtype, **fields)
    for step in range(3):
        made.step(make_batch(3, seed=step))
    return made


def numbers_of(made: tezo_ds.Engine) -> dict[tuple[str, str], Tensor]:
    found: dict[tuple[str, str], Tensor] = {}

    def note(view: ShardView) -> None:
        numbers = {"weight": view.local.clone(), **made.method.moments(view)}
        found.update({(view.name, kind): tensor for kind, tensor in numbers.items()})

    made.sharding.each_shard(made.space.slices.keys(), note)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_process_has_its_own_again(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (lowrank, mezo, shardfiles):
        monkeypatch.setattr(module, "BLOCK_NUMEL", 100)  # moments in many pieces
    saved, again = trained(dtype), engine(dtype)
    save_shards(saved, tmp_path / "at 3")
    checked_shards(again, tmp_path / "at 3")()
    ours, theirs = numbers_of(again), numbers_of(saved)
    assert ours.keys() == theirs.keys()
    assert {kind for _, kind in ours} == {"weight", "moment1", "moment2"}
    for key, tensor in theirs.items():
        assert tensor.any() and torch.equal(ours[key], tensor), key
    again.step_index = 3
    assert again.step(make_batch(3, seed=3)).kappa == saved.step(make_batch(3, seed=3)).kappa


def test_before_the_first_update_there_are_no_moments(tmp_path: Path) -> None:
    save_shards(engine(), tmp_path / "at 0")
    later = trained()
    checked_shards(later, tmp_path / "at 0")()
    assert {kind for _, kind in numbers_of(later)} == {"weight"}
    for key, tensor in numbers_of(engine()).items():
        assert torch.equal(numbers_of(later)[key], tensor)


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    folder, name = tmp_path / "at 3", "model.layers.0.mlp.gate_proj.weight"
    save_shards(trained(), folder)

    def said(other: tezo_ds.Engine) -> str:
        before = numbers_of(other)
        with pytest.raises(tezo_ds.StorageError) as caught:
            checked_shards(other, folder)()
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
        assert all(torch.equal(x, before[key]) for key, x in numbers_of(other).items()) or moments
        return str(caught.value)

    moments = False
    wide = said(engine(torch.bfloat16))
    assert "dtype is torch.float32 in the snapshot and torch.bfloat16 in the run" in wide
    assert f"{name}: shape is [37, 22] in the snapshot and [38, 22] in the run" in said(
        engine(mlp=38)
    )
    assert "other trained parameters" in said(engine(include=["*layers.1*"]))
    moments = True  # which are found not to fit as shards are filled
    assert "moment1" in said(engine(method="mezo-m")) and "moment2" in said(engine(method="mezo"))
    assert "keeps none there" in said(engine(method="tezo-adam", rank=3))
