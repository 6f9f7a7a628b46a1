"""How the words' logits answer to what is added behind an inner layer, at the labelled position.

After a plain forward that keeps its keys and values, the labelled position alone runs again, once for each
direction, with ε u added to the inner layer's output: J u = (z(ε) - z(0)) / ε. What stands before it is not
computed anew, nor blocks before the inner layer's, so C directions cost C tokens an example in the rest of
the blocks, and not C forwards. They run beside one that has nothing added, in one forward, so rounding that
follows from a product's shape cancels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tezo_ds.errors import ConfigError
from tezo_ds.losses.head import Head
from tezo_ds.losses.objective import Objective
from tezo_ds.models.structure import is_classifier, is_encoder_decoder, is_masked_lm
from tezo_ds.output_layer.columns import Answers
from tezo_ds.output_layer.entry import Entry, Late
from tezo_ds.output_layer.inner import InnerLayer, directions
from tezo_ds.trunk.outputs import hidden_in, hidden_of
from tezo_ds.trunk.stand_ins import replaced

PUSH = 0.05  # ε over the length of the hidden state behind the block
OTHERS = 4  # positions before a labelled one whose inputs are kept
CLOSE, ROUNDINGS = 1e-2, 8  # how far, over the largest logit, a position that goes on may be off


class _Watched:
    """What an inner layer is given, and the hidden states behind its block; what to add to its output.

    Attributes:
        inner: the inner layer.
        given: (B, T, n), or (B * T, n).
        behind: (B, T, d).
        entry: what enters its block, and whether the forward that runs is looked at.
        tried: whether a position that went on alone was compared with a whole forward's.
        push: to be added, (rows, m); None: nothing.
    """

    def __init__(self, module: nn.Module, inner: InnerLayer, stack: ExitStack) -> None:
        self.given = self.behind = torch.empty(0)
        self.push: Tensor | None = None
        self.tried, self.inner = False, inner
        layer, block = inner.layer, inner.block
        self.entry = Entry(module, block, stack)
        for hook in (
            layer.register_forward_pre_hook(self._before, with_kwargs=True),
            layer.register_forward_hook(self._after),
            block.register_forward_hook(self._behind),
        ):
            stack.callback(hook.remove)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.entry.on:
            self.given = hidden_in(args, kwargs)

    def _after(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return None if self.push is None else output + self.push.to(output.dtype).view_as(output)

    def _behind(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.entry.on:
            self.behind = hidden_of(output)


class Answering:
    """Context manager: knows of every batch that runs inside what is known of some inner layers.

    Args:
        objective: of the model, whose terms are off.
        words: token ids, int64 (C,).
        inner: the inner layers.
        rows: gives the words' rows of the output layer, (C, d), once a batch has run.
        late: is given what enters the first inner layer's block.
    """

    def __init__(
        self, objective: Objective, words: Tensor, inner: Sequence[InnerLayer],
        rows: Callable[[], Tensor], late: Late,
    ) -> None:  # fmt: skip
        self._objective, self._sharding = objective, objective.sharding
        self._words, self._inner, self._rows, self._late = words, inner, rows, late
        self._head, self._stack = Head(objective.sharding), ExitStack()
        self._watched: list[_Watched] = []
        self._kept: Any = None

    def __enter__(self) -> Answering:
        module = self._sharding.module
        self._watched = [_Watched(module, inner, self._stack) for inner in self._inner]
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @cached_property
    def directions(self) -> Tensor:
        """U, float32 (d, C)."""
        return directions(self._rows())

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Context manager: the model's forward inside keeps its keys and values."""
        module = self._sharding.module
        forward = module.forward
        self._kept = None

        def keep(**inputs: Any) -> Any:
            outputs = forward(**{**inputs, "use_cache": True})
            self._kept = getattr(outputs, "past_key_values", None)
            return outputs

        with ExitStack() as looking, replaced(module, keep):
            for watched in self._watched:
                looking.enter_context(watched.entry.watching())
            yield

    @torch.no_grad()
    def of(self, batch: Mapping[str, Any], positions: Tensor, logits: Tensor) -> list[Answers]:
        """Returns what is known of each inner layer, for the batch that has just run inside `keeping`. Every
        rank must call it.

        Args:
            batch: the examples, (B, T).
            positions: flat positions with a label, int64 (k,).
            logits: of the words there, (k, C).

        Raises:
            ConfigError: the model cannot go on from keys and values.
        """
        length = batch["labels"].shape[1]
        device = self._sharding.device
        own = positions.to(device) if len(positions) else torch.zeros(1).long().to(device)
        rows, places = own // length, own % length
        if self._sharding.maxima([not hasattr(self._kept, "layers")])[0]:
            raise self._unfit("keeps no keys and values")
        mask, count = batch.get("attention_mask", torch.ones_like(batch["labels"])), len(positions)
        before = positions_before(mask.to(device), rows[:count], places[:count])
        found = [
            self._answers(watched, batch, rows, places, before, logits.to(device), count)
            for watched in self._watched
        ]
        self._late.keep([watched.entry for watched in self._watched])
        return found

    def _answers(
        self, watched: _Watched, batch: Mapping[str, Any], rows: Tensor, places: Tensor,
        before: tuple[Tensor, Tensor], logits: Tensor, count: int,
    ) -> Answers:  # fmt: skip
        path, n = watched.inner.path, watched.inner.sizes[1]
        if self._sharding.maxima([watched.given.numel() != batch["labels"].numel() * n])[0]:
            raise self._unfit(f"runs {path} on other positions than all of a batch, as experts do")
        given = watched.given.reshape(*batch["labels"].shape, n)
        inputs = given[rows, places]  # (k, n)
        hidden = _wide(watched.behind[rows, places])  # (k, d)
        step = PUSH * hidden.norm(dim=1)  # (k,): ε of each example
        U = self.directions.to(step)
        pushes = torch.cat([torch.zeros_like(U[:, :1]), U], dim=1).t()  # (1 + C, d)
        watched.push = (pushes[:, None] * step[:, None]).flatten(0, 1)  # branch by branch
        try:
            found = self._tried(
                watched,
                logits,
                lambda: self._forward(watched.entry, batch, rows, places, len(pushes)),
            )
        finally:
            watched.push = None
        answers = (found[1:] - found[0]) / step[:, None]
        return Answers(inputs[:count], answers.permute(1, 2, 0)[:count].contiguous(), given[before])

    def _forward(
        self, entry: Entry, batch: Mapping[str, Any], rows: Tensor, places: Tensor, branches: int
    ) -> Tensor:
        """Runs the labelled positions alone, behind the keys and values of what stands before them: the
        words' logits, (branches, k, C)."""
        several = rows.repeat(branches)
        kept = copy.copy(self._kept)
        kept.layers = [copy.copy(layer) for layer in kept.layers]
        for layer in kept.layers[entry.place :]:  # those that run
            layer.batch_select_indices(several)
        batch = self._objective.inputs(batch)
        ids = batch["input_ids"]
        before = batch.get("attention_mask", torch.ones_like(ids)).clone()[rows]
        before[torch.arange(ids.shape[1], device=rows.device) >= places[:, None]] = 0
        mask = torch.cat([before, torch.ones_like(before[:, :1])], dim=1)  # (k, T + 1)
        at = batch.get(
            "position_ids", torch.arange(ids.shape[1], device=rows.device).expand_as(ids)
        )
        inputs = {
            "input_ids": ids[rows, places][:, None].repeat(branches, 1),
            "attention_mask": mask.repeat(branches, 1),
            "position_ids": at[rows, places][:, None].repeat(branches, 1),
        }
        inputs = {**self._objective.inputs(inputs), "past_key_values": kept, "use_cache": True}
        words = self._words.to(rows.device)
        self._head.mode = self._objective.head_mode
        everyone = torch.arange(len(rows), device=rows.device)
        hidden = entry.given
        if entry.leaves_out:
            hidden = hidden[several, places.repeat(branches)][:, None]  # (branches * k, 1, d)
        with entry.beginning(hidden):
            return self._head(inputs, everyone, branches, lambda logits, _: _wide(logits), words)

    def _tried(self, watched: _Watched, logits: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """Returns what `run` gives, (1 + C, k, words). Sees once that positions that go on from keys and
        values have a whole forward's logits, (k, words), and whether so they do without earlier blocks."""
        if watched.tried:
            return run()
        watched.tried = True
        if watched.entry.leaves_out:
            try:
                found = run()
                differs = not _alike(found[0], logits, watched.given.dtype)
            except Exception:  # whatever a model of unknown kind may object to
                differs = True
            if not self._sharding.maxima([differs])[0]:
                return found
            watched.entry.give_up()
        found = run()
        if self._sharding.maxima([not _alike(found[0], logits, watched.given.dtype)])[0]:
            raise self._unfit(
                "goes on from its keys and values to other logits than a whole forward's"
            )
        return found

    def _unfit(self, why: str) -> ConfigError:
        name = type(self._sharding.module).__name__
        return ConfigError(f"inner_layers: {name} {why}; leave inner_layers off")


def positions_before(mask: Tensor, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rows and places of OTHERS positions before each labelled one, from the first to the last that
    is no padding; of a labelled position that has none before it nothing.

    Args:
        mask: what is no padding, (B, T).
        rows, places: of the labelled positions, int64 (k,).
    """
    at = torch.arange(mask.shape[1], device=mask.device)
    counted = (mask[rows].bool() & (at < places[:, None])).cumsum(dim=1)  # (k, T)
    last = counted.amax(dim=1, keepdim=True) - 1
    nth = last * torch.arange(OTHERS, device=mask.device) // (OTHERS - 1)  # (k, OTHERS)
    found = torch.searchsorted(counted, nth + 1)
    some = last[:, 0] >= 0
    return rows[some].repeat_interleave(OTHERS), found[some].flatten()


def _alike(again: Tensor, logits: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether logits of positions that went on are those of a whole forward in some dtype, (k, C)."""
    if not len(logits):  # of a rank without examples, which runs along with one position
        return True
    close = max(CLOSE, ROUNDINGS * torch.finfo(dtype).eps) * float(logits.nan_to_num().abs().max())
    return torch.allclose(again, logits.to(again), rtol=0, atol=close, equal_nan=True)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def refuse_unfit(objective: Objective) -> None:
    """Raises ConfigError if the model is of a kind that has no inner layers to be fitted."""
    module = objective.sharding.module
    if is_masked_lm(module) or is_encoder_decoder(module) or is_classifier(module):
        raise ConfigError(
            f"inner_layers: {type(module).__name__} is no causal model, so its labelled positions cannot run "
            "by themselves; leave inner_layers off"
        )
