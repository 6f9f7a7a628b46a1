"""launch/matrix.sh in a repository of its own, whose launch/test.sh tells how it was called."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
TOLD = """cd "$(dirname "$0")/.."
echo "by $PYTHON with $*, $(cat new)"
test ! -e secret && test ! -e .venv && [[ "$1" == --fast ]]
"""


def test_each_python_tests_a_copy_of_what_git_keeps(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    (repo / "launch").mkdir(parents=True)
    shutil.copy(LAUNCH / "matrix.sh", repo / "launch")
    (repo / "launch" / "test.sh").write_text("#!/usr/bin/env bash\n" + TOLD)
    (repo / "launch" / "test.sh").chmod(0o755)
    (repo / ".gitignore").write_text("secret\n")
    (repo / ".venv").symlink_to(tmp_path)
    for name in ("secret", "new"):  # left out by git, and not yet added
        (repo / name).write_text(name)
    subprocess.run(["git", "init", "-q", repo], check=True)

    def matrix(*words: str) -> tuple[int, list[str]]:
        command = [repo / "launch" / "matrix.sh", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()

    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    code, said = matrix(sys.executable, "--", "--fast", "-x")
    assert code == 0 and f"by {sys.executable} with --fast -x, new" in said
    assert said[-1] == f"matrix: {version}: passed"
    code, said = matrix("/no/such/python", sys.executable, "--", "--slow")
    ends = ["matrix: /no/such/python: does not run", f"matrix: {version}: FAILED"]
    assert code == 1 and said[-2:] == ends
    assert matrix() == (2, []) and matrix("--", "--fast") == (2, [])
