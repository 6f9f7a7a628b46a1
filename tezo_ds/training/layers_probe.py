"""A probe of a session's layers: at the calibrated point, on the run's first examples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError, ProbeError
from tezo_ds.patterns import numbered_layers
from tezo_ds.probing_layers.choice import candidates, choose, rows_of
from tezo_ds.probing_layers.figures import LEAST, Horizon
from tezo_ds.probing_layers.measure import Asked, Batch, measure
from tezo_ds.probing_layers.names import bands_of
from tezo_ds.probing_layers.report import Found
from tezo_ds.tasks.batches import batch_indices, rounds
from tezo_ds.tasks.encoded import Encoded, collate
from tezo_ds.tasks.lazy import pick
from tezo_ds.training.display import Display
from tezo_ds.training.session import Session

BANDS = 3
NOTES = 10  # lines of progress where no bar is shown


@dataclass(frozen=True)
class Wanted:
    """How much to measure.

    Attributes:
        examples: n, at most as many as there are.
        columns: columns of each matrix, at most its rank.
        together: layers whose matrices of a kind move together; None: a third of all.
        batch_size: examples of a step, over all ranks.
        steps: steps of the run that is foreseen.
    """

    examples: int
    columns: int
    together: int | None
    batch_size: int
    steps: int


def refuse_unfit(config: TezoConfig) -> None:
    """Raises ConfigError unless the method learns along factors that stay, of which there are figures."""
    if not config.facts.fixed_factors:
        raise ConfigError(
            f"the layers are measured along U and V of the tezo methods, and method {config.method} has none "
            "that stay; use a tezo method"
        )


def probe_layers(
    session: Session, examples: Sequence[Encoded], wanted: Wanted, display: Display
) -> Found:
    """Measures the matrices that the session's engine trains; the same result on every rank.

    All ranks must call it. Takes the engine as it is: a term of the output layer that it was given acts.

    Raises:
        TezoError: too few examples, or what `measure` refuses.
    """
    engine = session.engine
    refuse_unfit(engine.config)
    if engine.objective.piecewise_constant:
        raise ConfigError(
            f"--objective {session.settings.objective}: the layers are measured by slopes, and it has none; "
            "take --objective choices, and give --include what is recommended"
        )
    n = min(wanted.examples, len(examples))
    if n < LEAST:
        raise ConfigError(
            f"there are {n} examples to measure the layers on; at least {LEAST} needed"
        )
    config, start = engine.config, time.perf_counter()
    batches = list(_batches(session, examples, n, wanted.batch_size))
    rho = _rho(session, batches[0])
    shape, parameters = engine.sharding.shape, engine.sharding.module.named_parameters()
    several = [name for name, parameter in parameters if len(shape(parameter)) > 1]
    third = math.ceil(len(numbered_layers(several)) / BANDS)
    bands = bands_of(engine.space.matrices, several, wanted.together or max(1, third))
    at_once = config.branch_chunk or 2 * config.queries
    asked = Asked(bands, config.seed, batches, n, wanted.columns, rho, at_once, config.shared_trunk)
    display.note(
        f"probing {len(asked.matrices)} matrices on {n} examples: {asked.branches:,} branches of each"
    )
    with torch.inference_mode(False), torch.no_grad(), _shown(display) as progress:
        measured = measure(engine.sharding, engine.objective, asked, progress)
    for one in measured:
        if not bool(one.slopes.isfinite().all() and one.bends.isfinite().all()):
            raise ProbeError(
                f"{one.group[0].name}: a loss is not finite at ρ {rho:g}; lower rho, or exclude the matrix"
            )
    rows = rows_of(measured, several)
    horizon = Horizon(wanted.batch_size, wanted.steps * config.queries)
    sets = candidates(rows, several, config.include, horizon)
    display.note(f"probed the layers in {time.perf_counter() - start:.0f} s")
    return Found(rows, sets, choose(sets), horizon, n, wanted.columns, rho, n * asked.branches)


def _batches(
    session: Session, examples: Sequence[Encoded], n: int, batch_size: int
) -> Iterator[Batch]:
    """Yields this rank's share of the first n examples of the first epoch, as many batches on every rank."""
    engine, sharding = session.engine, session.engine.sharding
    rank, world = sharding.rank, sharding.world_size
    mine = batch_indices(len(examples), n, 0, engine.config.seed, rank, world)
    size = math.ceil(batch_size / world)
    size = min(size, engine.config.micro_batch or size)
    first = n * rank // world
    for index in range(rounds(n, size, world)):
        part = mine[index * size : (index + 1) * size]
        batch = collate(pick(examples, part), session.pad_id, filler=examples[0])
        yield batch, first + index * size


def _rho(session: Session, batch: Batch) -> float:
    """Returns the config's ρ, or chooses one on the first batch as a run does."""
    engine = session.engine
    if math.isnan(engine.run_state.rho):
        with torch.inference_mode(False), torch.no_grad():
            engine.measuring.choose_rho(batch[0], engine.step_index)
    return engine.run_state.rho


@contextmanager
def _shown(display: Display) -> Iterator[Callable[[float], None]]:
    """Context manager: gives a function that takes the share done, and shows it on a terminal or in lines."""
    start, told = time.perf_counter(), 0.0
    with display.evaluation("probing the layers") as bar:

        def progress(share: float) -> None:
            nonlocal told
            if bar is not None:
                bar(share)
            elif share - told >= 1 / NOTES or share == 1:
                told, left = share, (time.perf_counter() - start) * (1 / share - 1)
                display.note(f"probed {share:.0%}  eta {left:.0f} s")

        yield progress
