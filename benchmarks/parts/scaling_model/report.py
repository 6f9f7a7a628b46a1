"""The model of scaling as Markdown and pictures. Every number is called measured, counted or modelled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from parts.common.pictures import load_pyplot
from parts.common.tables import markdown_table
from parts.scaling_model.counted import Line
from parts.scaling_model.points import OURS, WAYS, Limit, Point, efficiency, limit, line_of
from tezo_ds.plan import timing
from tezo_ds.plan.hardware import Cluster, Gpu
from tezo_ds.plan.needs import GIB

MARKERS = (
    "<!-- benchmarks/scaling_model.py: begin -->",
    "<!-- benchmarks/scaling_model.py: end -->",
)
SHOWN = {
    "ZeRO-3": ("s/step", "efficiency", "tokens/s", "directions/s"),
    "FSDP2": ("s/step", "efficiency"),
    "hybrid": ("s/step", "efficiency", "tokens/s", "directions/s"),
    "MeZO in place": ("s/step", "tokens/s", "directions/s"),
    "Adam": ("s/step", "tokens/s"),
}


def constants(gpu: str, of: Gpu, cluster: Cluster) -> str:
    """Makes a table of the constants that stand for machines that were not there."""
    rows = [
        ("arithmetic", f"{of.flops / 1e12:.0f} TFLOP/s", f"NVIDIA's data sheet of {gpu}: dense, bfloat16"),
        ("of it reached", f"{100 * cluster.efficiency:.0f} %", "assumed"),
        ("memory", f"{of.memory / GIB:.0f} GiB, {of.hbm / 1e12:.2f} TB/s", "data sheet"),
        ("of it reserved", f"{cluster.reserved / GIB:g} GiB",
         "assumed: CUDA's context, NCCL's and cuBLAS's buffers"),
        ("NVLink, into a GPU", f"{of.nvlink / 1e9:.0f} GB/s", "data sheet: half of both ways together"),
        ("network, into a node", "see each table", "stated: of all adapters of a node together, in full"),
        ("a hop inside of a node", f"{1e6 * cluster.latency_inside:g} µs",
         "NCCL's own model, `tuning.cc`: hwLat of a ring over NVLink, protocol Simple"),
        ("a hop between nodes", f"{1e6 * cluster.latency_between:g} µs", "the same, over a network"),
        ("a collective besides", f"{1e6 * timing.BASE:g} µs", "the same, baseLat"),
    ]  # fmt: skip
    return markdown_table(("constant", "stated", "source"), rows)


def steps(points: Sequence[Point], model: str) -> str:
    """Makes a table of every network and world of one model."""
    heads = ["Gbit/s a node", "GPUs"]
    for way, names in SHOWN.items():
        heads += [f"{way}: {names[0]}", *names[1:]]
    rows = []
    for gbit in dict.fromkeys(p.gbit for p in points):
        lines = [line_of(points, model, gbit, way) for way in SHOWN]
        for at in zip(*lines, strict=True):
            cells = [f"{gbit:g}", f"{at[0].world:,}"]
            for point, line in zip(at, lines, strict=True):
                found = _cells(point, line)
                cells += [found[name] for name in SHOWN[point.way]]
            rows.append(cells)
    return markdown_table(heads, rows)


def _cells(point: Point, line: Sequence[Point]) -> dict[str, str]:
    names = ("s/step", "efficiency", "tokens/s", "directions/s")
    if not point.fits:
        return {**dict.fromkeys(names, "–"), "s/step": "too large"}
    rate = point.directions / point.timing.step
    part = _percent(efficiency(point, line))
    values = (f"{point.timing.step:.3g}", part, f"{point.tokens:,.0f}", _number(rate))
    return dict(zip(names, values, strict=True))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def limits(points: Sequence[Point], fastest: float) -> list[Limit]:
    """Returns the limits of every model, network and way of this engine; one for any network where gathers
    stay inside of nodes.

    Args:
        points: points of all models.
        fastest: bytes a second of NVLink.
    """
    keys = dict.fromkeys((p.model, p.gbit, p.way) for p in points if p.way in OURS)
    found = [limit(line_of(points, *key), fastest) for key in keys]
    return list({(each.last.model, each.last.way, _network(each)): each for each in found}.values())


def _network(each: Limit) -> str:
    return f"{each.last.gbit:g}" if each.last.column.traffic.between else "any"


def stops(found: Sequence[Limit]) -> str:
    """Makes a table of where each way stops scaling."""
    world = f"{found[0].last.world:,}"
    heads = (
        "model", "Gbit/s a node", "way", "GPUs a copy", "GiB a GPU", "fits from", "waits for gathers from",
        "gather, s", "of it hops", "forward, s", "scalars, ms", f"efficiency at {world}",
        "tokens/s never above", "half of that at about", "hidden by examples a rank", "that fit",
        "or by Gbit/s a node",
    )  # fmt: skip
    rows = []
    for each in found:
        last, spent = each.last, each.last.timing
        rows.append((
            last.model, _network(each), last.way, f"{last.group:,}",
            f"{last.column.memory.total / GIB:.1f}", _gpus(each.fits), _gpus(each.waits),
            f"{spent.gather:.3g}", f"{100 * last.latency / spent.gather:.0f} %", f"{spent.compute:.3g}",
            f"{1e3 * spent.scalars:.3g}", _percent(each.efficiency), f"{each.ceiling / 1e6:,.3g} M",
            f"{_about(each.half)} GPUs", str(each.examples), str(last.column.examples),
            "–" if each.gbit is None else f"{each.gbit:,.0f}",
        ))  # fmt: skip
    return markdown_table(heads, rows)


def _gpus(world: int | None) -> str:
    return "none" if world is None else f"{world:,}"


def _percent(part: float) -> str:
    return "–" if math.isnan(part) else f"{100 * part:.0f} %"


def _about(number: float) -> str:
    return f"{float(f'{number:.2g}'):,.0f}"


def words(found: Sequence[Limit], chip: Gpu) -> str:
    """Says in sentences what the table of limits says."""
    return "\n".join([*map(_sentence, found), *_room(found, chip)])


def _sentence(each: Limit) -> str:
    last, spent = each.last, each.last.timing
    begin = f"- **{last.model}, {last.way}, {_network(each)} Gbit/s a node**: "
    if each.fits is None:
        return f"{begin}does not fit up to {last.world:,} GPUs."
    if each.waits is None:
        text = (
            f"gathers ({spent.gather:.2g} s) are hidden behind forwards ({spent.compute:.2g} s) in every "
            f"world; efficiency at {last.world:,} GPUs is {_percent(each.efficiency)}."
        )
    else:
        cause = "hops" if last.latency > spent.gather / 2 else "bytes"
        fit = "and" if each.examples <= last.column.examples else "but only"
        text = (
            f"from {each.waits:,} GPUs on forwards ({spent.compute:.2g} s) wait for gathers; at "
            f"{last.world:,} these take {spent.gather:.2g} s, most of it {cause}, and efficiency is "
            f"{_percent(each.efficiency)}. {each.examples} examples a rank would hide them, {fit} "
            f"{last.column.examples} fit."
        )
    return f"{begin}{text} Hops leave half of the most tokens/s at about {_about(each.half)} GPUs."


def _room(found: Sequence[Limit], chip: Gpu) -> list[str]:
    """Says what the largest copy is that a node holds."""
    inside = [e.last for e in found if e.last.fits and not e.last.column.traffic.between]
    if not inside:
        return []
    largest = max(inside, key=lambda point: point.column.memory.shard)
    taken = largest.column.memory
    weights = (chip.memory - taken.total + taken.shard) * largest.group / 2
    return [
        f"- **A node's memory** ends what a copy on it may be: beside what {largest.model} has gathered, "
        f"{largest.group} GPUs hold about {weights / 1e9:.0f} B weights of 16 bits. Larger copies take two "
        f"nodes, and gather as FSDP2 on {2 * largest.group} GPUs."
    ]


def counted(checks: Sequence[tuple[str, Sequence[Line]]]) -> str:
    """Makes a table of the dry runs of some points."""
    rows = [
        (about, what, f"{predicted:,}", f"{found:,}", "yes" if fine else "**no**")
        for about, lines in checks
        for what, predicted, found, fine in lines
    ]
    return markdown_table(("point", "of a rank and a step", "modelled", "counted", "agrees"), rows)


def draw(points: Sequence[Point], page: Path) -> None:
    """Draws two pictures beside the page: seconds of a step and tokens/s, against GPUs."""
    pyplot = load_pyplot()
    models = list(dict.fromkeys(p.model for p in points))
    networks = list(dict.fromkeys(p.gbit for p in points))
    styles = ("-", "--", ":", "-.")
    for stem, label in (("step", "s/step, modelled"), ("tokens", "tokens/s, modelled")):
        figure, axes = pyplot.subplots(
            1, len(models), figsize=(4.5 * len(models), 4.5), layout="constrained", squeeze=False
        )
        for axis, model in zip(axes[0], models, strict=True):
            for colour, way in enumerate(WAYS):
                for gbit, style in zip(networks, styles, strict=False):
                    line = [p for p in line_of(points, model, gbit, way) if p.fits]
                    values = [p.timing.step if stem == "step" else p.tokens for p in line]
                    worlds = [p.world for p in line]
                    name = f"{way}, {gbit:g} Gbit/s a node"
                    axis.plot(worlds, values, style, marker=".", color=f"C{colour}", label=name)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.set_yscale("log")
            axis.set_title(model)
            axis.set_xlabel("GPUs")
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel(label)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8
        )
        figure.savefig(page.with_name(f"{page.stem}-model-{stem}.png"), dpi=100)
        pyplot.close(figure)
