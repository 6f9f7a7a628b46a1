"""What the terminal shows of libraries: what a user can act on. The rest is kept for the run's folder.

Libraries log through handlers of their own, some of which they make and use while they are imported. So
`sieved` stands where all of them write, in `logging.StreamHandler`, for as long as a command runs.
"""

from __future__ import annotations

import logging
import re
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tezo_ds.launched import env_local_rank, env_rank

LOG = "libraries.log"
MOST = 10_000  # lines that wait for a folder
FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
# Warnings over which users of ours can do nothing, or of what we say ourselves: logger, beginning.
NOISE = (
    ("", r"(?s).*\bdeprecat(ed|ion)\b"),
    ("torchao", ""),  # kernels for other devices
    ("DeepSpeed", r"Setting accelerator to CPU"),  # the summary names the device
    ("transformers", r"Token indices sequence length is longer"),  # what is cut is counted
    ("transformers", r"The following generation flags are not valid"),  # ours are greedy
    ("py.warnings", r"(No device id is provided via|barrier\(\): using the device)"),  # of torch
)


class Sieve:
    """Records of libraries, shown or kept.

    Attributes:
        lines: kept ones that wait for a folder, oldest first.
    """

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=MOST)
        self._path: Path | None = None
        self._shown: set[str] = set()

    def takes(self, name: str, level: int, text: str) -> bool:
        """Takes a record, unless it has to be shown as its handler does: our own, and errors.

        Args:
            name: the logger.
            level: the record's, as logging numbers them.
            text: its message.
        """
        if name.split(".")[0] == "tezo_ds" or level >= logging.ERROR:
            return False
        line = " ".join(text.split())
        if level < logging.WARNING or _is_noise(name, text):
            self._keep(f"{time.strftime('%H:%M:%S')} {name}: {line}")
        elif line not in self._shown and env_local_rank() == 0:
            self._shown.add(line)
            print(f"warning: {line}", file=sys.stderr)
        return True

    def keep_in(self, folder: Path) -> None:
        """Writes what is kept to a file of a folder, from now on; on rank 0 alone."""
        if env_rank() == 0:
            self._path = folder / LOG
            while self.lines:
                self._keep(self.lines.popleft())

    def _keep(self, line: str) -> None:
        if self._path is None:
            self.lines.append(line)
            return
        # A full disk is the run's to tell; and the locale may be one of few letters.
        with suppress(OSError), self._path.open("a", encoding="utf-8", errors="replace") as log:
            log.write(line + "\n")


_sieves: list[Sieve] = []  # that of the command that runs, if any


def _is_noise(name: str, text: str) -> bool:
    return any(
        (not logger or name == logger or name.startswith(f"{logger}."))
        and re.match(beginning, text)
        for logger, beginning in NOISE
    )


@contextmanager
def sieved(verbose: bool) -> Iterator[None]:
    """Context manager: inside, a terminal shows of libraries what a user can act on.

    Args:
        verbose: whether to show everything, as libraries do.
    """
    if verbose or _sieves:
        yield
        return
    sieve = Sieve()
    emit: Any = logging.StreamHandler.emit
    show = warnings.showwarning

    def emit_less(handler: logging.StreamHandler[Any], record: logging.LogRecord) -> None:
        on_terminal = handler.stream in (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__)
        try:
            taken = on_terminal and sieve.takes(record.name, record.levelno, record.getMessage())
        except (TypeError, ValueError):  # words that do not fit their format, which `emit` tells
            taken = False
        if not taken:
            emit(handler, record)

    def show_less(message: Any, category: Any, *where: Any, **more: Any) -> None:
        level = logging.INFO if issubclass(category, FOR_DEVELOPERS) else logging.WARNING
        sieve.takes("py.warnings", level, f"{message}")

    _sieves.append(sieve)
    setattr(logging.StreamHandler, "emit", emit_less)  # noqa: B010
    warnings.showwarning = show_less
    try:
        yield
    finally:
        _sieves.remove(sieve)
        setattr(logging.StreamHandler, "emit", emit)  # noqa: B010
        warnings.showwarning = show


def keep_in(folder: Path) -> None:
    """Writes what is kept of libraries' lines to `LOG` in a run's folder, from now on."""
    for sieve in _sieves:
        sieve.keep_in(folder)


def without_bars() -> None:
    """Turns off libraries' progress bars. Downloads keep theirs on rank 0's terminal: they take minutes."""
    if not _sieves:
        return
    for name in ("transformers", "datasets"):
        if name in sys.modules:
            sys.modules[name].utils.logging.disable_progress_bar()
    if env_rank() == 0 and sys.stderr.isatty() and "huggingface_hub" in sys.modules:
        sys.modules["huggingface_hub"].utils.enable_progress_bars()
