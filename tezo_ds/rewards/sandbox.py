"""Programs that nobody has read, run in a process with limits; a script, by the standard library alone.

    python -I sandbox.py isolated|open FOLDER BYTES SECONDS EXIT_CODE < programs
    python -I sandbox.py try FOLDER

The first reads a JSON list of programs, runs them one after the other with the same names, and ends with
EXIT_CODE after the last, whatever they call to end earlier. Where it is isolated, it has no network, no
process to signal but its own, and may write nothing but what is under FOLDER, a file system in memory of at
most BYTES. The second prints why this kernel isolates nothing, or nothing where it does.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV = 2, 4
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
NOBODY = 65534  # within the namespace, so that a new program has no capabilities there
FILES, PROCESSES = 64, 64  # open at once, and running (which the kernel does not count for root)
# Ends by the code alone, so that a program that exits has not passed.
RUN = """
import json, os, sys
names = {"__name__": "__main__"}
for program in json.load(sys.stdin):
    exec(compile(program, "<program>", "exec"), names)
os._exit(int(sys.argv[1]))
"""
_libc = ctypes.CDLL(None, use_errno=True)


def _call(what: str, result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def isolate(folder: str, nbytes: int) -> None:
    """Moves this process out of reach of the network, and of files but those of a folder, which is empty
    then; its children get a process tree of their own. Raises OSError where the kernel does not allow it."""
    user, group = os.getuid(), os.getgid()
    flags = CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID
    _call("unshare", _libc.unshare(flags))
    for name, text in (
        ("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1"),
    ):  # fmt: skip
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    options = f"size={nbytes},nr_inodes=1000,mode=700".encode()
    at = folder.encode()
    _call("mount", _libc.mount(b"tezo", at, b"tmpfs", MS_NOSUID | MS_NODEV, options))
    for path, depth, changes in ((b"/", AT_RECURSIVE, (READ_ONLY, 0)), (at, 0, (0, READ_ONLY))):
        attributes = struct.pack("QQQQ", *changes, 0, 0)
        found = _libc.syscall(MOUNT_SETATTR, AT_FDCWD, path, depth, attributes, len(attributes))
        _call("mount_setattr", found)


def limit(nbytes: int, seconds: int) -> None:
    """Sets this process's limits, which its children get, too."""
    for what, most in (
        (resource.RLIMIT_AS, nbytes), (resource.RLIMIT_FSIZE, nbytes), (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_NOFILE, FILES), (resource.RLIMIT_NPROC, PROCESSES), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(what, (most, most))
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def run(nbytes: int, seconds: int, code: str) -> int:
    """Runs the programs of the standard input in a child, and returns how it ended."""
    child = os.fork()  # the first process of its tree, with which all others in it end
    if not child:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        limit(nbytes, seconds)
        os.execv(sys.executable, [sys.executable, "-I", "-c", RUN, code])
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) & 255


def main(
    what: str, folder: str, nbytes: str = "1048576", seconds: str = "1", code: str = "0"
) -> int:
    if what == "try":
        try:
            isolate(folder, int(nbytes))
        except OSError as error:
            print(error)
        return 0
    if what == "isolated":
        isolate(folder, int(nbytes))
    os.chdir(folder)
    return run(int(nbytes), int(seconds), code)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
