"""Damage to a run's files, flipped bits and cuts, and what resuming makes of it, without training."""

from __future__ import annotations

import random
import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fault_runs import fresh
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import logging

from tezo_ds.engine.engine import Engine
from tezo_ds.errors import TezoError
from tezo_ds.export.adapter import CHECKSUMS
from tezo_ds.files.tensors import digest
from tezo_ds.files.text import read_json
from tezo_ds.run.about import read_run
from tezo_ds.run.folder import ADAPTER, CONFIG, JOURNAL, SNAPSHOTS, RunFolder
from tezo_ds.run.journal import read_journal
from tezo_ds.run.resuming import look, restore
from tezo_ds.sharding import ShardView
from tezo_ds.training.display import Display
from tezo_ds.training.session import open_engine

PATTERNS = {
    "journal": JOURNAL,
    "state": f"{SNAPSHOTS}/step-*.safetensors",
    "shards": f"{SNAPSHOTS}/step-*/rank-*.safetensors",
    "index": f"{SNAPSHOTS}/step-*/index.json",
}  # what is damaged, as a pattern in a run folder


@dataclass(frozen=True)
class Case:
    """A damaged file.

    Attributes:
        part: a key of `PATTERNS`.
        file: its path.
        what: that was done to it.
    """

    part: str
    file: Path
    what: str


def damaged(run: Path, part: str, drawn: random.Random) -> Case | None:
    """Damages one file of a part of a run by `damage`; None where the run has no such file."""
    files = sorted(run.glob(PATTERNS[part]))
    if not files:
        return None
    file = drawn.choice(files)
    return Case(part, file, damage(file, drawn))


def damage(file: Path, drawn: random.Random) -> str:
    """Cuts a file or flips one to three of its bits; returns which."""
    content = bytearray(file.read_bytes())
    if drawn.random() < 0.4:
        size = drawn.randrange(len(content))
        file.write_bytes(content[:size])
        return f"cut to {size} of {len(content)} bytes"
    places = [
        (drawn.randrange(len(content)), drawn.randrange(8)) for _ in range(drawn.randint(1, 3))
    ]
    for byte, bit in places:
        content[byte] ^= 1 << bit
    file.write_bytes(content)
    return f"flipped {places}"


class Subject:
    """A run of which copies are damaged, and the state of its engine after each step.

    Args:
        run: a folder that is whole, of any sharding; one process without any goes on from it here.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._settings, self._config = read_run(run)
        self._settings = self._settings.model_copy(update={"fsdp": False, "dtype": "auto"})
        self._about = read_json(run / CONFIG)
        self._display = Display(rank=1, world_size=1, log_every=1)  # silent
        logging.disable_progress_bar()
        steps = read_journal(run / JOURNAL).steps
        engine = self._engine()
        self.after = [where(engine)]
        for line in steps:
            engine.replay(line["step"], line["kappa"], line["lr"], line["rho"])
            self.after.append(where(engine))

    def _engine(self) -> Engine:
        return open_engine(self._settings, self._config, None, self._about.get("ranks"))

    def goes_on(self, run: Path) -> str:
        """Resumes from a copy of the run: "refused" in one line, "identical", or what is wrong."""
        folder = None
        try:
            folder = RunFolder(run)
            found = look(folder, None, self._about)
            engine = self._engine()
            restore(engine, found, self._display)
        except TezoError as error:
            return "refused" if "\n" not in str(error) else f"wrong: of several lines: {error}"
        except Exception as error:
            return f"wrong: {type(error).__name__}: {error}"
        finally:
            if folder is not None:
                folder.close()
        if engine.step_index != found.done or where(engine) != self.after[found.done]:
            return f"wrong: after {found.done} steps it is somewhere else"
        return "identical"

    def parts(self) -> list[str]:
        """Returns the keys of `PATTERNS` of which this run has files."""
        return [part for part, pattern in PATTERNS.items() if list(self.run.glob(pattern))]

    def try_one(self, part: str, drawn: random.Random, copy: Path) -> tuple[Case, str]:
        """Damages a copy of the run and resumes from it."""
        shutil.copytree(self.run, fresh(copy), dirs_exist_ok=True)
        case = damaged(copy, part, drawn)
        assert case is not None, f"{self.run} has no {part}"
        return case, self.goes_on(copy)


def where(engine: Engine) -> str:
    """Returns a digest of all that a step changes."""
    tensors = dict(engine.state())
    tensors |= {f"weight.{name}": p.data for name, p in engine.sharding.module.named_parameters()}

    def note(view: ShardView) -> None:
        for kind, moment in engine.method.moments(view).items():
            tensors[f"{kind}.{view.name}"] = moment.clone()

    engine.sharding.each_shard(engine.space.slices.keys(), note)
    return digest(tensors)


def adapter_case(run: Path, drawn: random.Random, copy: Path) -> str:
    """Damages an adapter; returns what its checksums, safetensors and peft make of it."""
    from peft import PeftConfig

    shutil.copytree(run / ADAPTER, fresh(copy), dirs_exist_ok=True)
    whole = load_file(run / ADAPTER / "adapter_model.safetensors")
    file = copy / drawn.choice(["adapter_model.safetensors", "adapter_config.json"])
    before = file.read_bytes()
    damage(file, drawn)
    check = ["sha256sum", "--check", "--strict", "--status", CHECKSUMS]
    passed = subprocess.run(check, cwd=copy).returncode == 0
    if passed != (file.read_bytes() == before):
        return "wrong: missed by its checksums"
    if file.suffix == ".json":
        old = PeftConfig.from_pretrained(str(run / ADAPTER)).to_dict()
        return _loaded(lambda: PeftConfig.from_pretrained(str(copy)).to_dict() == old)
    return _loaded(lambda: _equal(load_file(file), whole))


def _loaded(same: Callable[[], bool]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            return "loads the same" if same() else "loads something else"
    except SafetensorError:
        return "refused by safetensors"
    except UserWarning:  # of a name that is none of peft's
        return "loads with a warning"
    except Exception as error:
        return f"refused by {type(error).__name__}"


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
