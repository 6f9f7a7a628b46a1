"""What is installed: a wheel's content, versions, extras; runs where packages are missing; bug reports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from command_line import Given, call
from only_ours import stray
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.version import Version

import tezo_ds
from tezo_ds.doctor import environment
from tezo_ds.installed import COMMAND_LINE

pytest_plugins = ("cli_fixtures",)
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Runs helpers/without_packages.py, and returns its cases by name."""
    program = REPO / "tests" / "helpers" / "without_packages.py"
    folder = tmp_path_factory.mktemp("without")
    done = subprocess.run(
        [sys.executable, program, folder], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_the_engine_needs_neither_deepspeed_nor_what_the_command_line_needs(found: Any) -> None:
    assert found["own loop"]["code"] == 0 and found["own loop"]["out"] == "3\n"
    missing = [name for name in COMMAND_LINE if name != "accelerate"]
    assert found["command line"] == {
        "case": "command line", "code": 2, "out": "",
        "error": f"tezo-ds: error: the command line needs {', '.join(missing)}, not installed here; "
        "pip install 'tezo_ds[train]'\n",
    }  # fmt: skip


@pytest.mark.parametrize("case", ["train", "fsdp2"])
def test_one_process_and_fsdp2_run_without_deepspeed(found: Any, case: str) -> None:
    assert found[case]["code"] == 0, found[case]


@pytest.mark.parametrize(
    "case, what",
    [
        ("zero3", "tezo-ds: error: --deepspeed"),
        ("plan", "tezo-ds: error: --dry-run of ZeRO-3"),
        ("own loop, zero3", "initialize: a config with zero_optimization"),
    ],
)
def test_zero3_names_what_installs_deepspeed(found: Any, case: str, what: str) -> None:
    assert found[case]["code"] == 2
    assert found[case]["error"] == (
        f"{what} needs deepspeed, not installed here; pip install 'tezo_ds[zero3]', or shard by FSDP2 "
        "(--fsdp), which needs no such package\n"
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds a wheel from a copy of what git would keep, and unpacks it where a pip would."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(REPO / "tezo_ds", folder / "repo" / "tezo_ds")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, folder / "repo")
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=folder / "repo", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    with zipfile.ZipFile(made) as content:
        content.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_has_the_package_its_types_and_the_version_of_the_code(wheel: Path) -> None:
    modules = {path.relative_to(REPO) for path in (REPO / "tezo_ds").rglob("*.py")}
    assert {path.relative_to(wheel) for path in wheel.rglob("*.py")} == modules
    assert (wheel / "tezo_ds" / "py.typed").exists()
    (info,) = wheel.glob("*.dist-info")
    about = Metadata.from_email((info / "METADATA").read_bytes())
    assert about.version == Version(tezo_ds.__version__)
    extras = {"train", "zero3", "trackers", "bench", "dev"}
    assert extras <= {*map(str, about.provides_extra or ())}
    by_extra: dict[str, set[str]] = {extra: set() for extra in ("", *extras)}
    for one in about.requires_dist or ():
        for extra in by_extra:
            always = one.marker is None and not extra
            if always or (one.marker and extra and one.marker.evaluate({"extra": extra})):
                by_extra[extra].add(one.name)
    assert by_extra["train"] == {*COMMAND_LINE}
    assert by_extra["zero3"] == {"deepspeed"}
    assert not by_extra[""] & {*COMMAND_LINE, "deepspeed"}
    starts = (info / "entry_points.txt").read_text()
    assert "tezo-ds = tezo_ds.__main__:main" in starts


def test_it_runs_outside_of_the_repository(wheel: Path, given: Given, tmp_path: Path) -> None:
    """A run, the version and completion, from the wheel's own files. All that the run's process writes, from
    the interpreter's start on, is ours."""
    env = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(wheel)}

    def ran(*words: object, **more: str) -> str:
        start = "import sys; sys.argv[0] = 'tezo-ds'; from tezo_ds.__main__ import main; main()"
        command = [sys.executable, "-c", start, *map(str, words)]
        done = subprocess.run(
            command, env={**env, **more}, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout

    assert stray(ran(*given.train(tmp_path / "run", steps=2))) == []
    assert stray("Loading weights: 100%|███| 20/20\n[INFO] [launch.py:152] dist_world_size=2") != []
    assert ran("--version") == f"tezo-ds {tezo_ds.__version__}\n"
    asked = {"_TEZO_DS_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    assert ran(COMP_WORDS="tezo-ds prob", **asked).split() == ["probe-layers"]
    asked["COMP_CWORD"] = "3"
    words = ran(COMP_WORDS="tezo-ds train --placement per", **asked).split()
    assert words == ["per_rank", "per_example"]


def test_a_bug_report_names_no_host_folder_or_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secrets = {"MASTER_ADDR": "node-7.example", "HF_TOKEN": "hf_secret", "HF_HOME": "/home/me/hf"}
    for name, text in {**secrets, "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, text)
    assert call("env") == 0
    said = capsys.readouterr().out
    for word in (
        "tezo_ds",
        "torch",
        "accelerator",
        "threads",
        "MASTER_ADDR (set)",
        "DS_ACCELERATOR=cpu",
    ):
        assert word in said
    for secret in (*secrets.values(), str(Path.home()), os.getcwd()):
        assert secret not in said


def test_variables_are_shown_by_a_list_and_places_without_their_values() -> None:
    environ = {"OMP_NUM_THREADS": "2", "MASTER_ADDR": "10.0.0.7", "WANDB_API_KEY": "k", "PATH": "p"}
    assert environment.variables(environ) == "OMP_NUM_THREADS=2 MASTER_ADDR (set)"
    assert not {*environment.SHOWN} & {*environment.HIDDEN}
    risky = (
        "KEY",
        "TOKEN",
        "SECRET",
        "PASS",
        "ADDR",
        "HOST",
        "USER",
        "FILE",
        "DIR",
        "PATH",
        "HOME",
    )
    shown = [name for name in environment.SHOWN if any(word in name for word in risky)]
    assert shown == ["TOKENIZERS_PARALLELISM"]


def test_constraints_name_what_the_extras_ask_for() -> None:
    """The tested set has each package of ours, so that `pip install -c` takes no other version."""
    pinned = {
        Requirement(line).name.lower().replace("_", "-")
        for line in (REPO / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    for name in ("torch", "deepspeed", *COMMAND_LINE):
        assert name in pinned
