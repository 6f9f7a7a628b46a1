"""launch/elastic.sh when ranks that were told to stop are started again, as one of them broke at its end."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from launching import end, start

# Starts a rank; when that ends, makes another attempt, as torchrun does where a rank's exit code is not 0.
TORCHRUN = """#!/usr/bin/env bash
while (($#)); do [[ "$1" != --log-dir ]] || logs="$2"; shift; done
trap 'kill $(jobs -p); exit 1' TERM
for attempt in 0 1 2; do
    mkdir -p "$logs/run/attempt_$attempt"
    RANK=0 bash -c 'trap "kill %1; exit 134" TERM; sleep 60 & wait' &
    wait
done
"""


def test_ranks_that_are_started_again_after_a_stop_are_ended(tmp_path: Path) -> None:
    (tmp_path / "torchrun").write_text(TORCHRUN)
    (tmp_path / "torchrun").chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    output = tmp_path / "run"
    process = start("elastic.sh", "--output", output, PYTHON_BIN_DIR=tmp_path, NPROC_PER_NODE=1)
    deadline = time.monotonic() + 60
    while not list(output.glob("logs/*/run/attempt_0")):
        assert time.monotonic() < deadline, end(process)
        time.sleep(0.05)
    time.sleep(0.5)  # until its rank runs
    process.terminate()
    code, _, err = end(process)
    assert time.monotonic() < deadline and code != 0, err
    assert len(list(output.glob("logs/*/run/attempt_1"))) == 1
