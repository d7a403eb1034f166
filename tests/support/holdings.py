"""What a process holds open, to find what a test left behind."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from dataclasses import dataclass
from typing import Any

# Closing a transport takes a few turns of the event loop; whatever is still open after these many is a leak.
SETTLE_TURNS = 50


def open_sockets() -> frozenset[tuple[int, int]]:
    """Return (descriptor, inode) of every socket this process holds, the event loop's own aside."""
    found = set()
    for entry in os.scandir("/dev/fd"):
        try:
            status = os.fstat(int(entry.name))
        except OSError:
            # The descriptor through which the directory was listed.
            continue
        if stat.S_ISSOCK(status.st_mode) and not _is_nameless_pair(int(entry.name)):
            found.add((int(entry.name), status.st_ino))
    return frozenset(found)


def _is_nameless_pair(descriptor: int) -> bool:
    """Say whether this is one end of a ``socketpair``: what event loops wake themselves with, uvloop a new one each
    run."""
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        return sock.family == socket.AF_UNIX and sock.getsockname() in ("", b"") and _peer_name(sock) in ("", b"")


def _peer_name(sock: socket.socket) -> object:
    try:
        return sock.getpeername()
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class Holdings:
    """The tasks of the running event loop and the sockets of the process at one moment."""

    tasks: frozenset[asyncio.Task[Any]]
    sockets: frozenset[tuple[int, int]]

    @classmethod
    def now(cls) -> Holdings:
        """Take stock. Needs a running event loop."""
        return cls(frozenset(asyncio.all_tasks()), open_sockets())

    async def assert_nothing_added(self) -> None:
        """Raise ``AssertionError`` naming the tasks and sockets that came since and stay."""
        for _ in range(SETTLE_TURNS):
            tasks = asyncio.all_tasks() - self.tasks - {asyncio.current_task()}
            sockets = open_sockets() - self.sockets
            if not tasks and not sockets:
                return
            await asyncio.sleep(0)
        raise AssertionError(f"the test left behind tasks {sorted(map(repr, tasks))}, sockets {sorted(sockets)}")
