"""Two hosts on one machine: namespaces of their own, an sshd in each, and a link of limited rate between.

    python tests/helpers/two_hosts.py --rate 100mbit -- bash          a shell on the first host, until it ends
    python tests/helpers/two_hosts.py -- ssh node2 hostname

Needs root and Debian's iproute2, openssh-server and pdsh. Each host has its own network, name, processes and
/etc/ssh, and /etc/hosts knows both; other files are those of this machine. Nothing outside the hosts is
changed. They are gone, with all that runs on them, when the command or the process that made them ends, in
whatever way.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

NAMES, ADDRESSES = ("node1", "node2"), ("10.77.0.1", "10.77.0.2")
LINK = "eth0"
TOOLS = {"ip": "iproute2", "tc": "iproute2", "/usr/sbin/sshd": "openssh-server",
         "ssh-keygen": "openssh-client", "pdsh": "pdsh", "unshare": "util-linux"}  # fmt: skip
NAMESPACES = ("--mount", "--uts", "--net", "--pid")
# The first process of a host. The kernel ends all others when it ends, and it ends with its standard input.
INIT = """
set -e
mount -t tmpfs tmpfs /run && mkdir /run/sshd
mount --bind "$1/ssh" /etc/ssh && mount --bind "$1/hosts" /etc/hosts
hostname "$2" && ip link set lo up
/usr/sbin/sshd -E "$1/$2.log"
echo up && exec cat
"""
SSHD = """
HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
"""
SSH = """
IdentityFile /etc/ssh/key
IdentitiesOnly yes
GlobalKnownHostsFile /etc/ssh/known_hosts
UserKnownHostsFile none
StrictHostKeyChecking yes
LogLevel ERROR
"""


class Bytes(NamedTuple):
    """Counts of the bytes that crossed a host's end of the link since it was made, frames' headers
    included."""

    received: int
    sent: int


def why_not() -> str | None:
    """Returns why there can be no two hosts on this machine; None where there can."""
    if sys.platform != "linux" or os.geteuid():
        return "two hosts need Linux and root"
    if missing := [name for name in TOOLS if shutil.which(name) is None]:
        packages = " ".join(sorted({TOOLS[name] for name in missing}))
        return f"two hosts need {', '.join(missing)}; apt-get install {packages}"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "--mount-proc", "mount", "-t", "tmpfs", "tmpfs", "/run"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"two hosts need namespaces ({tried.stderr.strip()})" if tried.returncode else None


@dataclass(frozen=True)
class Host:
    """One of the two hosts.

    Attributes:
        name, address: on the link; the name is its hostname, too.
        pid: of its first process, as this machine numbers it.
    """

    name: str
    address: str
    pid: int

    def words(self, *command: object) -> list[str]:
        """Returns the words that run a command on this host, in this process's folder."""
        enter = ["nsenter", f"--target={self.pid}", *NAMESPACES]
        return [*enter, "env", f"--chdir={Path.cwd()}", *map(str, command)]

    def start(self, *command: object, **options: Any) -> subprocess.Popen[str]:
        """Starts a command on this host, with options of `subprocess.Popen`. The command leads a process
        group, to which signals should go: the process itself only waits for the command."""
        words = self.words(*command)
        return subprocess.Popen(words, text=True, start_new_session=True, **options)

    def run(self, *command: object) -> str:
        """Runs a short command on this host and returns its stdout. Raises RuntimeError with the command's
        stderr, if it fails."""
        words = self.words(*command)
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            said = done.stderr.strip()
            raise RuntimeError(f"{' '.join(map(str, command))}, on {self.name}: {said}")
        return done.stdout

    def bytes(self) -> Bytes:
        """Reads what has crossed this host's end of the link so far."""
        for line in Path(f"/proc/{self.pid}/net/dev").read_text().splitlines():
            name, _, counts = line.partition(":")
            if name.strip() == LINK:
                received, sent = (int(counts.split()[column]) for column in (0, 8))
                return Bytes(received, sent)
        raise RuntimeError(f"{self.name} has no {LINK}")

    def limit(self, rate: str) -> None:
        """Bounds what this host sends; `rate` as tc writes it, e.g. 100mbit."""
        queue = ("tbf", "rate", rate, "burst", "128kb", "latency", "50ms")
        self.run("tc", "qdisc", "replace", "dev", LINK, "root", *queue)


class TwoHosts(NamedTuple):
    """Two hosts joined by a link.

    Attributes:
        first, second: the hosts; commands are typed on the first.
        folder: of their files; it goes when they go.
    """

    first: Host
    second: Host
    folder: Path

    def limit(self, rate: str) -> None:
        """Bounds the link in each direction."""
        for host in (self.first, self.second):
            host.limit(rate)

    def cut(self) -> None:
        """Pulls the second host's cable."""
        self.second.run("ip", "link", "set", LINK, "down")

    def mend(self) -> None:
        """Puts the second host's cable back."""
        self.second.run("ip", "link", "set", LINK, "up")

    def hostfile(self, slots: int) -> Path:
        """Writes DeepSpeed's hostfile, with `slots` ranks a host."""
        path = self.folder / f"hostfile-{slots}"
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in self[:2]))
        return path


@contextmanager
def two_hosts(rate: str = "1gbit") -> Iterator[TwoHosts]:
    """Context manager: two hosts exist inside; the module says of what they are made. `rate` as tc writes it.

    Raises:
        RuntimeError: there can be none here, or one did not come up; says why.
    """
    if reason := why_not():
        raise RuntimeError(reason)
    with ExitStack() as undone:
        folder = Path(undone.enter_context(tempfile.TemporaryDirectory(prefix="tezo-hosts-")))
        _write_files(folder)
        inits = [undone.enter_context(_first_process(folder, name)) for name in NAMES]
        ends = [
            Host(name, address, pid)
            for name, address, pid in zip(NAMES, ADDRESSES, inits, strict=True)
        ]
        _join(*ends)
        hosts = TwoHosts(*ends, folder)
        hosts.limit(rate)
        yield hosts


def _write_files(folder: Path) -> None:
    """Writes the files that the hosts find in /etc."""
    ssh = folder / "ssh"
    ssh.mkdir(mode=0o700)
    make_key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(ssh / "key")]
    subprocess.run(make_key, check=True)
    public = (ssh / "key.pub").read_text()
    (ssh / "known_hosts").write_text(f"{','.join(NAMES + ADDRESSES)} {public}")
    (ssh / "sshd_config").write_text(SSHD)
    (ssh / "ssh_config").write_text(SSH)
    lines = ["127.0.0.1 localhost", *map(" ".join, zip(ADDRESSES, NAMES, strict=True))]
    (folder / "hosts").write_text("\n".join(lines) + "\n")


@contextmanager
def _first_process(folder: Path, name: str) -> Iterator[int]:
    """Context manager: a host's first process runs inside; yields its id. Ctrl-C on a terminal must not
    reach it before us."""
    init = subprocess.Popen(
        ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc",
         "sh", "-c", INIT, "init", str(folder), name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert init.stdin and init.stdout and init.stderr
        if init.stdout.readline() != "up\n":
            init.stdin.close()
            raise RuntimeError(f"{name} did not come up: {init.stderr.read().strip()}")
        (child,) = psutil.Process(init.pid).children()
        yield child.pid
    finally:
        init.kill()  # its child, and with that all of the host, by --kill-child
        init.communicate()


def _join(first: Host, second: Host) -> None:
    """Makes the link between two hosts, inside the first host's network, so that its names cannot clash
    with others."""
    peer = ("peer", "name", LINK, "netns", str(second.pid))
    create = ["nsenter", f"--target={first.pid}", "--net", "ip", "link", "add", LINK]
    subprocess.run([*create, "type", "veth", *peer], check=True)
    for host in (first, second):
        host.run("ip", "address", "add", f"{host.address}/24", "dev", LINK)
        host.run(
            "ip", "link", "set", LINK, "addrgenmode", "none", "up"
        )  # IPv6 would look for routers


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rate", default="1gbit", help="of the link, as tc writes it (%(default)s)"
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="to run on the first host")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)
    try:
        with two_hosts(args.rate) as hosts:
            code = subprocess.call(hosts.first.words(*args.command))
            received, sent = hosts.first.bytes()
    except RuntimeError as error:
        raise SystemExit(f"two_hosts: error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(f"two_hosts: {sent:,} bytes to {NAMES[1]}, {received:,} back", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
