"""Fit of rings to the gathers that `benchmarks/scaling.py` timed, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from parts.common.tables import markdown_table
from parts.methods.report import Record
from parts.scaling.report import NAMES
from parts.scaling_model.fit import FORMS, RING, Fit, LeftOut, fit, left_out, typical, usable


def calibration(records: Sequence[Record]) -> str:
    """Reports how well the form of the model fits what was measured.

    Args:
        records: rows of the CSV of `benchmarks/scaling.py`.

    Raises:
        ValueError: the rows do not tell hops from bytes.
    """
    rows = usable(records)
    parts = [f"Machine: {machine}." for machine in dict.fromkeys(r["machine"] for r in rows)]
    for backend in dict.fromkeys(r["backend"] for r in rows):
        mine = [r for r in rows if r["backend"] == backend]
        fits = [fit(mine, form) for form in FORMS]
        others = [left_out(mine, form) for form in FORMS]
        parts += [
            f"{backend}, {len(mine)} rows. Constants and errors are **modelled**, from gathers whose seconds "
            "were **measured** with nothing beside them. Errors are relative. *Left out*: each world and "
            "sharding, predicted from the others.",
            markdown_table(
                ("form", "hop, inside", "hop, between", "GB/s, inside", "GB/s, between", "median error",
                 "largest", "median, left out", "largest, left out"),
                [_form(f, mine, o) for f, o in zip(fits, others, strict=True)],
            ),
            _verdict(others),
            _rows(others[0]),
        ]  # fmt: skip
    if not rows:
        raise ValueError("no row has gathers between ranks; measure worlds of 2 and more")
    return "\n\n".join(parts)


def _form(found: Fit, records: Sequence[Record], others: Sequence[LeftOut]) -> tuple[str, ...]:
    hops = (f"{1e6 * c:.3g} µs" if c else "–" for c in found.constants[:2])
    rates = (f"{1e-9 / c:.3g}" if c else "–" for c in found.constants[2:])
    errors, left = found.errors(records), [each.error for each in others]
    return (found.form.name, *hops, *rates, *_sizes(errors), *_sizes(left))


def _sizes(errors: Sequence[float]) -> tuple[str, str]:
    if not errors:
        return "–", "–"
    return f"{100 * typical(errors):.0f} %", f"{100 * max(map(abs, errors)):.0f} %"


def _verdict(others: Sequence[Sequence[LeftOut]]) -> str:
    """Says which form predicts best what it was not fitted to."""
    scores = {
        form.name: typical([each.error for each in found])
        for form, found in zip(FORMS, others, strict=True)
        if found
    }
    if RING.name not in scores:
        return "Nothing could be left out: too few worlds and shardings."
    best = min(scores, key=lambda name: scores[name])
    if scores[best] == scores[RING.name]:
        return (
            f"No other form predicts what was left out better than the model's own ({RING.name})."
        )
    return f"**{best}** predicts what was left out better than the model's own form ({RING.name})."


def _rows(others: Sequence[LeftOut]) -> str:
    """Makes a table of the model's own form, medians of the rows that sent the same."""
    same: dict[tuple[str, ...], list[LeftOut]] = {}
    for each in others:
        r = each.record
        ranks = f"{r['world']}" + (f" on {r['nodes']}" if r["nodes"] > 1 else "")
        sent: tuple[str, ...] = (
            str(r["model"]), NAMES[r["sharding"]], ranks, str(r["gather_ranks"]), str(r["gather_calls"]),
            f"{r['gather_bytes'] / 1e6:.1f}",
        )  # fmt: skip
        same.setdefault(sent, []).append(each)
    lines = []
    for sent, rows in same.items():
        measured = statistics.median(each.record["gathers_alone_s"] for each in rows)
        predicted = statistics.median(each.predicted for each in rows)
        change = f"{100 * (predicted / measured - 1):+.0f} %"
        lines.append((*sent, f"{1e3 * measured:.1f}", f"{1e3 * predicted:.1f}", change))
    heads = (
        "model", "sharding", "ranks", "of a gather", "gathers (counted)", "MB (counted)", "ms (measured)",
        "ms (modelled from the others)", "error",
    )  # fmt: skip
    return markdown_table(heads, lines)
