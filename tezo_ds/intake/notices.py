"""Notices on what an engine makes of its config: ranks of small matrices, ranks that `auto` left at its
bound, and fields that change nothing."""

from __future__ import annotations

from tezo_ds.engine.engine import Engine
from tezo_ds.intake.unused_fields import unused_fields
from tezo_ds.quantised.packed import rounding


def notices(engine: Engine) -> list[str]:
    """Returns lines for the user, to be shown once, by the first rank."""
    return [
        line
        for line in (unused_fields(engine), _small(engine), _at_bound(engine), _rounds(engine))
        if line
    ]


def _small(engine: Engine) -> str:
    rank, matrices = engine.config.rank, engine.space.matrices
    small = [] if rank == "auto" else [matrix for matrix in matrices if matrix.rank < rank]
    if not small:
        return ""
    first = small[0]
    return (
        f"rank {rank} is above min(m, n) in {len(small)} of {len(matrices)} matrices, which take that "
        f"instead, e.g. {first.rank} for {first.name} {first.shape}"
    )


def _rounds(engine: Engine) -> str:
    """Returns a line on packed layers that round activations, too, so that κ has noise of its own."""
    sharding = engine.sharding
    found = rounding(sharding.packed.values()) if sharding.runs_alone else None
    if found is None:
        return ""
    weight, error = found
    return (
        f"{weight.kind} rounds its inputs, to a relative error of {error:.2g} in a product, so slopes are "
        "noisier than beside weights that are quantised alone; --load-in int8 or 4bit are such"
    )


def _at_bound(engine: Engine) -> str:
    config, matrices = engine.config, engine.space.matrices
    bounds = [min(config.rank_max, *matrix.shape) for matrix in matrices]
    if config.rank != "auto" or not matrices or [m.rank for m in matrices] != bounds:
        return ""
    return (
        f"rank auto chose nothing: all {len(matrices)} matrices are at the bound, rank_max "
        f"{config.rank_max} or min(m, n); raise rank_threshold (now {config.rank_threshold:g}) or "
        "rank_max, or set a rank"
    )
