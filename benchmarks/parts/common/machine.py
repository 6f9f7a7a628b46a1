"""One line on where and on what a benchmark ran."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from tezo_ds.doctor.machine import processor


def describe() -> str:
    """Returns processor, cores, versions and commit, in one line."""
    return (
        f"{_processor()}, {torch.get_num_threads()} threads, {platform.system()}; "
        f"torch {torch.__version__}, transformers {version('transformers')}; commit {_commit()}"
    )


def _processor() -> str:
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    return processor()


def _commit() -> str:
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=10"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
