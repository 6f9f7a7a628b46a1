import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("MKL_CBWR", "AUTO")  # as the command line does, before torch multiplies
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Worlds take the other cores, and threads that wait for each other on busy cores take for ever.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Started in the background of a shell, we and all that we start would ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Asked to end, we end what we have started, too.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
sys.path.insert(0, str(Path(__file__).parent))

from other_kernels import KINDS, VARIABLE, OtherKernels  # noqa: E402
from worlds import Background  # noqa: E402

BACKGROUND = pytest.StashKey[Background]()


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "of this machine, or emulated ones of another; see other_kernels.py"
    parser.addoption("--kernels", choices=KINDS, default="own", help=text)


def pytest_configure(config: pytest.Config) -> None:
    if (kernels := config.getoption("kernels")) != "own":
        os.environ[VARIABLE] = kernels
        OtherKernels(kernels).__enter__()  # until the process ends
    for line in (
        "launches: starts processes that take all cores",
        "world: a case of tests/worlds.py",
        "slow: takes some seconds; launch/test.sh --fast leaves it out",
    ):
        config.addinivalue_line("markers", line)


def _world_size(item: pytest.Item) -> int:
    """0 where the test is not of tests/test_worlds.py."""
    callspec = getattr(item, "callspec", None)
    in_world = item.path.name == "test_worlds.py" and callspec is not None
    return callspec.params["size"] if in_world else 0


def _turn(item: pytest.Item) -> int:
    if _world_size(item):
        return 2
    return 1 if item.get_closest_marker("launches") else 0


def pytest_collection_finish(session: pytest.Session) -> None:
    """Worlds run while the other tests do, and are asked for their results last. First come the tests that
    leave them a core."""
    session.items.sort(key=_turn)
    sizes = {_world_size(item) for item in session.items} - {0}
    if not session.config.option.collectonly:
        session.config.stash[BACKGROUND] = Background(sorted(sizes, reverse=True))


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


@pytest.fixture
def worlds_in_background(request: pytest.FixtureRequest) -> Background:
    return request.config.stash[BACKGROUND]
