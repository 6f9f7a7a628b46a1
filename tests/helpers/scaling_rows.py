"""Rows as `benchmarks/scaling.py` finds them, made up."""

from __future__ import annotations

from typing import Any

from parts.scaling.split import PARTS


def row(**more: Any) -> dict[str, Any]:
    """Makes the row of a step of 2 s with 10 % of spread, of which gathers take a second."""
    record: dict[str, Any] = {
        "model": "tiny", "dtype": "float32", "backend": "gloo", "length": 10, "queries": 1, "rank": 4,
        "mode": "weak", "sharding": "zero3", "probe": "fused", "nodes": 1, "world": 1, "examples": 2,
        "workers": 1, "steps": 5, "gathers_alone_s": 0.5, "peak_bytes": 1000, "gather_ranks": 1,
        "gather_calls": 3, "gather_bytes": 400, "our_calls": 1, "our_bytes": 40,
        "collectives": "gather of 1: 3 x, 400 B; allreduce of 1: 1 x, 40 B", "machine": "here, 2 cores",
        "command": "python benchmarks/scaling.py --a 1,2",
    }  # fmt: skip
    seconds = {"step": 2.0, **dict.fromkeys(PARTS, 0.2), "gather": 1.0}
    for name in seconds:
        given = more.pop(f"{name}_s", seconds[name])
        record |= {f"{name}_s": given, f"{name}_s_low": 0.9 * given, f"{name}_s_high": 1.1 * given}
    return {**record, **more}
