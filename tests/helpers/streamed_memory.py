"""The most memory that a run of `tezo-ds` takes of its own, files that are mapped left out."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from pathlib import Path

import datasets
import pandas  # noqa: F401  what a run would import on its way is no growth of it
import pyarrow.parquet  # noqa: F401

from tezo_ds import cli


def _own() -> int:
    """Reads this process's bytes of anonymous memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def measure(arguments: list[str], cache: Path, found: Path) -> None:
    """Runs the command, and writes its growth and its exit code as JSON."""
    datasets.config.HF_DATASETS_CACHE = cache
    peak, over = _own(), threading.Event()
    before = peak

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.01):
            peak = max(peak, _own())

    watching = threading.Thread(target=watch)
    watching.start()
    sys.argv = ["tezo-ds", *arguments]
    code: object = None
    with (
        (found.parent / "out").open("w") as out,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code
    over.set()
    watching.join()
    found.write_text(json.dumps({"bytes": peak - before, "code": code}))
