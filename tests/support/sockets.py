"""Ports, and what the kernel knows about a socket that asyncio does not say."""

from __future__ import annotations

import atexit
import fcntl
import os
import socket
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from typing import NamedTuple

# Above the ports of well-known services and below the range the kernel gives to outgoing connections (32768 and up),
# so that a port which was free stays free until the test listens on it.
LOWEST_PORT, HIGHEST_PORT = 20000, 32767

# Every port in turn, from a place of this process's own: two free ports asked for one after the other are never the
# same, the workers of one test run begin far apart, and test runs beside each other seldom try the same ones.
WORKER_DISTANCE = 6000
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_next_port = cycle(range(LOWEST_PORT, HIGHEST_PORT + 1))
_place = _worker * WORKER_DISTANCE + int.from_bytes(os.urandom(2), "big") % 512
next(islice(_next_port, _place, None))

# Numbers of linux/sock_diag.h and linux/inet_diag.h, and offsets in struct tcp_info of linux/tcp.h.
SOCK_DIAG_BY_FAMILY = 20
NETLINK_SOCK_DIAG = 4
INET_DIAG_INFO = 2
TCP_INFO_BYTES_RECEIVED = 128
TCP_INFO_NOT_SENT = 144
TCP_INFO_BYTES_SENT = 200


def tcp_socket(family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
    """Return a TCP socket that says so: asyncio switches Nagle's algorithm off only where the protocol is named."""
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)


def bind_free(host: str = "127.0.0.1") -> socket.socket:
    """Return a TCP socket bound to a free port below 32768. Raises ``OSError`` when all of them are taken."""
    for port in islice(_next_port, HIGHEST_PORT - LOWEST_PORT + 1):
        candidate = tcp_socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind((host, port))
        except OSError:
            candidate.close()
            continue
        return candidate
    raise OSError(f"no free port between {LOWEST_PORT} and {HIGHEST_PORT} on {host}")


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that is free now, another one each time. Prefer ``bind_free`` where the socket can be handed
    over."""
    with bind_free(host) as bound:
        return int(bound.getsockname()[1])


@contextmanager
def black_hole() -> Iterator[tuple[str, int]]:
    """Give an address where a connection attempt is neither accepted nor refused.

    So it is behind a firewall that drops packets. The listener's queue is full, so the kernel drops every further SYN.
    """
    with bind_free() as listener:
        listener.listen(0)
        address = listener.getsockname()
        fillers = []
        for _ in range(2):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(address)
            fillers.append(filler)
        try:
            yield address
        finally:
            for filler in fillers:
                filler.close()


def reset_on_close(sock: socket.socket) -> None:
    """Make closing this TCP socket send RST instead of FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def unread_by_peer(sock: socket.socket) -> int:
    """Return how many bytes written to ``sock`` the process at the other end has not taken from its kernel yet.

    On a Unix socket the send queue shrinks only when the peer reads. On TCP, where acknowledgements come late, the
    peer's own socket is asked; it must be on this machine. Elsewhere than on Linux only what is not acknowledged is
    known.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sys.platform != "linux":
        return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    peer = _socket_at(sock.family, local=sock.getpeername(), remote=sock.getsockname())
    if peer is None:
        return 0
    not_sent: int = struct.unpack_from("=I", info, TCP_INFO_NOT_SENT)[0]
    sent, repeated = struct.unpack_from("=QQ", info, TCP_INFO_BYTES_SENT)
    on_the_way: int = sent - repeated - peer.received
    return not_sent + on_the_way + peer.queued


# Asked thousands of times by some tests; opened before any of them begins to count sockets.
_kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) if sys.platform == "linux" else None
if _kernel is not None:
    atexit.register(_kernel.close)


class _Peer(NamedTuple):
    """What the kernel knows of a TCP socket: bytes it received so far, bytes the process has not read."""

    received: int
    queued: int


def _socket_at(family: int, *, local: tuple[object, ...], remote: tuple[object, ...]) -> _Peer | None:
    """Ask the kernel (sock_diag) for one TCP socket of this machine; None when there is no such socket any more."""
    any_cookie = b"\xff" * 8
    ends = struct.pack("!HH", local[1], remote[1])
    addresses = b"".join(socket.inet_pton(family, str(end[0])).ljust(16, b"\0") for end in (local, remote))
    with_tcp_info, every_state = 2, 0xFFFFFFFF
    query = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, with_tcp_info, every_state)
    query += ends + addresses + bytes(4) + any_cookie
    assert _kernel is not None
    _kernel.send(struct.pack("=IHHII", 16 + len(query), SOCK_DIAG_BY_FAMILY, 1, 0, 0) + query)
    answer = _kernel.recv(4096)
    (kind,) = struct.unpack_from("=H", answer, 4)
    if kind != SOCK_DIAG_BY_FAMILY:
        return None
    # struct inet_diag_msg: 4 bytes of state, 48 of socket id, 4 of expiry, then the receive queue; 72 in all, and then
    # attributes, each with its length, its kind and padding to 4 bytes.
    (queued,) = struct.unpack_from("=I", answer, 16 + 56)
    at = 16 + 72
    while at < len(answer):
        length, attribute = struct.unpack_from("=HH", answer, at)
        if attribute == INET_DIAG_INFO:
            (received,) = struct.unpack_from("=Q", answer, at + 4 + TCP_INFO_BYTES_RECEIVED)
            return _Peer(received, queued)
        at += (length + 3) & ~3
    return None
