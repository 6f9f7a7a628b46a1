"""Code that a model wrote: what passes, and each limit, which is seen not to hold without it."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tezo_ds.errors import ConfigError
from tezo_ds.rewards import code as code_module
from tezo_ds.rewards import load_judges, sandbox
from tezo_ds.rewards.code import code_in, missing, runs

ADD = "def add(a, b):\n    return a + b\n"
isolated = pytest.mark.skipif(bool(missing()), reason=f"no namespaces: {missing()}")


def test_the_rows_tests_judge_the_code() -> None:
    judges = load_judges(["code"], run_code=True)
    completions = [
        ADD, f"Here you are:\n```python\n{ADD}```\nThat adds.", ADD.replace("+", "-"), "def add(:", "exit(0)",
        "import os; os._exit(0)", ADD,
    ]  # fmt: skip
    tests = [
        ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
        *["assert add(1, 2) == 3"] * 5,
        "1 / 0",
    ]
    found = judges(["?"] * 7, completions, {"tests": tests})
    assert found == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert judges(["?"] * 2, ["x = 1", "x = y"], {}) == [1.0, 0.0]


def test_code_is_found_in_a_completion() -> None:
    assert code_in("a = 1") == "a = 1"
    assert code_in("so\n```py\na = 1\n```\nor\n```\nb = 1\n```") == "a = 1\n"
    assert code_in("```\na = 1\nb = '```'\nc") == "a = 1\nb = '```'\nc"


def test_it_has_to_be_asked_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="--reward code: runs what a model wrote; add --run-code"):
        load_judges(["code"])
    with caplog.at_level(logging.WARNING):
        for what, says in (
            ("", "without network"),
            ("unshare: no", "and NOT isolated: it can use the"),
        ):
            monkeypatch.setattr(code_module, "missing", lambda what=what: what)
            load_judges(["code"], run_code=True)
            assert says in caplog.messages[-1] and what in caplog.messages[-1]


def test_time_and_memory_are_limited() -> None:
    start = time.monotonic()
    for forever in ("while True: pass", "import time; time.sleep(60)"):
        assert not runs([forever], seconds=1)
    assert time.monotonic() - start < 20
    # Its children end with it, also those that leave its session.
    stray = f"stray{os.getpid()}"
    fork = (
        "import ctypes, os, time\nif os.fork() == 0:\n    os.setsid()\n"
        f"    ctypes.CDLL(None).prctl(15, b'{stray}')\n    time.sleep(60)\ntime.sleep(0.1)"
    )
    assert runs([fork])
    names = [path.read_text().strip() for path in Path("/proc").glob("[0-9]*/comm")]
    assert missing() or stray not in names
    large = "x = bytearray(300 << 20)"
    assert runs([large]) and not runs([large], nbytes=200 << 20)


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@isolated
def test_files_processes_and_the_network_are_out_of_reach(
    listening: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    victim = os.fork()
    if not victim:
        time.sleep(60)
        os._exit(0)
    harms = {
        "write": f"open({str(mine)!r}, 'a').write('x')",
        "delete": f"import os; os.remove({str(mine)!r})",
        "connect": f"import socket; socket.create_connection(('127.0.0.1', {listening}), 1)",
        "signal": f"import os; os.kill({victim}, 0)",
        "remount": "import os, subprocess; subprocess.run(['mount', '-o', 'remount,rw', '/'], check=True)",
        "fill": "open('x', 'w').write('x' * (60 << 20)); open('y', 'w').write('y' * (60 << 20))",
    }
    try:
        for name, harm in harms.items():
            assert not runs([harm], nbytes=100 << 20 if name == "fill" else code_module.BYTES), name
        assert mine.read_text() == "precious"
        assert runs(["open('x', 'w').write('own'); assert open('x').read() == 'own'"])
        # Without the handling each of these does what it is for.
        copied = tmp_path / "sandbox.py"
        text = Path(sandbox.__file__).read_text()
        copied.write_text(text.replace('if what == "isolated"', 'if what == "never"'))
        assert copied.read_text() != text
        monkeypatch.setattr(code_module, "_SANDBOX", str(copied))
        for name in ("connect", "signal", "write", "delete"):
            assert runs([harms[name]]), name
        assert not mine.exists()
    finally:
        os.kill(victim, 9)
        os.waitpid(victim, 0)
