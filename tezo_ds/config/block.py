"""Fields of the `tezo` block: types, defaults, bounds, and which go together."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tezo_ds.config.declared import declared
from tezo_ds.config.registry import MethodFacts, facts_of
from tezo_ds.config.schedules import LR_SCHEDULES, adaptive_queries, adazeta_queries
from tezo_ds.errors import ConfigError

BLOCK = "tezo"
# Fields that may change on resume: the steps stay the same, up to the rounding of losses.
FREE = frozenset({"check_every", "branch_chunk", "memory_budget", "micro_batch"})
FREE |= {"shared_trunk", "trunk_cache_gib"}


AUTO = "auto"
METHOD, STEP, DIRECTIONS = "Method", "Step size", "Directions"
PROBE, TRAINS, ADAPTER = "Probe, memory and checks", "What trains", "Adapters"
LORA_RANK = 8  # default of `rank` under adapter lora
ADAPTER_LR = {"sgd": 1e-4, "momentum": 1e-4, "adam": 1e-3}  # of `lr` of an adapter's parameters
ADAMS = "tezo-adam, tezo-adam-coef, mezo-adam"


def _first_of(odd: dict[str, bool]) -> str | None:
    """Returns the first field that is set otherwise than it may be."""
    return next((name for name, is_odd in odd.items() if is_odd), None)


class TezoConfig(BaseModel):
    """The `tezo` block. Every field has an override of the same name on the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: str = declared(
        "tezo",
        "update rule: tezo, tezo-m (momentum), tezo-adam (as published), tezo-adam-coef (Adam on the "
        "coefficients), tezo-gn (Gauss-Newton in the span of a step's directions), lozo, lozo-m, mezo, "
        "mezo-m or mezo-adam",
        group=METHOD, example="lozo",
    )  # fmt: skip
    rank: Annotated[int, Field(ge=1)] | Literal["auto"] = declared(
        16,
        'columns r of U and V of each matrix; "auto" chooses them by layer (tezo methods only); lozo takes '
        "2 by default, adapter lora 8 for its A and B",
        group=METHOD, used_by="tezo…, lozo…", example=4,
    )  # fmt: skip
    rank_threshold: float = declared(
        0.25,
        "share of a matrix's largest singular value above which a singular value counts, under rank auto",
        group=METHOD, used_by="rank auto", example=0.5, gt=0, le=1,
    )  # fmt: skip
    rank_max: int = declared(
        64, "largest rank that auto may choose", group=METHOD, used_by="rank auto", example=32, ge=1
    )
    refresh_every: int = declared(
        0,
        "steps after which what was learnt is written into the weights and U, V are drawn anew; 0: never",
        group=METHOD, used_by="tezo…", example=500, ge=0,
    )  # fmt: skip
    keep_periods: int = declared(
        0,
        "ended periods of refresh_every steps that stay low-rank terms beside weights, which are then never "
        "written; 0: they go into the weights",
        group=METHOD, used_by="tezo…", example=3, ge=0,
    )  # fmt: skip
    nu: int = declared(
        50, "ν, steps for which LOZO keeps its V", group=METHOD, used_by="lozo…", example=100, ge=1
    )
    rank_scaling: bool = declared(
        False, "scale LOZO's updates by 1/rank, as its paper does and its code does not",
        group=METHOD, used_by="lozo…", example=True,
    )  # fmt: skip
    momentum: float = declared(
        0.9, "β₁ of the methods with momentum", group=METHOD, used_by="tezo-m, lozo-m, mezo-m",
        example=0.95, ge=0, lt=1,
    )  # fmt: skip
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = declared(
        (0.9, 0.999), "β₁ and β₂ of Adam", group=METHOD, used_by=ADAMS, example=(0.9, 0.99)
    )  # fmt: skip
    eps: float = declared(
        1e-8, "ε in the denominator of Adam", group=METHOD, used_by=ADAMS, example=1e-6, gt=0
    )
    bias_correction: bool = declared(
        True, "Adam bias correction (the TeZO paper omits it)", group=METHOD, used_by=ADAMS, example=False
    )  # fmt: skip

    damping: float = declared(
        0.1, "what tezo-gn adds to the diagonal of its matrix, over the diagonal's mean", group=METHOD,
        used_by="tezo-gn", example=0.3, ge=0,
    )  # fmt: skip
    step_scales: tuple[Annotated[float, Field(gt=0)], ...] = declared(
        (0.25, 0.5, 1.0),
        "scales of tezo-gn's step that one more forward tries, beside 0; the one with the least loss of the "
        "batch is taken",
        group=METHOD, used_by="tezo-gn", example=(1.0,),
    )  # fmt: skip

    recall: bool = declared(
        True, "measure along the last step as well, beside the directions that are drawn", group=METHOD,
        used_by="tezo-gn", example=False,
    )  # fmt: skip

    rho: Annotated[float, Field(gt=0)] | Literal["auto"] = declared(
        1e-3, 'perturbation radius ρ; "auto" chooses it on the first batch', group=STEP, example="auto"
    )  # fmt: skip
    lr: float = declared(
        1e-6,
        "peak learning rate η; by default 1e-4 under tezo-adam-coef, 1 under tezo-gn, and of adapters 1e-4, "
        "or with Adam 1e-3",
        group=STEP, example=2e-6, ge=0,
    )  # fmt: skip
    schedule: str = declared(
        "constant",
        "learning rate after the warm-up: constant, or falling to 0 at total_steps by linear or cosine",
        group=STEP, example="cosine",
    )  # fmt: skip
    warmup_steps: int = declared(
        0, "steps over which the learning rate rises from 0", group=STEP, example=100, ge=0, le=2**53
    )  # fmt: skip
    total_steps: int | None = declared(
        None,
        "length of the run in steps, which linear, cosine and adaptive need; the command line takes --steps",
        group=STEP, example=5000, ge=1,
    )  # fmt: skip
    clip_kappa: float | None = declared(
        None,
        "quantile of |κ| over the last 256 slopes that bounds later slopes; unset: no bound",
        group=STEP, example=0.95, gt=0, lt=1,
    )  # fmt: skip

    normalize: Literal["none", "std"] = declared(
        "none",
        "std: slopes over the standard deviation of the step's losses, so that lr does not depend on the "
        "loss's scale (FZOO, GRZO); none: as measured",
        group=STEP, example="std",
    )  # fmt: skip

    seed: int = declared(
        0, "seed of U, V, τ and of the order of the data", group=DIRECTIONS, example=1, ge=0
    )
    queries: int = declared(
        1, "directions Q measured in a step, two branches each", group=DIRECTIONS,
        used_by="query_schedule constant", example=8, ge=1,
    )  # fmt: skip
    query_schedule: Literal["constant", "adaptive", "adazeta"] = declared(
        "constant",
        "directions in later epochs: constant, or growing as in TT-ZO (adaptive) or AdaZeta (adazeta)",
        group=DIRECTIONS, example="adazeta",
    )  # fmt: skip
    queries_max: int | None = declared(
        None,
        "upper bound on queries under adaptive and adazeta",
        group=DIRECTIONS, used_by="query_schedule adaptive, adazeta", example=16, ge=1,
    )  # fmt: skip
    query_alpha: float = declared(
        1.0, "α in AdaZeta's ⌊α epoch^β⌋ directions", group=DIRECTIONS, used_by="query_schedule adazeta",
        example=2.0, gt=0,
    )  # fmt: skip
    query_beta: float = declared(
        0.5, "β in AdaZeta's ⌊α epoch^β⌋ directions", group=DIRECTIONS,
        used_by="query_schedule adazeta", example=1.0, ge=0,
    )  # fmt: skip
    steps_per_epoch: int | None = declared(
        None,
        "steps of an epoch, which adaptive and adazeta need; the command line takes examples over batch size",
        group=DIRECTIONS, used_by="query_schedule adaptive, adazeta", example=50, ge=1,
    )  # fmt: skip
    placement: Literal["shared", "per_rank", "per_example"] = declared(
        "shared",
        "shared: all ranks measure the same directions, each on its own examples; per_rank: each measures as "
        "many of its own, for the same traffic; per_example: each example does, in the same forward",
        group=DIRECTIONS, used_by="fused probe", example="per_rank",
    )  # fmt: skip
    difference: Literal["central", "forward"] = declared(
        "central",
        "slope of a direction: central, (L⁺ - L⁻) / 2ρ of two branches; forward, (L⁺ - L) / ρ of one branch "
        "and one for all directions",
        group=DIRECTIONS, example="forward",
    )  # fmt: skip

    probe: Literal["auto", "fused", "inplace"] = declared(
        "auto",
        "fused: all branches in one forward, weights only read; inplace: one forward a branch, weights "
        "written and restored; auto: fused where it reaches all that trains",
        group=PROBE, example="inplace",
    )  # fmt: skip
    restore: Literal["auto", "copy", "subtract"] = declared(
        "auto",
        "how the in-place probe restores weights: copy (exact, from a second copy of what trains), subtract "
        "(no copy, rounding errors, as MeZO does) or auto (subtract for mezo, else copy)",
        group=PROBE, used_by="in-place probe", example="copy",
    )  # fmt: skip
    branch_chunk: int = declared(
        0, "branches in one forward; 0: all branches of a step", group=PROBE, used_by="fused probe",
        example=4, ge=0,
    )  # fmt: skip
    memory_budget: float | None = declared(
        None,
        "GiB that the tensors of a forward may take on a rank, the weights beside; sets branch_chunk",
        group=PROBE, used_by="fused probe", example=20.0, gt=0,
    )  # fmt: skip
    micro_batch: int = declared(
        0, "examples of a rank in one forward; 0: all", group=PROBE, example=2, ge=0
    )
    shared_trunk: bool = declared(
        True,
        "run what comes before the first layer that trains once for all branches; off: once in each branch",
        group=PROBE, example=False,
    )  # fmt: skip
    trunk_cache: Literal["off", "memory", "disk"] = declared(
        "off",
        "keep the hidden states that enter the first layer that trains, so that from its second visit on an "
        "example runs the late layers alone: off, memory (host memory of the rank) or disk (files in the "
        "run's folder)",
        group=PROBE, example="memory",
    )  # fmt: skip
    trunk_cache_gib: float | None = declared(
        None,
        "most GiB that trunk_cache may take on a rank; examples above that are computed each time; unset: no "
        "bound",
        group=PROBE, used_by="trunk_cache memory, disk", example=8.0, gt=0,
    )  # fmt: skip
    stochastic_rounding: bool = declared(
        True,
        "round what is written into 16-bit weights at random, so that small updates count; off: to the "
        "nearest",
        group=PROBE, used_by="methods that write weights", example=False,
    )  # fmt: skip
    check_every: int = declared(
        100, "steps between checks that all ranks hold the same bits; 0: only at the end", group=PROBE,
        example=1000, ge=0,
    )  # fmt: skip

    include: tuple[str, ...] = declared(
        ("*",),
        "what trains: a glob of parameter names; last:6, the model's last six layers; or layers:24-29, "
        "these layers, counted from 0; may be given several times; or auto alone: the run measures all "
        "matrices before its first step, and chooses",
        group=TRAINS, example=("*.v_proj.*",),
    )  # fmt: skip
    exclude: tuple[str, ...] = declared(
        (),
        "what stays frozen although included: a glob of parameter names, last:6 or layers:24-29 as include "
        "takes them; may be given several times",
        group=TRAINS, example=("*embed*",),
    )  # fmt: skip
    train_vectors: bool = declared(
        False, "train biases and norm weights, too", group=TRAINS, example=True
    )
    adapter: Literal["none", "tt", "lora"] = declared(
        "none",
        "small functions that train beside frozen weights: tt, tensor-train adapters (TT-ZO), or lora, A and "
        "B of the queries and values (MeZO's LoRA); none: the weights' own directions",
        group=ADAPTER, example="tt",
    )  # fmt: skip
    adapter_sites: Literal["after", "mlp"] = declared(
        "after",
        "where tensor-train adapters stand: after the attention and the feed-forward of each block, or mlp, "
        "before the feed-forward's first layers and after its last",
        group=ADAPTER, used_by="adapter tt", example="mlp",
    )  # fmt: skip
    tt_rank: int = declared(
        5, "rank of the tensor trains", group=ADAPTER, used_by="adapter tt", example=8, ge=1
    )
    tt_modes: tuple[Annotated[int, Field(ge=1)], ...] = declared(
        (),
        "modes of the tensor trains: first those of the layers' size, then the bottleneck's, such as "
        "16,16,16,4,4,4; unset: factors that are near each other",
        group=ADAPTER, used_by="adapter tt", example=(16, 16, 16, 4, 4, 4),
    )  # fmt: skip
    tt_init: Literal["zero", "published"] = declared(
        "zero",
        "last core at the start: zero, so that the model begins as its base, or published, random as others",
        group=ADAPTER, used_by="adapter tt", example="published",
    )  # fmt: skip
    tt_act: Literal["relu", "tanh"] = declared(
        "relu", "nonlinearity between the two layers of a tensor-train adapter: relu or tanh",
        group=ADAPTER, used_by="adapter tt", example="tanh",
    )  # fmt: skip
    bottleneck: int = declared(
        64, "size between the two layers of a tensor-train adapter", group=ADAPTER, used_by="adapter tt",
        example=32, ge=1,
    )  # fmt: skip
    contraction: Literal["parallel", "sequential"] = declared(
        "parallel",
        "how tensor trains meet their input: parallel, cores with each other first, or sequential, the input "
        "with one core after the other (slow, for comparison)",
        group=ADAPTER, used_by="adapter tt", example="sequential",
    )  # fmt: skip
    output_layer: Literal["frozen", "bias", "fit"] = declared(
        "frozen",
        "term on the logits of a task's label words, or with objective lm of all tokens that are labels, "
        "fitted in closed form to hidden states of plain forwards: none (frozen), a bias for each word "
        "(bias), or a bias and a change of its row (fit)",
        group=TRAINS, example="fit",
    )  # fmt: skip
    output_layer_every: int = declared(
        0, "steps after which the output layer is fitted again; 0: once, before the first step",
        group=TRAINS, used_by="output_layer bias, fit", example=100, ge=0,
    )  # fmt: skip
    output_layer_examples: int | None = declared(
        None, "training examples, at most, that the output layer is fitted to; unset: all",
        group=TRAINS, used_by="output_layer bias, fit", example=1000, ge=5,
    )  # fmt: skip
    output_layer_rank: int = declared(
        16, "rank of the rows' changes where all tokens count in the loss (objective lm)", group=TRAINS,
        used_by="output_layer fit", example=8, ge=1,
    )  # fmt: skip
    inner_layers: str = declared(
        "none",
        "transformer blocks whose last linear map gets a term that is fitted with the output layer, of rank "
        "C for C label words: none; layers:20 or last:6, as include takes them; or auto, the best of three "
        "or none by the examples that are held out",
        group=TRAINS, used_by="output_layer fit", example="layers:20",
    )  # fmt: skip

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
    def writes_periods(self) -> bool:
        """Whether what a period learnt goes into the weights when it ends."""
        return self.refresh_every > 0 and not self.keep_periods

    @property
    def chooses(self) -> bool:
        """Whether the run measures all matrices, and chooses the ones that train."""
        return self.include == (AUTO,)

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
