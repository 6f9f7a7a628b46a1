"""Network checks: whether each rank reaches each other one, and how fast.

Plain TCP between the addresses that the ranks' collectives would use, since a process group that
cannot connect says neither which pair it was nor, within minutes, anything at all.
"""

from __future__ import annotations

import os
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import psutil

from tezo_ds.doctor.report import Failed, attempt

CONNECT = 5.0  # seconds
PINGS = 8
AT_ONCE = 16  # peers that a rank tries at the same time
CHUNK = 1 << 18
SENDING = 1.0  # seconds for which a rate is measured
DRAINING = 30.0  # seconds that what was sent may take to arrive
MOST = 256 << 20  # bytes sent for a rate

_NUMBER = struct.Struct("!d")


class Address(NamedTuple):
    """Address that a rank listens at."""

    host: str
    port: int


class Listener:
    """Context manager: this rank answers other ranks that try to reach it inside.

    Args:
        rank: this rank, as told to others; an address may turn out to be another rank's.
        host: address to listen at.
    """

    def __init__(self, rank: int, host: str) -> None:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                _answer(self.request, rank)

        self._server = socketserver.ThreadingTCPServer((host, 0), Handler)
        self._server.daemon_threads = True
        self.address = Address(host, self._server.server_address[1])

    def __enter__(self) -> Listener:
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self._server.shutdown()
        self._server.server_close()


def _answer(connection: socket.socket, rank: int) -> None:
    connection.settimeout(DRAINING)
    try:
        connection.sendall(_NUMBER.pack(rank))
        taken = 0
        while data := connection.recv(CHUNK):
            if taken == 0 and data == b"p":
                connection.sendall(_NUMBER.pack(0))
                continue
            taken += len(data)
        if taken:
            connection.sendall(_NUMBER.pack(taken))
    except OSError:
        pass  # the other side says what it was


def reach_all(own: int, peers: Mapping[int, Address]) -> dict[int, float | Failed]:
    """Pings every other rank, beginning with the one after `own`; returns what was found of each."""
    others = sorted((rank for rank in peers if rank != own), key=lambda rank: (rank < own, rank))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tried = pool.map(lambda rank: attempt(_ping_of(rank, peers[rank])), others)
        return dict(zip(others, tried, strict=True))


def _ping_of(rank: int, address: Address) -> Callable[[], float]:
    return lambda: ping(rank, address)


def ping(rank: int, address: Address) -> float:
    """Sends a rank a few messages of a byte each; returns the seconds until the fastest answer.

    Raises:
        OSError: the peer does not answer, or is another rank.
    """
    found = []
    with _connected(rank, address) as connection:
        for _ in range(PINGS):
            sent = time.perf_counter()
            connection.sendall(b"p")
            _number(connection)
            found.append(time.perf_counter() - sent)
    return min(found)


def rate(rank: int, address: Address) -> float:
    """Returns the bytes a second that arrive at a rank.

    Raises:
        OSError: the peer is unreachable, or is another rank, or bytes were lost.
    """
    block, sent = bytes(CHUNK), 0
    with _connected(rank, address) as connection:
        connection.settimeout(DRAINING)
        start = time.monotonic()
        while sent < MOST and time.monotonic() - start < SENDING:
            connection.sendall(block)
            sent += CHUNK
        connection.shutdown(socket.SHUT_WR)
        if (arrived := _number(connection)) != sent:
            raise OSError(f"{sent - arrived:.0f} of {sent} bytes were lost")
        return sent / (time.monotonic() - start)


def _connected(rank: int, address: Address) -> socket.socket:
    connection = socket.create_connection(address, CONNECT)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if (other := _number(connection)) != rank:
            raise OSError(
                f"rank {other:.0f} answers at {address.host}, where rank {rank} should be"
            )
    except BaseException:
        connection.close()
        raise
    return connection


def _number(connection: socket.socket) -> float:
    data = b""
    while len(data) < _NUMBER.size:
        part = connection.recv(_NUMBER.size - len(data))
        if not part:
            raise OSError("the connection was closed")
        data += part
    number: float = _NUMBER.unpack(data)[0]
    return number


def own_address(backend: str) -> str:
    """Returns the address that this rank's collectives listen at: of the interface that the environment
    names; else gloo takes what the hostname resolves to, NCCL the way out (here: to the launcher's store).

    Raises:
        OSError: there is no such interface, or the hostname does not resolve.
    """
    variable = "NCCL_SOCKET_IFNAME" if "nccl" in backend else "GLOO_SOCKET_IFNAME"
    wanted = os.environ.get(variable, "")
    if wanted and not wanted.startswith("^"):
        return _of_interface(variable, wanted)
    if "nccl" not in backend:
        try:
            return socket.gethostbyname(socket.gethostname())
        except OSError:
            raise OSError(
                f"the hostname {socket.gethostname()} does not resolve, which gloo needs; add it to "
                "/etc/hosts, or set GLOO_SOCKET_IFNAME"
            ) from None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:  # nothing is sent
        way.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
        host: str = way.getsockname()[0]
        return host


def _of_interface(variable: str, wanted: str) -> str:
    prefixes = tuple(name.strip().lstrip("=") for name in wanted.split(","))
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if name.startswith(prefixes) and address.family == socket.AF_INET:
                return str(address.address)
    raise OSError(f"{variable} is {wanted}, and there is no such interface with an IPv4 address")
