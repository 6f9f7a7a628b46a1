"""What each head gathers at a labelled position, and how the words' logits answer to what heads give.

Attention is linear in its values. So the labelled position runs again with what enters the value projection
in the place of the values, as many of its numbers at a time as a value has, and what the heads give then is
p_h = Σ_t a_ht x_t, without that anybody looks into how a model makes its weights a.

How logits answer to what heads give has as many numbers as the hidden state, for each word: too many to be
asked of each example. It is asked of the mean over examples, each of which is asked for a few numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tezo_ds.losses.objective import Objective
from tezo_ds.output_layer.going import Change, alike, unfit, wide
from tezo_ds.output_layer.inner import Heads, InnerLayer
from tezo_ds.output_layer.value_rows import value_rows
from tezo_ds.output_layer.values import Gathered
from tezo_ds.output_layer.watched import Watched
from tezo_ds.trunk.outputs import hidden_in, hidden_of
from tezo_ds.trunk.stand_ins import replaced

SHARE = 128  # an example is asked for one of so many numbers that heads give; or for one a word


class Attended(Watched):
    """What a value projection is given, and what its attention's heads give; what to add to that.

    Attributes:
        heads: of the attention.
        rows: which of the numbers that the map gives are values, int64 (groups * size,); None: not known yet.
        projected: what the map gave in the whole forward that is looked at, (B, T, m), as long as they are
            not.
        gave: what all heads gave in the whole forward that is looked at, (B, T, H * size).
        mixed: what the attention's last map made of it, (B, T, d).
        again: what they gave in the last forward.
        push: to be added to what they give, (rows, H * size); None: nothing.
    """

    def __init__(self, module: nn.Module, inner: InnerLayer, stack: ExitStack) -> None:
        super().__init__(module, inner, stack)
        assert inner.heads is not None
        self.heads: Heads = inner.heads
        self.gave = self.mixed = self.again = self.projected = torch.empty(0)
        values = self.heads.groups * self.heads.size
        self.rows = torch.arange(values) if inner.sizes[0] == values else None
        self.compared = False
        for hook in (
            self.heads.last.register_forward_pre_hook(self._given),
            self.heads.last.register_forward_hook(self._made),
        ):
            stack.callback(hook.remove)

    def _after(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.entry.on and self.rows is None:
            self.projected = output
        return None  # it is to what heads give that something is added

    def _given(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self.again = hidden_in(args, {})
        if self.entry.on:
            self.gave = self.again
        if self.push is None:
            return None
        return (self.again + self.push.to(self.again.dtype).view_as(self.again), *args[1:])

    def _made(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.entry.on:
            self.mixed = hidden_of(output)


@dataclass(frozen=True)
class Seen:
    """What a whole forward of a batch gave the value projection.

    Attributes:
        given: x, (B, T, width).
        rows, places: of the labelled positions, int64 (k,).
        before: rows and places of some positions before them.
        count: number of labelled positions that count: k, or none where k is one that runs along.
        layers: keys and values that the forward kept, a layer for each block.
    """

    given: Tensor
    rows: Tensor
    places: Tensor
    before: tuple[Tensor, Tensor]
    count: int
    layers: Sequence[Any]


Within = Callable[[int, Change], None]
Ask = Callable[[Tensor], Tensor]


def gathered(
    objective: Objective, watched: Attended, seen: Seen, batch: Mapping[str, Any], words: int,
    within: Within, ask: Ask,
) -> Gathered:  # fmt: skip
    """Returns what is known of a value projection, for one batch. Every rank must call it.

    Args:
        objective: of the model.
        watched: of the value projection.
        seen: what a whole forward gave it.
        batch: the examples, (B, T).
        words: C, which is also how many copies of the positions run beside the plain one at a time.
        within: runs so many copies of the labelled positions through the block, with keys and values changed.
        ask: pushes (K, k, H * size) -> how the logits change, over ε: (K, k, C).

    Raises:
        ConfigError: heads give something else than what attention gathers of the values.
    """
    heads, at = watched.heads, (seen.rows, seen.places)
    width = heads.count * heads.size
    if watched.rows is None:
        watched.rows = _rows(objective, watched, seen)
    asked = coordinates(batch, *at, words, width)  # (k, K)
    gave = wide(watched.gave.reshape(*seen.given.shape[:2], width)[at])  # (k, H * size)
    # As long a change of the hidden state as that of other inner layers, going by what the map makes of all.
    made = wide(watched.mixed.reshape(*seen.given.shape[:2], -1)[at]).norm(dim=1)
    gain = gave.norm(dim=1) / made  # (k,)
    gain = torch.where(gain.isfinite() & (gain > 0), gain, 1.0)  # heads may give nothing
    if (
        not watched.tried
    ):  # shows whether earlier blocks can be left out, before anything relies on it
        ask(gave.new_zeros(1, *gave.shape))
    pooled = _pooled(objective, watched, seen, words, within)
    sums, counts = torch.zeros(words, width).double(), torch.zeros(width).double()
    for some in asked.split(words, dim=1):
        pushes = F.one_hot(some.t(), width).to(gain) * gain[:, None]  # (K, k, H * size)
        with _comparing(objective, watched, pooled, gave):
            found = ask(pushes) / gain[:, None]  # (K, k, C)
        own = found[:, : seen.count].flatten(0, 1).double().cpu()
        places = some.t()[:, : seen.count].flatten().cpu()
        sums.index_add_(1, places, own.t())
        counts.index_add_(0, places, torch.ones(len(places)).double())
    device = seen.given.device
    return Gathered(
        pooled[: seen.count],
        sums.to(device),
        counts.to(device),
        seen.given[seen.before],
        heads.groups,
        watched.rows,
        watched.inner.sizes[0],
    )


def coordinates(
    batch: Mapping[str, Any], rows: Tensor, places: Tensor, words: int, width: int
) -> Tensor:
    """Returns which of the numbers that heads give are asked of each example: int64 (k, K), evenly spaced
    from a place that follows from the example's tokens, so whatever the batch and the rank it is the same."""
    count = count_asked(width, words)
    ids = batch["input_ids"].cpu()
    mask = batch.get("attention_mask", torch.ones_like(ids)).cpu().bool()
    starts = [
        zlib.crc32(ids[row, : place + 1][mask[row, : place + 1]].numpy().tobytes())
        for row, place in zip(rows.tolist(), places.tolist(), strict=True)
    ]
    apart = torch.arange(count) * width // count
    return ((torch.tensor(starts)[:, None] + apart) % width).to(rows.device)


def count_asked(width: int, words: int) -> int:
    """Returns how many of the numbers that heads give, `width` in all, are asked of an example."""
    return min(width, max(words, width // SHARE))


def _rows(objective: Objective, watched: Attended, seen: Seen) -> Tensor:
    """Returns which of the numbers that the map gives are values, the same on all ranks, on the CPU."""
    heads, found = watched.heads, None
    kept = getattr(seen.layers[heads.place], "values", None)  # (B, groups, T, size)
    length, count = seen.given.shape[1], heads.groups * heads.size
    if isinstance(kept, Tensor) and kept.shape[1:] == (heads.groups, length, heads.size):
        values = kept.transpose(1, 2).reshape(-1, count)
        found = value_rows(watched.projected.reshape(len(values), -1), values)
    ours = None if found is None else found.tolist()
    all_of = objective.sharding.gather(ours)
    if ours is None or any(theirs != ours for theirs in all_of):
        why = f"keeps other values than {watched.inner.path} gives (or use inner_maps last)"
        raise unfit(objective, why)
    watched.projected = torch.empty(0)
    return torch.tensor(ours)


def _pooled(
    objective: Objective, watched: Attended, seen: Seen, words: int, within: Within
) -> Tensor:
    """Returns p of each head at the labelled positions, (k, H, width), in the dtype of the forward."""
    heads, (k, width) = watched.heads, (len(seen.rows), seen.given.shape[-1])
    project, places = watched.inner.layer.forward, watched.rows
    pieces = -(-width // heads.size)

    def in_pieces(x: Tensor) -> Tensor:
        """Returns inputs (…, width) in pieces as long as a value, zero after the end: (…, pieces, size)."""
        return F.pad(x, (0, pieces * heads.size - width)).unflatten(-1, (pieces, heads.size))

    entered, found = in_pieces(seen.given), []  # (B, T, pieces, size)
    for chosen in torch.arange(pieces).split(words + 1):

        def change(layers: Sequence[Any], rows: Tensor, chosen: Tensor = chosen) -> None:
            layer = layers[heads.place]
            values = entered[:, :, chosen][rows[:k]].permute(2, 0, 1, 3).flatten(0, 1)[:, None]
            values = values.expand(-1, heads.groups, -1, -1)  # (pieces * k, groups, T, size)
            kept = getattr(layer, "values", None)
            fits = isinstance(kept, Tensor) and kept.shape == values.shape
            if objective.sharding.maxima([not fits])[0]:
                raise unfit(objective, "keeps values in a form of its own (or use inner_maps last)")
            layer.values = values.to(kept).contiguous()

        def own(x: Tensor, chosen: Tensor = chosen) -> Tensor:
            """Gives pieces of what enters, in the place of the position's own values."""
            branch, y = chosen.repeat_interleave(k).to(x.device), project(x)
            piece = in_pieces(x)[
                torch.arange(len(x), device=x.device), ..., branch, :
            ]  # (rows, 1, size)
            y[..., places] = piece.repeat(*(1 for _ in piece.shape[:-1]), heads.groups).to(y.dtype)
            return y

        with replaced(watched.inner.layer, own):
            within(len(chosen), change)
        found.append(watched.again.reshape(len(chosen), k, heads.count, heads.size))
    return torch.cat(found).permute(1, 2, 0, 3).flatten(2)[..., :width]


@contextmanager
def _comparing(
    objective: Objective, watched: Attended, pooled: Tensor, gave: Tensor
) -> Iterator[None]:
    """Context manager: sees once, in a forward inside, that the projection of what heads gather is what they
    gave."""
    if watched.compared:
        yield
        return
    watched.compared, heads = True, watched.heads
    project, found = watched.inner.layer.forward, list[Tensor]()

    def note(x: Tensor) -> Tensor:
        found.append(project(pooled))
        return project(x)

    with replaced(watched.inner.layer, note):
        yield
    values = found[0][..., watched.rows].unflatten(-1, (heads.groups, heads.size))
    group = torch.arange(heads.count, device=gave.device) // (heads.count // heads.groups)
    ours = wide(values[:, torch.arange(heads.count), group]).flatten(1)
    if objective.sharding.maxima([not alike(ours, gave, pooled.dtype)])[0]:
        raise unfit(
            objective,
            f"has heads that give something else than what they gather of {watched.inner.path} (or use "
            "inner_maps last)",
        )
