"""A reward for code that runs: what a model wrote, run beside the row's tests in a process with limits."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SECONDS = 3  # of a processor, for each process of a program
WAIT = 4  # as long, of a clock: a machine that is busy fails no program
BYTES = 512 * 2**20  # of its memory, and of its files
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each reserves memory
_SANDBOX = str(Path(__file__).with_name("sandbox.py"))
_FENCED = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)
log = logging.getLogger(__name__)


def code(
    completions: Sequence[str], tests: Sequence[str | Sequence[str]] | None = None
) -> list[float]:
    """Rewards by 1 a completion whose code runs to its end, and then the row's tests do.

    Args:
        completions: Python; where there is a block between ```, the first one alone.
        tests: statements that raise where the code is wrong, such as asserts; a text or several.
    """
    rows = [""] * len(completions) if tests is None else tests
    given = [
        (code_in(said), test if isinstance(test, str) else "\n".join(test))
        for said, test in zip(completions, rows, strict=True)
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        try:
            return list(threads.map(lambda programs: float(runs(programs)), given))
        finally:
            threads.shutdown(cancel_futures=True)


def code_in(completion: str) -> str:
    """Returns the first block between ``` of a completion, which need not end; without any all of it."""
    found = _FENCED.search(completion)
    return completion if found is None else found[1]


def runs(programs: Sequence[str], seconds: int = SECONDS, nbytes: int = BYTES) -> bool:
    """Returns whether programs run one after the other, with the same names, to the end of the last.

    Args:
        programs: texts in Python.
        seconds: of a processor that they may take together.
        nbytes: memory, and bytes of files, that they may take.
    """
    passed = 2 + secrets.randbelow(100)  # no program knows how to exit as if it had
    with tempfile.TemporaryDirectory(prefix="tezo-code-") as folder:
        how = "open" if missing() else "isolated"
        words = [
            sys.executable,
            "-I",
            _SANDBOX,
            how,
            folder,
            str(nbytes),
            str(seconds),
            str(passed),
        ]
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, **_ONE_THREAD}, start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(json.dumps(list(programs)).encode(), timeout=WAIT * seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _kill(process)
    return process.returncode == passed


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process with all that are of its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@functools.cache
def missing() -> str:
    """Returns why programs are not isolated on this machine; "" where they are."""
    with tempfile.TemporaryDirectory(prefix="tezo-code-") as folder:
        words = [sys.executable, "-I", _SANDBOX, "try", folder]
        done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip()[-200:]


def warn() -> None:
    """Says plainly what runs, and what does not keep it from doing harm."""
    limits = f"{SECONDS} s of a processor and {BYTES >> 20} MiB each"
    if not missing():
        log.warning("--reward code: runs what the model writes, within %s, without network", limits)
    else:
        log.warning(
            "--reward code: runs what the model writes, within %s, and NOT isolated: it can use the network, "
            "and change and delete your files, as this machine gives no namespaces (%s); run in a container",
            limits, missing(),
        )  # fmt: skip
