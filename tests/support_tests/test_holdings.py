"""A forgotten task or socket fails the test that forgot it."""

from __future__ import annotations

import asyncio
import socket

import pytest

from tests.support.holdings import Holdings


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
