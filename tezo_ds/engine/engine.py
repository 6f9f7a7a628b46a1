"""One step of training: draw directions, probe, reduce scalars, update."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tezo_ds.auto.radius import Radius
from tezo_ds.config import TezoConfig
from tezo_ds.directions.space import CoefficientSpace, Packed, as_rows, by_name
from tezo_ds.engine.measuring import Measuring
from tezo_ds.engine.merging import merged_tensors
from tezo_ds.engine.replicas import Watch, require_same_start
from tezo_ds.engine.report import StepReport
from tezo_ds.engine.selection import Selection, select
from tezo_ds.engine.slopes import clip, quality, slopes_of
from tezo_ds.engine.solving import Solving
from tezo_ds.engine.state import StepState, pack, refuse_unfit, unpack, unpack_method
from tezo_ds.errors import ConfigError, ShardingError
from tezo_ds.losses.objective import LossFn
from tezo_ds.methods import Method, Write, make_method
from tezo_ds.methods.tezo_gn import TezoGaussNewton
from tezo_ds.output_layer.term import OutputTerm
from tezo_ds.per_example.measures import measures
from tezo_ds.rollouts.judged import Rewarded
from tezo_ds.sharding import Sharding
from tezo_ds.sharding.absent import refuse_absent
from tezo_ds.solving.deviation import scale_of
from tezo_ds.trunk.trunk import EXAMPLE_IDS, trunk_of

SHARED_FROM = 1 << 20  # numbers of τ


def sums_are_shared(method: Method, space: CoefficientSpace, others: int) -> bool:
    """True when g is of use, and an all-reduce of D numbers is cheaper than drawing the other ranks' τ."""
    return bool(method.in_tau or space.vectors) and others * space.numel > SHARED_FROM


@contextmanager
def _without_grad() -> Iterator[None]:
    """Context manager: `torch.no_grad`, also within a caller's inference mode, whose tensors (sharded
    weights among them) would fail in every later step outside."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Engine:
    """Forward-only training of a model whose weights may be sharded. Made by `initialize`."""

    def __init__(
        self,
        sharding: Sharding,
        config: TezoConfig,
        loss_fn: LossFn | None,
        factors_dtype: torch.dtype | None = None,
        ranks: Mapping[str, int] | None = None,
        rewarded: Rewarded | None = None,
    ) -> None:
        require_same_start(sharding, config)
        self.config, self.sharding = config, sharding
        self.selection: Selection = select(sharding, config, factors_dtype, ranks)
        chosen = self.selection
        self.space = CoefficientSpace(chosen.matrices, config.seed, chosen.vectors)
        self.method = make_method(config, self.space, sharding.device)
        chosen.adapters.start_(self.method.coefficients, self.space)
        if self.method.writes and not config.one_period:
            advice = ", unless nu is total_steps or more" if config.facts.fresh_left else ""
            self._refuse_quantised(f"method {config.method} writes weights{advice}")
        self.objective, self.probe, of_examples = measures(
            config, sharding, self.method, self.space.slices.keys(), loss_fn, rewarded
        )
        self.output_layer = OutputTerm(sharding)
        self.objective.micro_batch = config.micro_batch
        if config.shared_trunk:
            acting = {*self.space.slices, *chosen.adapters.at}
            self.probe.trunk = self.objective.trunk = trunk_of(config, sharding, acting)
        self.run_state = StepState(math.nan if config.rho == "auto" else config.rho)
        self.measuring = Measuring(
            config, sharding, self.method, self.probe, self.objective, self.run_state, of_examples
        )
        self._solving: Solving | None = None
        if config.facts.solves:
            assert isinstance(self.method, TezoGaussNewton)
            self._solving = Solving(
                config, sharding, self.method, self.measuring, self.objective, self.output_layer
            )
        self._watch = Watch(sharding, self.space)
        if sharding.filled_apart:
            refuse_absent(sharding.absent if sharding.everyone > 1 else None, "replicas")
            self._watch.check(self.method.state, 0, weights=True)

    @_without_grad()
    def step(self, batch: Mapping[str, Any]) -> StepReport:
        """Measures L(W ± ρZ) along `queries` directions on every rank's batch and descends.

        κ = (L⁺ - L⁻) / 2ρ; L is the loss sum over all ranks divided by the count over all ranks.

        Args:
            batch: this rank's examples, tensors whose first dim is the examples. All ranks must
                call in step; a rank without examples passes one whose labels are all -100. With a
                `trunk_cache` also example_ids, int64 (examples,), their numbers in one data set.

        Raises:
            DataError: the batch is no dict of the model's inputs, or `loss_fn` returns no pair of tensors.
            ProbeError: no position carries a label, no branch differs, or directions failed (a loss was
                not finite) in several steps in a row; before that they are left out.
            ShardingError: replicas differ; looked for before every `check_every`-th step.
            ConfigError: a `trunk_cache`, and a batch without example_ids or a model without a trunk.
        """
        start = time.perf_counter()
        batch = self.objective.checked(batch)
        if self.config.trunk_cache != "off" and EXAMPLE_IDS not in batch:
            raise ConfigError(f"trunk_cache: the batch has no {EXAMPLE_IDS}, int64 (examples,)")
        # 0. compare replicas, if due
        every = self.config.check_every
        if every and self.step_index and self.step_index % every == 0:
            self.check()
        step, lr = self.step_index, self.config.lr_at(self.step_index)
        # 1. end a period, if one is due
        self._write(self.method.begin(step))
        # 2. losses at W + Δ_b over all ranks; before the first step also ρ, if auto
        measuring = self.measuring
        if math.isnan(self.run_state.rho):
            try:
                measuring.choose_rho(batch, step)
            except BaseException:
                self.run_state.rho = math.nan  # not chosen, where a caller goes on
                raise
        solved = None
        if self._solving is not None:
            losses, solved = self._solving.losses(batch, step)
        else:
            losses = measuring.losses(batch, step)  # (groups, branches)
        # 3. slopes κ, NaN where a loss is not finite
        found = measuring.kappas(losses)
        measuring.check(losses, found, step)
        kappa = self._clip(found)
        drawn = kappa[len(self.method.recalled) :]
        # 4. update by g = Σκτ/Q, over σ under `normalize`
        scale = scale_of(self.config, kappa, self.run_state.rho)
        slopes = slopes_of(kappa) * scale if solved is None else solved
        gradient = self._finish(step, slopes, lr, measuring.own(step), measuring.others(step))
        finite = losses[losses.isfinite()]
        return StepReport(
            step, finite.mean().item() if len(finite) else math.nan, tuple(found.tolist()),
            self.run_state.rho, lr, time.perf_counter() - start, _tokens(batch), int(found.isnan().sum()),
            quality(drawn, gradient / scale if self.method.in_tau and solved is None and scale else None),
            self.run_state.stopping, None if solved is None else tuple(solved.tolist()),
            tuple((-losses).flatten().tolist()) if self.objective.gain else None,
        )  # fmt: skip

    @_without_grad()
    def settle(self, batch: Mapping[str, Any]) -> None:
        """Finds the model's trunk by forwards of two examples of a batch, as the first step would otherwise.

        Raises:
            ConfigError: there is none, and `trunk_cache` needs one.
        """
        self.measuring.settle(batch, self.step_index)

    def ask_to_stop(self) -> None:
        """Asks all ranks to stop: reports say `stopping` from the next step on, on all ranks from the same
        one, as the request travels with its losses. May be called on any rank, also in a signal handler."""
        self.measuring.asked = True

    @property
    def step_index(self) -> int:
        """Index of the next step, from 0."""
        return self.run_state.step

    @step_index.setter
    def step_index(self, step: int) -> None:
        self.run_state.step = step

    def _clip(self, kappa: Tensor) -> Tensor:
        state = self.run_state
        kappa, state.window = clip(kappa, self.config.clip_kappa, state.window)
        return kappa

    @property
    def radius(self) -> Radius | None:
        """Choice that `rho: auto` made; None before the first step, and where ρ was given."""
        return self.measuring.radius

    def _finish(self, step: int, slopes: Tensor, lr: float, own: range, others: int = 0) -> Tensor:
        """Updates by the slopes of all directions, (Q,); returns g = Σ slope · τ, (D,).

        Args:
            step: the step's index.
            slopes: κ over the number of directions, 0 for those that failed; or what a step solved for.
            lr: η.
            own: directions that this rank sums, if not all.
            others: directions that it would have to draw besides, as many on every rank.
        """
        biases = None
        if self._solving is not None:
            gradient, biases = self._solving.parts(step, slopes)
        else:
            gradient = self._summed(step, slopes, own, others)
        self.run_state.step += 1
        if bool(slopes.any()):
            self._write(self.method.update(step, slopes, gradient, lr))
            if biases is not None and len(biases):
                self.output_layer.move_biases(-lr * biases)
        return gradient

    def _summed(self, step: int, slopes: Tensor, own: range, others: int) -> Tensor:
        """Returns Σ slope · τ, (D,), of all drawn directions; zeros where it is of no use."""
        if sums_are_shared(self.method, self.space, others):
            total = self.space.weighted(step, slopes, own).to(self.sharding.device)
            total = self.sharding.all_reduce(total).cpu()
        elif self.method.in_tau or self.space.vectors:
            total = self.space.weighted(step, slopes, range(len(slopes)))
        else:
            total = torch.zeros(self.space.numel, dtype=torch.int64)
        return self.space.unweighted(total, slopes)

    @_without_grad()
    def replay(
        self, step: int, kappa: Sequence[float | None], lr: float, rho: float,
        solved: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        """Replays a step that was measured before: all that `step` does to the run, without forwards.

        Args:
            step: index of the step; steps are replayed in order, from the first on.
            kappa: slopes, as in the step's `StepReport`; None or NaN for directions that failed.
            lr: the step's learning rate.
            rho: the step's ρ.
            solved: as in the step's `StepReport`.

        Raises:
            ConfigError: `step` is not the next one, or its method solves and `solved` is missing.
        """
        if step != self.step_index:
            raise ConfigError(f"step {step} cannot be replayed after {self.step_index} steps")
        if (solved is None) == self.config.facts.solves:
            raise ConfigError(
                f"step {step}: method {self.config.method} and its journal disagree on solved"
            )
        self.run_state.rho = rho
        self._write(self.method.begin(step))
        measured = torch.tensor([math.nan if k is None else k for k in kappa], dtype=torch.float64)
        if self.probe.writes:
            for ask in self.measuring.asks(step, range(len(kappa)), self.config.branch_chunk):
                self.probe.retrace(self.method.branches(ask))
        self.measuring.count(measured)
        kappas = self._clip(measured)
        slopes = slopes_of(kappas) * scale_of(self.config, kappas, rho)
        if solved is not None:
            slopes = torch.tensor(solved, dtype=torch.float64)
        self._finish(step, slopes, lr, range(len(kappa)))

    def _write(self, write: Write | None) -> None:
        """Applies a method's write to every shard."""
        if write is not None:
            if self.sharding.packed:
                self._refuse_quantised("a period ends")
            self.sharding.each_shard(self.space.slices.keys(), write)

    @_without_grad()
    def loss(self, batch: Mapping[str, Any]) -> float:
        """Returns the unperturbed mean loss of a batch over all ranks at the current coefficients."""
        batch = self.objective.checked(batch)
        return self.measuring.loss(batch, self.step_index)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager: plain forwards of the model inside see the current coefficients."""
        self.sharding.module.eval()
        with _without_grad(), self.probe.held(self.method.kept_aside()):
            yield

    def coefficients(self) -> dict[str, Tensor]:
        """Returns copies, on the CPU, of the coefficients by parameter name, as of `by_name`; those of an
        adapter are its parameters, flat."""
        rows = [*self.method.finished, self.method.coefficients]
        return by_name(self.space, torch.stack(rows))

    @_without_grad()
    def load_coefficients(self, coefficients: Mapping[str, Tensor]) -> None:
        """Sets a, e.g. from a run's coefficients.safetensors, and writes periods that have ended into
        the weights as the run did.

        Raises:
            ConfigError: names, ranks or periods are not the engine's; the engine has ended periods.
            ShardingError: there are ended periods, and weights that cannot be written.
        """
        *ended, current = as_rows(self.space, coefficients)
        self.go_to_period(len(ended), ended, written=False)
        self.method.coefficients.copy_(current)

    @_without_grad()
    def go_to_period(self, period: int, finished: Sequence[Tensor], written: bool) -> None:
        """Moves an engine that is as `initialize` leaves it to a later period of its run.

        Args:
            period: number of periods before that one.
            finished: coefficients of each period before, (D,), where a method has them.
            written: whether the shards hold these already; otherwise they are written now.

        Raises:
            ConfigError: the engine is not new, or its method has no such periods.
            ShardingError: weights would be written, and cannot be.
        """
        if finished and not written and self.method.writes:
            self._refuse_quantised("coefficients of several periods")
        if self.method.period or (finished and not self.config.facts.fixed_factors):
            raise ConfigError(
                "coefficients of this run cannot be loaded here: they are for an engine that is as "
                f"initialize leaves it, of method tezo (got {self.config.method})"
            )
        for row in finished:
            self.method.coefficients.copy_(row)
            write = self.method.refresh()
            self._write(None if written else write)
        while self.method.factors is not None and self.method.period < period:
            self.method.factors.advance()

    def state(self) -> dict[str, Tensor]:
        """Returns all that the next step depends on and that is equal on every rank: CPU copies, by name."""
        return pack(self.run_state, self.method) | self.output_layer.state

    @_without_grad()
    def load_state(self, tensors: Mapping[str, Tensor], written: bool) -> None:
        """Restores a `state` in a new engine. All ranks must call it.

        Args:
            tensors: a `state` of the same config, model and data.
            written: whether the shards hold already what the run wrote into them; otherwise only ended
                periods of coefficients can be written again.

        Raises:
            StorageError: the tensors do not fit this engine.
        """
        refuse_unfit(tensors, self.method, self.config.method)
        period, finished = unpack(tensors, self.run_state)
        self.go_to_period(period, finished, written)
        unpack_method(tensors, self.method)
        self.output_layer.load(tensors)

    def check(self) -> None:
        """Compares replicas over all ranks: the method's state, and the weights that several ranks hold
        if the method or the probe writes weights. All ranks must call it.

        Raises:
            ShardingError: something differs; names the first parameter and the ranks.
        """
        weights = self.method.writes or self.probe.writes
        words = {"the label words": slice(None)}
        term = {k: Packed(part.flatten(), words) for k, part in self.output_layer.state.items()}
        self._watch.check({**self.method.state, **term}, self.step_index, weights)

    @_without_grad()
    def merge(self) -> None:
        """Merges in place, W ← W + (change kept aside, U diag(a) Vᵀ), rounded to the nearest number of the
        shards' dtype; nothing is kept aside then.

        All ranks must call it: it begins and ends with a `check`.

        Raises:
            ShardingError: the weights are quantised on their way to the forward; replicas differ.
            ConfigError: there are adapters.
        """
        self.selection.adapters.refuse_merged()
        self._refuse_quantised("merge")
        self.check()
        kept = self.method.kept_aside()
        self._write(lambda view: kept.move_(view, None, 0))
        self.method.merged()
        self._watch.check(self.method.state, self.step_index, weights=True)

    def merged_tensors(
        self, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[list[str], Tensor | None]]:
        """Yields full merged weights, packed ones unpacked, one at a time: all names of each and a copy on
        the CPU of rank 0 (None elsewhere). The model and its coefficients stay as they are.

        All ranks must run it to its end, since each tensor is gathered when its turn comes.

        Args:
            dtype: dtype of floating-point copies, rounded after the update was added; None keeps the
                weights' own, in which small updates of bfloat16 weights round away.

        Raises:
            ShardingError: the weights are quantised on their way to the forward.
            ConfigError: there is a term of an output layer that is tied, or there are adapters.
        """
        self.selection.adapters.refuse_merged()
        if not (self.sharding.packed and self.sharding.runs_alone):  # which unpack
            self._refuse_quantised("merged weights")
        self.output_layer.refuse_merged()
        add = self.output_layer.merge_into
        return merged_tensors(self.sharding, self.space, self.method.kept_aside(), dtype, add)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns all of `merged_tensors` at once, in the order of the model's own state_dict: on the CPU
        of rank 0, {} elsewhere.

        Raises:
            ShardingError: the weights are quantised on their way to the forward.
        """
        merged: dict[str, Tensor] = {}
        for names, tensor in self.merged_tensors():
            if tensor is not None:
                merged.update(dict.fromkeys(names, tensor))
        return {name: merged[name] for name in self.sharding.module.state_dict()} if merged else {}

    def _refuse_quantised(self, what: str) -> None:
        refuse_absent(self.sharding.absent, what)
        if self.sharding.quantised:
            raise ShardingError(
                f"{what}: weights are stored or gathered quantised ({self.sharding.quantised}); "
                "keep to tezo, tezo-m, tezo-adam-coef or tezo-gn, which only read them, with keep_periods "
                "where refresh_every is set, and export an adapter"
            )


def _tokens(batch: Mapping[str, Any]) -> int:
    for key in ("attention_mask", "input_ids"):
        if isinstance(batch.get(key), Tensor):
            return int(batch[key].sum() if key == "attention_mask" else batch[key].numel())
    return 0
