"""Accuracy and loss on a task's examples, at the engine's present coefficients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tezo_ds.engine.engine import Engine
from tezo_ds.tasks.batches import longest_first, rounds, shard_range
from tezo_ds.tasks.encoded import collate
from tezo_ds.tasks.example import Example
from tezo_ds.tasks.generation import Generated
from tezo_ds.tasks.posing import posing_of
from tezo_ds.tasks.spec import MOST_CHOICES, TaskSpec
from tezo_ds.trunk.cache import Cache
from tezo_ds.trunk.trunk import EXAMPLE_IDS

SHOWN = 3  # answers that an evaluation returns


@dataclass(frozen=True)
class Score:
    """Accuracy and mean loss a label token, over all ranks.

    A language-model task and one of answers in free text have no accuracy: None.

    Attributes:
        metric: of generated answers; None where none are generated.
        answers: the first of them.
    """

    accuracy: float | None
    loss: float
    examples: int
    metric: float | None = None
    answers: tuple[str, ...] = ()


class Stopped(Exception):
    """End of an evaluation that was asked to stop, on all ranks alike."""


class Evaluator:
    """Scorer of one fixed set of examples, split over the ranks.

    Where one token, or a class, tells the answers apart, an example is one sequence and its prediction the
    answer with the highest logit. Otherwise each answer is a sequence of its own and the prediction the
    answer with the lowest mean loss a token.

    Attributes:
        encoded: this rank's sequences.
        cache: hidden states of them after the trunk; None: none are kept.
        generated: what measures generated answers; None: nothing does.
        loss_alone: why answers are not picked from, in one line, where the task's are free text: each would
            be compared with all others; None where accuracy is measured, or there are no answers.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        spec: TaskSpec,
        examples: Sequence[Example],
        batch_size: int,
        max_length: int,
        pad_id: int | None = None,
    ) -> None:
        self._engine, self._batch_size = engine, batch_size
        self._pad = int(tokenizer.pad_token_id or 0) if pad_id is None else pad_id
        self.examples = len(examples)
        self.labels = list(spec.verbalizers or {})
        rank, world_size = engine.sharding.rank, engine.sharding.world_size
        self._rounds = rounds(len(examples), batch_size, world_size)
        share = shard_range(len(examples), rank, world_size)
        mine = examples[share.start : share.stop]
        words = list((spec.verbalizers or {}).values())
        self._tokens: list[int] | None = None
        self.loss_alone: str | None = None
        self.cache: Cache | None = None
        self.generated: Generated | None = None
        alone = engine.objective.choices is not None
        posing = posing_of(engine.sharding.module, tokenizer, spec, alone)
        if words:
            self._tokens = posing.tokens(words, [e.prompt for e in examples])
        if spec.is_free_text and self._tokens is None:
            self.loss_alone = (
                f"evaluations measure the loss alone: {len(words)} different answers are taken for free text "
                f"(above {MOST_CHOICES}); --verbalizers makes them words to pick from"
            )
            words, self.labels = [], []
        self._chosen = bool(self.labels) or spec.choices_field is not None
        if self._chosen and self._tokens is None:
            rows = posing.candidates(mine, words, max_length)
        else:
            rows = [[encoded] for encoded in posing.encode(mine, max_length)]
        # Batches of like lengths, of which little is padding.
        order = longest_first([max(len(each.input_ids) for each in row) for row in rows])
        mine, rows = [mine[i] for i in order], [rows[i] for i in order]
        self._truth = torch.tensor(self._right(mine, spec))
        self.encoded = [encoded for row in rows for encoded in row]
        self._counts = [len(row) for row in rows]  # sequences of each example
        self._starts = [0, *accumulate(self._counts)]
        # For a rank that has run out: any sequence will do, as none of its labels count.
        self._filler = posing.encode(examples[:1], max_length)[0]

    def _right(self, examples: Sequence[Example], spec: TaskSpec) -> list[int]:
        """Returns which of the answers is each example's own; nothing where none are picked from."""
        if spec.choices_field is not None:
            return [e.candidates.index(str(e.answer)) for e in examples]
        number = {label: i for i, label in enumerate(self.labels)}
        return [number[e.label] for e in examples if e.label in number]

    def __call__(
        self,
        progress: Callable[[float], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Score:
        """Scores all batches; every rank must call this.

        Args:
            progress: given the fraction done.
            stop: asked on every rank after each batch.

        Raises:
            Stopped: `stop` said so on some rank; raised on all.
        """
        totals = torch.zeros(3, dtype=torch.float64)  # correct, loss sum, label tokens
        sharding = self._engine.sharding
        with self._engine.applied(), self._cached():
            for index in range(self._rounds):
                totals += self._batch(index)
                if progress is not None:
                    progress((index + 1) / self._rounds)
                if sharding.maxima([stop()])[0]:
                    raise Stopped
        correct, loss_sum, tokens = sharding.all_reduce(totals.to(sharding.device)).tolist()
        accuracy = correct / self.examples if self._chosen else None
        score = Score(accuracy, loss_sum / max(tokens, 1), self.examples)
        if self.generated is None:
            return score
        metric, answers = self.generated(progress)
        return replace(score, metric=metric, answers=tuple(answers[:SHOWN]))

    def _cached(self) -> AbstractContextManager[None]:
        trunk = self._engine.objective.trunk
        return nullcontext() if trunk is None else trunk.using(self.cache)

    def _batch(self, index: int) -> Tensor:
        """Returns how many examples of one batch are right, their loss sum and their label tokens."""
        last = len(self._counts)
        first, end = (min(last, at * self._batch_size) for at in (index, index + 1))
        counts, truth, start = self._counts[first:end], self._truth[first:end], self._starts[first]
        encoded = self.encoded[start : self._starts[end]]
        batch = collate(encoded, self._pad, filler=self._filler)
        if self.cache is not None:
            ids = range(start, start + len(encoded))
            batch[EXAMPLE_IDS] = torch.tensor(list(ids) or [-1])  # -1: the filler
        words = None if self._tokens is None else torch.tensor(self._tokens)
        rows, losses, logits = self._engine.objective.score(batch, words)
        sums = torch.zeros(len(encoded), dtype=torch.float64).index_add_(0, rows, losses.double())
        tokens = torch.bincount(rows, minlength=len(encoded)).double()
        correct = torch.tensor(0)
        if self._tokens is not None:
            firsts = rows.diff(prepend=rows.new_tensor([-1])) > 0  # a decoder's answer goes on
            correct = (logits[firsts].argmax(dim=1) == truth).sum()
        elif self._chosen and counts:
            means = (sums / tokens).split(counts)  # of each example, (answers,)
            best = torch.stack([each.argmin() for each in means])
            correct = (best == truth).sum()
            right = torch.tensor([0, *accumulate(counts)][:-1]) + truth
            sums, tokens = sums[right], tokens[right]
        return torch.stack([correct.double(), sums.sum(), tokens.sum()])
