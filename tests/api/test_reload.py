"""The configuration changes while the gateway runs: nothing under way is disturbed, nothing wrong is taken over."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.app import HOUSEKEEPING
from tests.conftest import Connect
from tests.support.client import request_bytes
from tests.support.gateway import (
    AUTH,
    CHAT,
    ENGINE_MODEL,
    KEY,
    MODEL,
    Face,
    Gateway,
    StartGateway,
    chat,
    relayed,
    serving,
    until,
)
from tests.support.journal import Journal
from tests.support.recordings import load
from tests.support.script import DONE, Gate, event_stream, json_answer, play
from tests.support.sockets import free_port
from tests.support.table import named
from tests.support.upstream import ScriptedUpstream

GOOD = play(load("vllm", "chat_basic"))
STREAM = event_stream(load("vllm", "chat_stream").events())


class File:
    """The ``forebay.yaml`` of a test and what stands in it."""

    def __init__(self, path: Path, face: Face, *upstreams: ScriptedUpstream) -> None:
        self.path = path
        self.tree: dict[str, Any] = {
            "listen": {"port": free_port(), "face": face},
            "admin": {"enabled": False},
            "data_dir": str(path.parent),
            "keys": [{"name": "alice", "key": KEY}],
            "upstreams": [self.upstream(one) for one in upstreams],
            "log": {"file": str(path.parent / "log.jsonl")},
            "discovery": {"interval": 3600},
            "shutdown": {"announce": 0},
        }
        self.write()

    @staticmethod
    def upstream(one: ScriptedUpstream, **more: Any) -> dict[str, Any]:
        """Return the section of a scripted engine that answers everything well."""
        serving(one)
        one.always(GOOD, path=CHAT)
        return {"url": one.url, "models": {MODEL: ENGINE_MODEL}, **more}

    def write(self, **sections: Any) -> None:
        """Write the file with these sections instead of what stood there, whole or not at all, as editors do."""
        self.tree |= sections
        temporary = self.path.with_suffix(".new")
        temporary.write_text(yaml.safe_dump(self.tree))
        temporary.replace(self.path)


@pytest.fixture
def file(tmp_path: Path, face: Face, upstream: ScriptedUpstream) -> File:
    return File(tmp_path / "forebay.yaml", face, upstream)


async def status(gateway: Gateway, key: str = KEY, **fields: Any) -> int:
    return (await gateway.ask(chat(**fields), headers=[("authorization", f"Bearer {key}")])).status


# --- keys ------------------------------------------------------------------------------------------------------------


async def test_keys_come_and_go(start_gateway: StartGateway, file: File) -> None:
    """A key taken out of the file is out, a new one in, and caps change with the next request."""
    gateway = await start_gateway(path=file.path)
    assert await status(gateway) == 200
    file.write(keys=[{"name": "bob", "key": "fb-bob", "caps": {"max_tokens": 5}}])
    assert await gateway.replica.reload() == []
    assert await status(gateway) == 401
    assert await status(gateway, "fb-bob", max_tokens=5) == 200
    assert await status(gateway, "fb-bob", max_tokens=6) == 400
    (line,) = gateway.lines("reloaded")
    assert line["changed"] == ["keys"]
    started = gateway.lines("started")[0]["configuration"]
    assert line["configuration"] != started


async def test_a_key_that_lies_elsewhere_is_read_anew(start_gateway: StartGateway, file: File, tmp_path: Path) -> None:
    """A rotated secret takes effect with a reload, although the configuration itself is the same."""
    secret = tmp_path / "secret"
    secret.write_text("first")
    file.write(keys=[{"name": "alice", "key_file": str(secret)}])
    gateway = await start_gateway(path=file.path)
    assert await status(gateway, "first") == 200
    secret.write_text("second")
    assert await gateway.replica.reload() == []
    assert [await status(gateway, key) for key in ("first", "second")] == [401, 200]


async def test_authentication_can_be_switched(start_gateway: StartGateway, file: File) -> None:
    """Off and on again; with it the state database is opened when there was no need before."""
    file.write(auth="none")
    gateway = await start_gateway(path=file.path)
    assert await status(gateway, "anything") == 200
    file.write(auth="keys")
    assert await gateway.replica.reload() == []
    assert [await status(gateway, key) for key in ("anything", KEY)] == [401, 200]
    file.write(auth="none")
    assert await gateway.replica.reload() == []
    assert await status(gateway, "anything") == 200


async def test_opening_the_gateway_to_everybody_is_said(start_gateway: StartGateway, file: File) -> None:
    """As loudly as at the start, where others can reach it."""
    file.write(listen={**file.tree["listen"], "host": "0.0.0.0"})
    gateway = await start_gateway(path=file.path)
    file.write(auth="none")
    assert await gateway.replica.reload() == []
    assert len(gateway.lines("open_to_everybody")) == 1
    file.write(bounds={"body": 1000})
    assert await gateway.replica.reload() == []
    assert len(gateway.lines("open_to_everybody")) == 1, "once is enough"


# --- endpoints -------------------------------------------------------------------------------------------------------


async def test_an_engine_comes_while_a_stream_runs(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect, journal: Journal, file: File
) -> None:
    """The stream goes on where it is; the new engine gets the next request, since it has nothing to do."""
    gateway = await start_gateway(path=file.path)
    gate = Gate()
    upstream.queue(STREAM.do(gate, STREAM.after_frame(1)), path=CHAT)
    client = await connect(gateway.url)
    client.post(CHAT, chat(stream=True), AUTH)
    await upstream.saw("gate")
    async with ScriptedUpstream(journal=journal, name="other") as other:
        file.write(upstreams=[*file.tree["upstreams"], file.upstream(other)])
        assert await gateway.replica.reload() == []
        assert await status(gateway) == 200
        assert (len(relayed(upstream)), len(relayed(other))) == (1, 1)
        gate.open()
        assert (await client.response()).events()[-1] == DONE
        assert upstream.open_connections == 2, "the kept connection and the one that looks after its health"


async def test_an_engine_goes_while_a_stream_runs_there(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect, journal: Journal, file: File
) -> None:
    """The stream ends as it should, new requests go elsewhere, and then no connection to the old one is left."""
    gateway = await start_gateway(path=file.path)
    gate = Gate()
    assert await status(gateway) == 200
    upstream.queue(GOOD.do(gate, 0), STREAM.do(gate, STREAM.after_frame(1)), path=CHAT)
    waiting, streaming = await connect(gateway.url), await connect(gateway.url)
    waiting.post(CHAT, chat(), AUTH)
    await upstream.saw("gate")
    streaming.post(CHAT, chat(stream=True), AUTH)
    await upstream.saw("gate", times=2)
    async with ScriptedUpstream(journal=journal, name="other") as other:
        file.write(upstreams=[file.upstream(other)])
        assert await gateway.replica.reload() == []
        assert await status(gateway) == 200
        assert len(relayed(other)) == 1
        gate.open()
        assert (await waiting.response()).status == 200
        assert (await streaming.response()).events()[-1] == DONE
        await until(lambda: not upstream.open_connections, "a connection to the engine that is gone stays open")
        assert len(relayed(upstream)) == 3
        assert (await gateway.line(index=3))["outcome"] == "ok"


async def test_idle_connections_to_an_engine_that_goes_are_closed(
    start_gateway: StartGateway, upstream: ScriptedUpstream, file: File
) -> None:
    """Its model goes with it."""
    gateway = await start_gateway(path=file.path)
    assert await status(gateway) == 200
    assert upstream.open_connections == 2
    file.write(upstreams=[])
    assert await gateway.replica.reload() == []
    await until(lambda: not upstream.open_connections, "a connection to the engine that is gone stays open")
    assert await status(gateway) == 404
    assert (await gateway.get("/v1/models", AUTH)).json()["data"] == []
    assert (await gateway.get("/health/ready")).status == 503


async def test_an_engine_that_stays_keeps_its_connections(
    start_gateway: StartGateway, upstream: ScriptedUpstream, journal: Journal, file: File
) -> None:
    """Whatever else changes."""
    gateway = await start_gateway(path=file.path)
    assert await status(gateway) == 200
    async with ScriptedUpstream(journal=journal, name="other") as other:
        file.write(upstreams=[*file.tree["upstreams"], file.upstream(other)], stream={"retries": 1})
        assert await gateway.replica.reload() == []
        for _ in range(4):
            assert await status(gateway) == 200
        assert (upstream.accepted, other.accepted) == (2, 2)


async def test_two_reloads_at_once_do_not_mix(
    start_gateway: StartGateway, upstream: ScriptedUpstream, journal: Journal, file: File
) -> None:
    """While one still looks at a new engine, the next takes that engine out again: the later file wins."""
    gateway = await start_gateway(path=file.path)
    before = file.tree["upstreams"]
    async with ScriptedUpstream(journal=journal, name="other") as other:
        gate = Gate()
        file.write(upstreams=[*before, file.upstream(other)])
        other.always(json_answer(b"").do(gate, 0), path="/health")
        first = asyncio.create_task(gateway.replica.reload())
        await other.saw("gate")
        file.write(upstreams=before)
        second = asyncio.create_task(gateway.replica.reload())
        # Both are under way: the second one has had its chance to overtake.
        assert await status(gateway) == 200
        gate.open()
        assert [await first, await second] == [[], []]
        assert [endpoint.name for endpoint in gateway.replica.pool.endpoints] == [upstream.url]
        await until(lambda: not other.open_connections, "the engine that was taken out is still looked at")


# --- what is wrong ---------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"listne": {}}, "listne: unknown key; did you mean listen?"),
    ({"keys": [{"name": "x", "key": "a"}, {"name": "x", "key": "b"}]}, "keys[1].name"),
    ({"keys": [{"name": "x", "key_file": "/nowhere/key"}]}, "keys[0]"),
    ({"keys": [{"name": "x", "key_env": "FOREBAY_TEST_NOT_SET"}]}, "keys[0]"),
    ({"upstreams": [{"url": "host:8000"}]}, "upstreams[0].url"),
    ({"upstreams": [{"url": "http://host", "engine": "vlm"}]}, "upstreams[0].engine"),
    ({"upstreams": [{"url": "https://host", "ca_file": "/nowhere/ca.pem"}]}, "ca.pem"),
    ({"timeouts": {"idle": "soon"}}, "timeouts.idle"),
    ({"keys": [], "upstreams": [{"url": "http://vllm:8000", "discover": "kubernetes"}]}, "inside a cluster only"),
]


async def test_a_wrong_file_is_refused_whole(start_gateway: StartGateway, file: File) -> None:
    """Every problem is logged, and nothing of the file takes effect, not even what was right in it."""
    gateway = await start_gateway(path=file.path)
    right = dict(file.tree)
    for index, (sections, told) in enumerate(WRONG):
        with named(told=told):
            file.tree = dict(right)
            file.write(**{"bounds": {"body": 10}, **sections})
            problems = await gateway.replica.reload()
            assert len(problems) == 1
            assert told in problems[0]
            lines = gateway.lines("reload_refused")
            assert len(lines) == index + 1
            assert (lines[-1]["level"], lines[-1]["problems"]) == ("error", problems)
            assert await status(gateway) == 200
            assert gateway.lines("reloaded") == []


async def test_a_file_that_cannot_be_read_is_refused(start_gateway: StartGateway, file: File) -> None:
    gateway = await start_gateway(path=file.path)
    for content in (b"keys: [", b"- a list\n", b"\xff\xfe", None):
        if content is None:
            file.path.unlink()
        else:
            file.path.write_bytes(content)
        assert len(await gateway.replica.reload()) == 1, content
        assert await status(gateway) == 200
        file.write()
        assert await gateway.replica.reload() == [], content


async def test_a_database_that_cannot_be_opened_is_refused_too(
    start_gateway: StartGateway, file: File, tmp_path: Path
) -> None:
    """Keys were not needed so far; the gateway goes on as it was, and still looks after its file and its log."""
    (tmp_path / "forebay.db").write_bytes(b"this is no database" * 1000)
    file.write(auth="none")
    gateway = await start_gateway(path=file.path)
    file.write(auth="keys")
    problems = await gateway.replica.reload()
    assert len(problems) == 1
    assert "state database" in problems[0]
    assert await status(gateway, "anything") == 200
    (tmp_path / "forebay.db").unlink()
    assert await gateway.replica.reload() == []
    assert await status(gateway, "anything") == 401


async def test_a_log_that_cannot_be_opened_again_is_kept(
    start_gateway: StartGateway, file: File, tmp_path: Path
) -> None:
    """Its directory has gone with the rotation: lines go on to the old file rather than nowhere."""
    folder = tmp_path / "logs"
    folder.mkdir()
    file.write(log={"file": str(folder / "log.jsonl")})
    gateway = await start_gateway(path=file.path)
    folder.rename(tmp_path / "moved")
    await gateway.replica.reload()
    assert await status(gateway) == 200
    gateway.log_file = tmp_path / "moved" / "log.jsonl"
    assert gateway.lines("request")
    assert gateway.lines("log_not_reopened")


async def test_a_rotated_log_is_opened_anew(start_gateway: StartGateway, file: File, tmp_path: Path) -> None:
    gateway = await start_gateway(path=file.path)
    (tmp_path / "log.jsonl").rename(tmp_path / "log.jsonl.1")
    assert await gateway.replica.reload() == []
    assert await status(gateway) == 200
    assert len(gateway.lines("request")) == 1


# --- what changes and what waits -------------------------------------------------------------------------------------


async def test_what_waits_for_a_restart_is_said(start_gateway: StartGateway, file: File, tmp_path: Path) -> None:
    """And the rest of the same file takes effect."""
    gateway = await start_gateway(path=file.path)
    file.write(
        listen={**file.tree["listen"], "port": free_port(), "keep_alive": "10s"},
        log={"file": str(tmp_path / "other.jsonl")},
        bounds={"body": 10},
    )
    assert await gateway.replica.reload() == []
    assert await status(gateway) == 413
    (line,) = gateway.lines("restart_needed")
    assert line["level"] == "warning"
    assert sorted(line["for_changes_in"]) == ["listen.keep_alive", "listen.port", "log.file"]


async def test_limits_and_time_outs_take_effect(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect, file: File
) -> None:
    """For connections that exist, too: what is not said to wait for a restart does not."""
    gateway = await start_gateway(path=file.path)
    kept = await connect(gateway.url)
    kept.request("GET", "/health/live")
    assert (await kept.response()).status == 200
    file.write(
        bounds={"header_count": 5, "header_bytes": 500, "connections": 2, "body": 200},
        timeouts={"headers": 1, "body": 1, "first_byte": 7},
        stream={"heartbeat_after": 3},
    )
    assert await gateway.replica.reload() == []
    kept.request("GET", "/health/live", [(f"x-{number}", "1") for number in range(5)])
    assert (await kept.response()).status == 431
    assert await status(gateway, user="x" * 200) == 413
    slow = await connect(gateway.url)
    await slow.send_pieces([b"GET / HTTP/1.1\r\n"])
    gateway.advance(1)
    assert (await slow.response()).status == 408
    late = await connect(gateway.url)
    await late.send_pieces([request_bytes("POST", CHAT, AUTH, b"{}")[:-1]])
    gateway.advance(1)
    assert (await late.response()).status == 408
    upstream.queue(STREAM.do(Gate(), 0), path=CHAT)
    stream = await connect(gateway.url)
    stream.post(CHAT, chat(stream=True), AUTH)
    await upstream.saw("gate")
    gateway.advance(3)
    await stream.head()
    assert await stream.event() == b": keep-alive\n\n"
    gateway.advance(4)
    assert b'"engine_timeout"' in b"".join(await stream.events())
    for client in (slow, late, stream, kept):
        await client.close()
    await until(lambda: not gateway.replica.listeners[0].state.connections, "a connection is left")
    crowd = [await connect(gateway.url) for _ in range(3)]
    assert (await crowd[2].response()).status == 503


async def test_the_logs_form_and_level_take_effect(start_gateway: StartGateway, file: File, tmp_path: Path) -> None:
    gateway = await start_gateway(path=file.path)
    file.write(log={**file.tree["log"], "level": "warning"})
    assert await gateway.replica.reload() == []
    assert await status(gateway) == 200
    assert gateway.lines("request") == []
    file.write(log={**file.tree["log"], "level": "info", "format": "console"})
    assert await gateway.replica.reload() == []
    assert await status(gateway) == 200
    gateway.replica.log.flush()
    assert " info    request  " in (tmp_path / "log.jsonl").read_text().splitlines()[-1]


async def test_labels_bound_and_proxies_take_effect(start_gateway: StartGateway, file: File) -> None:
    keys = [{"name": name, "key": f"fb-{name}"} for name in ("a", "b", "c")]
    file.write(keys=keys)
    gateway = await start_gateway(path=file.path)
    file.write(trusted_proxies=["127.0.0.1"], metrics={"max_label_values": 2})
    assert await gateway.replica.reload() == []
    await gateway.ask(chat(), headers=[("authorization", "Bearer fb-a"), ("x-forwarded-for", "203.0.113.7")])
    assert gateway.lines("request")[0]["client"] == "203.0.113.7"
    for name in ("b", "c"):
        assert await status(gateway, f"fb-{name}") == 200
    text = gateway.replica.metrics.render().decode()
    assert 'tenant="other"' in text
    assert 'tenant="c"' not in text


async def test_a_changed_file_is_noticed(
    start_gateway: StartGateway, file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a signal, with the tenth turn of its housekeeping: within a second or so."""
    assert HOUSEKEEPING <= 0.1
    monkeypatch.setattr("gateway.app.HOUSEKEEPING", 0.005)
    gateway = await start_gateway(path=file.path)
    file.write(keys=[{"name": "bob", "key": "fb-bob"}])
    await gateway.line("reloaded")
    assert await status(gateway, "fb-bob") == 200


async def test_an_unchanged_file_is_left_alone(start_gateway: StartGateway, file: File, tmp_path: Path) -> None:
    """A reload of the same file changes nothing and says so."""
    gateway = await start_gateway(path=file.path)
    pool = list(gateway.replica.pool.endpoints)
    os.utime(file.path)
    assert await gateway.replica.reload() == []
    assert gateway.replica.pool.endpoints == pool
    assert gateway.lines("reloaded")[0]["changed"] == []
    assert gateway.lines("restart_needed") == []
