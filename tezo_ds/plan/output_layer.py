"""The fit of the output layer: what a rank keeps for it, what ranks add up, and the arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from tezo_ds.config import TezoConfig
from tezo_ds.config.block import AUTO
from tezo_ds.errors import ConfigError
from tezo_ds.models.structure import embeddings
from tezo_ds.output_layer.answering import OTHERS
from tezo_ds.output_layer.attending import count_asked
from tezo_ds.output_layer.columns import CHUNK, silent_count
from tezo_ds.output_layer.inner import InnerLayer, InnerLayers, named
from tezo_ds.output_layer.language import CHUNK_NUMEL
from tezo_ds.output_layer.lbfgs import PAIRS
from tezo_ds.output_layer.values import SILENT
from tezo_ds.patterns import numbered_layers
from tezo_ds.plan.job import Job
from tezo_ds.plan.needs import GIB
from tezo_ds.plan.timing import all_reduce, flops
from tezo_ds.plan.trunk import hidden_size

PRODUCTS = 500  # gradients or products of a fit: some hundreds, as the data have it; assumed
VECTORS = 8  # of Newton's method and its conjugate gradients, or of L-BFGS beside its pairs
COPIES = 3  # logits of a chunk, their exponentials, and what is multiplied


@dataclass(frozen=True)
class Fit:
    """What a fit takes of a rank.

    Attributes:
        positions: labelled positions of this rank.
        words: C label words, or at most as many tokens that are labels.
        numbers: variables of the convex problem.
        states: bytes that are kept of the positions while the fit runs, twice that while they are joined.
        solver: bytes of the solver's vectors and of a chunk.
        message: bytes of an all-reduce, one for each product or gradient; 0: of a single rank.
        forwards: forwards of an example: one, and for inner layers one or two in a share of the blocks.
        tokens: of a labelled position, those that run again for inner layers, each in its share of blocks.
    """

    positions: int
    words: int
    numbers: int
    states: int
    solver: int
    message: int
    forwards: float = 1.0
    tokens: float = 0.0

    @property
    def nbytes(self) -> int:
        """Most bytes at once."""
        return self.states + max(self.states, self.solver)


def fit_of(
    module: nn.Module, config: TezoConfig, ranks: int, examples: int, labels: int, words: int | None,
    length: int, compute: torch.dtype | None = None,
) -> Fit | None:  # fmt: skip
    """Returns what a fit takes; None where the config has none.

    Args:
        module: the model, without values.
        config: the run's config.
        ranks: ranks with data of their own.
        examples: training examples over all ranks.
        labels: labels of an example.
        words: label words, where they alone count in the loss; None: all tokens do, and the different ones
            among the labels are taken to be as many as they can be.
        length: tokens of an example, whose hidden states are kept for inner layers.
        compute: dtype in which weights are gathered; None: their own.

    Raises:
        ConfigError: inner layers are fitted to label words, and there are none.
    """
    if config.output_layer == "frozen":
        return None
    if config.inner_layers != "none" and words is None:
        raise ConfigError(
            "inner_layers: are fitted to label words that alone count in the loss; give their number by "
            "--words, or leave inner_layers off"
        )
    width, layer = hidden_size(module), embeddings(module, "output")
    vocabulary = getattr(layer, "out_features", 1)
    itemsize = (compute or next(module.parameters()).dtype).itemsize
    count = min(examples, config.output_layer_examples or examples)
    positions = -(-count // ranks) * labels
    among = words if words is not None else min(vocabulary, count * labels)
    each = width * itemsize + 8 + 1  # and the label's place, and whether it is held out
    if words is not None:
        numbers, largest = among * (width + 1), 0
        states = positions * (each + 4 * among)
        solver = 8 * (VECTORS * numbers + 3 * CHUNK * width)
    else:
        rank = 0 if config.output_layer == "bias" else min(config.output_layer_rank, width)
        numbers, largest = among * (rank + 1), max(rank * width, 2 * among, width + 1)
        states = positions * (each + 2 * max(4, itemsize)) + among * (width + 1) * itemsize
        solver = 8 * ((VECTORS + 2 * PAIRS) * numbers + COPIES * CHUNK_NUMEL)
    layers = InnerLayers(module).of_blocks(config.inner_layers, config.inner_maps)
    added = [_added(inner, among, itemsize) for inner in layers]
    states += sum(positions * each.kept + each.once for each in added)
    shares, one = _shares(module, config.inner_layers, config.inner_maps)
    if shares and max(shares) < 1:  # else forwards begin at the first block anyway
        states += -(-count // ranks) * length * width * itemsize
    silent = [each.silent for each in added]
    numbers += sum(each.numbers for each in added)
    largest = max([largest, *silent, *(each.known for each in added)])
    # Of a chunk single precision is at hand, and double is made for a gradient.
    chunk = min(positions, CHUNK)
    solver += sum(8 * VECTORS * each.numbers + 12 * chunk * each.made for each in added)
    solver += 8 * (sum(silent) + max(silent, default=0))
    message = 8 * max(numbers, largest) if ranks > 1 else 0
    tokens = sum(
        # Where blocks before its own are left out, those behind it can be, too.
        each.tokens * share + each.within * (one if share < 1 else 1)
        for each, share in zip(added, shares, strict=True)
    )
    again = 2 if config.inner_layers == AUTO else 1  # what terms are worth is measured first
    forwards = 1 + again * max(shares, default=0.0)
    return Fit(positions, among, numbers, states, solver, message, forwards, tokens)


@dataclass(frozen=True)
class _Added:
    """What an inner layer takes.

    Attributes:
        numbers: of A.
        kept: bytes of a labelled position.
        once: bytes that are kept, whatever the positions.
        silent, known: numbers of messages.
        made: numbers of a labelled position that products are made of.
        tokens: of a labelled position, that run again.
        within: those that run again in this block alone.
    """

    numbers: int
    kept: int
    once: int
    silent: int
    known: int
    made: int
    tokens: int
    within: int


def _added(inner: InnerLayer, words: int, itemsize: int) -> _Added:
    n = inner.sizes[1]
    if (heads := inner.heads) is None:
        kept = (1 + OTHERS) * n * itemsize + 4 * words**2
        silent, made = silent_count(n) * n, n + words**2
        return _Added(words * n, kept, 0, silent, n + 1, made, words + 1, 0)
    given = heads.count * heads.size  # numbers that all heads give
    asked = count_asked(given, words)
    return _Added(
        numbers=heads.groups * min(words, heads.size) * n,
        kept=(heads.count + OTHERS) * n * itemsize,
        once=8 * (words + 1) * given,
        silent=silent_count(n, SILENT) * n,
        known=(words + 1) * given + n,
        made=heads.count * n,
        tokens=asked + -(-asked // words),
        within=-(-n // heads.size),
    )


def _shares(module: nn.Module, chosen: str, maps: str) -> tuple[list[float], float]:
    """Returns the share of the blocks that runs again for each of some inner layers, from its own on, and
    that of a block alone."""
    layers = numbered_layers(name for name, _ in module.named_parameters())
    one = 1 / max(1, len(layers))
    return [1 - layers.index(block) * one for block in named(chosen, module, maps)], one


def seconds(job: Job, fit: Fit) -> float:
    """Returns the seconds of a fit: a forward of each example, what of it runs again, one or two forwards
    with the terms of inner layers, from the first on, and some hundreds of products or gradients."""
    examples = fit.positions // job.labels
    tokens = int(examples * fit.forwards * job.length + fit.positions * fit.tokens)
    once = flops(job, tokens, fused=job.run.fused)
    width = job.shape.hidden
    rows = width + 2 * (fit.numbers // fit.words)  # their logits, the term, and the slopes
    products = PRODUCTS * 2.0 * fit.positions * fit.words * rows
    rate = job.cluster.gpu.flops * job.cluster.efficiency
    return (once + products) / rate + PRODUCTS * (
        all_reduce(job, fit.message) if fit.message else 0
    )


def line(fit: Fit, seconds: float, every: int) -> str:
    """Returns what is to be said of a fit."""
    sent = f", an all-reduce of {fit.message:,} bytes each" if fit.message else ""
    again = f", again every {every} steps" if every else ""
    return (
        f"output layer: a rank keeps {fit.states / GIB:.3g} GiB of states of {fit.positions:,} labels while "
        f"it is fitted ({fit.nbytes / GIB:.3g} GiB at most); {fit.words:,} words, {fit.numbers:,} numbers, "
        f"some {PRODUCTS} products or gradients{sent}; {seconds:.3g} s before the first step{again}"
    )  # fmt: skip


def as_dict(fit: Fit, seconds: float) -> Mapping[str, Any]:
    """Returns all numbers."""
    return {**asdict(fit), "bytes": fit.nbytes, "seconds": seconds}
