"""Imports of a command, which garbage collection leaves alone."""

from __future__ import annotations

import gc
import subprocess
import sys

from tezo_ds.cli.imports import uncollected

COLLECTED = "[entry['collections'] for entry in gc.get_stats()]"
COMMANDS = {
    "train": ["--model", "m", "--task", "t", "--output", "o"],
    "evaluate": [],
    "generate": ["--prompt", "p", "--run", "r"],
    "export": [],
    "replay": ["run"],
    "env": [],
    "plan": ["--model", "m", "--world", "2"],
    "doctor": [],
    "probe-layers": ["--model", "m", "--task", "t"],
    "sweep": ["--model", "m", "--task", "t", "--output", "o", "--lr", "1", "2"],
}


def test_a_process_with_torch_goes_on_as_before() -> None:
    assert "torch" in sys.modules
    frozen = gc.get_freeze_count()
    with uncollected():
        assert gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == frozen


def ran(code: str) -> str:
    """Runs code in a process that has not imported torch, and returns what it prints."""
    command = [sys.executable, "-c", f"if True:\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_collected_inside_and_all_that_is_new_after_it() -> None:
    """Collection goes on whether or not an import fails; who has turned it off finds it so."""
    ran(f"""
        import gc, sys
        from tezo_ds.cli.imports import uncollected
        with uncollected():
            before = {COLLECTED}
            made = [[] for _ in range(10_000)]
            assert {COLLECTED} == before, before
        assert gc.isenabled() and gc.get_freeze_count() > len(made)
        more = [[] for _ in range(10_000)]
        assert {COLLECTED} != before
        try:
            with uncollected():
                import no_such_module
        except ImportError:
            assert gc.isenabled()
        gc.disable()
        with uncollected():
            pass
        assert not gc.isenabled() and "torch" not in sys.modules
    """)


def test_every_command_imports_torch_so() -> None:
    told = ran(f"""
        import gc, os, sys
        from tezo_ds.cli import app, main

        class Torch:
            def find_spec(self, name, path=None, target=None):
                if name == "torch":
                    print(sys.argv[1], gc.isenabled(), flush=True)
                    os._exit(0)

        sys.meta_path.insert(0, Torch())
        names = {{one.callback.__name__.replace("_", "-") for one in app.registered_commands}}
        assert names == {set(COMMANDS)}
        for command, words in {COMMANDS}.items():
            if not (child := os.fork()):
                sys.argv = ["tezo-ds", command, *words]
                main()
            os.waitpid(child, 0)
    """)
    assert told.splitlines() == [f"{command} False" for command in COMMANDS]
