"""Hidden states before the output layer, and what is to be known of their logits, by plain forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tezo_ds.errors import ConfigError
from tezo_ds.losses.head import CHUNK_NUMEL
from tezo_ds.losses.objective import Objective
from tezo_ds.losses.targets import IGNORE, targets
from tezo_ds.output_layer.answering import Answering
from tezo_ds.output_layer.columns import Answers
from tezo_ds.output_layer.entry import Late
from tezo_ds.output_layer.inner import InnerLayer
from tezo_ds.output_layer.language import TokenStates
from tezo_ds.output_layer.multiplier import multiplier
from tezo_ds.output_layer.problem import States
from tezo_ds.output_layer.values import Gathered
from tezo_ds.trunk.outputs import hidden_in

Batches = Iterable[tuple[Mapping[str, Any], Tensor]]
Of = Callable[[Tensor, Tensor], Tensor]


class _Seen:
    """What an output layer was last given, and what it returned; by hooks, which the probes leave alone.

    Attributes:
        multiplier: what the model multiplies that by, once all batches have run.

    Args:
        layer: the output layer.
        words: tokens, int64 (words,).
        stack: its end takes the hooks away.
        knows: whether the words' rows are to be known.
    """

    def __init__(self, layer: nn.Module, words: Tensor, stack: ExitStack, knows: bool) -> None:
        self.hidden = self.logits = torch.empty(0)
        self.rows = self.offset = torch.empty(0)
        self.layer, self.words, self.multiplier = layer, words, 1.0
        self._project, self._knows = layer.forward, knows  # with what probes add to it
        # The last of all that come before the layer, so its weight is gathered then.
        before = layer.register_forward_pre_hook(self._before, with_kwargs=True)
        after = layer.register_forward_hook(self._after)
        stack.callback(before.remove)
        stack.callback(after.remove)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.hidden = hidden_in(args, kwargs)  # (B, T, d)
        if self._knows and not len(self.rows):
            self._know_rows()

    def _after(self, _: nn.Module, args: tuple[Any, ...], logits: Tensor) -> None:
        self.logits = logits

    def _know_rows(self) -> None:
        """Reads the words' rows off the layer's results for one-hot states."""
        width, like = self.hidden.shape[-1], self.hidden
        words = self.words.to(like.device)
        offset = self._project(like.new_zeros(1, 1, width))[0, 0]  # (vocabulary,)
        self.offset, each = offset[words], max(1, CHUNK_NUMEL // len(offset))
        ones = torch.eye(width, dtype=like.dtype, device=like.device).split(each)
        columns = [self._project(part[None])[0][:, words] - self.offset for part in ones]
        self.rows = torch.cat(columns).t().contiguous()  # (words, d)


class _Part(NamedTuple):
    """Positions with a label, of one batch: hidden states (k, d), tokens (k,), whether they are held out
    (k,), and what was made of their logits (k, …); all on the model's device. What is known of each inner
    layer."""

    hidden: Tensor
    tokens: Tensor
    held: Tensor
    made: Tensor
    inner: Sequence[Answers | Gathered] = ()


def collect(
    objective: Objective, layer: nn.Module, batches: Batches, words: Tensor,
    inner: Sequence[InnerLayer] = (), late: Late | None = None,
) -> States:  # fmt: skip
    """Runs batches, as many on every rank, and keeps a state for each position with a label.

    Args:
        objective: of the model, whose term is off.
        layer: the model's output layer.
        batches: batch, and which of its examples are held out, bool (examples,).
        words: token ids, int64 (C,), one of which is each label.
        inner: inner layers of which inputs and responses are kept, too.
        late: with inner layers it is given what enters the first one's block; without, forwards begin there
            with what it was given of the same batches; None: neither.

    Raises:
        ConfigError: the model changes what its output layer returns by more than a factor, or does not use
            it; or its inner layers cannot be fitted.
    """
    with ExitStack() as stack:
        seen = _Seen(layer, words, stack, bool(inner))
        answering = None
        if inner:
            late = late or Late()
            answering = stack.enter_context(
                Answering(objective, words, inner, lambda: seen.rows, late)
            )

        def chosen(logits: Tensor, _: Tensor) -> Tensor:
            return logits[:, words.to(logits.device)].float()

        parts = _joined(_parts(objective, seen, batches, chosen, answering, late))
    truth = _index_in(words, parts.tokens)
    U = torch.empty(0) if answering is None else answering.directions
    return States(parts.hidden, parts.made, truth, parts.held, parts.inner, U, seen.multiplier)


def collect_tokens(
    objective: Objective, layer: nn.Module, batches: Batches, words: Tensor
) -> TokenStates:
    """Runs batches as `collect` does, for losses over the whole vocabulary.

    Args:
        objective: of the model, whose term is off.
        layer: the model's output layer.
        batches: batch, and which of its examples are held out, bool (examples,).
        words: token ids in ascending order, int64 (words,), one of which is each label.

    Raises:
        ConfigError: the model changes what its output layer returns by more than a factor, or does not use
            it.
    """

    def others(logits: Tensor, _: Tensor) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        wide[:, words.to(logits.device)] = -torch.inf
        return torch.stack([wide.logsumexp(dim=1), wide.amax(dim=1)], dim=1)

    with ExitStack() as stack:
        seen = _Seen(layer, words, stack, True)
        parts = _joined(_parts(objective, seen, batches, others))
    truth = _index_in(words, parts.tokens)
    s = seen.multiplier
    rows, offset = seen.rows * s, seen.offset * s
    return TokenStates(parts.hidden, parts.made, truth, parts.held, rows, offset, s)


def _parts(
    objective: Objective, seen: _Seen, batches: Batches, of: Of, answering: Answering | None = None,
    late: Late | None = None,
) -> Iterator[_Part]:  # fmt: skip
    sharding, shown = objective.sharding, None  # a batch whose logits the model has changed
    for number, (batch, out) in enumerate(batches):
        wanted = targets(sharding.module, batch["labels"]).reshape(-1)
        positions = (wanted != IGNORE).nonzero()[:, 0]
        way: AbstractContextManager[None] = nullcontext()
        if answering is not None:
            way = answering.keeping()
        elif late is not None:
            way = late.beginning(number)
        with way:
            rows, made = objective.reduced(batch, of)
        mode = objective.head_mode
        if mode == "whole":
            break
        states = seen.hidden.reshape(-1, seen.hidden.shape[-1])
        device = states.device
        if mode == "chosen":  # (1, k, vocabulary), as the model goes on with them
            own = of(seen.logits[0], wanted[positions].to(device))
            if not torch.equal(own.cpu(), made):
                shown = batch
        inner = [] if answering is None else answering.of(batch, positions, made)
        found = (states[positions.to(device)], wanted[positions], out[rows], made)
        hidden, tokens, held, made = (part.to(device) for part in found)
        yield _Part(hidden, tokens, held, made, inner)
    if objective.head_mode == "whole":  # by the model's code, so on all ranks alike
        raise _unfit(sharding.module, "does not take its logits from its output layer as they are")
    if sharding.maxima([shown is not None])[0]:
        s = multiplier(objective, seen.layer, shown or batch, seen.words)
        if s is None:
            why = "goes on to change what its output layer returns, and not by a factor alone"
            raise _unfit(sharding.module, why)
        seen.multiplier = s


def _joined(parts: Iterable[_Part]) -> _Part:
    all_of = list(parts)
    layers = zip(*(part.inner for part in all_of), strict=True)
    joined = [type(layer[0]).joined(layer) for layer in layers]
    columns = zip(*(part[:4] for part in all_of), strict=True)
    hidden, tokens, held, made = (torch.cat(column) for column in columns)
    return _Part(hidden, tokens, held, made, joined)


def _index_in(words: Tensor, tokens: Tensor) -> Tensor:
    """Returns the place of each token among the words, each of which is there: int64 (k,)."""
    ascending, order = words.to(tokens.device).sort()
    return order[torch.searchsorted(ascending, tokens)]


def _unfit(module: nn.Module, why: str) -> ConfigError:
    return ConfigError(
        f"output_layer: {type(module).__name__} {why}, so that a term there is not one on the logits; "
        "leave it frozen"
    )
