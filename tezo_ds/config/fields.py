"""Fields of the `tezo` block as they are declared: type, default, bounds, what each is for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from tezo_ds.config.declared import declared

METHOD, STEP, DIRECTIONS = "Method", "Step size", "Directions"
PROBE, TRAINS, ADAPTER = "Probe, memory and checks", "What trains", "Adapters"
REWARDS = "Rewards"
ADAMS = "tezo-adam, tezo-adam-coef, mezo-adam"


class Fields(BaseModel):
    """The fields of `TezoConfig`, which says how they go together."""

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
        "batch is taken, and where that is 0 smaller ones are tried",
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
        "peak learning rate η; by default 1e-3 under tezo-adam and mezo-adam, 1e-4 under tezo-adam-coef, 1 "
        "under tezo-gn, and of adapters 1e-4, or with Adam 1e-3",
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

    shape: Literal["none", "zscore", "rank", "centred"] = declared(
        "none",
        "what slopes are taken of, over all branches of a step: losses or rewards as they are (none), over "
        "their standard deviation (zscore), their ranks (rank), or less their mean (centred, which "
        "difference central takes out by itself)",
        group=REWARDS, example="rank",
    )  # fmt: skip
    temperature: float = declared(
        0.0,
        "temperature at which a rewarded completion's tokens are drawn, by random numbers that all branches "
        "of a step share; 0: the likeliest token",
        group=REWARDS, used_by="--reward", example=0.7, ge=0,
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
    compile: bool = declared(
        False,
        "run transformer blocks through torch.compile (one process and FSDP2): the first steps compile, "
        "losses change by rounding",
        group=PROBE, used_by="fused probe", example=True,
    )  # fmt: skip
    cuda_graphs: bool = declared(
        False,
        "record compiled blocks as CUDA graphs, one for each size of a batch: for small batches of few sizes "
        "and whole weights on a GPU",
        group=PROBE, used_by="compile", example=True,
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
        "C for C label words: none; layers:20 or last:6, as include takes them; or auto, three or none, by "
        "the examples that are held out",
        group=TRAINS, used_by="output_layer fit", example="layers:20",
    )  # fmt: skip
    inner_maps: Literal["last", "values"] = declared(
        "last",
        "which linear map of these blocks gets a term: last, the block's last, or values, its value "
        "projection, of rank C for each group of heads, which reads what attention gathers of the whole text",
        group=TRAINS, used_by="inner_layers", example="values",
    )  # fmt: skip
