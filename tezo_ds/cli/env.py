"""The command `tezo-ds env`."""

from __future__ import annotations

from tezo_ds.cli.imports import uncollected
from tezo_ds.launched import env_rank

ENV_HELP = """Print what a bug report has to say of this machine.

Versions, the accelerator, the processor, threads, and the variables of a launcher. No host names, no folders
and no secrets, so that it can be pasted as it is. Started by a launcher, rank 0 prints its own.

```
tezo-ds env
```
"""


def env() -> None:
    """Prints the environment; see ENV_HELP."""
    with uncollected():
        from tezo_ds.doctor.environment import environment

    if env_rank() != 0:
        return
    lines = environment()
    width = max(map(len, lines))
    for title, text in lines.items():
        print(f"{title.ljust(width)}  {text}")
