"""What measures a run's losses: an objective and a probe, of each example where it has its own directions."""

from __future__ import annotations

from collections.abc import Collection

from tezo_ds.adapters.found import adapters_of
from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError
from tezo_ds.losses.objective import LossFn, Objective
from tezo_ds.methods import Method
from tezo_ds.per_example.losses import ExampleLosses
from tezo_ds.per_example.objective import ExampleObjective
from tezo_ds.per_example.probe import ExampleProbe
from tezo_ds.probes import Probe, choose_probe
from tezo_ds.rollouts.judged import Rewarded
from tezo_ds.rollouts.objective import RewardObjective, refuse_unfit
from tezo_ds.sharding import Sharding


def measures(
    config: TezoConfig,
    sharding: Sharding,
    method: Method,
    names: Collection[str],
    loss_fn: LossFn | None,
    rewarded: Rewarded | None = None,
) -> tuple[Objective, Probe, ExampleLosses | None]:
    """Makes the objective and the probe of a run, and what measures directions of examples' own, if any are.

    Args:
        config: the run's config.
        sharding: the model.
        method: the run's method.
        names: names of all parameters that train.
        loss_fn: see `Objective`.
        rewarded: what is generated and judged in the place of a loss; None: nothing is.

    Raises:
        ConfigError: ranks or examples cannot have directions of their own, or a method not all at once.
        ProbeError: a trainable parameter, or directions, are out of the probe's reach.
        ShardingError: in-place on weights that cannot be written exactly.
    """
    if rewarded is not None:
        refuse_unfit(sharding, config)
    kind = choose_probe(config, sharding, names, method.factors)
    if config.placement != "shared" and (kind.writes or method.factors is None):
        whose = "ranks" if config.placement == "per_rank" else "examples of a forward"
        raise ConfigError(
            f"placement {config.placement} needs the fused probe, as {whose} share the weights; exclude what "
            "it cannot reach, or set placement to shared"
        )
    if config.facts.solves and kind.writes:
        raise ConfigError(
            f"method {config.method} needs all branches of a step in one forward; exclude what the fused "
            "probe cannot reach, or use another method"
        )
    if config.placement != "per_example":
        probe = kind.make(config, sharding, names, method.factors)
        if config.compile:
            from tezo_ds.compiling.blocks import compile_blocks

            compile_blocks(probe, sharding, config.cuda_graphs)
        if rewarded is None:
            return Objective(sharding, loss_fn), probe, None
        generating = RewardObjective(sharding, rewarded, config)
        generating.seat = probe.seat
        return generating, probe, None
    assert method.factors is not None, "refused above"
    if config.memory_budget is not None and config.facts.fresh_left:
        raise ConfigError(
            f"memory_budget: does not know what {config.method} keeps for each example under placement "
            "per_example; set branch_chunk or micro_batch instead"
        )
    objective = ExampleObjective(sharding, loss_fn)
    adapters = adapters_of(config, sharding)
    by_example = ExampleProbe(sharding, method.factors, objective, adapters)
    return objective, by_example, ExampleLosses(config, sharding, method, by_example, objective)
