"""What a script measures in a process of its own, whose memory nothing else has had."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def found_apart(*words: str) -> Any:
    """Runs a Python script to its end, and returns what the last line that it prints holds, as JSON.

    Args:
        words: the script, and its arguments.

    Raises:
        subprocess.CalledProcessError: the script failed.
    """
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
