"""Ports, and what the kernel knows about a socket that asyncio does not say."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

# Above the ports of well-known services and below the range the kernel gives to outgoing connections (32768 and up),
# so that a port which was free stays free until the test listens on it.
LOWEST_PORT, HIGHEST_PORT = 20000, 32767

SOCK_DIAG_BY_FAMILY = 20
NETLINK_SOCK_DIAG = 4


def bind_free(host: str = "127.0.0.1") -> socket.socket:
    """Return a TCP socket bound to a free port below 32768. Raises ``OSError`` when all of them are taken."""
    span = HIGHEST_PORT - LOWEST_PORT + 1
    start = int.from_bytes(os.urandom(4), "big") % span
    for offset in range(span):
        candidate = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind((host, LOWEST_PORT + (start + offset) % span))
        except OSError:
            candidate.close()
            continue
        return candidate
    raise OSError(f"no free port between {LOWEST_PORT} and {HIGHEST_PORT} on {host}")


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that is free now. Prefer ``bind_free`` where the socket can be handed over."""
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

    On a Unix socket the send queue shrinks only when the peer reads. On TCP the peer must be on this machine: its
    receive queue is asked for. Elsewhere than on Linux only what the peer's kernel has not acknowledged is known.
    """
    waiting = int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    if waiting or sock.family not in (socket.AF_INET, socket.AF_INET6) or sys.platform != "linux":
        return waiting
    return _receive_queue(sock.family, local=sock.getpeername(), remote=sock.getsockname())


def _receive_queue(family: int, *, local: tuple[object, ...], remote: tuple[object, ...]) -> int:
    """Ask the kernel (sock_diag) for the unread bytes of one TCP socket; 0 when there is no such socket any more."""
    any_cookie = b"\xff" * 8
    ends = struct.pack("!HH", local[1], remote[1])
    addresses = b"".join(socket.inet_pton(family, str(end[0])).ljust(16, b"\0") for end in (local, remote))
    every_state = 0xFFFFFFFF
    query = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 0, every_state) + ends + addresses + bytes(4) + any_cookie
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as kernel:
        kernel.send(struct.pack("=IHHII", 16 + len(query), SOCK_DIAG_BY_FAMILY, 1, 0, 0) + query)
        answer = kernel.recv(4096)
    (kind,) = struct.unpack_from("=H", answer, 4)
    if kind != SOCK_DIAG_BY_FAMILY:
        return 0
    # struct inet_diag_msg: 4 bytes of state, 48 of socket id, 4 of expiry, then the receive queue.
    (unread,) = struct.unpack_from("=I", answer, 16 + 4 + 48 + 4)
    return int(unread)
