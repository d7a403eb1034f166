"""A forgotten task or socket fails the test that forgot it."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from tests.support.holdings import Holdings, open_sockets


async def test_nothing_added_passes_once_cancelled_tasks_are_through() -> None:
    before = Holdings.now()
    task = asyncio.create_task(asyncio.Event().wait())
    await asyncio.sleep(0)
    task.cancel()
    await before.assert_nothing_added()
    assert task.cancelled()


async def test_a_running_task_is_named() -> None:
    before = Holdings.now()
    task = asyncio.create_task(asyncio.Event().wait(), name="forgotten")
    with pytest.raises(AssertionError, match="forgotten"):
        await before.assert_nothing_added()
    task.cancel()


async def test_an_open_socket_is_named() -> None:
    before = Holdings.now()
    forgotten = socket.socket()
    with pytest.raises(AssertionError, match=rf"sockets \[\({forgotten.fileno()}, \d+\)\]"):
        await before.assert_nothing_added()
    forgotten.close()


async def test_an_accepted_unix_connection_is_named(tmp_path: Path) -> None:
    """Only nameless pairs, which event loops keep for themselves, are left out."""
    before = Holdings.now()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        client.connect(str(tmp_path / "socket"))
        with listener.accept()[0] as accepted:
            held = {descriptor for descriptor, _ in open_sockets() - before.sockets}
            assert held == {listener.fileno(), client.fileno(), accepted.fileno()}
    left, right = socket.socketpair()
    assert open_sockets() == before.sockets
    left.close()
    right.close()


async def test_the_event_loop_is_the_one_asked_for(request: pytest.FixtureRequest) -> None:
    uses_uvloop = any(base.__module__.startswith("uvloop") for base in type(asyncio.get_running_loop()).__mro__)
    assert uses_uvloop == (request.config.getoption("--loop") == "uvloop")
