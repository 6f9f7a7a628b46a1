"""Resume of a run: its folder read and agreed on by all ranks, an engine restored, snapshots saved."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tezo_ds.config import BLOCK, FREE, TezoConfig
from tezo_ds.engine.engine import Engine
from tezo_ds.engine.state import Cost
from tezo_ds.errors import ConfigError, StorageError
from tezo_ds.files.tensors import load, save
from tezo_ds.files.text import read_json
from tezo_ds.run.about import describe_run, read_about
from tezo_ds.run.changed import refuse_changed
from tezo_ds.run.folder import JOURNAL, METRICS, PARTS, SNAPSHOTS, SUMMARY, RunFolder, read_metrics
from tezo_ds.run.foreign import refuse_foreign_files
from tezo_ds.run.results import Display, give_fitted, refuse_foreign, replay
from tezo_ds.run.snapshots import checked_shards, save_shards
from tezo_ds.run.terms import Terms, terms_of
from tezo_ds.settings import Settings
from tezo_ds.sharding.world import agreed
from tezo_ds.tasks import Example
from tezo_ds.tasks.encoded import Encoded
from tezo_ds.tasks.lazy import LazyEncoded

FIRST = 16  # lazy examples that are tokenised for a digest

# Settings that may change on resume, as config.FREE of the block.
_FREE_SETTINGS = {
    "dtype", "compute_dtype", "eval_batch_size", "fsdp", "fsdp_replicas", "fsdp_offload_params",
    "fsdp_layers",
}  # fmt: skip
_OTHERS = ("batch_size", "weights_dtype", "factors_dtype", "examples", "data", "ranks")


@dataclass(frozen=True)
class Snapshot:
    """A saved state of a run.

    Attributes:
        after: number of steps before it.
        state: tensors of `Engine.state`.
        shards: folder of what ranks held of the weights, where a method writes weights.
    """

    after: int
    state: dict[str, Tensor]
    shards: Path | None


@dataclass(frozen=True)
class Begun:
    """A run as its folder has it, the same on every rank.

    Attributes:
        path: the folder's path.
        config: content of config.json.
        header: the journal's header.
        snapshots: whole snapshots, the newest first.
        steps: lines of the journal.
        scores: lines of metrics.jsonl of each part's evaluations, by the steps before them or what else came
            before.
        finished: whether the run came to its end.
        notices: messages to the user.
        terms: terms of the output layer, by the steps before each fit.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict)
    snapshots: tuple[Snapshot, ...] = ()
    steps: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, dict[int | str, dict[str, Any]]] = field(default_factory=dict)
    finished: bool = False
    notices: tuple[str, ...] = ()
    terms: Terms = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Number of steps in the journal."""
        return len(self.steps)

    @property
    def ranks(self) -> dict[str, int] | None:
        """Rank of each matrix, where the run chose ranks itself."""
        return self.config.get("ranks")


@contextmanager
def begun(
    path: Path, resume: bool | None, asked: Mapping[str, Any]
) -> Iterator[tuple[RunFolder | None, Begun]]:
    """Context manager: holds a run folder inside; gives the folder on rank 0, and what it has of the run on
    all. All ranks of the world must enter; see `look`."""
    folder: RunFolder | None = None

    def take() -> Begun:
        nonlocal folder
        folder = RunFolder(path)
        return look(folder, resume, asked)

    try:
        found = agreed(take)
        yield folder, found
    finally:
        if folder is not None:
            folder.close()


def look(folder: RunFolder, resume: bool | None, about: Mapping[str, Any]) -> Begun:
    """Reads what a folder has of the run that is to be made in it.

    Args:
        folder: a folder that is held.
        resume: whether to resume a run; None: if there is one.
        about: content of config.json, as far as it is known before a model is loaded.

    Raises:
        ConfigError: there is a run and none is to be resumed, or none and one is, or it is another run.
        StorageError: a file of the run is damaged.
    """
    contents, path = folder.contents, folder.path
    if contents is None or contents.header is None:
        if resume:
            raise ConfigError(f"--resume: {path} holds no run that has begun; leave --resume out")
        return Begun(path, notices=tuple(refuse_foreign_files(path)))
    if resume is False:
        raise ConfigError(f"{path} holds a run already; choose another --output, or remove it")
    config = read_about(path)
    refuse_other(path, config, about)
    block = TezoConfig(**config[BLOCK])
    refuse_foreign(path / JOURNAL, contents.header, block)
    notices = [f"{path} goes on after {len(contents.steps)} steps"]
    if contents.torn:
        notices.append(f"{JOURNAL}: {contents.torn}; dropped")
    snapshots = tuple(_snapshots(path, contents.steps, config, notices))
    scores = {part: _scores(path / METRICS, part) for part in PARTS}
    summary = read_json(path / SUMMARY) if (path / SUMMARY).exists() else {}
    terms = terms_of(path, block, contents.header, contents.steps, summary)
    return Begun(
        path, config, contents.header, snapshots, contents.steps,
        scores, summary.get("status") == "finished", tuple(notices), terms,
    )  # fmt: skip


def _scores(metrics: Path, part: str) -> dict[int | str, dict[str, Any]]:
    lines = read_metrics(metrics, part)[1] if metrics.exists() else []
    return {"output_layer" if "after" in line else line["step"]: line for line in lines}


def _snapshots(
    path: Path, steps: Sequence[Mapping[str, Any]], config: Mapping[str, Any], notices: list[str]
) -> Iterator[Snapshot]:
    """Yields the whole snapshots of this journal, the newest first; their shards are not checked yet."""
    writes = not TezoConfig.model_validate(config[BLOCK]).facts.learns_coefficients
    for file in sorted((path / SNAPSHOTS).glob("step-*.safetensors"), reverse=True):
        try:
            state, about = load(file)
        except StorageError as error:
            notices.append(f"{error}; going on without it")
            continue
        after, shards = int(about["step"]), file.with_suffix("")
        of_this = after <= len(steps) and steps[after - 1]["sum"] == about["sum"]
        if of_this and (shards.exists() or not writes):
            yield Snapshot(after, state, shards if writes else None)


def refuse_other(path: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ConfigError, which names the field, unless a folder's config.json is of the run asked for."""
    for part, free in ((BLOCK, _free(stored)), ("settings", _FREE_SETTINGS), ("", frozenset())):
        was, asked = (content.get(part, {}) if part else content for content in (stored, now))
        names = asked.keys() - free if part else asked.keys() & set(_OTHERS)
        for name in sorted(names):
            unsaid = name == "steps_per_epoch" and asked[name] is None  # by the examples, later on
            kept = name == "trunk_cache" and "off" not in (
                was.get(name),
                asked[name],
            )  # where is free
            if was.get(name) != asked[name] and not unsaid and not kept:
                raise ConfigError(
                    f"{path} holds a run of {name} {was.get(name)!r}, not {asked[name]!r}; use the same "
                    "to go on, or choose another --output"
                )


def _free(stored: Mapping[str, Any]) -> frozenset[str]:
    """Returns the fields of the block that may change on resume: the number of steps, too, unless the steps
    that were made depend on it."""
    block = stored.get(BLOCK, {})
    depends = block.get("schedule") != "constant" or block.get("query_schedule") == "adaptive"
    return FREE | (set() if depends else {"total_steps"})


def fingerprint(examples: Sequence[Encoded]) -> str:
    """Returns a digest of the training examples, in their order; of lazy ones as texts, with the first as
    the tokenizer has them."""
    if isinstance(examples, LazyEncoded):
        known = fingerprint(examples.pick(range(min(len(examples), FIRST))))
        return _hash([examples.examples.digest, known])
    return _hash(
        (
            e.input_ids,
            e.label_start,
            *(() if e.mask is None else (e.label_end, e.mask)),
            *(() if e.spans is None else e.spans),
            *(() if e.answer is None else (e.start, e.answer)),
            *(() if e.number is None else (e.number,)),
        )
        for e in examples
    )


def fingerprint_of_tests(examples: Sequence[Example]) -> str:
    """Returns a digest of the test examples, in their order."""
    return _hash((example.prompt, example.answer) for example in examples)


def _hash(things: Iterable[object]) -> str:
    hashed = hashlib.blake2b(digest_size=8)
    for thing in things:
        hashed.update(repr(thing).encode())
    return hashed.hexdigest()


def go_on(
    settings: Settings, engine: Engine, data: Mapping[str, Any], folder: RunFolder | None, found: Begun,
    about: Mapping[str, Any], display: Display,
) -> None:  # fmt: skip
    """Restores a new engine to where the run is, and opens the folder for further steps. All ranks must call
    this; `folder` is rank 0's.

    Args:
        settings: the run's settings.
        engine: the engine to train.
        data: how many examples train, and a digest of them, or None: `examples` and `data` of the journal.
        folder: the run's folder.
        found: the run as its folder has it.
        about: fields of config.json that neither settings nor engine know.
        display: receiver of notices and progress.

    Raises:
        ConfigError: the model or the examples are not the run's.
        TezoError: a snapshot is damaged, or a file cannot be written.
    """
    config = describe_run(settings, engine, dict(about))
    header = {**data, "run": engine.config.identity}
    if "ranks" in config:  # chosen by the run, and read from config.json when it goes on
        header["ranks"] = _hash(sorted(config["ranks"].items()))
    if found.header:
        refuse_changed(found.path, {**found.config, **found.header}, {**config, **header}, settings)
        refuse_other(found.path, {**found.config, **found.header}, {**config, **header})
    for notice in found.notices:
        display.note(notice)
    restore(engine, found, display)
    if folder is not None:
        folder.open(config, header)


def restore(engine: Engine, found: Begun, display: Display) -> None:
    """Restores a new engine to where the run was. All ranks must call this.

    Raises:
        TezoError: the run is of another model, or a snapshot is damaged.
    """
    steps = found.steps
    if costs := [line["cost"] for line in steps if "cost" in line]:
        engine.run_state.cost = Cost(**costs[-1])
    for snapshot in found.snapshots:
        if snapshot.shards is not None:
            try:
                fill = checked_shards(engine, snapshot.shards)
            except StorageError as error:
                display.note(f"{error}; going on without it")
                continue
            fill()
        engine.load_state(snapshot.state, written=snapshot.shards is not None)
        steps = steps[snapshot.after :]
        break
    if steps:
        replay(engine, steps, display, terms=found.terms)
    give_fitted(engine, found.terms)
    engine.check()


def snapshot(engine: Engine, path: Path, folder: RunFolder | None, kept: int) -> None:
    """Saves a snapshot: what is equal on all ranks, and the shards where a method writes weights. All ranks
    must call this; `folder` is rank 0's.

    Args:
        engine: the engine, after a step that is in the journal.
        path: the run folder's path; every rank must be able to write there if weights are written.
        folder: the run folder, on rank 0.
        kept: number of snapshots that stay; older ones go.

    Raises:
        TezoError: a file cannot be written.
    """
    name = path / SNAPSHOTS / f"step-{engine.step_index:08d}"
    if folder is not None:  # away with what a run that was killed in here has left
        name.with_suffix(".safetensors").unlink(missing_ok=True)
        for left in (name, *(path / SNAPSHOTS).glob(".step-*")):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(
                missing_ok=True
            )
    if not engine.config.facts.learns_coefficients and not engine.sharding.packed:
        engine.sharding.maxima([0])  # all see that it is gone
        save_shards(engine, name)
    if folder is not None:
        about = {"step": str(engine.step_index), "sum": folder.sum}
        save(engine.state(), name.with_suffix(".safetensors"), about)
        _remove_others(path / SNAPSHOTS, name.with_suffix(".safetensors"), kept)


def _remove_others(folder: Path, newest: Path, kept: int) -> None:
    """Removes snapshots that are too many, or of steps that are to be made again, and shards of which a
    killed run has left no state."""
    found = sorted(folder.glob("step-*.safetensors"))
    count = found.index(newest) + 1
    for state in (*found[: max(count - kept, 0)], *found[count:]):
        state.unlink()
    for shards in folder.glob("step-*"):
        if shards.is_dir() and not shards.with_suffix(".safetensors").exists():
            shutil.rmtree(shards, ignore_errors=True)
