"""The picture of a run: whatever matplotlib makes of a user's settings, the run keeps its results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Given, Run, call, finish, start

from tezo_ds.run.folder import ADAPTER, COEFFICIENTS, CURVE, REPORT
from tezo_ds.training import records

pytest_plugins = ("cli_fixtures",)


BACKENDS = ["module://matplotlib_inline.backend_inline", "nonsense"]
ONE_EACH = """if True:
    import gc, json, os, sys
    gc.disable()  # as collections would go through what is imported again and again
    import transformers.models.llama.modeling_llama
    from tezo_ds.cli import main
    from tezo_ds.run import resuming
    from tezo_ds.training import records, session
    gc.freeze()

    assert "matplotlib" not in sys.modules  # which reads the variable
    codes = []
    for backend, arguments in json.loads(sys.argv[1]):
        if not (child := os.fork()):
            os.environ["MPLBACKEND"] = backend
            print(f"-- {backend}", flush=True)
            os.dup2(1, 2)
            sys.argv = ["tezo-ds", *arguments]
            main()
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print("--", *codes)
"""


@pytest.fixture(scope="module")
def started(given: Given, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Run, str]]:
    """Starts a run for each backend, from one process that has imported all but matplotlib."""
    runs = {backend: Run(tmp_path_factory.mktemp("run") / "run") for backend in BACKENDS}
    lines = [(backend, given.train(run.path, steps=2)) for backend, run in runs.items()]
    code, out, err = finish(start(sys.executable, "-c", ONE_EACH, json.dumps(lines, default=str)))
    assert code == 0, out + err
    *outs, codes = out.split("-- ")[1:]
    assert codes.split() == ["0"] * len(runs), out
    return {each.split("\n")[0]: (runs[each.split("\n")[0]], each) for each in outs}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow
def test_a_notebooks_backend_does_not_fail_a_run(
    backend: str, started: dict[str, tuple[Run, str]]
) -> None:
    run, out = started[backend]
    assert "Traceback" not in out, out
    assert run.summary["status"] == "finished" and run.coefficients
    assert (run.path / CURVE).exists() and "no curve.png" not in out


@pytest.mark.parametrize("failing", ["draw_curve", "save_adapter", "page_of"])
def test_what_fails_after_the_last_step_leaves_the_rest(
    failing: str, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*_: Any) -> None:
        raise RuntimeError("of a library")

    monkeypatch.setattr(records, failing, fail)
    assert call(*given.train(tmp_path / "run", steps=2), drawn=True) == 0
    assert "of a library" in capsys.readouterr().out
    run = Run(tmp_path / "run")
    assert run.summary["status"] == "finished" and (run.path / COEFFICIENTS).exists()
    assert (run.path / ADAPTER).exists() == (failing != "save_adapter")
    assert (run.path / CURVE).exists() == (failing != "draw_curve")
    assert (run.path / REPORT).exists() == (failing != "page_of")
