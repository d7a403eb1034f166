"""The steps of a request suspend wherever they may have to, and the client leaves, or time or the gateway ends, there.

Positions: before the body is read, while a thread reads it, while an engine counts its prompt, and in the relay.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gateway.api.auth import ANONYMOUS, Authenticator
from gateway.api.edge import Edge, EdgeRules, Refused
from gateway.api.request import Request, Steps
from gateway.api.routes import RELAYED
from gateway.limits import Limits, declared
from gateway.log import Log
from gateway.serving.limiter import Limiter
from gateway.serving.pending import Pending
from gateway.serving.relay import Client
from gateway.settings import Caps
from gateway.store.memory import MemoryStore
from tests.support.table import each
from tests.unit.ports import CHAT, MODEL, SSE, FakeClient, Stage

KEY = b"fb-alice"
HEADERS = [(b"authorization", b"Bearer " + KEY), (b"content-type", b"application/json")]
CHUNK = b'data: {"model":"own-name","choices":[{"delta":{"content":"x"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


class HeldExecutor(Executor):
    """Threads that begin when the test says so."""

    def __init__(self) -> None:
        self.work: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.work.append((future, lambda: fn(*args, **kwargs)))
        return future

    def run(self) -> None:
        """Do the work, as threads would that cannot know that nobody waits any more."""
        for future, work in self.work:
            if future.set_running_or_notify_cancel():
                future.set_result(work())
        self.work.clear()


class Suspending(Edge):
    """An edge whose steps begin with one that must wait for the test."""

    gate: asyncio.Future[None] | None = None

    def _steps(self, request: Request, body: bytes, client: Client) -> Steps:
        if self.gate is not None:
            yield Pending(self._opened(self.gate))
        yield from super()._steps(request, body, client)

    async def _opened(self, gate: asyncio.Future[None]) -> None:
        await gate


@dataclass
class House:
    """An edge between a fake client and fake engines."""

    stage: Stage
    edge: Suspending
    executor: HeldExecutor
    log_file: Path
    client: FakeClient

    def open(self, path: str = CHAT, headers: list[tuple[bytes, bytes]] = HEADERS) -> Request:
        opened = self.edge.open(RELAYED[path], headers, "1.2.3.4")
        assert isinstance(opened, Request)
        return opened

    def lines(self, event: str = "request") -> list[dict[str, Any]]:
        self.edge.log.flush()
        found = [json.loads(line) for line in self.log_file.read_text().splitlines()]
        return [line for line in found if line["event"] == event]

    def check_over(self, outcome: str, status: int) -> None:
        """The request is accounted for once and holds nothing."""
        assert [(line["outcome"], line["status"]) for line in self.lines()] == [(outcome, status)]
        assert self.edge.active == set()
        assert self.edge._held == 0
        assert self.stage.in_flight == 0
        assert len(self.stage.deadlines) == 0
        assert self.lines("internal_error") == []


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    stage = Stage()
    alice = replace(ANONYMOUS, name="alice", tenant="team", caps=Caps(context=1000))
    log_file = tmp_path / "log.jsonl"
    executor = HeldExecutor()
    edge = Suspending(
        Authenticator({hashlib.sha256(KEY).digest(): alice}),
        stage.admission,
        stage.deadlines,
        stage.metrics,
        Log("json", log_file),
        executor,
        EdgeRules(offload_above=300),
        Limiter(MemoryStore(lambda: 0), declared(Limits()), stage.metrics, lambda: 0),
    )
    yield House(stage, edge, executor, log_file, FakeClient())
    edge.log.close()


def body_of(size: int) -> bytes:
    messages = [{"role": "user", "content": "x" * size}]
    return json.dumps({"model": MODEL, "stream": True, "max_tokens": 5, "messages": messages}).encode()


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# Each position brings a request so far and no further.


async def reach_gate(house: House) -> Request:
    house.edge.gate = asyncio.get_running_loop().create_future()
    request = house.open()
    house.edge.run(request, body_of(900), house.client)
    return request


async def reach_reading(house: House) -> Request:
    request = house.open()
    house.edge.run(request, body_of(900), house.client)
    assert len(house.executor.work) == 1
    return request


async def reach_counting(house: House) -> Request:
    request = await reach_reading(house)
    await turns(2)
    house.executor.run()
    await turns(5)
    assert house.stage.attempt.payload.startswith(b"POST /tokenize ")
    return request


async def reach_relay(house: House) -> Request:
    request = await reach_counting(house)
    house.stage.attempt.answer(200, b'{"count":31}')
    await turns(5)
    assert house.stage.attempt.payload.startswith(b"POST /v1/chat/completions ")
    return request


async def reach_stream(house: House) -> Request:
    request = await reach_relay(house)
    house.stage.attempt.connect()
    house.stage.attempt.head(200, SSE)
    house.stage.attempt.data(CHUNK)
    assert house.client.started
    return request


POSITIONS = [reach_gate, reach_reading, reach_counting, reach_relay, reach_stream]
NAMES = [reach.__name__.removeprefix("reach_") for reach in POSITIONS]
Reach = Callable[[House], Any]


@pytest.mark.parametrize("reach", POSITIONS, ids=NAMES)
@pytest.mark.parametrize("later", [0, 1, 5], ids=["at once", "a turn later", "later"])
async def test_the_client_may_leave_wherever_a_step_waits(house: House, reach: Reach, later: int) -> None:
    """Also before the waiting has even begun: nothing is sent, nothing is kept, and what comes late starts nothing."""
    request = await reach(house)
    await turns(later)
    before, attempts = house.client.out, len(house.stage.attempts)
    house.edge.client_gone(request)
    house.check_over("client_gone", 499)
    house.executor.run()
    if house.edge.gate is not None and not house.edge.gate.done():
        house.edge.gate.set_result(None)
    await turns(10)
    house.edge.client_gone(request)
    house.edge.shut_down()
    assert house.client.out == before
    assert len(house.stage.attempts) == attempts
    assert all(attempt.ended for attempt in house.stage.attempts)
    house.check_over("client_gone", 499)
    # A step that was never awaited would be told of here.
    gc.collect(1)


@pytest.mark.parametrize("reach", POSITIONS, ids=NAMES)
@pytest.mark.parametrize("later", [0, 5], ids=["at once", "later"])
async def test_the_gateway_may_end_wherever_a_step_waits(house: House, reach: Reach, later: int) -> None:
    request = await reach(house)
    await turns(later)
    house.edge.shut_down()
    assert b"server_shutting_down" in house.client.out
    house.executor.run()
    await turns(10)
    house.edge.client_gone(request)
    assert all(attempt.ended for attempt in house.stage.attempts)
    house.check_over("shutdown", 200 if reach is reach_stream else 503)
    gc.collect(1)


async def test_the_value_and_the_leaving_may_come_in_the_same_turn(house: House) -> None:
    """The step's result is there, and the client goes before anybody has looked at it."""
    request = await reach_reading(house)
    await turns(3)
    house.executor.run()
    house.edge.client_gone(request)
    await turns(10)
    assert house.stage.attempts == []
    house.check_over("client_gone", 499)


async def test_a_request_goes_through_every_step(house: House) -> None:
    request = await reach_gate(house)
    assert house.edge.active == {request}
    assert house.edge.gate is not None
    house.edge.gate.set_result(None)
    await turns(3)
    house.executor.run()
    await turns(5)
    house.stage.attempt.answer(200, b'{"count":31}')
    await turns(5)
    assert house.stage.attempt.body["max_tokens"] == 5
    house.stage.attempt.connect()
    house.stage.attempt.head(200, SSE)
    house.stage.attempt.data(CHUNK + DONE)
    assert house.client.out.endswith(DONE)
    house.check_over("ok", 200)


async def test_a_step_that_need_not_wait_costs_no_task(house: House) -> None:
    house.edge.rules = EdgeRules()
    request = house.open()
    house.edge.run(request, body_of(10), house.client)
    assert request.task is None
    house.stage.attempt.connect()
    house.stage.attempt.head(200, SSE)
    house.stage.attempt.data(CHUNK + DONE)
    house.check_over("ok", 200)


async def test_a_refusal_after_waiting_is_told(house: House) -> None:
    request = await reach_counting(house)
    house.stage.attempt.answer(200, b'{"count":999}')
    await turns(5)
    assert house.client.status == 400
    assert house.client.json["error"]["code"] == "context_length_exceeded"
    assert house.lines()[0]["request_id"] == request.ticket.request_id
    house.check_over("refused", 400)


async def test_a_step_that_fails_is_our_fault_and_told_so(house: House) -> None:
    """The log has the traceback, the client an id to report."""
    request = await reach_gate(house)
    assert house.edge.gate is not None
    house.edge.gate.set_exception(RuntimeError("broken step"))
    await turns(5)
    assert house.client.status == 500
    assert request.ticket.request_id in house.client.json["error"]["message"]
    assert "broken step" not in house.client.out.decode()
    (line,) = house.lines("internal_error")
    assert "broken step" in line["trace"]
    assert house.edge.active == set()
    assert [line["outcome"] for line in house.lines()] == ["internal_error"]


async def test_what_is_cancelled_under_a_step_leaves_no_client_waiting(house: House) -> None:
    await reach_gate(house)
    await turns(2)
    assert house.edge.gate is not None
    house.edge.gate.cancel()
    await turns(5)
    assert house.client.status == 500
    assert house.edge.active == set()
    assert len(house.lines("internal_error")) == 1


# --- what is said on the headers alone ---------------------------------------------------------------------------


def refused(house: House, *extra: tuple[bytes, bytes], headers: list[tuple[bytes, bytes]] = HEADERS) -> tuple[int, str]:
    opened = house.edge.open(RELAYED[CHAT], [*headers, *extra], "1.2.3.4")
    assert isinstance(opened, Refused)
    status, _, body = house.edge.refusal(opened.route, opened.ticket, opened.refusal)
    assert house.edge.active == set()
    return status, json.loads(body)["error"]["message"]


async def test_large_bodies_share_a_budget(house: House) -> None:
    """What is reserved is given back on every way out; small bodies take nothing."""
    house.edge.rules = EdgeRules(offload_above=100, parse_budget=1000)
    large = [*HEADERS, (b"content-length", b"600")]
    first = house.open(headers=large)
    status, message = refused(house_without(house, first), headers=large)
    assert (status, "Try again" in message) == (503, True)
    house.open(headers=[*HEADERS, (b"content-length", b"100")])
    house.edge.client_gone(first)
    assert house.edge._held == 0
    house.open(headers=large)


def house_without(house: House, request: Request) -> House:
    """The same house, where one request is not counted as left over."""
    house.edge.active.discard(request)
    return house


async def test_a_body_that_grows_takes_its_share_as_it_comes(house: House) -> None:
    house.edge.rules = EdgeRules(offload_above=100, parse_budget=1000, body=2000)
    first, second = house.open(), house.open()
    assert house.edge.grow(first, 100) is None
    assert house.edge._held == 0
    assert house.edge.grow(first, 700) is None
    assert house.edge.grow(first, 650) is None
    assert house.edge._held == 700
    # However small the steps are in which it comes.
    for size in range(50, 301, 50):
        assert house.edge.grow(second, size) is None
    refusal = house.edge.grow(second, 301)
    assert refusal is not None
    assert refusal.kind.value.status == 503
    assert house.edge._held == 1000
    assert house.edge.grow(first, 700) is None
    too_large = house.edge.grow(first, 2001)
    assert too_large is not None
    assert too_large.kind.value.status == 413
    for request in (first, second):
        house.edge.client_gone(request)
    assert house.edge._held == 0


REFUSED = [
    ((b"content-encoding", b"gzip"), 415, "gzip"),
    ((b"content-encoding", b"BR"), 415, "br"),
    ((b"content-type", b"text/plain"), 415, "text/plain"),
    ((b"content-type", b"multipart/form-data; boundary=x"), 415, "multipart"),
    ((b"content-length", b"99999999999"), 413, "larger"),
    ((b"x-client-request-id", b"x" * 513), 400, "512"),
    ((b"x-client-request-id", b"\xc3\xa9"), 400, "ASCII"),
]


@each(("header", "status", "told"), REFUSED)
async def test_headers_that_are_refused(house: House, header: tuple[bytes, bytes], status: int, told: str) -> None:
    found, message = refused(house, header)
    assert found == status
    assert told in message


ACCEPTED = [
    (b"content-encoding", b"identity"),
    (b"content-type", b"application/json; charset=utf-8"),
    (b"content-type", b"Application/JSON"),
    (b"content-type", b"application/vnd.api+json"),
    (b"content-length", b"0"),
    (b"x-client-request-id", b"x" * 512),
]


@each("header", ACCEPTED)
async def test_headers_that_are_accepted(house: House, header: tuple[bytes, bytes]) -> None:
    request = house.open(headers=[*HEADERS, header])
    house.edge.client_gone(request)


async def test_a_key_is_asked_for_before_anything_else(house: House) -> None:
    status, _ = refused(house, (b"content-encoding", b"gzip"), headers=[(b"content-type", b"application/json")])
    assert status == 401


@pytest.mark.parametrize(("value", "seen", "counted"), [(b"2", 2, 1), (b"0", 0, 0), (b"x", 0, 0), (b"9" * 30, 9999, 1)])
async def test_an_sdks_retries_are_counted(house: House, value: bytes, seen: int, counted: int) -> None:
    request = house.open(headers=[*HEADERS, (b"x-stainless-retry-count", value)])
    assert request.ticket.sdk_retry == seen
    assert house.stage.metrics.client_retries == counted
    house.edge.client_gone(request)


async def test_ids_do_not_repeat(house: House) -> None:
    ids = {house.edge.new_id(1_700_000_000.0) for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(name) == 36 and name.startswith("req_") for name in ids)
    # In the order of time, so that the ledger grows at its end.
    assert max(ids) < house.edge.new_id(1_700_000_000.001) < house.edge.new_id(1_700_000_001.0)
