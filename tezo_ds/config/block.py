"""The `tezo` block: its defaults by method, which fields go together, and what follows from them."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from typing import Any

from pydantic import field_validator, model_validator

from tezo_ds.config.fields import Fields
from tezo_ds.config.registry import MethodFacts, facts_of
from tezo_ds.config.schedules import LR_SCHEDULES, adaptive_queries, adazeta_queries
from tezo_ds.errors import ConfigError

BLOCK = "tezo"
# Fields that may change on resume: the steps stay the same, up to the rounding of losses.
FREE = frozenset({"check_every", "branch_chunk", "memory_budget", "micro_batch"})
FREE |= {"shared_trunk", "trunk_cache_gib", "compile", "cuda_graphs"}


AUTO = "auto"
LORA_RANK = 8  # default of `rank` under adapter lora
ADAPTER_LR = {"sgd": 1e-4, "momentum": 1e-4, "adam": 1e-3}  # of `lr` of an adapter's parameters


def _first_of(odd: dict[str, bool]) -> str | None:
    """Returns the first field that is set otherwise than it may be."""
    return next((name for name, is_odd in odd.items() if is_odd), None)


class TezoConfig(Fields):
    """The `tezo` block. Every field has an override of the same name on the command line."""

    @field_validator("tt_modes", mode="before")
    @classmethod
    def _with_commas(cls, modes: Any) -> Any:
        """Takes 16,16,4,4 for a list, as no one writes an option six times."""
        words = [modes] if isinstance(modes, str) else modes
        if isinstance(words, (list, tuple)) and all(isinstance(word, str) for word in words):
            return [part for word in words for part in word.split(",")]
        return words

    @field_validator("method")
    @classmethod
    def _is_a_method(cls, name: str) -> str:
        facts_of(name)
        return name

    @field_validator("schedule")
    @classmethod
    def _is_a_schedule(cls, name: str) -> str:
        if name not in LR_SCHEDULES:
            raise ValueError(f"must be one of {', '.join(LR_SCHEDULES)}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_method(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        adapted = fields.get("adapter", "none") != "none"
        if fields.get("adapter") == "lora":
            fields = {"rank": LORA_RANK, **fields}
        if "method" not in fields and not adapted:
            return fields
        with suppress(ValueError):  # no method, which the field's own check says
            facts = facts_of(str(fields.get("method", cls.model_fields["method"].default)))
            lr = ADAPTER_LR[facts.descent] if adapted and not facts.solves else facts.lr
            for name, value in (("rank", facts.rank), ("lr", lr)):
                if value not in (None, cls.model_fields[name].default):
                    fields = {name: value, **fields}
        return fields

    @model_validator(mode="after")
    def _method_takes(self) -> TezoConfig:
        if not self.facts.fixed_factors:
            if self.refresh_every:
                raise ValueError(f"refresh_every: is for tezo, not for method {self.method}")
            if self.rank == "auto":
                raise ValueError(f"rank: auto is for tezo, not for method {self.method}")
        if self.chooses and not self.facts.fixed_factors:
            raise ValueError(f"include: auto is for tezo, not for method {self.method}")
        if self.facts.solves:
            odd = {
                "probe": self.probe == "inplace", "placement": self.placement != "shared",
                "branch_chunk": self.branch_chunk > 0, "memory_budget": self.memory_budget is not None,
                "clip_kappa": self.clip_kappa is not None, "normalize": self.normalize != "none",
                "shape": self.shape != "none",
            }  # fmt: skip
            if wrong := _first_of(odd):
                raise ValueError(
                    f"{wrong}: {self.method} needs all branches of a step in one fused forward, the same "
                    f"on every rank; leave {wrong} as it is by default"
                )
        return self

    @model_validator(mode="after")
    def _periods_have_room(self) -> TezoConfig:
        if not self.keep_periods:
            return self
        if not self.refresh_every:
            raise ValueError("keep_periods: are ended by refresh_every, which is 0; set it, too")
        if not self.facts.learns_coefficients:
            raise ValueError(
                f"keep_periods: {self.method} writes weights in every step; leave it out"
            )
        if self.total_steps is not None:
            ended = (self.total_steps - 1) // self.refresh_every
            if ended > self.keep_periods:
                raise ValueError(
                    f"keep_periods: {ended} periods of {self.refresh_every} steps end before step "
                    f"{self.total_steps}, and {self.keep_periods} can stay; raise keep_periods, or "
                    "refresh_every"
                )
        return self

    @model_validator(mode="after")
    def _auto_chooses_alone(self) -> TezoConfig:
        if AUTO in self.include and not self.chooses:
            raise ValueError("include: auto stands alone; use exclude for what it must not choose")
        if self.chooses and self.train_vectors:
            raise ValueError("include: auto chooses among matrices; leave train_vectors off")
        return self

    @model_validator(mode="after")
    def _adapter_goes_with(self) -> TezoConfig:
        if self.adapter == "none":
            return self
        if not self.facts.learns_coefficients:
            raise ValueError(
                f"adapter: {self.adapter} is for tezo, tezo-m, tezo-adam-coef (SGD, momentum and Adam on its "
                f"parameters) and tezo-gn, not for method {self.method}"
            )
        odd = {
            "refresh_every": self.refresh_every > 0, "rank": self.rank == AUTO, "include": self.chooses,
            "probe": self.probe == "inplace", "output_layer": self.output_layer != "frozen",
        }  # fmt: skip
        if wrong := _first_of(odd):
            raise ValueError(
                f"{wrong}: is for weights that change, which are frozen beside an adapter "
                f"{self.adapter}; leave {wrong} as it is by default"
            )
        return self

    @model_validator(mode="after")
    def _fields_go_together(self) -> TezoConfig:
        if self.query_schedule != "constant" and self.queries_max is None:
            raise ValueError(f"query_schedule: {self.query_schedule} needs queries_max")
        if self.query_schedule == "adaptive" and self.total_steps is None:
            raise ValueError("query_schedule: adaptive needs total_steps, which is not set")
        if self.inner_layers != "none":
            if self.output_layer != "fit":
                raise ValueError("inner_layers: are fitted with output_layer fit; set that, too")
            if self.trunk_cache != "off":
                raise ValueError(
                    "inner_layers: change what comes before late layers, which trunk_cache keeps; leave one "
                    "of them off"
                )
        if self.trunk_cache != "off" and not self.shared_trunk:
            raise ValueError("trunk_cache: needs shared_trunk; set it on, or trunk_cache to off")
        if self.memory_budget is not None and self.branch_chunk:
            raise ValueError("memory_budget: sets branch_chunk by itself; leave one of them out")
        if self.compile and (self.probe == "inplace" or self.placement == "per_example"):
            raise ValueError(
                "compile: is for the fused probe with directions that examples share; leave it off"
            )
        if self.cuda_graphs and not self.compile:
            raise ValueError("cuda_graphs: are of compiled blocks; set compile, too")
        if self.placement != "shared" and self.probe == "inplace":
            raise ValueError(
                f"placement: {self.placement} needs the fused probe; all share weights"
            )
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
        """Registry facts of `method`."""
        return facts_of(self.method)

    @property
    def one_period(self) -> bool:
        """Whether a run of fresh lefts (LOZO) ends before its first period does, which writes weights."""
        return self.facts.fresh_left and 0 < (self.total_steps or 0) <= self.nu

    @property
    def writes_periods(self) -> bool:
        """Whether what a period learnt goes into the weights when it ends."""
        return self.refresh_every > 0 and not self.keep_periods

    @property
    def chooses(self) -> bool:
        """Whether the run measures all matrices, and chooses the ones that train."""
        return self.include == (AUTO,)

    @property
    def recalls(self) -> bool:
        """Whether a step measures along the last one; one with U and V of its own has none to recall."""
        return self.facts.solves and self.recall and self.refresh_every != 1

    @property
    def directions(self) -> int:
        """Number of directions of a step, or of each rank or example where these have their own, the
        recalled one counted, at the start of a query schedule."""
        return self.queries_at(0) + self.recalls

    @property
    def branches(self) -> int:
        """Number of branches of a step along its `directions`, the base of one-sided ones counted."""
        return 2 * self.directions if self.difference == "central" else self.directions + 1

    @property
    def identity(self) -> str:
        """Hex digest, 64 bits, of the fields that must not change on resume; kept in a run's files."""
        fields = self.model_dump(mode="json", exclude_defaults=True, exclude={*FREE, "total_steps"})
        if self.trunk_cache != "off":  # which sets the order of the data; memory and disk are alike
            fields["trunk_cache"] = "on"
        text = json.dumps(fields, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def lr_at(self, step: int) -> float:
        """Returns the learning rate η of `step` (from 0): a linear warm-up, then the schedule."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.total_steps is None:  # constant, by the config's own check
            return self.lr
        remaining = max(1, self.total_steps - self.warmup_steps)
        return self.lr * LR_SCHEDULES[self.schedule](
            min(1.0, (step - self.warmup_steps) / remaining)
        )

    def queries_at(self, step: int) -> int:
        """Returns Q, the number of directions that `step` (from 0) measures; the same within an epoch.

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
