"""Imports between rooms: each room may import only what stands below it.

Read off the imports themselves, those within functions and for type checkers included.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tezo_ds

ROOT = Path(__file__).resolve().parent.parent / "tezo_ds"

# From the top to the bottom; files beside the rooms go by their own names.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli", "session"),
    ("integrations", "sweeping"),
    ("training",),
    ("run", "doctor", "probing_layers"),
    ("merged",),
    ("intake",),
    ("rewards",),
    ("tasks", "plan", "export"),
    ("settings", "quiet"),
    ("engine",),
    ("per_example",),
    ("rollouts",),
    ("compiling",),
    ("methods", "probes"),
    ("output_layer", "auto", "adapters"),
    ("directions", "losses"),
    ("solving", "trunk"),
    ("config", "models"),
    ("sharding",),
    ("quantised",),
    ("files", "launched"),
    ("kinds",),
    ("sources", "patterns", "user_functions"),
    ("installed",),
    ("rng", "errors", "repeatable", ""),
)
CORE = (
    "engine", "methods", "probes", "directions", "losses", "config", "models", "sharding", "files", "rng",
    "errors", "launched",
)  # fmt: skip
CORE_LINES = 6000  # of all its files, blank ones left out
# Left out: the methods as their papers have them, which no step runs, the one method that solves, the text
# of the options, and the reading of checkpoints, which no other part of the core imports.
APART = (
    "methods.reference", "methods.reference_adapters", "methods.tezo_gn", "engine.solving", "config.fields",
    "models.loading", "models.fsdp", "models.checkpoint",
)  # fmt: skip


def modules() -> dict[str, Path]:
    """Finds the modules by name within the package; the package itself is ""."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yields the modules of the package that a file names in its imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tezo_ds"):
            base = node.module.removeprefix("tezo_ds").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                yield inner if inner in known else base
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "tezo_ds":
                    yield alias.name.removeprefix("tezo_ds").removeprefix(".")


def room_of(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def floor_of(module: str) -> int:
    """Returns a module's floor, 0 at the top; raises an error for a module that is on none."""
    return next(floor for floor, rooms in enumerate(FLOORS) if room_of(module) in rooms)


def arrows() -> set[tuple[str, str]]:
    known = modules()
    return {(a, b) for a, path in known.items() for b in imports(path, known) if a != b}


def test_every_room_knows_only_what_is_below_it() -> None:
    wrong = {
        (source, goal)
        for source, goal in arrows()
        if source and room_of(source) != room_of(goal) and floor_of(source) >= floor_of(goal)
    }
    assert wrong == set(), "these arrows run upwards or sideways"


def test_no_circles() -> None:
    goes: dict[str, set[str]] = {}
    for source, goal in arrows():
        if source and goal:
            goes.setdefault(source, set()).add(goal)

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        ahead = [start]
        while ahead:
            new = goes.get(ahead.pop(), set()) - found
            found |= new
            ahead += new
        return found

    all_reached = {module: reached(module) for module in goes}
    circles = {
        frozenset(other for other in all_reached[module] if module in all_reached.get(other, ()))
        for module in goes
        if module in all_reached[module]
    }
    assert circles == set()


def test_methods_do_not_know_of_ranks_and_models() -> None:
    for name, path in modules().items():
        if name.startswith(("methods", "directions")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                for found in names:
                    assert not found.startswith(("torch.distributed", "deepspeed", "transformers"))


def test_the_core_stays_small() -> None:
    lines: dict[str, int] = {}
    for module, path in modules().items():
        if (room := room_of(module)) in CORE and module not in APART:
            lines[room] = lines.get(room, 0) + sum(
                bool(line.strip()) for line in path.read_text().splitlines()
            )
    print(f"core: {sum(lines.values())} lines, {lines}")
    assert sum(lines.values()) <= CORE_LINES


def test_all_public_names_are_there() -> None:
    for name in tezo_ds.__all__:
        assert getattr(tezo_ds, name).__name__ == name and name in dir(tezo_ds)
    assert tezo_ds.merged.is_complete  # modules too, as README names this one
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tezo_ds.nothing  # noqa: B018
