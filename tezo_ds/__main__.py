"""Start of the command line, where what it needs is installed; the engine alone needs less."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn


def main() -> None:
    """Runs `tezo-ds`; a package that is missing is one line and exit code 2."""
    from tezo_ds.errors import ConfigError
    from tezo_ds.installed import COMMAND_LINE, need

    try:
        need("the command line", COMMAND_LINE, "train")
    except ConfigError as error:
        print(f"tezo-ds: error: {error}", file=sys.stderr)
        sys.exit(2)
    from tezo_ds.cli import Left, main

    try:
        main()
    except Left as ended:
        leave(int(ended.code or 0))


def leave(code: int) -> NoReturn:
    """Ends the process with `code` as multiprocessing ends its children: the interpreter is not taken down.

    A thread of gloo's that lets go of a tensor meanwhile would abort the process (pytorch 190489), and a
    sharded model keeps its process group, and so these threads, to the very end. What is registered with
    atexit runs, threads that are no daemons are waited for, and files are flushed.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = 120  # Python's own for it
    os._exit(code)


if __name__ == "__main__":
    main()
