"""A run that is stopped once its steps have had so many processor seconds, and then evaluated."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

BEGUN = "after 0 steps"  # what a run prints before its first step and before a fit
POLL = 0.1  # seconds


def run_for(words: Sequence[str], budget: float, log: Path, env: dict[str, str]) -> float:
    """Runs `tezo-ds train` until its steps have taken the budget, and returns the processor seconds that
    the process took in all. A step that is under way is finished, and counts.

    Raises:
        RuntimeError: the run ended in another way, with what it printed.
    """
    with log.open("w") as out:
        process = psutil.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=env)
    begun: float | None = None
    taken = 0.0
    while process.poll() is None:
        time.sleep(POLL)
        try:
            used = process.cpu_times()
        except psutil.NoSuchProcess:
            break
        taken = used.user + used.system
        if begun is None and BEGUN in log.read_text():
            begun = taken
        if begun is not None and taken - begun >= budget:
            process.send_signal(signal.SIGTERM)
            break
    process.wait()
    printed = log.read_text()
    # What somebody else stopped has had less than the budget.
    if begun is None or taken - begun < budget or "stopped by SIGTERM" not in printed:
        raise RuntimeError(f"{' '.join(words)}:\n{printed}")
    return taken
