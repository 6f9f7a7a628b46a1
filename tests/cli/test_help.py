"""What users read of options: `--help`, docs/configuration.md and docs/python.md's table say the same, and
enough."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import reference
from pydantic import BaseModel

import tezo_ds
from tezo_ds.cli.options import flags_of, values_of
from tezo_ds.config import TezoConfig
from tezo_ds.config.declared import extra_of
from tezo_ds.config.registry import METHODS
from tezo_ds.config.schedules import LR_SCHEDULES
from tezo_ds.settings import RunOptions, Settings
from tezo_ds.tasks import BUILTIN_TASKS

STALE = "run `python launch/reference.py`, look at what changed, and commit it"
NAMED = {"method": METHODS, "schedule": LR_SCHEDULES, "task": BUILTIN_TASKS}  # by registries


@pytest.mark.parametrize("command", reference.COMMANDS)
def test_help_is_as_it_was_last_looked_at(command: str) -> None:
    golden = reference.HELP / f"{command or 'tezo-ds'}.txt"
    assert reference.help_of(command) == golden.read_text(), STALE


def test_docs_say_what_the_fields_say() -> None:
    page = reference.REPO / "docs" / "configuration.md"
    assert page.read_text() == reference.configuration(), STALE
    python = (reference.REPO / "docs" / "python.md").read_text()
    assert python == reference.with_table(python), STALE


@pytest.mark.parametrize("model", [TezoConfig, Settings, RunOptions])
def test_each_text_names_its_values_and_shows_one_that_is_valid(model: type[BaseModel]) -> None:
    for name, field in flags_of(model).items():
        text = str(field.description)
        values = {*values_of(field.annotation)} | set(NAMED.get(name, ()))
        assert not {value for value in values if value not in text}, f"{name} names not all values"
        assert "  " not in text and not text.endswith("."), name
        example = extra_of(field)["example"]
        assert example is not None, f"{name} has no example"
        together = {"query_schedule": {"queries_max": 9}, "warmup_steps": {"total_steps": 900}}
        together["inner_layers"] = {"output_layer": "fit"}
        together["cuda_graphs"] = {"compile": True}
        together["keep_periods"] = {"refresh_every": 500}
        required = {"model": "m", "task": "t", "output": "o"}
        given = {key: value for key, value in required.items() if key in model.model_fields}
        for one in (example, *sorted(values if name not in NAMED else ())):
            given |= {"total_steps": 9, name: one, **together.get(name, {})}
            model(**{key: value for key, value in given.items() if key in model.model_fields})


HEAVY = {"torch", "transformers", "deepspeed", "datasets", "numpy", "numba", "matplotlib"}


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = f"""if True:
        import atexit, sys
        from tezo_ds import cli
        atexit.register(lambda: print(*({HEAVY} & sys.modules.keys()), file=sys.stderr))
        cli.main()
    """

    def took(*arguments: str) -> float:
        """Returns the processor seconds of a call, which other processes disturb less than the time."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.stderr.strip() == "", done.stderr
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(took("--help") for _ in range(5)) < 0.75  # 0.3 s alone
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"tezo-ds {tezo_ds.__version__}\n"
