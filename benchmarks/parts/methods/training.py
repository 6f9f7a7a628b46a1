"""One training run of `benchmarks/methods.py`: some steps from the same weights, then judged."""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import tezo_ds
from parts.methods.data import Splits
from tezo_ds.engine.live_bytes import LiveBytes
from tezo_ds.errors import ProbeError
from tezo_ds.losses.targets import IGNORE, targets
from tezo_ds.tasks import Example, batch_indices, collate, encode, first_tokens
from tezo_ds.tasks.evaluation import Evaluator

LORA = "lora-adamw"
SEEDS_APART = 1000  # TeZO's refreshes and LOZO's periods take the seeds that follow
MEMORY_STEPS = 3
PACE_ROUNDS, PACE_STEPS = 5, 4

Step = Callable[[int], object]


@dataclass(frozen=True)
class Settings:
    """All that a run depends on besides task, method, learning rate and seed.

    Attributes:
        budget: seconds of training, at the pace that each method has when nothing disturbs it.
        rho, dense_rho: ρ of directions of low rank, and of MeZO's; about what `rho: auto` chooses.
        include: glob patterns of the matrices that train.
        max_length: tokens; a longer prompt loses its beginning.
        dtype: dtype of the weights.
    """

    budget: float
    batch_size: int
    train_examples: int
    valid_examples: int
    test_examples: int
    queries: int = 1
    rank: int = 16
    rho: float = 1e-3
    dense_rho: float = 1e-3
    include: tuple[str, ...] = ("*v_proj*",)
    max_length: int = 48
    dtype: str = "float32"

    def fields(self) -> dict[str, Any]:
        """Returns the fields as JSON has them."""
        return {**asdict(self), "include": list(self.include)}


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run: accuracy and loss (None: not finite) on the examples it was judged on."""

    steps: int
    seconds: float
    accuracy: float
    loss: float | None
    n: int
    seconds_judging: float
    error: str | None = None


class Weights:
    """A copy of a model's weights, to be put back before each run."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._kept = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def put_back(self) -> None:
        """Restores the model's weights from the copy, in place."""
        for name, parameter in self._model.named_parameters():
            parameter.copy_(self._kept[name])


def tezo_fields(method: str, lr: float, seed: int, settings: Settings) -> dict[str, Any]:
    """Returns the tezo block of a run; LOZO keeps its own rank of 2, and MeZO its weights as they were, which
    in 16 bits would drift if restored by subtraction."""
    rho = settings.dense_rho if method.startswith("mezo") else settings.rho
    fields: dict[str, Any] = {
        "method": method, "lr": lr, "seed": seed * SEEDS_APART, "rho": rho, "restore": "copy",
        "queries": settings.queries, "include": settings.include, "check_every": 0,
    }  # fmt: skip
    return {**fields, "rank": settings.rank} if method.startswith("tezo") else fields


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the options of all benchmarks on this data: examples, model, and files by the benchmark's name."""
    root, add = Path(__file__).resolve().parents[3], parser.add_argument
    add("--train-examples", type=int, default=800)
    add("--test-examples", type=int, default=200)
    add("--model", default=".cache/quickstart/SmolLM2-135M-Instruct")
    add("--cache", type=Path, default=root / ".cache/methods", help="of the data")
    add("--out", type=Path, default=root / f"runs/{name}", help="folder of results.jsonl")
    add("--page", type=Path, default=root / f"docs/{name}.md", help="where the tables go")
    add("--report", action="store_true", help="run nothing, report what there is")


class Trainer:
    """Trainer of a model on a task, each time from the weights that the model had at first.

    Args:
        model: the model, whose weights are written by some methods, and put back.
        tokenizer: the model's tokenizer.
        task: the task's examples.
        settings: settings of all runs.
        weights: the model's weights, before anything trained.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Splits,
        settings: Settings,
        weights: Weights,
    ) -> None:
        self._model, self._tokenizer, self._task = model, tokenizer, task
        self._settings, self._weights = settings, weights
        self._pad = int(tokenizer.pad_token_id)
        words = list((task.spec.verbalizers or {}).values())
        prompts = [example.prompt for example in [*task.train, *task.valid, *task.test]]
        tokens = first_tokens(tokenizer, words, prompts)
        assert tokens is not None, f"{task.spec.name}: words {words} are not of one token each"
        self._choices = torch.tensor(tokens)
        # For plain forwards; it never steps.
        self._plain = self._engine({"rank": 1, "include": settings.include})
        self._check_batch = self._batch(task.valid[:8], range(min(8, len(task.valid))))
        self._first_loss = self._plain.loss(self._check_batch)

    def paces(self, methods: Sequence[str]) -> dict[str, float]:
        """Measures median seconds of a step of each method, in turns so that what else the machine does
        falls on all alike."""
        taken: dict[str, list[float]] = {method: [] for method in methods}
        for _ in range(PACE_ROUNDS):
            for method in methods:
                self.put_back()
                with self._started(method, 1e-12, 0) as (step, _engine):
                    step(0)  # makes what later steps find made
                    for index in range(1, 1 + PACE_STEPS):
                        start = time.perf_counter()
                        step(index)
                        taken[method].append(time.perf_counter() - start)
        return {method: statistics.median(seconds) for method, seconds in taken.items()}

    def run(self, method: str, lr: float, seed: int, role: str, steps: int) -> Outcome:
        """Trains, then judges: by the test examples if `role` is "final", else by those for validation.
        A loss that is not finite ends the run, whose accuracy is then 0."""
        self.put_back()
        start, error = time.perf_counter(), None
        with self._started(method, lr, seed) as (step, engine):
            try:
                for index in range(steps):
                    step(index)
            except ProbeError as problem:
                error, steps = str(problem), index
            seconds = time.perf_counter() - start
            judged = self.judge(role, engine)
        if error is None and judged.loss is None:
            error = "the loss after training is not finite"
        return replace(
            judged, steps=steps, seconds=seconds, error=error,
            accuracy=judged.accuracy if error is None else 0.0,
        )  # fmt: skip

    def judge(self, role: str, engine: tezo_ds.Engine | None = None) -> Outcome:
        """Judges without training, by the weights as they are, or as an engine has them."""
        examples = self._task.test if role == "final" else self._task.valid
        alike = sorted(examples, key=lambda example: len(example.prompt))  # little padding
        start, max_length = time.perf_counter(), self._settings.max_length
        score = Evaluator(
            engine or self._plain, self._tokenizer, self._task.spec, alike, 25, max_length
        )()
        assert score.accuracy is not None
        seconds = time.perf_counter() - start
        loss = score.loss if math.isfinite(score.loss) else None
        return Outcome(0, 0.0, score.accuracy, loss, score.examples, seconds)

    def peak_bytes(self, method: str) -> int:
        """Measures the most bytes of tensors that are alive at once in three steps, the model's included."""
        self.put_back()
        gc.collect()
        with LiveBytes() as live, self._started(method, 1e-12, 0) as (step, _):
            for index in range(MEMORY_STEPS):
                step(index)
        return live.peak + sum(p.numel() * p.itemsize for p in self._model.parameters())

    def put_back(self) -> None:
        """Restores the weights as at first, and checks that the loss is, too.

        Raises:
            RuntimeError: the model's loss is not what it was: a run left something behind.
        """
        self._weights.put_back()
        loss = self._plain.loss(self._check_batch)
        if not math.isclose(loss, self._first_loss, rel_tol=1e-6):
            raise RuntimeError(
                f"{self._task.spec.name}: loss {loss} before training was {self._first_loss} at "
                "first; an earlier run left something in the model"
            )

    def _engine(self, fields: dict[str, Any]) -> tezo_ds.Engine:
        engine = tezo_ds.initialize(self._model, fields)
        engine.objective.choices = self._choices
        return engine

    def _batch(self, examples: Sequence[Example], chosen: Sequence[int]) -> dict[str, Tensor]:
        encoded = encode(self._tokenizer, [examples[i] for i in chosen], self._settings.max_length)
        return collate(encoded, self._pad)

    def _batches(self, seed: int) -> Callable[[int], dict[str, Tensor]]:
        """Returns a function from a step to its batch, of a subset of the training examples by the seed."""
        s, train = self._settings, self._task.train
        count = min(s.train_examples, len(train))
        subset = [train[i] for i in batch_indices(len(train), count, 0, seed, 0, 1)]
        return lambda step: self._batch(
            subset, batch_indices(count, s.batch_size, step, seed + SEEDS_APART, 0, 1)
        )

    @contextmanager
    def _started(self, method: str, lr: float, seed: int) -> Iterator[tuple[Step, tezo_ds.Engine]]:
        """Context manager: gives a function that makes a step, and the engine to judge by."""
        batch = self._batches(seed)
        if method == LORA:
            with self._lora(lr, seed, batch) as step:
                yield step, self._plain
            return
        engine = self._engine(tezo_fields(method, lr, seed, self._settings))
        yield lambda index: engine.step(batch(index)), engine

    @contextmanager
    def _lora(
        self, lr: float, seed: int, batch: Callable[[int], dict[str, Tensor]]
    ) -> Iterator[Step]:
        """Context manager: gives steps of backpropagation into LoRA adapters of the same matrices, which are
        removed at the end."""
        names = [matrix.name.removesuffix(".weight") for matrix in self._plain.space.matrices]
        rank = self._settings.rank
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(self._model, config)
        try:
            trained = [p for p in adapted.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=lr)

            def step(index: int) -> None:
                loss = choice_loss(self._model, batch(index), self._choices)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            yield step
        finally:
            adapted.unload()
            self._model.requires_grad_(True)


def choice_loss(model: PreTrainedModel, batch: dict[str, Tensor], choices: Tensor) -> Tensor:
    """Returns the mean cross-entropy of the labels among the choices, with a gradient: a scalar."""
    wanted = targets(model, batch["labels"])  # (B, T)
    at = wanted != IGNORE
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state  # (B, T, hidden)
    logits = model.get_output_embeddings()(hidden[at])[:, choices]  # (labels, words)
    return F.cross_entropy(logits.float(), (wanted[at][:, None] == choices).int().argmax(dim=1))
