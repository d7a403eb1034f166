"""The ledger from outside: every request is one row however it ended, is summed and exported, and can be explained."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.api import edge as edge_module
from gateway.settings import Bounds, State, Stream
from gateway.state.usage import UsageRow, Wanted
from tests.api.test_admin_endpoints import ADMIN, KEYS
from tests.api.test_limits import limited
from tests.conftest import Connect
from tests.support.client import RawClient
from tests.support.gateway import AUTH, CHAT, KEY, MODEL, Gateway, StartGateway, chat, post_bytes, serving
from tests.support.recordings import load
from tests.support.script import DONE, Do, Gate, event_stream, garbage, json_answer, nothing, play
from tests.support.table import each, named
from tests.support.upstream import ScriptedUpstream

STREAM = play(load("vllm", "chat_stream_usage"))
GOOD = play(load("vllm", "chat_basic"))


async def written(gateway: Gateway) -> list[UsageRow]:
    """Every row of the table, oldest first, with those of just now."""
    books = gateway.replica.books
    assert books is not None
    await books.flush()
    store = books.ledger.store

    def read() -> list[UsageRow]:
        found = [store.find(one["request_id"]) for one in store.rows(Wanted())]
        return [row for row in found if row is not None]

    return await asyncio.to_thread(read)


async def sums(gateway: Gateway, query: str = "") -> Any:
    answer = await gateway.get(f"/admin/usage?{query}", ADMIN, admin=True)
    assert answer.status == 200, answer.body
    return answer.json()["data"]


async def explained(gateway: Gateway, request_id: str) -> Any:
    answer = await gateway.get(f"/admin/requests/{request_id}", ADMIN, admin=True)
    assert answer.status == 200, answer.body
    return answer.json()


@pytest.fixture
async def keeping(start_gateway: StartGateway, upstream: ScriptedUpstream) -> Gateway:
    """A gateway with an operator's key, in front of the test's engine."""
    upstream.always(GOOD, path=CHAT)
    stream, bounds = Stream(heartbeat_after=0), Bounds(body=20_000)
    return await start_gateway(upstream, keys=KEYS, stream=stream, bounds=bounds, database=True)


# --- every way out is one row --------------------------------------------------------------------------------------


class Scene:
    """A gateway, its engine and its clients."""

    def __init__(self, gateway: Gateway, upstream: ScriptedUpstream, connect: Connect, patch: pytest.MonkeyPatch):
        self.gateway = gateway
        self.upstream = upstream
        self.connect = connect
        self.patch = patch

    async def begin(self, body: Any) -> RawClient:
        """A request that its engine is at."""
        client: RawClient = await self.connect(self.gateway.url)
        before = len(self.upstream.journal.find("hanging"))
        client.post(CHAT, body, AUTH)
        await self.upstream.saw("hanging", times=before + 1)
        return client


async def a_whole_answer(scene: Scene) -> None:
    assert (await scene.gateway.ask(chat())).status == 200


async def a_stream(scene: Scene) -> None:
    scene.upstream.queue(STREAM, path=CHAT)
    assert (await scene.gateway.ask(chat(stream=True))).status == 200


async def no_key(scene: Scene) -> None:
    assert (await scene.gateway.ask(chat(), headers=())).status == 401


async def no_such_model(scene: Scene) -> None:
    assert (await scene.gateway.ask(chat(model="nobody's"))).status == 404


async def no_json(scene: Scene) -> None:
    assert (await scene.gateway.ask(b"{")).status == 400


async def no_http(scene: Scene) -> None:
    client = await scene.connect(scene.gateway.url)
    client.expect("POST")
    client.send(b"POST /v1/chat/completions NONSENSE\r\n\r\n")
    assert (await client.response()).status == 400


async def too_large(scene: Scene) -> None:
    assert (await scene.gateway.ask(chat(stop="x" * 30_000))).status == 413


async def refused_by_the_engine(scene: Scene) -> None:
    body = b'{"error":{"message":"max_tokens is wrong","type":"BadRequestError","param":null,"code":400}}'
    scene.upstream.queue(json_answer(body, status=400), path=CHAT)
    assert (await scene.gateway.ask(chat())).status == 400


async def an_engine_that_fails(scene: Scene) -> None:
    scene.upstream.queue(garbage(), path=CHAT)
    assert (await scene.gateway.ask(chat())).status == 502


async def an_engine_that_breaks_off(scene: Scene) -> None:
    scene.upstream.queue(STREAM.do(Do.UNTIL_READ, STREAM.after_frame(1)).do(Do.CLOSE, STREAM.after_frame(1)), path=CHAT)
    assert (await scene.gateway.ask(chat(stream=True))).status == 200


async def an_engine_that_is_silent(scene: Scene) -> None:
    scene.upstream.queue(nothing().do(Do.HANG), path=CHAT)
    client = await scene.begin(chat())
    scene.gateway.advance(601)
    assert (await client.response()).status == 504


async def no_engine(scene: Scene) -> None:
    scene.gateway.replica.pool.endpoints[0].healthy = False
    assert (await scene.gateway.ask(chat())).status == 503


async def a_client_that_leaves_a_stream(scene: Scene) -> None:
    place = STREAM.after_frame(1)
    scene.upstream.queue(STREAM.do(Do.HANG, place), path=CHAT)
    client = await scene.begin(chat(stream=True))
    await client.head()
    await client.close()


async def a_client_that_leaves_before_its_answer(scene: Scene) -> None:
    scene.upstream.queue(nothing().do(Do.HANG), path=CHAT)
    await (await scene.begin(chat())).reset()


async def a_client_that_leaves_its_body(scene: Scene) -> None:
    client = await scene.connect(scene.gateway.url)
    client.send(post_bytes(chat())[:-5])
    while not scene.gateway.replica.edge.active:
        await asyncio.sleep(0)
    await client.close()


async def the_gateway_ends(scene: Scene) -> None:
    scene.upstream.queue(nothing().do(Do.HANG), path=CHAT)
    client = await scene.begin(chat())
    scene.gateway.replica.edge.shut_down()
    assert (await client.response()).status == 503


async def a_mistake_of_ours(scene: Scene) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a mistake")

    with scene.patch.context() as patch:
        patch.setattr(edge_module, "read_body", fail)
        assert (await scene.gateway.ask(chat())).status == 500


WAYS_OUT: dict[Callable[[Scene], Awaitable[None]], tuple[str, int]] = {
    a_whole_answer: ("ok", 200),
    a_stream: ("ok", 200),
    no_key: ("refused", 401),
    no_such_model: ("refused", 404),
    no_json: ("refused", 400),
    no_http: ("refused", 400),
    too_large: ("refused", 413),
    refused_by_the_engine: ("refused", 400),
    an_engine_that_fails: ("engine_failed", 502),
    an_engine_that_breaks_off: ("engine_failed", 200),
    an_engine_that_is_silent: ("engine_slow", 504),
    a_client_that_leaves_a_stream: ("client_gone", 499),
    a_client_that_leaves_before_its_answer: ("client_gone", 499),
    a_client_that_leaves_its_body: ("client_gone", 499),
    the_gateway_ends: ("shutdown", 503),
    a_mistake_of_ours: ("internal_error", 500),
    no_engine: ("no_engine", 503),
}


async def test_every_way_out_is_one_row(
    keeping: Gateway, upstream: ScriptedUpstream, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the row says what the log says."""
    known: set[str] = set()
    for way, ended in WAYS_OUT.items():
        with named(way=way.__name__):
            await way(Scene(keeping, upstream, connect, monkeypatch))
            await keeping.idle()
            line = await keeping.line(index=len(known))
            (row,) = [row for row in await written(keeping) if row.request_id not in known]
            known.add(row.request_id)
            assert (row.outcome, row.status) == ended
            assert (row.outcome, row.status, row.request_id) == (line["outcome"], line["status"], line["request_id"])
            assert (row.key, row.endpoint, row.attempts) == (
                line.get("key", ""),
                line.get("endpoint", ""),
                line.get("attempts", 0),
            )
            assert (row.tokens_in is None) == (row.attempts > 0 and "tokens_in" not in line)
            assert len(keeping.lines("request")) == len(known)


async def test_a_row_has_what_is_charged_by(keeping: Gateway) -> None:
    await keeping.ask(chat(), headers=[*AUTH, ("x-client-request-id", "mine"), ("x-stainless-retry-count", "1")])
    (row,) = await written(keeping)
    assert (row.key, row.key_id, row.tenant, row.model, row.path) == ("alice", "alice", "alice", MODEL, CHAT)
    assert (row.tokens_in, row.tokens_out, row.cost_nanos, row.attempts) == (37, 8, 0, 1)
    assert abs(row.at - keeping.replica.log.wall()) < 600
    detail = json.loads(row.detail)
    assert (detail["client"], detail["client_request_id"], detail["sdk_retry"]) == ("127.0.0.1", "mine", 1)


async def test_nothing_of_prompts_answers_or_keys_is_kept(
    keeping: Gateway, upstream: ScriptedUpstream, connect: Connect, tmp_path: Path
) -> None:
    """Neither in the database nor in the spool, nor where an engine quotes what it refuses."""
    prompt, secret = "the-prompt-itself", "the-answer-itself"
    quoting = json.dumps({"error": {"message": f"cannot read {prompt}", "type": "BadRequestError", "code": 400}})
    told = json.dumps({"model": "x", "choices": [{"message": {"content": secret}}]})
    asked = chat(messages=[{"role": "user", "content": prompt}], user=prompt)
    for script in (json_answer(told.encode()), json_answer(quoting.encode(), status=400), garbage()):
        upstream.queue(script, path=CHAT)
        await keeping.ask(asked)
    await keeping.ask(asked, headers=(("authorization", f"Bearer {KEY}-wrong"),))
    books = keeping.replica.books
    assert books is not None
    await books._journal()
    spooled = b"".join(file.read_bytes() for file in (tmp_path / "spool").glob("*/*.jsonl"))
    rows = repr(await written(keeping)).encode()
    assert (spooled + rows).count(b"req_") >= 4
    for text in (prompt, secret, KEY):
        assert text.encode() not in spooled + rows


# --- sums ----------------------------------------------------------------------------------------------------------


async def test_only_an_admin_key_sees_it(keeping: Gateway) -> None:
    for path in ("/admin/usage", "/admin/requests/req_1"):
        assert (await keeping.get(path, admin=True)).status == 401
        assert (await keeping.get(path, AUTH, admin=True)).status == 403
        assert (await keeping.get(path, ADMIN)).status == 404


async def test_what_was_used_is_summed(keeping: Gateway, upstream: ScriptedUpstream) -> None:
    """Of this replica, requests of just now are in it."""
    for _ in range(3):
        await keeping.ask(chat())
    await keeping.ask(chat(), headers=())
    assert await sums(keeping, "by=key&key=alice") == [
        {
            "key_id": "alice",
            "key": "alice",
            "requests": 3,
            "tokens_in": 111,
            "tokens_cached": 0,
            "tokens_out": 24,
            "tokens_reasoning": 0,
            "tokens_unknown": 0,
            "cost_nanos": 0,
            "cost": "0.00",
        }
    ]
    by_outcome = await sums(keeping, "by=team,outcome&since=1h")
    assert [(one["tenant"], one["outcome"], one["requests"]) for one in by_outcome] == [
        ("", "refused", 1),
        ("alice", "ok", 3),
    ]
    assert await sums(keeping, "by=model&until=2020-01-01") == []
    assert (await sums(keeping, "team=alice"))[0]["requests"] == 3
    assert (await sums(keeping, f"model={MODEL}&tenant=alice"))[0]["requests"] == 3


async def test_sums_as_csv(keeping: Gateway) -> None:
    await keeping.ask(chat())
    answer = await keeping.get("/admin/usage?by=key,model,day&format=csv", ADMIN, admin=True)
    assert answer.header("content-type") == "text/csv; charset=utf-8"
    (line,) = csv.DictReader(io.StringIO(answer.body.decode()))
    assert (line["key"], line["model"], line["requests"], line["tokens_out"]) == ("alice", MODEL, "1", "8")


@each(
    ("query", "told"),
    [
        ("by=colour", "by: there is no 'colour'; write some of key, tenant, "),
        ("since=yesterday", "'yesterday' is no time; write 2026-11-01"),
        ("format=xml", "format: Input should be 'json' or 'csv'"),
    ],
)
async def test_what_cannot_be_asked_says_why(keeping: Gateway, query: str, told: str) -> None:
    answer = await keeping.get(f"/admin/usage?{query}", ADMIN, admin=True)
    assert answer.status == 400
    assert told in answer.json()["error"]["message"]


async def test_while_the_database_is_away_requests_are_served_and_wait(keeping: Gateway, tmp_path: Path) -> None:
    """Said once, seen in the metrics, and all of it in the table when it is back."""
    books = keeping.replica.books
    assert books is not None
    await keeping.ask(chat())
    await books.flush()
    books.ledger.store.close()
    database = tmp_path / "forebay.db"
    away = {file: file.with_suffix(f"{file.suffix}.away") for file in tmp_path.glob("forebay.db*")}
    for file, elsewhere in away.items():
        file.rename(elsewhere)
    database.mkdir()
    for _ in range(3):
        assert (await keeping.ask(chat())).status == 200
        await books.flush()
    answer = await keeping.get("/admin/usage", ADMIN, admin=True)
    assert (answer.status, answer.json()["error"]["code"]) == (503, "state_unavailable")
    metrics = (await keeping.get("/metrics", admin=True)).body
    assert b"forebay_usage_waiting_rows 3.0" in metrics
    assert b"forebay_usage_rows_total 1.0" in metrics
    database.rmdir()
    for file, elsewhere in away.items():
        elsewhere.rename(file)
    assert len(await written(keeping)) == 4
    metrics = (await keeping.get("/metrics", admin=True)).body
    assert b"forebay_usage_waiting_rows 0.0" in metrics
    assert b"forebay_usage_spool_bytes 0.0" in metrics
    assert len(keeping.lines("usage_spooled")) == len(keeping.lines("usage_stored_again")) == 1


async def test_without_a_ledger_nothing_is_written_and_that_is_said(
    start_gateway: StartGateway, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    upstream.always(GOOD, path=CHAT)
    gateway = await start_gateway(upstream, keys=KEYS, state=State(ledger=False))
    request_id = (await gateway.ask(chat())).header("x-request-id")
    answer = await gateway.get("/admin/usage", ADMIN, admin=True)
    assert (answer.status, answer.json()["error"]["message"]) == (400, "No ledger is kept: state.ledger is off.")
    assert (await explained(gateway, str(request_id)))["source"] == "memory"
    answer = await gateway.get("/admin/requests/req_none", ADMIN, admin=True)
    assert "no ledger is kept" in answer.json()["error"]["message"]
    assert not (tmp_path / "spool").exists()


async def test_an_open_gateway_accounts_too(
    start_gateway: StartGateway, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """Whoever has a gateway on a laptop for everybody may still ask what was used."""
    upstream.always(GOOD, path=CHAT)
    gateway = await start_gateway(upstream, keys=(), auth="none")
    assert not (tmp_path / "forebay.db").exists()
    await gateway.ask(chat(), headers=())
    (row,) = await written(gateway)
    assert (row.key, row.key_id, row.tenant) == ("anonymous", "", "anonymous")


async def test_an_open_gateway_needs_no_disk(
    start_gateway: StartGateway, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """Neither for its database nor for its spool: requests are served, and what is lost is said."""
    upstream.always(GOOD, path=CHAT)
    folder = tmp_path / "file"
    folder.touch()
    gateway = await start_gateway(upstream, keys=(), auth="none", data_dir=folder)
    assert (await gateway.ask(chat(), headers=())).status == 200
    books = gateway.replica.books
    assert books is not None
    await books.flush()
    await books.stop()
    assert gateway.lines("usage_spooled")[0]["level"] == "error"
    assert gateway.lines("usage_lost")[0]["rows"] == {"full": 1}


async def test_the_end_writes_the_last_rows(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    """Those of requests that only the end has ended, too."""
    gate = Gate()
    upstream.always(GOOD, path=CHAT)
    gateway = await start_gateway(upstream, keys=KEYS, database=True)
    await gateway.ask(chat())
    upstream.queue(nothing().do(gate), path=CHAT)
    async with await RawClient.connect(gateway.url) as client:
        client.post(CHAT, chat(), AUTH)
        await gate.reached()
        gateway.replica.stop()
        gateway.replica.stop()
        await gateway.replica.until_stopped()
        gate.open()
    books = gateway.replica.books
    assert books is not None
    assert {one["outcome"] for one in books.ledger.store.rows(Wanted())} == {"ok", "shutdown"}
    books.ledger.store.close()


# --- one request -----------------------------------------------------------------------------------------------------


@pytest.fixture
async def two(start_gateway: StartGateway, upstream: ScriptedUpstream, journal: Any) -> AsyncIterator[Any]:
    """A gateway in front of two engines, ``one`` and ``other``, and these."""
    async with ScriptedUpstream(journal=journal) as other:
        gateway = await start_gateway(serving(upstream, name="one"), serving(other, name="other"), keys=KEYS)
        yield gateway, {"one": upstream, "other": other}


async def test_a_good_request_explained(two: Any) -> None:
    gateway, engines = two
    for engine in engines.values():
        engine.always(GOOD, path=CHAT)
    answer = await gateway.ask(chat())
    told = await explained(gateway, answer.header("x-request-id"))
    assert (told["state"], told["outcome"], told["status"], told["error"]) == ("ended", "ok", 200, "")
    assert told["who"]["key"] == told["who"]["key_id"] == told["who"]["tenant"] == "alice"
    size = len(json.dumps(chat()))
    plain = {"version": "", "served": "", "via": "", "mirrors": "", "stream": False}
    assert told["asked"] == {"path": CHAT, "model": MODEL, **plain, "bytes_in": size}
    (attempt,) = told["engine"]["tried"]
    assert (attempt["endpoint"], attempt["result"]) == (told["engine"]["endpoint"], "ok")
    assert sorted(name for name, *_ in attempt["among"]) == ["one", "other"]
    assert told["engine"]["why"].startswith("the best by prediction of one: first token in ")
    assert (told["engine"]["attempts"], told["engine"]["retries"]) == (1, 0)
    assert (told["tokens"]["in"], told["tokens"]["out"]) == (37, 8)
    assert list(told["time"]["split_ms"]) == ["headers", "body", "policy", "connect", "first_event", "rest"]


async def test_a_refused_request_explained(keeping: Gateway) -> None:
    answer = await keeping.ask(chat(model="nobody's"))
    told = await explained(keeping, str(answer.header("x-request-id")))
    assert (told["outcome"], told["status"]) == ("refused", 404)
    assert told["error"].startswith('The model "nobody\'s" does not exist.')
    assert told["engine"] == {"endpoint": "", "why": "", "attempts": 0, "retries": 0, "tried": []}
    assert told["tokens"]["in"] == 0
    assert list(told["time"]["split_ms"]) == ["headers", "body", "rest"]


async def test_one_that_a_limit_refused_explained(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    """Which bucket, and of the one before it what it was charged."""
    upstream.always(GOOD, path=CHAT)
    gateway = await start_gateway(upstream, keys=KEYS, limits=limited(requests="1/m"), database=True)
    answers = [await gateway.ask(chat()) for _ in range(2)]
    served, refused = [await explained(gateway, str(answer.header("x-request-id"))) for answer in answers]
    assert [answer.status for answer in answers] == [200, 429]
    assert served["limits"]["settlement"] == "exact"
    (charged,) = served["limits"]["charged"]
    assert (charged["unit"], charged["reserved"], charged["settled"]) == ("requests", 1, 1)
    assert refused["limits"]["refused_by"].startswith("key alice: ")
    assert (refused["outcome"], refused["engine"]["attempts"]) == ("refused", 0)
    first, second = await written(gateway)
    assert {first.settlement, second.settlement} == {"exact", ""}


async def test_a_retried_request_explained(two: Any) -> None:
    """Which engine failed it, how, and who served it then."""
    gateway, engines = two
    for engine in engines.values():
        engine.queue(garbage(), path=CHAT)
        engine.always(GOOD, path=CHAT)
    # Both fail their first request; whichever is asked first, the other one is asked next, and one of them is good.
    first = await gateway.ask(chat())
    assert first.status == 502
    told = await explained(gateway, first.header("x-request-id"))
    assert [one["result"] for one in told["engine"]["tried"]] == ["broken", "broken"]
    assert sorted(one["endpoint"] for one in told["engine"]["tried"]) == ["one", "other"]
    before, served = told["engine"]["tried"]
    assert told["engine"]["why"].endswith(f"; tried before: {before['endpoint']}")
    assert (told["engine"]["endpoint"], told["engine"]["retries"]) == (served["endpoint"], 1)
    assert told["outcome"] == "engine_failed"
    assert told["tokens"]["in"] is None


async def test_one_that_was_left_explained(keeping: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    """While it runs, and after."""
    place = STREAM.after_frame(1)
    upstream.queue(STREAM.do(Do.HANG, place), path=CHAT)
    client = await connect(keeping.url)
    client.post(CHAT, chat(stream=True), AUTH)
    request_id = str((await client.head()).header("x-request-id"))
    told = await explained(keeping, request_id)
    assert (told["state"], told["outcome"], told["engine"]["tried"][0]["result"]) == ("running", "", "running")
    await client.close()
    await keeping.idle()
    told = await explained(keeping, request_id)
    assert (told["state"], told["outcome"], told["status"]) == ("ended", "client_gone", 499)
    assert told["engine"]["tried"][0]["result"] == "client_gone"
    assert told["engine"]["why"] == "the only one that serves this model"
    assert told["tokens"]["events"] >= 1


async def test_the_ledger_tells_the_same_as_memory(keeping: Gateway) -> None:
    """Of another replica's request, or one of long ago."""
    request_id = str((await keeping.ask(chat())).header("x-request-id"))
    remembered = await explained(keeping, request_id)
    keeping.replica.edge.recent.clear()
    found = await explained(keeping, request_id)
    assert (remembered.pop("source"), found.pop("source")) == ("memory", "ledger")
    assert found == remembered


async def test_where_time_went_adds_up(keeping: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    gate = Gate()
    upstream.queue(event_stream([*load("vllm", "chat_stream").events()[:1], DONE]).do(gate, 0), path=CHAT)
    client = await connect(keeping.url)
    client.post(CHAT, chat(stream=True), AUTH)
    await gate.reached()
    keeping.advance(1.5)
    gate.open()
    answer = await client.response()
    time = (await explained(keeping, str(answer.header("x-request-id"))))["time"]
    assert (time["total_ms"], time["ttft_ms"]) == (1500, 1500)
    assert time["split_ms"]["first_event"] == 1500
    assert sum(time["split_ms"].values()) == 1500


async def test_an_unknown_id_says_where_was_looked(keeping: Gateway) -> None:
    await keeping.ask(chat())
    answer = await keeping.get("/admin/requests/req_none", ADMIN, admin=True)
    assert (answer.status, answer.json()["error"]["code"]) == (404, "request_not_found")
    assert answer.json()["error"]["message"] == (
        "There is no request 'req_none'. Looked at: the latest 1 requests of this replica and the ledger, whose rows"
        " are kept 400 days."
    )
