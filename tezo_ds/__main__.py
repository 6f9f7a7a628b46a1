"""Start of the command line, where what it needs is installed; the engine alone needs less."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs `tezo-ds`; a package that is missing is one line and exit code 2."""
    from tezo_ds.errors import ConfigError
    from tezo_ds.installed import COMMAND_LINE, need

    try:
        need("the command line", COMMAND_LINE, "train")
    except ConfigError as error:
        print(f"tezo-ds: error: {error}", file=sys.stderr)
        sys.exit(2)
    from tezo_ds.cli import main

    main()


if __name__ == "__main__":
    main()
