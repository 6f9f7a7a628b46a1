"""The end of a process whose threads go on in C++, as gloo's do."""

from __future__ import annotations

import os
import subprocess
import sys

START = """
import atexit, sys, threading, time
import torch.distributed as dist
import tezo_ds.cli
from tezo_ds.__main__ import main

def app():
    def beat():
        while True:  # comes back to the interpreter all the time; aborts when that is taken down
            store.set("a", "b")

    store = dist.HashStore()
    threading.Thread(target=beat, daemon=True).start()
    threading.Thread(target=lambda: (time.sleep(0.2), print("waited for"))).start()
    atexit.register(print, "at exit", end="")
    sys.exit({code})

tezo_ds.cli.main = app
main()
"""


def ended(code: str, **streams: int) -> tuple[int, str, str]:
    command = [sys.executable, "-c", START.format(code=code)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, text=True, check=False, env=buffered, **streams)
    return done.returncode, done.stdout, done.stderr


def test_threads_do_not_abort_a_process_at_its_end() -> None:
    for given, code in (("3", 3), ("None", 0)):
        assert ended(given) == (code, "waited for\nat exit", ""), given


def test_output_that_cannot_be_written_is_told_by_the_code() -> None:
    with open("/dev/full", "w") as full:
        code, _, _ = ended("0", stdout=full.fileno())
    assert code == 120
