"""A method from outside of the package, as docs/extending.md has it: trained, resumed, replayed, exported."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from command_line import Given, Run, call
from tiny import make_batch, tiny

import tezo_ds
from tezo_ds.config.registry import GROUP, METHODS
from tezo_ds.methods import MethodFacts, register

pytest_plugins = ["cli_fixtures"]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
NAME = "sign-tezo"


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The page's module, importable and with its entry point, as an installed package would be."""
    python, toml = (
        re.search(rf"```{kind}\n(.*?)```", PAGE.read_text(), re.S) for kind in ("python", "toml")
    )
    assert python and toml
    site = tmp_path / "site"
    (site / "sign_tezo-1.dist-info").mkdir(parents=True)
    (site / "sign_tezo.py").write_text(python[1])
    point = toml[1].splitlines()[1].replace('"', "")
    assert toml[1].splitlines()[0] == f'[project.entry-points."{GROUP}"]'
    (site / "sign_tezo-1.dist-info" / "METADATA").write_text("Name: sign_tezo\nVersion: 1\n")
    (site / "sign_tezo-1.dist-info" / "entry_points.txt").write_text(f"[{GROUP}]\n{point}\n")
    monkeypatch.syspath_prepend(str(site))
    yield importlib.import_module("sign_tezo")
    METHODS.pop(NAME, None)
    sys.modules.pop("sign_tezo")


def test_the_command_line_finds_it_by_its_entry_point(
    outside: ModuleType, given: Given, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    assert NAME not in METHODS
    options = {"method": NAME, "rank": 4, "lr": 1e-3, "snapshot_every": 3, "check_every": 2}
    assert call(*given.train(output, **options)) == 0
    assert call(*given.train(output, **options, steps=9)) == 0  # resumes
    assert call("replay", output, "--verify") == 0
    assert call("export", "--run", output, "--adapter", tmp_path / "adapter") == 0
    run = Run(output)
    assert run.summary["steps"] == 9 and run.config["tezo"]["method"] == NAME
    steps = torch.cat([part.flatten() for part in run.coefficients.values()]) / 1e-3
    assert steps.abs().max() > 0 and torch.allclose(steps, steps.round(), atol=1e-6)


def test_python_registers_it(outside: ModuleType) -> None:
    register(NAME, outside.FACTS)
    register(NAME, outside.FACTS)  # a module that is imported again
    with pytest.raises(ValueError, match="there is a method 'sign-tezo' already"):
        register(NAME, MethodFacts("other:make", "another"))
    engine = tezo_ds.initialize(tiny(), {"method": NAME, "rank": 4, "lr": 1e-3})
    for step in range(3):
        before = engine.method.coefficients.clone()
        engine.step(make_batch(3, seed=step))
        moved = engine.method.coefficients - before
        assert torch.allclose(moved.abs(), torch.full_like(moved, 1e-3))


def test_one_that_nobody_has_is_refused_by_name() -> None:
    with pytest.raises(
        tezo_ds.ConfigError, match=r"method: must be one of tezo, tezo-m, .* package's own"
    ):
        tezo_ds.initialize(tiny(), {"method": "no-such"})
