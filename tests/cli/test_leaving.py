"""The end of a process whose threads go on in C++, as gloo's do."""

from __future__ import annotations

import os
import subprocess
import sys

FULL = """
import sys, tezo_ds.cli

def app():
    print("lost")
    raise tezo_ds.cli.Left(None)
"""
MAIN = """
from tezo_ds.__main__ import main
tezo_ds.cli.main = app
main()
"""
THREADS = """
import atexit, sys, threading, time
import tezo_ds.cli
import torch.distributed as dist

def app():
    def beat():
        while True:  # comes back to the interpreter all the time, and aborts when that is taken down
            store.set("a", "b")

    store = dist.HashStore()
    threading.Thread(target=beat, daemon=True).start()
    threading.Thread(target=lambda: (time.sleep(0.2), print("waited for"))).start()
    atexit.register(print, "at exit", end="")
    raise tezo_ds.cli.Left(3)
"""


def ended(code: str, stdout: int = subprocess.PIPE) -> tuple[int, str, str]:
    """Runs Python code with buffers; returns its exit code and what it wrote."""
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": ""}, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_threads_do_not_abort_a_process_at_its_end() -> None:
    assert ended(THREADS + MAIN) == (3, "waited for\nat exit", "")


def test_output_that_cannot_be_written_is_told_by_the_code() -> None:
    with open("/dev/full", "w") as full:
        assert ended(FULL + MAIN, full.fileno())[0] == 120
