"""Servers for the tests of stores."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.store.servers import Server, program
from tests.support.gateway import face, start_gateway

__all__ = ["face", "start_gateway"]


def pytest_report_header() -> str:
    return f"redis: {program()}"


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Server]:
    """One server for all tests that do it no harm; each uses a namespace of its own."""
    server = Server()
    server.start()
    yield server
    server.close()


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server for a test that does it harm."""
    server = Server()
    server.start()
    yield server
    server.close()


@pytest.fixture
async def unhandled() -> AsyncIterator[list[str]]:
    """What nobody has caught."""
    found: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: found.append(str(context)))
    yield found
    # What the test has left is young; everything that lives takes longer to look at than most tests run.
    gc.collect(1)
    assert found == []
