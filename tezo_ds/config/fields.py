"""Fields of the `tezo` block: types, defaults, bounds, and which go together."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tezo_ds.config.registry import MethodFacts, facts_of
from tezo_ds.config.schedules import LR_SCHEDULES, adaptive_queries, adazeta_queries
from tezo_ds.errors import ConfigError

BLOCK = "tezo"
# What may change when a run goes on, as the same steps follow from it, up to the rounding of losses.
FREE = frozenset({"check_every", "branch_chunk", "memory_budget", "micro_batch"})


class TezoConfig(BaseModel):
    """The `tezo` block. Every field has an override of the same name on the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: str = Field(
        "tezo",
        description="tezo, tezo-m (momentum), tezo-adam, tezo-adam-coef (Adam on the coefficients), "
        "lozo, lozo-m, mezo, mezo-m or mezo-adam",
    )
    rank: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        16, description='r, columns of U and V of each matrix (lozo: 2); "auto": by layer (tezo)'
    )
    rank_threshold: float = Field(
        0.25, gt=0, le=1, description="auto: of the largest singular value; those above it count"
    )
    rank_max: int = Field(64, ge=1, description="auto: most columns")
    refresh_every: int = Field(
        0,
        ge=0,
        description="tezo: steps until W takes in what was learnt and U, V are new; 0: never",
    )
    nu: int = Field(50, ge=1, description="lozo: ν, steps until V is new")
    rank_scaling: bool = Field(
        False, description="lozo: scale updates by 1/rank, as its paper does and its code does not"
    )
    rho: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        1e-3,
        description='perturbation radius ρ; "auto": chosen before the first step, on its batch',
    )
    lr: float = Field(1e-6, ge=0, description="learning rate η at its peak")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how lr goes after the warm-up: stays, or falls to 0 at total_steps"
    )
    warmup_steps: int = Field(0, ge=0, le=2**53, description="steps over which lr rises from 0")
    total_steps: int | None = Field(
        None, ge=1, description="length of the run in steps; linear and cosine need it"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="β₁ of tezo-m, lozo-m, mezo-m")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="β₁ and β₂ of the Adams"
    )
    eps: float = Field(1e-8, gt=0, description="ε of the Adams")
    bias_correction: bool = Field(True, description="of the Adams; TeZO's paper has none")
    seed: int = Field(0, ge=0, description="of U, V, τ and the data order")
    queries: int = Field(1, ge=1, description="directions measured a step (two branches each)")
    query_schedule: Literal["constant", "adaptive", "adazeta"] = Field(
        "constant",
        description="how their number grows by epoch: not, as in TT-ZO, or as in AdaZeta",
    )
    queries_max: int | None = Field(
        None, ge=1, description="most of them, of the growing schedules"
    )
    query_alpha: float = Field(1.0, gt=0, description="adazeta: α of ⌊α epoch^β⌋")
    query_beta: float = Field(0.5, ge=0, description="adazeta: β")
    steps_per_epoch: int | None = Field(
        None, ge=1, description="of the growing schedules; train takes examples over batch size"
    )
    placement: Literal["shared", "per_rank"] = Field(
        "shared",
        description="shared: all ranks measure the same directions, on their own data; per_rank: each "
        "measures as many of its own, for the same traffic",
    )
    difference: Literal["central", "forward"] = Field(
        "central", description="central: two branches a direction; forward: one, and one for all"
    )
    branch_chunk: int = Field(0, ge=0, description="branches in one forward; 0: all of a step")
    memory_budget: float | None = Field(
        None,
        gt=0,
        description="GiB that tensors of a forward may take on a rank, the weights beside; sets "
        "branch_chunk by itself",
    )
    micro_batch: int = Field(0, ge=0, description="a rank's examples in one forward; 0: all")
    clip_kappa: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="bound |κ| by this quantile of the last 256; by default nothing",
    )
    probe: Literal["auto", "fused", "inplace"] = Field(
        "auto", description="fused: all branches in one forward; inplace: one forward a branch"
    )
    restore: Literal["auto", "copy", "subtract"] = Field(
        "auto",
        description="in-place probe: restore weights from a copy, exactly, or by subtracting, without "
        "a copy and with rounding errors; auto: subtract for mezo, as published, else copy",
    )
    stochastic_rounding: bool = Field(
        True, description="of updates that are written into 16-bit weights; else to the nearest"
    )
    train_vectors: bool = Field(False, description="biases and norm weights train too")
    include: tuple[str, ...] = Field(
        ("*",), description="glob patterns: a matrix whose name matches one of them trains"
    )
    exclude: tuple[str, ...] = Field((), description="glob patterns that freeze what include took")
    check_every: int = Field(
        100, ge=0, description="steps between checks that all ranks agree; 0: only at the end"
    )

    @field_validator("method")
    @classmethod
    def _is_a_method(cls, name: str) -> str:
        facts_of(name)
        return name

    @model_validator(mode="before")
    @classmethod
    def _rank_of_method(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or "method" not in fields:
            return fields
        with suppress(ValueError):  # no method, which the field's own check says
            rank = facts_of(str(fields["method"])).rank
            if rank not in (None, cls.model_fields["rank"].default):
                return {"rank": rank, **fields}
        return fields

    @model_validator(mode="after")
    def _method_takes(self) -> TezoConfig:
        if not self.facts.fixed_factors:
            if self.refresh_every:
                raise ValueError(f"refresh_every: is for tezo, not for method {self.method}")
            if self.rank == "auto":
                raise ValueError(f"rank: auto is for tezo, not for method {self.method}")
        return self

    @model_validator(mode="after")
    def _queries_have_bounds(self) -> TezoConfig:
        if self.query_schedule != "constant" and self.queries_max is None:
            raise ValueError(f"query_schedule: {self.query_schedule} needs queries_max")
        if self.query_schedule == "adaptive" and self.total_steps is None:
            raise ValueError("query_schedule: adaptive needs total_steps, which is not set")
        if self.memory_budget is not None and self.branch_chunk:
            raise ValueError("memory_budget: sets branch_chunk by itself; leave one of them out")
        if self.placement == "per_rank" and self.probe == "inplace":
            raise ValueError("placement: per_rank needs the fused probe; ranks share the weights")
        return self

    @model_validator(mode="after")
    def _schedule_has_an_end(self) -> TezoConfig:
        if self.schedule != "constant" and self.total_steps is None:
            raise ValueError(
                f"schedule: {self.schedule} falls to 0 at total_steps, which is not set"
            )
        if self.total_steps is not None and self.warmup_steps > self.total_steps:
            raise ValueError(
                f"warmup_steps: {self.warmup_steps} is more than total_steps {self.total_steps}"
            )
        return self

    @property
    def facts(self) -> MethodFacts:
        """What is known of `method`."""
        return facts_of(self.method)

    @property
    def identity(self) -> str:
        """Of a run's files, by which those of a run that was configured otherwise are told apart: 64 bits,
        as hex, of the fields that stay while a run goes on."""
        fields = self.model_dump(mode="json", exclude_defaults=True, exclude={*FREE, "total_steps"})
        text = json.dumps(fields, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def lr_at(self, step: int) -> float:
        """Learning rate η of `step` (from 0): a linear warm-up, then the schedule."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.total_steps is None:  # constant, by the config's own check
            return self.lr
        remaining = max(1, self.total_steps - self.warmup_steps)
        return self.lr * LR_SCHEDULES[self.schedule](
            min(1.0, (step - self.warmup_steps) / remaining)
        )

    def queries_at(self, step: int) -> int:
        """Directions Q that `step` (from 0) measures; all steps of an epoch measure as many.

        Raises:
            ConfigError: `steps_per_epoch` is not set, and the schedule needs it.
        """
        if self.query_schedule == "constant":
            return self.queries
        if self.steps_per_epoch is None:
            raise ConfigError(
                f"query_schedule {self.query_schedule} needs steps_per_epoch: examples over batch size"
            )
        epoch, most = step // self.steps_per_epoch, self.queries_max
        assert most is not None, "the config's own check"
        if self.query_schedule == "adaptive":
            assert self.total_steps is not None, "the config's own check"
            return adaptive_queries(epoch, most, self.total_steps)
        return adazeta_queries(epoch, most, self.query_alpha, self.query_beta)
