"""What a command shows of libraries: what a user can act on; the rest is in the run's folder."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_line import Given, call
from only_ours import stray
from transformers.utils import logging as bars

from tezo_ds import quiet
from tezo_ds.training import session

pytest_plugins = ("cli_fixtures",)
MISSING = "Some weights of Llama were not initialized from the checkpoint: lm_head"


@contextmanager
def library(name: str, stream: Any) -> Iterator[logging.Logger]:
    """Context manager: a logger as libraries make theirs, with a handler of its own."""
    log, handler = logging.getLogger(name), logging.StreamHandler(stream)
    log.addHandler(handler)
    level, log.propagate = log.level, False
    log.setLevel(logging.INFO)
    try:
        yield log
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = True


def make_noise() -> None:
    """Logs and warns as libraries do: of nothing, of what a user acts on, and of an error."""
    with library("transformers.a_module", sys.stderr) as log:
        log.info("loaded, %s", "κ")
        log.info("%d", "no number")  # which logging tells on stderr, and no more
        log.warning("`torch_dtype` is deprecated! Use `dtype` instead!")
        for _ in range(2):
            log.warning(MISSING.replace(": ", ":\n"))
        log.error("no such device")
    with library("DeepSpeed", sys.stdout) as log:
        log.info("a banner")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old name", FutureWarning, stacklevel=1)
        warnings.warn("the driver is too old", UserWarning, stacklevel=1)


def test_what_a_user_acts_on_is_shown_once_and_the_rest_is_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    elsewhere = io.StringIO()
    with quiet.sieved(verbose=False), library("kept.elsewhere", elsewhere) as log:
        make_noise()
        quiet.keep_in(tmp_path)
        log.info("into a file of the user's")
        logging.getLogger("tezo_ds.models").warning("left over in the checkpoint")
    out, err = capsys.readouterr()
    assert out == ""
    shown = [f"warning: {MISSING}", "no such device", "warning: the driver is too old"]
    assert [line for line in err.splitlines() if line in shown] == shown
    assert "deprecated" not in err and "Logging error" in err
    assert elsewhere.getvalue() == "into a file of the user's\n"
    kept = (tmp_path / quiet.LOG).read_text()
    for text in (
        "transformers.a_module: loaded, κ",
        "`torch_dtype`",
        "DeepSpeed: a banner",
        "old name",
    ):
        assert text in kept
    assert "driver" not in kept and MISSING not in kept
    # Without it, or with --verbose, all of that is on the terminal.
    with quiet.sieved(verbose=True):
        make_noise()
    out, err = capsys.readouterr()
    assert "a banner" in out and "`torch_dtype`" in err
    # Of several ranks on a host the first speaks for all; an error is each one's own.
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with quiet.sieved(verbose=False):
        make_noise()
        quiet.keep_in(tmp_path)
    out, err = capsys.readouterr()
    assert out == "" and "no such device" in err and "warning:" not in err
    assert (tmp_path / quiet.LOG).read_text() == kept


def test_a_run_keeps_them_in_its_folder_and_verbose_shows_them(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    load = session.load_model

    def noisy(*arguments: Any) -> Any:
        make_noise()
        return load(*arguments)

    monkeypatch.setattr(session, "load_model", noisy)
    assert call(*given.train(tmp_path / "run", steps=2)) == 0
    out, err = capsys.readouterr()
    assert stray(out) == [] and "a banner" not in err and f"warning: {MISSING}" in err
    assert "DeepSpeed: a banner" in (tmp_path / "run" / quiet.LOG).read_text()
    assert not bars.is_progress_bar_enabled()
    bars.enable_progress_bar()
    assert call("evaluate", "--run", tmp_path / "run", "--verbose") == 0
    assert "a banner" in capsys.readouterr().out and bars.is_progress_bar_enabled()
