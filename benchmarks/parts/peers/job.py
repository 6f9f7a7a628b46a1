"""One run of `benchmarks/peers.py` as given to every rank, and plain inference of its sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig

from parts.methods.training import Settings
from parts.peers.loops import Batch
from tezo_ds.losses.objective import Objective
from tezo_ds.models import loading
from tezo_ds.sharding import Sharding, sharding_of
from tezo_ds.sharding.world import local_device
from tezo_ds.tasks import batch_indices, collate
from tezo_ds.tasks.encoded import Encoded


@dataclass(frozen=True)
class Job:
    """One run, in which a batch is a pure function of `examples`, `seed` and the step.

    Attributes:
        way: one of WAYS; None: inference alone.
        ranks: processes; several shard by ZeRO-3.
        backward: whether the run goes backward.
        copies: how often the batch goes into a plain forward.
        model: a folder.
        lr, seed: learning rate and seed of the training.
        examples: the examples to train on.
        pad: the token to pad with.
        choices: int64 (words,), tokens of the task's words.
    """

    way: str | None
    ranks: int
    backward: bool
    copies: int
    model: str
    settings: Settings
    lr: float
    seed: int
    examples: tuple[Encoded, ...]
    pad: int
    choices: Tensor

    def batch(self, step: int, rank: int) -> Batch:
        """Returns this rank's examples of a step, on its device."""
        size = self.settings.batch_size
        mine = batch_indices(len(self.examples), size, step, self.seed, rank, self.ranks)
        batch = collate([self.examples[i] for i in mine], self.pad)
        return {key: value.to(local_device()) for key, value in batch.items()}

    def load(self) -> nn.Module:
        """Loads the model; under ZeRO-3 partitioned while it is read, as it is for a user."""
        return loading.load_model(self.model, self.settings.dtype, self.zero3)

    @property
    def zero3(self) -> dict[str, Any] | None:
        """DeepSpeed's config: buckets as transformers' "auto" makes them; its own linear where the run goes
        backward, as otherwise the graph would hold on to gathered weights."""
        if self.ranks == 1:
            return None
        square = AutoConfig.from_pretrained(self.model).hidden_size ** 2
        return {
            "train_micro_batch_size_per_gpu": max(1, self.settings.batch_size // self.ranks),
            "bf16": {"enabled": self.settings.dtype == "bfloat16"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,
                "reduce_bucket_size": square,
                "stage3_prefetch_bucket_size": square * 9 // 10,
                "memory_efficient_linear": self.backward,
            },
        }

    def place(self, model: nn.Module) -> Sharding:
        """Shards a model, for forwards only."""
        return sharding_of(model.eval(), self.zero3)


def inference(model: nn.Module, job: Job) -> Callable[[Batch], object]:
    """Returns a function for plain inference of `job.copies` of a batch in one forward."""
    objective = Objective(job.place(model), None)
    objective.choices = job.choices
    return lambda batch: objective(batch, job.copies)
