"""A run as one page of HTML that loads nothing: results, curves, samples, configuration, what comes next."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tezo_ds.config import BLOCK, TezoConfig
from tezo_ds.run.about import TRAINER, on_rewards, read_about
from tezo_ds.run.chart import Point, Series, chart
from tezo_ds.run.curve import running_median
from tezo_ds.run.folder import METRICS, PARTS, TEST, VALIDATION, read_metrics
from tezo_ds.run.style import STYLE

# Nothing is fetched, whatever a field holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page_of(run: Path, summary: Mapping[str, Any], device: str) -> str:
    """Returns the page of a run.

    Args:
        run: the run's folder, with config.json and metrics.jsonl.
        summary: content of summary.json.
        device: where forwards ran.

    Raises:
        ConfigError, StorageError: config.json or metrics.jsonl cannot be read.
    """
    about = read_about(run)
    steps = read_metrics(run / METRICS)[0]
    scores = {part: read_metrics(run / METRICS, part)[1] for part in PARTS}
    settings, block, rewarded = about["settings"], about[BLOCK], on_rewards(about)
    name = run.absolute().name
    status = str(summary.get("status", "running"))
    sub = f"{Path(settings['model']).name} on {Path(settings['task']).name}, {block['method']}"
    failed = f'<p class="bad">{escape(str(summary["error"]))}</p>' if "error" in summary else ""
    body = [
        f'<h1>{escape(name)}</h1><p class="sub">{escape(sub)} · {escape(status)}</p>{failed}',
        f'<div class="cards">{"".join(_cards(summary, rewarded))}</div>',
        "<h2>Curves</h2>", *_curves(steps, scores, rewarded),
        *_samples(scores),
        "<h2>What to do next</h2>", *_next(run, about, status),
        "<h2>Configuration</h2>",
        _details("tezo block", _rows(_changed(block)), True),
        _details("all fields of the block", _rows(block.items()), False),
        _details("model and data", _rows(settings.items()), False),
        "<h2>Environment</h2>", _table(_rows(_environment(about, device))),
        "<h2>Summary</h2>", _table(_rows(summary.items())),
    ]  # fmt: skip
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _cards(summary: Mapping[str, Any], rewarded: bool) -> Iterable[str]:
    """Yields the numbers that people look for first."""

    def card(value: str, what: str) -> str:
        return f'<div class="card"><b>{escape(value)}</b><span>{escape(what)}</span></div>'

    known = {name: value for name, value in summary.items() if value is not None}
    for what, first, last, form in (
        ("test accuracy", "accuracy_before", "accuracy_after", "{:.1%}"),
        ("validation accuracy", "validation_accuracy_before", "validation_accuracy_after", "{:.1%}"),
        *(
            (f"{part} loss", f"{part}_loss_before", f"{part}_loss_after", "{:.4f}")
            for part in (() if rewarded else PARTS)
        ),
        (str(known.get("metric", "metric")), "metric_before", "metric_after", "{:.3f}"),
    ):  # fmt: skip
        if first in known and last in known:
            yield card(f"{form.format(known[first])} → {form.format(known[last])}", what)
    if "train_loss" in known:
        yield card(f"{known['train_loss']:.4f}", "mean training loss")
    yield card(f"{known.get('steps', 0):,}", "steps")
    if "seconds" in known:
        yield card(f"{known['seconds']:,.0f} s", "in the last process")


def _curves(
    steps: Sequence[Mapping[str, Any]], scores: Mapping[str, Sequence[Mapping[str, Any]]],
    rewarded: bool,
) -> Iterable[str]:  # fmt: skip
    """Yields figures, of what there is."""

    def points(lines: Iterable[Mapping[str, Any]], field: str, after: int = 0) -> list[Point]:
        kept = [line for line in lines if line.get(field) is not None and "after" not in line]
        return [(line["step"] + after, line[field]) for line in kept]

    what, of_scores = ("reward", "metric") if rewarded else ("loss", "loss")
    values, norms = points(steps, what, 1), points(steps, "gradient_norm", 1)
    judged = [
        Series(f"{part} {what}", points(scores[part], f"{part}_{of_scores}"), colour, "dots")
        for colour, part in ((1, VALIDATION), (2, TEST)) if scores[part]
    ]  # fmt: skip
    yield chart(
        what.capitalize(),
        [
            Series("", values, 0, "faint"),
            Series("training, running median", _smooth(values), 0),
            *judged,
        ],
    )
    for what, form in (("accuracy", 100.0), *(() if rewarded else (("metric", 1.0),))):
        found = [
            Series(part, [(x, form * y) for x, y in points(scores[part], f"{part}_{what}")], colour, "dots")
            for colour, part in ((1, VALIDATION), (2, TEST))
        ]  # fmt: skip
        yield chart(
            "Accuracy, %" if what == "accuracy" else "Metric", [s for s in found if s.points]
        )
    yield chart(
        "‖∇‖, root of the mean of κ²",
        [Series("", norms, 0, "faint"), Series("running median", _smooth(norms), 0)],
    )
    speeds = [
        (line["step"] + 1, line["tokens"] / line["seconds"])
        for line in steps
        if line.get("seconds")
    ]
    yield chart("Tokens a second and rank", [Series("", _smooth(speeds), 0)])


def _smooth(points: Sequence[Point]) -> list[Point]:
    medians = running_median([y for _, y in points])
    return [(x, y) for (x, _), y in zip(points, medians, strict=True)]


def _samples(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterable[str]:
    """Yields the last evaluation's generated answers, if there are any."""
    for part in (VALIDATION, TEST):
        if known := [line for line in scores[part] if line.get(f"{part}_answers")]:
            yield f"<h2>Samples</h2><p>Answers to {part} examples after {known[-1]['step']} steps:</p>"
            for answer in known[-1][f"{part}_answers"]:
                yield f"<pre>{escape(str(answer)) or '(nothing)'}</pre>"
            return


def _next(run: Path, about: Mapping[str, Any], status: str) -> Iterable[str]:
    """Yields commands for what there is."""

    def command(what: str, *words: str) -> str:
        return f"<p>{escape(what)}</p><pre>{escape(shlex.join(['tezo-ds', *words]))}</pre>"

    folder = str(run)
    if status != "finished":
        yield "<p>The same command goes on from the last step that counts.</p>"
    if about["settings"]["task"] != TRAINER:
        yield command(
            "Score it again, or on other data by --test-data:", "evaluate", "--run", folder
        )
        yield command("See what it answers:", "generate", "--run", folder, "--prompt", "…")
    if about[BLOCK]["adapter"] != "tt":  # which has no place in weights
        merged = ("export", "--run", folder, "--merged", f"{folder}-merged")
        yield command("Make a whole model of it, for from_pretrained:", *merged)
    if about[BLOCK]["check_every"]:
        yield command("Rebuild it from its journal, and compare:", "replay", folder, "--verify")


def _changed(block: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yields fields of the block that are not as by default, and always the method, rank, rate and radius."""
    defaults = TezoConfig().model_dump(mode="json")
    always = ("method", "rank", "lr", "rho", "seed")
    return [(k, v) for k, v in block.items() if k in always or v != defaults.get(k)]


def _environment(about: Mapping[str, Any], device: str) -> Iterable[tuple[str, Any]]:
    yield from about["versions"].items()
    yield "python", platform.python_version()
    yield "system", platform.platform()
    yield "device", device
    yield "ranks", about.get("world_size", 1)
    yield "weights", about["weights_dtype"]
    sharded = (
        "ZeRO-3" if about.get("deepspeed") else "FSDP2" if about["settings"]["fsdp"] else "whole"
    )
    yield "sharding", sharded


def _rows(pairs: Iterable[tuple[str, Any]]) -> str:
    return "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(_shown(value))}</td></tr>"
        for name, value in pairs
    )


def _shown(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _table(rows: str) -> str:
    return f"<table>{rows}</table>"


def _details(title: str, rows: str, opened: bool) -> str:
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{_table(rows)}</details>"
