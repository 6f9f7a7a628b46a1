"""Objective of a branch: the loss sum and count of each example of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tezo_ds.errors import DataError
from tezo_ds.losses.head import Head
from tezo_ds.losses.metric import Metric, class_counts, counted, loss_of, wrong
from tezo_ds.losses.targets import IGNORE, decoder_inputs, targets, width_of
from tezo_ds.models.flash_rows import OF_ONE_ROW
from tezo_ds.models.structure import is_classifier, is_encoder_decoder
from tezo_ds.sharding.base import Sharding
from tezo_ds.trunk.trunk import EXAMPLE_IDS, Trunk, two_of


class Taker(Protocol):
    """What is given the logits of labelled positions in all branches, as forwards compute them."""

    def add(self, logits: Tensor, labels: Tensor, /) -> None:
        """Takes some positions, see `Responses.add`; or examples' losses, see `LossResponses.add`."""


LossFn = Callable[[Any, Mapping[str, Any]], tuple[Tensor, Tensor]]


def repeat(batch: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Repeats every tensor of a batch `times` over along its first dim, copy after copy."""
    if times == 1:
        return dict(batch)
    return {
        key: value.repeat(times, *[1] * (value.dim() - 1))
        if isinstance(value, Tensor) and value.dim()
        else value
        for key, value in batch.items()
    }


class Objective:
    """Loss sums and counts of a model on a batch, branch by branch.

    Attributes:
        choices: int64 (words,), tokens that alone count in the default loss: the cross-entropy of
            picking the right one of them, not of predicting it among all; None: all tokens count.
        metric: what stands in the default loss's place: 1 less the accuracy of predictions among the choices,
            or classes, or less their macro F1; None: nothing does.
        micro_batch: examples of this rank in one forward; 0: all of a batch.
        trunk: splits forwards where the first module that trains stands; None: they are whole.
        gain: name of what minus the loss is, where that is what users look at; None: the loss itself is.
        step: index of the step that is measured.
        empty: what is wrong with a batch of nothing, and what to do; {} is "any" or "some", of the ranks.

    Args:
        sharding: the model.
        loss_fn: (outputs, batch) -> (loss_sum, count), each (examples,). None: cross-entropy on
            batch["labels"]: next-token for causal models, in place for masked ones, token classes and
            decoders that an encoder goes before, of one class an example for sequence classification.
    """

    gain: str | None = None
    step = 0
    empty = (
        "no position of the batch carries a label on {} rank; check the labels (-100 means none) and the "
        "truncation length"
    )

    def __init__(self, sharding: Sharding, loss_fn: LossFn | None) -> None:
        self.sharding = sharding
        self._loss_fn = loss_fn
        self._parameters = inspect.signature(sharding.module.forward).parameters
        self._decodes = is_encoder_decoder(sharding.module)
        self._classifies = is_classifier(sharding.module)
        self._head = Head(sharding) if loss_fn is None else None
        self.choices: Tensor | None = None
        self.metric: Metric | None = None
        self.micro_batch = 0
        self.trunk: Trunk | None = None
        self._responses: Taker | None = None
        self._lean: Tensor | None = None
        self.first: Callable[[Mapping[str, Any]], None] | None = None  # called once, with a batch

    def checked(self, batch: Any) -> Mapping[str, Any]:
        """Returns a batch, but for `OF_ONE_ROW`; raises DataError unless it holds tensors by names that the
        model's forward takes."""
        wrong, names = "", self._parameters
        by_name = batch if isinstance(batch, Mapping) else {}
        if not any(isinstance(value, Tensor) and value.dim() for value in by_name.values()):
            wrong = f"got a {type(batch).__name__} without tensors by name"
        elif "input_ids" in names and not set(by_name) & (set(names) - {"labels"}):
            wrong = f"got {', '.join(map(str, by_name))}, none of which is an input of the model's"
        for key in ("input_ids", "attention_mask", *(["labels"] if self._loss_fn is None else [])):
            if not wrong and not isinstance(by_name.get(key, torch.empty(0)), Tensor | None):
                wrong = f"{key} is a {type(by_name[key]).__name__}"
        if wrong:
            raise DataError(f"batch: {wrong}; pass a dict of tensors, the first dim its examples")
        batch = {key: value for key, value in by_name.items() if key not in OF_ONE_ROW}
        if self.first is not None:
            self.first(batch)
            self.first = None
        return batch

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the part of a batch that the model's forward takes, on its device, without labels, which
        are shifted into a decoder that is given nothing else."""
        takes_any = all(p.kind.name.startswith("VAR_") for p in self._parameters.values())
        chosen = {
            key: value.to(self.sharding.device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
            if key not in ("labels", EXAMPLE_IDS) and (takes_any or key in self._parameters)
        }
        given = {"decoder_input_ids", "decoder_inputs_embeds"} & chosen.keys()
        if self._decodes and not given and isinstance(batch.get("labels"), Tensor):
            shifted = decoder_inputs(self.sharding.module, batch["labels"])
            chosen["decoder_input_ids"] = shifted.to(self.sharding.device)
        if "use_cache" in self._parameters:
            chosen["use_cache"] = False  # keys and values of a forward that is never continued
        return chosen

    @property
    def head_mode(self) -> str:
        """Logits that the model lets be left out, see `Head.mode`; "whole" with a loss_fn."""
        return "whole" if self._head is None else self._head.mode

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any], branches: int) -> Tensor:
        """Returns loss sums and counts of `branches` copies of this rank's batch, whose first dim is the
        examples: float64 (2, branches) on the model's device; of F1 its counts, (S, branches), see `loss_of`.
        Over several forwards where there are more examples than `micro_batch`, as many on every rank. Raises
        DataError: no "labels" and no loss_fn."""
        self.settle(batch, branches)
        sums = [self._sums(part, branches, i) for i, part in enumerate(self._parts(batch))]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(dim=0)

    def _parts(self, batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Returns the parts of a batch that have a forward each, as many on every rank."""
        if not self.micro_batch:
            return [batch]
        parts: list[Mapping[str, Any]] = list(micro_batches(batch, self.micro_batch))
        most = self.sharding.maxima([len(parts)])[0]
        if len(parts) < most:  # as this rank has fewer examples: of these no label counts
            idle = {**parts[-1], "labels": torch.full_like(parts[-1]["labels"], IGNORE)}
            parts += [idle] * (most - len(parts))
        return parts

    @torch.no_grad()
    def fill(self, batch: Mapping[str, Any]) -> None:
        """Runs a batch through the trunk alone, as far as its cache lacks some of it on any rank."""
        assert self.trunk is not None
        for part in self._parts(batch):
            self.trunk.fill(part, self.inputs(part))

    def settle(self, batch: Mapping[str, Any], branches: int) -> None:
        """Finds at the first batch, by some forwards of two of its examples, the model's trunk; and, where
        somebody is given logits, which of them the model lets be left out."""
        trunk, head = self.trunk, self._head
        if trunk is not None and not trunk.settled:
            self._by_two(batch, lambda two: trunk.settle(lambda: self._sums(two, branches)))
        if self._responses is not None and head is not None and not head.settled:
            # Else a forward that shows that none can be has given wrong ones by then.
            self._by_two(batch, lambda two: self._sums(two, branches))

    def _by_two(self, batch: Mapping[str, Any], run: Callable[[Mapping[str, Any]], Any]) -> None:
        """Runs two examples of a batch for their forwards alone."""
        # Responses are a whole batch's, and counts do not tell forwards of two kinds apart.
        aside, self._responses, self.metric = (self._responses, self.metric), None, None
        try:
            run(two_of(batch))
        finally:
            self._responses, self.metric = aside

    @property
    def piecewise_constant(self) -> bool:
        """Whether branches may all give the same value with nothing wrong: a metric or a reward does not move
        with every change of the weights."""
        return self.metric is not None

    def losses_of(self, sums: Tensor) -> Tensor:
        """Returns the losses (…) of a call's sums over all ranks, (S, …)."""
        return loss_of(sums, self.metric)

    def counts_of(self, sums: Tensor) -> Tensor:
        """Returns how many labels, or weights of a `loss_fn`, sums (S, …) are of: (…)."""
        return counted(sums, self.metric)

    @property
    def has_logits(self) -> bool:
        """Whether losses are cross-entropies of logits, and not a `loss_fn`'s."""
        return self._head is not None

    @contextmanager
    def responding(self, responses: Taker) -> Iterator[None]:
        """Context manager: logits of forwards inside, each of all branches of a step, go into `responses`; a
        `loss_fn`'s losses where it shows no logits."""
        self._responses = responses
        try:
            yield
        finally:
            self._responses = None

    @contextmanager
    def leaning(self, biases: Tensor) -> Iterator[None]:
        """Context manager: the choices' logits of each branch get biases of its own, (branches, words)."""
        self._lean = biases if biases.shape[1] else None
        try:
            yield
        finally:
            self._lean = None

    def recurring(self, several: bool) -> AbstractContextManager[None]:
        """Returns a context manager: where `several` calls inside are of one batch, the trunk is run once."""
        return self.trunk.recurring() if several and self.trunk is not None else nullcontext()

    def _split(
        self, batch: Mapping[str, Any], branches: int, positions: Tensor | None
    ) -> AbstractContextManager[None]:
        """Returns a context manager: the forward inside runs the trunk once for all branches."""
        return (
            nullcontext() if self.trunk is None else self.trunk.serving(batch, branches, positions)
        )

    def _rows_of(self, hidden: Tensor) -> Tensor | None:
        """Returns the labelled positions that hidden states stand for, where they do."""
        return None if self.trunk is None else self.trunk.rest.rows_of(hidden)

    def _sums(self, batch: Mapping[str, Any], branches: int, part: int = 0) -> Tensor:
        """Returns sums as a call does, float64 (S, branches), by one forward of a part of a batch."""
        if self.trunk is not None:
            self.trunk.part = part
        if self._head is not None:
            return self._token_losses(self._head, batch, branches)
        assert self._loss_fn is not None
        repeated = repeat(batch, branches)
        device = self.sharding.device
        repeated = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in repeated.items()}
        with self._split(batch, branches, None):
            outputs = self.sharding.forward(**self.inputs(repeated))
        returned = self._loss_fn(outputs, repeated)
        try:
            both = torch.stack([torch.as_tensor(t).double() for t in returned])
            both = both.view(2, branches, -1)  # (2, branches, examples)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                "loss_fn must return (loss sums, counts), tensors of a number for each example it is "
                f"given; got {type(returned).__name__} ({error})"
            ) from error
        if self._responses is not None:
            self._responses.add(both[0], both[1, 0])
        return self._added(*both)

    def _token_losses(self, head: Head, batch: Mapping[str, Any], branches: int) -> Tensor:
        positions, tokens = self._labelled(batch)

        def losses(logits: Tensor, part: slice) -> Tensor:
            words = _wide(logits)  # (branches, j, words)
            if self._lean is not None:
                words = words + self._lean.to(words)[:, None]
            if self._responses is not None:
                self._responses.add(words, tokens[part])
            if self.metric is not None:
                return (class_counts if self.metric == "f1" else wrong)(words, tokens[part])
            right = tokens[part].repeat(branches)
            return F.cross_entropy(words.flatten(0, 1), right, reduction="none").view(branches, -1)

        inputs = self.inputs(repeat(batch, branches))
        # Of classes there are no positions: a model pools its hidden states itself.
        with self._split(batch, branches, None if self._classifies else positions):
            found = head(inputs, positions, branches, losses, self.choices, self._rows_of).double()
        if self.metric == "f1":  # (branches, k, S)
            return found.sum(dim=1).t()
        return self._added(found, torch.ones_like(found))

    def _added(self, losses: Tensor, counts: Tensor) -> Tensor:
        """Returns sums, (2, branches), of each labelled position's, or example's, (branches, …)."""
        return torch.stack([losses.sum(dim=1), counts.sum(dim=1)])

    def _labelled(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns flat positions (k,) that predict a label, and their labels, as places among the
        choices where there are any: (k,)."""
        if "labels" not in batch:
            raise DataError('batch has no "labels"; add them (-100 where none), or pass a loss_fn')
        wanted = targets(self.sharding.module, batch["labels"]).reshape(-1)  # (B * T,)
        positions = (wanted != IGNORE).nonzero()[:, 0]
        tokens = wanted[positions].to(self.sharding.device)
        if self.choices is None:
            return positions, tokens
        self.choices = self.choices.to(tokens.device)
        return positions, _index_in(self.choices, tokens)

    def _words(self, logits: Tensor) -> Tensor:
        """Returns logits (…, vocabulary) of the choices, or of all words: (…, words), float32 or wider."""
        return _wide(logits if self.choices is None else logits[..., self.choices])

    @torch.no_grad()
    def score(
        self, batch: Mapping[str, Any], candidates: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores each position with a label by a plain forward, in the order of the flat batch.

        Returns, on the CPU, the example that each position belongs to, int64 (k,); the cross-entropy of its
        label, float32 (k,); the logits of the `candidates`, token ids (words,): float32 (k, words).
        """
        ids = torch.empty(0, dtype=torch.int64) if candidates is None else candidates
        ids = ids.to(self.sharding.device)

        def both(logits: Tensor, tokens: Tensor) -> Tensor:
            losses = F.cross_entropy(self._words(logits), tokens, reduction="none")
            return torch.cat([losses[:, None], logits[:, ids].float()], dim=-1)

        rows, result = self.reduced(batch, both)
        return rows, result[:, 0], result[:, 1:]

    @torch.no_grad()
    def reduced(
        self, batch: Mapping[str, Any], of: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Returns `score`'s examples, (k,), and what `of` gives of logits (j, vocabulary) and labels (j,) of
        some positions, joined, (k, …); on the CPU."""
        assert self._head is not None, "scores need the default loss"
        positions, tokens = self._labelled(batch)
        if self.trunk is not None:
            self.trunk.part = 0
        with self._split(batch, 1, None):  # so that a run without the trunk gives the same bits
            result = self._head(
                self.inputs(batch), positions, 1, lambda z, part: of(z[0], tokens[part])[None]
            )
        return positions.cpu() // width_of(batch["labels"]), result[0].cpu()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def micro_batches(batch: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """Yields parts of a batch, cut along the first dim of its longest tensors."""
    count = max(len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim())
    for start in range(0, count, size):
        yield {
            key: value[start : start + size]
            if isinstance(value, Tensor) and value.dim() and len(value) == count
            else value
            for key, value in batch.items()
        }


def _index_in(choices: Tensor, tokens: Tensor) -> Tensor:
    """Returns the place of each token among the choices: (k,); raises DataError if it is none of them."""
    same = tokens[:, None] == choices
    if not bool(same.any(dim=1).all()):
        stranger = tokens[~same.any(dim=1)][0].item()
        raise DataError(f"label token {stranger} is none of the choices {choices.tolist()}")
    return same.int().argmax(dim=1)
