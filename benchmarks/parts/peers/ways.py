"""The ways of training that `benchmarks/peers.py` holds side by side, each started from a loaded model.

All have the same loss: the cross-entropy of the label among the task's words, at labelled positions alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import peft
import torch
from methods import SCALE
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from parts.methods.training import LORA, choice_loss, tezo_fields
from parts.peers.job import Job
from parts.peers.loops import ES_PAIRS, Batch, EggrollLoop, LozoLoop, MezoLoop, chosen
from tezo_ds.config import resolve
from tezo_ds.engine.engine import Engine
from tezo_ds.sharding.world import local_device

VALUES, ALL = ("*v_proj*",), ("*",)  # what trains: the matrices of docs/methods.md, or all there is
Changed = Iterator[tuple[str, Tensor | None]]


class Started(ABC):
    """A way of training under way, on one rank of its world."""

    @abstractmethod
    def plain(self, batches: Sequence[Batch]) -> None:
        """Infers, for each batch, the sequences of a step, in as many forwards as the step makes."""

    @abstractmethod
    def train(self, batches: Sequence[Batch]) -> None:
        """Makes a step on each batch."""

    @abstractmethod
    def changed(self) -> Changed:
        """Yields whole weights that may have changed, by the names of the checkpoint: float32 on the CPU of
        rank 0, None elsewhere. All ranks iterate to the end."""


class Ours(Started):
    """TeZO by the engine."""

    def __init__(self, model: nn.Module, job: Job) -> None:
        config, _ = resolve(tezo_fields("tezo", job.lr, job.seed, job.settings))
        self._engine = Engine(job.place(model), config, None)
        self._engine.objective.choices = job.choices
        self._copies = job.copies

    def plain(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            self._engine.objective(batch, self._copies)

    def train(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            self._engine.step(batch)

    def changed(self) -> Changed:
        trained = {matrix.name for matrix in self._engine.space.matrices}
        for names, tensor in self._engine.merged_tensors(torch.float32):
            for name in trained & set(names):
                yield name, tensor


class ChoiceLoss(nn.Module):
    """A model as a module whose forward is the loss of a batch, as DeepSpeed wants it."""

    def __init__(self, model: nn.Module, choices: Tensor) -> None:
        super().__init__()
        self.model, self._choices = model, choices.to(local_device())

    def forward(self, batch: Batch) -> Tensor:
        return choice_loss(self.model, batch, self._choices)  # type: ignore[arg-type]


class FirstOrder(Started):
    """Backpropagation and torch's AdamW under DeepSpeed's ZeRO-3, of all weights or of LoRA adapters."""

    def __init__(self, model: nn.Module, job: Job, lora: bool) -> None:
        if lora:
            target = _part(job.settings.include)
            rank = job.settings.rank
            config = peft.LoraConfig(
                r=rank,
                lora_alpha=2 * rank,
                target_modules="all-linear" if target is None else [target],
                task_type="CAUSAL_LM",
            )
            torch.manual_seed(job.seed)
            # DeepSpeed refuses adapters of another dtype than the model's
            peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        self._model, self._lora = model, lora
        trained = [p for p in model.parameters() if p.requires_grad]
        self._engine, *_ = deepspeed.initialize(
            model=ChoiceLoss(model, job.choices),
            optimizer=torch.optim.AdamW(trained, lr=job.lr),
            config=job.zero3,
        )

    @torch.no_grad()
    def plain(self, batches: Sequence[Batch]) -> None:
        self._engine.eval()
        for batch in batches:
            self._engine(batch)

    def train(self, batches: Sequence[Batch]) -> None:
        self._engine.train()
        for batch in batches:
            loss = self._engine(batch)
            self._engine.backward(loss)
            self._engine.step()

    @torch.no_grad()
    def changed(self) -> Changed:
        first = self._engine.global_rank == 0
        if not self._lora:
            for name, parameter in self._model.named_parameters():
                with deepspeed.zero.GatheredParameters([parameter]):
                    yield name, parameter.float().cpu().clone() if first else None
            return
        for name, module in self._model.named_modules():
            if isinstance(module, LoraLayer):
                with deepspeed.zero.GatheredParameters(_parameters(module)):
                    yield f"{name}.weight", merged_lora(module) if first else None


def _parameters(layer: Any) -> list[nn.Parameter]:
    return list(layer.parameters())


def merged_lora(layer: Any) -> Tensor:
    """Returns W + BA of a gathered layer, float32."""
    weight: Tensor = layer.get_base_layer().weight
    return (weight.float() + layer.get_delta_weight("default").float()).cpu()


class Loop(Started):
    """MeZO's or LOZO's loop in one process."""

    def __init__(self, model: nn.Module, job: Job, kind: type[MezoLoop]) -> None:
        s = job.settings
        self._trained = dict(chosen(model, s.include))
        rho = s.dense_rho if kind is MezoLoop else s.rho
        self._loss = _loss_of(model, job)
        self._loop = kind(list(self._trained.values()), self._loss, job.lr, rho, job.seed)

    def plain(self, batches: Sequence[Batch]) -> None:
        _repeat(self._loss, batches, 2)

    def train(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            self._loop.step(batch)

    def changed(self) -> Changed:
        yield from _whole(self._trained)


class Eggroll(Started):
    """The ES of `eggroll-es` in one process."""

    def __init__(self, model: nn.Module, job: Job) -> None:
        target = _part(job.settings.include)
        self._trained = dict(chosen(model, job.settings.include))
        self._loss = _loss_of(model, job)
        self._loop = EggrollLoop(model, target, self._loss, job.lr, job.seed)

    def plain(self, batches: Sequence[Batch]) -> None:
        _repeat(self._loss, batches, 2 * ES_PAIRS)

    def train(self, batches: Sequence[Batch]) -> None:
        self._loop.evolve(batches)

    def changed(self) -> Changed:
        yield from _whole(self._trained)


def _whole(parameters: dict[str, nn.Parameter]) -> Changed:
    for name, parameter in parameters.items():
        yield name, parameter.detach().float().cpu()


def _loss_of(model: nn.Module, job: Job) -> Callable[[Batch], Tensor]:
    """Returns the loss function of a whole model, without a graph."""
    loss = ChoiceLoss(model.eval(), job.choices)

    @torch.no_grad()
    def forward(batch: Batch) -> Tensor:
        found: Tensor = loss(batch)
        return found

    return forward


def _repeat(loss: Callable[[Batch], Tensor], batches: Sequence[Batch], times: int) -> None:
    for batch in batches:
        for _ in range(times):
            loss(batch)


def _part(include: Sequence[str]) -> str | None:
    """Returns what a name has to contain to match the pattern; None: nothing."""
    return include[0].strip("*") or None


@dataclass(frozen=True)
class Way:
    """A way of training, which is a row of the tables.

    Attributes:
        start: starts the way from a loaded model and a job.
        ranks: processes that share the batch; 2 shard by ZeRO-3.
        forwards, copies: how a step goes through the model, and plain inference that it is compared with.
        includes: what trains; with the first for the whole budget, with another to see what it costs.
        made: where the way comes from.
    """

    start: Callable[[nn.Module, Job], Started]
    ranks: int
    forwards: int
    copies: int
    includes: tuple[tuple[str, ...], ...]
    lr: float
    made: str

    @property
    def backward(self) -> bool:
        """Whether the way goes backward."""
        return isinstance(self.start, partial) and self.start.func is FirstOrder


BOTH = (VALUES, ALL)
WAYS = {
    "tezo": Way(Ours, 1, 1, 2, BOTH, SCALE["tezo"], "this engine"),
    "tezo, ZeRO-3": Way(Ours, 2, 1, 2, BOTH, SCALE["tezo"], "this engine"),
    "LoRA AdamW, ZeRO-3": Way(
        partial(FirstOrder, lora=True), 2, 1, 1, BOTH, SCALE[LORA], "peft, torch, DeepSpeed"
    ),
    "full AdamW, ZeRO-3": Way(
        partial(FirstOrder, lora=False), 2, 1, 1, (ALL,), 2e-5, "torch, DeepSpeed"
    ),
    "MeZO loop": Way(
        partial(Loop, kind=MezoLoop), 1, 2, 1, BOTH, SCALE["mezo"], "published loop, written here"
    ),
    "LOZO loop": Way(
        partial(Loop, kind=LozoLoop), 1, 2, 1, BOTH, SCALE["lozo"], "published loop, written here"
    ),
    "eggroll-es": Way(Eggroll, 1, 2 * ES_PAIRS, 1, (VALUES,), 0.1, "eggroll-es 0.2.0"),
}
