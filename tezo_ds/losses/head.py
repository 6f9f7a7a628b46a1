"""Vocabulary projection of positions that carry a label alone, a chunk of them at a time.

The logits of a whole batch are often the largest tensor of a forward: 32 x 64 tokens x 49,152 words
in float32 are 400 MB. A run of the output layer over a few positions at a time needs 64 MB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tezo_ds.models.structure import embeddings
from tezo_ds.sharding.base import Sharding

CHUNK_NUMEL = 1 << 24  # logits at a time

Reduce = Callable[[Tensor, slice], Tensor]
RowsOf = Callable[[Tensor], Tensor | None]
# Attribute of a function that stands in an output layer's forward and adds something to its result: adds
# it to the logits of some words alone, (hidden states, logits, words) -> logits.
TO_WORDS = "to_words"


def _no_rows(hidden: Tensor) -> Tensor | None:
    return None


class Head:
    """Reduction of a model's logits at chosen positions, without ever holding all of them.

    The output layer's forward is replaced for the time of one forward of the model. Models that
    return its result as it is (Llama, OPT, GPT-NeoX, …) get a chunk at a time. Models that go on to
    change the result row by row (soft-capping, scaling, a cast) are noticed, tried, and get the chosen
    positions at once; those that do anything else, or have no output layer, compute all logits.

    Attributes:
        mode: which of the three it is, as far as is known.
        settled: whether a forward has shown it; one that shows the opposite runs once more, and has called
            `reduce` before.
    """

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding
        self._layer = embeddings(sharding.module, "output")
        self.mode = "chunks" if self._layer is not None else "whole"
        self.settled = False

    def __call__(
        self, inputs: dict[str, Any], positions: Tensor, branches: int, reduce: Reduce,
        words: Tensor | None = None, rows_of: RowsOf = _no_rows,
    ) -> Tensor:  # fmt: skip
        """Runs the model once (more often only the first time) and reduces its logits.

        Args:
            inputs: for the model's forward, `branches` copies of B examples.
            positions: int64 (k,), places in one copy's flattened (B * T).
            branches: number of copies.
            reduce: (logits (branches, j, vocabulary), slice of the k positions) -> (branches, j, …).
            words: int64 (words,), tokens whose logits alone `reduce` is given: (branches, j, words). A plain
                output layer whose logits are taken as they are, or with a term, computes no others.
            rows_of: of the output layer's input, the positions alone, (branches, k, hidden), where it only
                stands for them; else None.

        Returns:
            reduce's results joined: (branches, k, …).
        """
        positions = positions.to(self._sharding.device)
        while True:
            result = self._run(inputs, positions, branches, reduce, words, rows_of)
            if result is not None:
                self.settled = True
                return result
            self.mode = "chosen" if self._row_by_row(inputs, branches) else "whole"

    def _run(
        self, inputs: dict[str, Any], positions: Tensor, branches: int, reduce: Reduce,
        words: Tensor | None, rows_of: RowsOf,
    ) -> Tensor | None:  # fmt: skip
        """Runs one forward in the present mode; None if the model turns out not to allow that mode."""
        of_all = _narrowed(reduce, words)
        if self._layer is None or self.mode == "whole":
            logits = _logits(self._sharding.forward(**inputs))
            return of_all(_pick(logits, positions, branches), slice(None))
        in_chunks = reduce if self.mode == "chunks" else None
        with _Tap(self._layer, positions, branches, in_chunks, words, rows_of) as tap:
            logits = _logits(self._sharding.forward(**inputs))
        if self.mode == "chosen":
            return of_all(logits, slice(None))
        return tap.result if tap.is_own(logits) else None

    def _row_by_row(self, inputs: dict[str, Any], branches: int) -> bool:
        """Tries, on one example of each branch, whether the model treats each row of its output layer's
        result by itself, so that leaving rows out changes nothing else."""
        assert self._layer is not None
        rows = max(value.shape[0] for value in inputs.values() if isinstance(value, Tensor))
        few = {
            key: value[:: rows // branches]
            if isinstance(value, Tensor) and value.shape[:1] == (rows,)
            else value
            for key, value in inputs.items()
        }
        whole = _logits(self._sharding.forward(**few))
        most = torch.arange(
            max(1, whole.shape[1] - 1), device=whole.device
        )  # a reversal would show
        with _Tap(self._layer, most, branches, None) as tap:
            chosen = _logits(self._sharding.forward(**few))
        expected = _pick(whole, most, branches)
        if not tap.called or chosen.shape != expected.shape:
            return False
        return torch.allclose(
            chosen.float(), expected.float(), rtol=1e-2, atol=1e-2 * float(expected.std())
        )


class _Tap:
    """Context manager: the output layer's forward is replaced inside."""

    def __init__(
        self, layer: nn.Module, positions: Tensor, branches: int, reduce: Reduce | None,
        words: Tensor | None = None, rows_of: RowsOf = _no_rows,
    ) -> None:  # fmt: skip
        self._layer, self._positions, self._branches = layer, positions, branches
        self._rows_of = rows_of
        self._reduce, self._words = reduce, words
        self._before = layer.__dict__.get("forward")
        self._project = layer.forward
        self._returned: tuple[Tensor, int] | None = None
        self.result: Tensor | None = None

    @property
    def called(self) -> bool:
        """Whether the model used its output layer."""
        return self._returned is not None

    def is_own(self, logits: Tensor) -> bool:
        """Returns whether `logits` are the output layer's result, untouched."""
        if self._returned is None:
            return False
        own, version = self._returned
        # Neither by object (wrappers return views) nor by address (those of empty tensors are all
        # equal, and ranks must decide alike).
        same = logits.untyped_storage()._cdata == own.untyped_storage()._cdata
        same = same and logits.shape == own.shape and logits.dtype == own.dtype
        return same and logits._version == version

    def __enter__(self) -> _Tap:
        self._layer.__dict__["forward"] = self._forward
        return self

    def __exit__(self, *error: object) -> None:
        del self._layer.__dict__["forward"]
        if self._before is not None:
            self._layer.__dict__["forward"] = self._before

    def _forward(self, input: Tensor) -> Tensor:  # torch's own name: callers may use it
        rows = self._rows_of(input)
        if rows is None:
            chosen = _pick(input, self._positions, self._branches)  # (branches, k, hidden)
        else:
            chosen = rows[:, : len(self._positions)]
        # Where tensor parallelism has split the output layer, no rank sees whole logits here.
        reduce = None if hasattr(input, "to_local") else self._reduce
        logits = self._project(chosen) if reduce is None else self._in_chunks(chosen, reduce)
        self._returned = logits, logits._version
        return logits

    def _in_chunks(self, chosen: Tensor, reduce: Reduce) -> Tensor:
        """Returns what the model is to return as logits, so that `is_own` knows them."""
        count, out_features = chosen.shape[1], getattr(self._layer, "out_features", CHUNK_NUMEL)
        project, width = self._project, out_features
        if (few := self._of_words_alone()) is not None:
            project, width = few
        else:
            reduce = _narrowed(reduce, self._words)
        step = max(1, CHUNK_NUMEL // (self._branches * width))
        parts = []
        for start in range(0, max(1, count), step):  # once even for none: gathers must stay in step
            part = slice(start, min(start + step, count))
            logits = project(chosen[:, part].contiguous())  # (branches, j, vocabulary or words)
            parts.append(reduce(logits, part))
        self.result = torch.cat(parts, dim=1)
        # What the model does to logits of all words has to show, and not to fail for want of some.
        return logits if few is None else logits.new_zeros(self._branches, 1, out_features)

    def _of_words_alone(self) -> tuple[Callable[[Tensor], Tensor], int] | None:
        """Returns the output layer of the words' rows alone, and their number; None where none are asked for,
        or its weight is not a plain one, or what is added to the layer's result is not known by words."""
        layer, words = self._layer, self._words
        if words is None or type(layer) is not nn.Linear:
            return None
        if type(layer.weight.data) is not Tensor:  # packed
            return None
        add = getattr(self._before, TO_WORDS, None)
        if self._before is not None and add is None:
            return None
        bias = None if layer.bias is None else layer.bias[words]
        weight = layer.weight[words]

        def project(chosen: Tensor) -> Tensor:  # (branches, j, hidden) -> (branches, j, words)
            logits = F.linear(chosen, weight, bias)
            return logits if add is None else add(chosen, logits, words)

        return project, len(words)


def _narrowed(reduce: Reduce, words: Tensor | None) -> Reduce:
    """Returns what reduces the words' logits out of all words'."""
    return reduce if words is None else lambda logits, part: reduce(logits[..., words], part)


def _logits(outputs: Any) -> Tensor:
    """Returns the logits of a model's outputs: a tensor, or an object or tuple that holds them."""
    if isinstance(outputs, Tensor):
        return outputs
    return outputs.logits if hasattr(outputs, "logits") else outputs[0]


def _pick(x: Tensor, positions: Tensor, branches: int) -> Tensor:
    """Picks flat `positions` of each copy from (branches * B, T, width): (branches, k, width)."""
    if hasattr(x, "to_local"):  # a DTensor, which plain positions cannot index
        split: Any = x
        picked = _pick(split.to_local(), positions, branches)
        of_all: Tensor = split.from_local(picked, split.device_mesh, split.placements)
        return of_all
    return x.reshape(branches, -1, x.shape[-1])[:, positions]
