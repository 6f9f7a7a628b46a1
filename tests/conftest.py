import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("MKL_CBWR", "AUTO")  # as the command line does, before torch multiplies
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Worlds take the other cores, and threads that wait for each other on busy cores take for ever.
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.disable()  # until all is imported, as collections would go through it again and again
# Started in the background of a shell, we and all that we start would ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Asked to end, we end what we have started, too.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
TESTS = Path(__file__).resolve().parent
PLACES = [
    *map(str, (TESTS / "helpers", TESTS.parent / "benchmarks", TESTS.parent / "launch")),
    *sorted({str(path.parent) for path in TESTS.glob("*/world_*.py")}),  # they import each other
]
sys.path[:0] = PLACES
# Processes that tests start import helpers, too.
os.environ["PYTHONPATH"] = os.pathsep.join([*PLACES, *filter(None, [os.environ.get("PYTHONPATH")])])

import worlds  # noqa: E402
from other_kernels import KINDS, VARIABLE, OtherKernels  # noqa: E402

BACKGROUND = pytest.StashKey[worlds.Background]()


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "of this machine, or emulated ones of another; see other_kernels.py"
    parser.addoption("--kernels", choices=KINDS, default="own", help=text)


def pytest_configure(config: pytest.Config) -> None:
    if (kernels := config.getoption("kernels")) != "own":
        os.environ[VARIABLE] = kernels
        OtherKernels(kernels).__enter__()  # until the process ends
    for line in (
        "launches: starts processes that take all cores",
        "waits: a launch that waits for most of its time",
        "world: a case of tests/helpers/worlds.py",
        "slow: takes some seconds; launch/test.sh --fast leaves it out",
    ):
        config.addinivalue_line("markers", line)


class WorldCase(pytest.Item):
    """A case of tests/ROOM/world_*.py in a world of one size."""

    def __init__(self, *, case: worlds.Case, size: int, **parts: Any) -> None:
        super().__init__(**parts)
        self.case, self.size = case, size
        self.add_marker("world")

    def runtest(self) -> None:
        """Waits until the worlds have ended."""
        errors = self.config.stash[BACKGROUND].results(self.size)[self.case.name]
        if errors:
            pytest.fail("\n".join(errors), pytrace=False)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name


class WorldFile(pytest.File):
    """tests/ROOM/world_*.py."""

    def collect(self) -> Iterator[WorldCase]:
        """An item for each case and size."""
        worlds.load(self.path)
        for case in worlds.CASES:
            if case.name.startswith(f"{self.path.stem}."):
                for size in case.worlds:
                    name = f"{case.name.partition('.')[2]}[{size}]"
                    yield WorldCase.from_parent(self, name=name, case=case, size=size)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.match("world_*.py"):
        return WorldFile.from_parent(parent, path=file_path)
    return None


def _turn(item: pytest.Item) -> int:
    if isinstance(item, WorldCase):
        return 2
    return 1 if item.get_closest_marker("launches") else 0


def pytest_collection_finish(session: pytest.Session) -> None:
    """Worlds run while the other tests do, and are asked for their results last. First come the tests that
    leave them a core."""
    session.items.sort(key=_turn)
    asked: dict[int, list[str]] = {}
    for item in session.items:
        if isinstance(item, WorldCase):
            asked.setdefault(item.size, []).append(item.case.name)
    if not session.config.option.collectonly:
        # Small worlds last, when nothing else runs that would fill the gaps of large ones.
        order = sorted(asked, reverse=True)
        background = worlds.Background({size: asked[size] for size in order})
        session.config.stash[BACKGROUND] = background
    gc.freeze()  # what is imported by now is no garbage, and most of what collections would go through
    gc.enable()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Says which cases of worlds took longest, as pytest sees but how long it waited for them."""
    background, most = config.stash.get(BACKGROUND, None), config.option.durations
    if background is not None and most and (took := background.seconds()):
        terminalreporter.section(f"slowest {most} cases of worlds")
        for name in sorted(took, key=lambda name: -took[name])[:most]:
            terminalreporter.line(f"{took[name]:.2f}s {name}")


def pytest_unconfigure(config: pytest.Config) -> None:
    background = config.stash.get(BACKGROUND, None)
    if background is not None:
        background.stop()


@pytest.fixture(scope="module")
def other_kernels() -> Iterator[None]:
    """A module's products are those of another maker's kernels."""
    with OtherKernels("shapes") as kernels:
        yield
    assert kernels.products
