"""Patterns of a recommendation, and which set is recommended."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch

from tezo_ds.patterns import matching
from tezo_ds.probing_layers.choice import Row, candidates, choose
from tezo_ds.probing_layers.figures import Figures, Horizon
from tezo_ds.probing_layers.names import globs, places_of, range_globs

KINDS = ("self_attn.q_proj.weight", "self_attn.v_proj.weight", "mlp.up_proj.weight")
HORIZON = Horizon(16, 1000)


@pytest.mark.parametrize(
    "first, last", [(0, 0), (0, 9), (3, 7), (8, 25), (0, 31), (5, 119), (98, 1203)]
)
def test_globs_match_just_the_numbers_of_a_range(first: int, last: int) -> None:
    patterns = list(range_globs(first, last))
    matched = [n for n in range(1500) if any(fnmatchcase(str(n), one) for one in patterns)]
    assert matched == [*range(first, last + 1)]


def names(layers: int) -> list[str]:
    inner = [f"model.layers.{i}.{kind}" for i in range(layers) for kind in KINDS]
    return ["model.embed_tokens.weight", *inner, "lm_head.weight"]


def test_globs_of_kinds_match_these_in_these_layers() -> None:
    every = names(32)
    layers = [f"model.layers.{i}" for i in (*range(3), *range(9, 32))]
    found = matching(globs(KINDS[:2], layers), every)
    assert found == {f"{layer}.{kind}" for layer in layers for kind in KINDS[:2]}


def test_places_are_by_layer_and_kind() -> None:
    experts = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in (0, 1) for e in (0, 1)]
    every = [*names(2), *experts]
    found = {place.name: (place.layer, place.short) for place in places_of(every, every)}
    assert found["model.embed_tokens.weight"] == (None, "embed_tokens")
    assert found["model.layers.1.mlp.up_proj.weight"] == (1, "up_proj")
    kinds = {place.kind for place in places_of(experts, every)}
    assert kinds == {"mlp.experts.*.up_proj.weight"}


def rows(layers: int, gradient: dict[tuple[int, str], float], scatter: float = 0.0) -> list[Row]:
    """Makes rows of S = 1 and tr H = 10, and s as given, otherwise 0; s scatters over examples."""
    made = []
    for place in places_of(names(layers), names(layers)):
        s = gradient.get((place.layer if place.layer is not None else -1, place.short), 0.0)
        sums = torch.tensor([[s], [1.0], [10.0]], dtype=torch.float64).repeat(1, 9)
        sums[0, 1:] += scatter * torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
        made.append(Row((place,), Figures(sums, 16)))
    return made


def recommended(found: list[Row], layers: int) -> tuple[str, ...] | None:
    chosen = choose(candidates(found, names(layers), ["*"], HORIZON))
    if chosen is None:
        return None
    assert matching(chosen.include, names(layers)) == set(chosen.names)
    return chosen.include


def test_the_kind_with_the_gradient_is_recommended_in_its_layers() -> None:
    late = {(i, "v_proj"): 1.0 for i in (5, 6, 7)}
    assert recommended(rows(8, late), 8) == ("model.layers.[5-7].self_attn.v_proj.weight",)


def test_where_all_kinds_gain_whole_layers_are() -> None:
    kinds = ("q_proj", "v_proj", "up_proj")
    late = {(i, kind): 1.0 for i in (6, 7) for kind in kinds}
    assert recommended(rows(8, late), 8) == ("last:2",)


def test_of_sets_that_gain_as_much_the_latest_is() -> None:
    found = rows(8, {(7, "v_proj"): 1.0, (0, "v_proj"): 0.01})
    assert recommended(found, 8) == ("model.layers.7.self_attn.v_proj.weight",)


def test_what_lies_before_all_layers_is_reached_only_with_everything() -> None:
    assert recommended(rows(2, {(-1, "embed_tokens"): 90.0}), 2) == ("*",)


def test_a_gradient_that_is_lost_in_noise_recommends_nothing() -> None:
    assert recommended(rows(4, {(3, "v_proj"): 0.1}, scatter=2.0), 4) is None
    assert recommended(rows(4, {}), 4) is None
