"""Fixtures every room uses, and the rule that a test leaves no task and no socket behind."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
from bisect import bisect
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AsyncExitStack, closing
from itertools import accumulate, count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import uvloop

from tests.support.client import RawClient
from tests.support.clock import ManualClock
from tests.support.holdings import Holdings
from tests.support.journal import Journal
from tests.support.tls import server_context
from tests.support.upstream import ScriptedUpstream

if TYPE_CHECKING:
    from tests.support.databases import Postgresql

ROOMS = Path(__file__).parent
COLLECT_AFTER = (10_000, 20, 20)
"""Allocations between two looks of the garbage collector, by generation, as in a served gateway."""

_FOLDERS = count()

LoopFactory = Callable[[], asyncio.AbstractEventLoop]
LOOPS: dict[str, LoopFactory] = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the client suites run against a server that is already there, an engine or a gateway."""
    group = parser.getgroup("forebay")
    group.addoption(
        "--loop",
        choices=sorted(LOOPS),
        default="uvloop",
        help="event loop of asynchronous tests (%(default)s, as served)",
    )
    group.addoption("--server-url", help="base URL without /v1, e.g. http://127.0.0.1:8000, for tests/clients")
    group.addoption("--server-model", default="smollm2-135m-instruct", help="model name at --server-url (%(default)s)")
    group.addoption("--server-key", default="", help="API key for --server-url; empty when it takes any")


def pytest_configure(config: pytest.Config) -> None:
    """Set up what is needed where tests run; a process that only hands them out starts sooner without."""
    if config.getoption("numprocesses", None) is None or hasattr(config, "workerinput"):
        from tests.support.examples import draw_the_same

        draw_the_same()
        signal.signal(signal.SIGINT, _interrupted)


def _interrupted(number: int, _: object) -> None:
    """Do what Python does by default. In the place of that default asyncio would put a handler of its own, and take it
    away again, for every step of every fixture."""
    signal.default_int_handler(number, None)


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, LoopFactory]:
    """Run asynchronous tests on the event loop that the gateway is served with, or on the other one."""
    name = config.getoption("--loop")
    return {name: LOOPS[name]}


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Leave what is imported and collected out of every search for garbage: that took a sixth of the run."""
    _begin_elsewhere(session.config)
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(*COLLECT_AFTER)
        gc.enable()


def _begin_elsewhere(config: pytest.Config) -> None:
    """Have each worker collect another part of the suite first: what one has compiled the others find, and from a fresh
    clone each compiles a part instead of everything."""
    worker = getattr(config, "workerinput", None)
    if worker is None or [config.invocation_params.dir / one for one in config.args] != [ROOMS]:
        return
    rooms = {room: [*room.rglob("test_*.py")] if room.is_dir() else [room] for room in sorted(ROOMS.glob("[!_]*"))}
    rooms = {room: files for room, files in rooms.items() if any(file.name.startswith("test_") for file in files)}
    sizes = list(accumulate(sum(file.stat().st_size for file in files) for files in rooms.values()))
    first = bisect(sizes, sizes[-1] * int(worker["workerid"].removeprefix("gw")) / worker["workercount"])
    names = [str(room) for room in rooms]
    config.args[:] = names[first:] + names[:first]


@pytest.hookimpl(tryfirst=True, wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None]:
    """Bring tests into one order, whichever room was collected first. Run what takes the session's real engine away
    after all else, whatever names and rooms: for a while, for good."""
    items.sort(key=lambda item: item.path)
    yield
    marks = ("real_engine", "ends_the_session"), ("real_engine", "ends_the_engine")
    items.sort(key=lambda item: [all(item.get_closest_marker(one) for one in both) for both in marks])


@pytest.fixture(autouse=True)
def leak_check(request: pytest.FixtureRequest) -> None:
    """Put the leak check around every asynchronous test: after fixtures of wider scope, before all others."""
    if asyncio.iscoroutinefunction(request.function):
        request.getfixturevalue("leaves_nothing_behind")


@pytest.fixture
async def leaves_nothing_behind() -> AsyncIterator[None]:
    """Fail the test when a task runs on or a socket stays open after it and its fixtures are through."""
    before = Holdings.now()
    yield
    await before.assert_nothing_added()


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgresql]:
    """The database of one server for all tests of a worker."""
    from tests.support.databases import Postgresql
    from tests.support.postgresql import running

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with running(shared) as server, closing(Postgresql(server)) as database:
        yield database


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the test's own. pytest's looks through all that were made before, and links the last one."""
    name = re.sub(r"\W", "_", request.node.name)[:30]
    folder = tmp_path_factory.getbasetemp() / f"{name}_{next(_FOLDERS)}"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def journal() -> Journal:
    """The journal that the test's upstreams and clients share."""
    return Journal()


@pytest.fixture
def clock() -> ManualClock:
    """A clock that stands still until the test moves it."""
    return ManualClock()


@pytest.fixture
async def upstream(journal: Journal) -> AsyncIterator[ScriptedUpstream]:
    """A scripted engine that listens on TCP."""
    async with ScriptedUpstream(journal=journal) as scripted:
        yield scripted


@pytest.fixture(params=["tcp", "unix", "tls"])
async def any_upstream(
    request: pytest.FixtureRequest, journal: Journal, tmp_path: Path
) -> AsyncIterator[ScriptedUpstream]:
    """A scripted engine on each kind of address in turn, for what must hold on all of them."""
    path = tmp_path / "engine.sock" if request.param == "unix" else None
    tls = server_context() if request.param == "tls" else None
    async with ScriptedUpstream(unix_path=path, tls=tls, journal=journal) as scripted:
        yield scripted


Connect = Callable[..., Awaitable[RawClient]]


@pytest.fixture
async def connect(journal: Journal) -> AsyncIterator[Connect]:
    """Open raw clients on the test's journal, closed at its end: ``await connect(url, name="second")``."""
    async with AsyncExitStack() as clients:

        async def open_client(address: str, **options: object) -> RawClient:
            client = await RawClient.connect(address, journal=journal, **options)  # type: ignore[arg-type]
            return await clients.enter_async_context(client)

        yield open_client
