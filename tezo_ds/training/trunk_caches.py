"""A run's caches of hidden states: of its training examples and of those that evaluations score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tezo_ds.engine.engine import Engine
from tezo_ds.errors import StorageError
from tezo_ds.files.text import read_json, to_json, writing
from tezo_ds.run.folder import TRUNK_CACHE
from tezo_ds.run.resuming import fingerprint
from tezo_ds.sharding.world import agreed
from tezo_ds.tasks.encoded import Encoded
from tezo_ds.tasks.evaluation import Evaluator
from tezo_ds.training.rewarded import RewardEvaluator
from tezo_ds.trunk.cache import Cache, MemoryCache
from tezo_ds.trunk.disk import DiskCache
from tezo_ds.trunk.trunk import budget_of

KEY = "key.json"


def open_caches(
    engine: Engine, examples: Sequence[Encoded], evaluators: Mapping[str, Evaluator | RewardEvaluator],
    base: str | None, output: Path,
) -> str:  # fmt: skip
    """Gives an engine and its evaluators caches of their own, and returns what they will take, in a line.

    Returns "" where the config wants none. All ranks must call this, after `Engine.settle`.

    Args:
        engine: knows its trunk.
        examples: training examples.
        evaluators: those of the test examples and others, by the name of their part.
        base: fingerprint of the base model's weights.
        output: the run's folder.

    Raises:
        StorageError: the folder holds hidden states of something else, or cannot be written.
    """
    config, trunk = engine.config, engine.objective.trunk
    if config.trunk_cache == "off" or trunk is None or trunk.found is None:
        return ""
    budget, sharding = budget_of(config), engine.sharding
    judged = [each for evaluator in evaluators.values() for each in evaluator.encoded]
    caches: list[Cache]
    if config.trunk_cache == "memory":
        pinned = sharding.device.type != "cpu"
        caches = [MemoryCache(budget, pinned) for _ in ("train", *evaluators)]
    else:
        key = {
            "base": base, "dtype": str(trunk.found.dtype), "first block": trunk.found.first,
            "training examples": fingerprint(examples),
        }  # fmt: skip
        folder = output / TRUNK_CACHE
        agreed(lambda: _check_key(folder, key))
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)  # on this node, too
            _check_key(folder, key)
            caches = [
                DiskCache(budget, folder / part, sharding.place) for part in ("train", *evaluators)
            ]
    trunk.cache = caches[0]
    for evaluator, cache in zip(evaluators.values(), caches[1:], strict=True):
        evaluator.cache = cache
    share = sum(len(e.input_ids) for e in examples) / sharding.world_size
    tokens = share + sum(len(e.input_ids) for e in judged)
    each = trunk.found.width * trunk.found.dtype.itemsize
    most = "" if config.trunk_cache_gib is None else f", at most {config.trunk_cache_gib:g} GiB"
    return (
        f"trunk cache: {tokens:,.0f} tokens of {each:,} bytes on a rank, {tokens * each / 2**30:.3g} GiB of "
        f"{config.trunk_cache}{most}"
    )


def _check_key(folder: Path, key: Mapping[str, object]) -> None:
    """Writes a new cache's key, or compares that of one that is there.

    Raises:
        StorageError: the cache is of something else.
    """
    path = folder / KEY
    if not path.exists():
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{KEY}")
            partial.write_text(to_json(key, indent=2) + "\n")
            partial.replace(path)
        return
    found = read_json(path)
    if odd := [name for name in key if found.get(name) != key[name]]:
        raise StorageError(
            f"{folder}: hidden states of another run: {', '.join(odd)} differ; remove the folder, or choose "
            "another --output"
        )
