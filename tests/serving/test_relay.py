"""The relay on both faces: the same bytes wherever they are cut, connections kept, slow readers waited for."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gateway.settings import Bounds
from tests.conftest import Connect
from tests.support.client import RawClient, Response
from tests.support.gateway import (
    AUTH,
    CHAT,
    ENGINE_MODEL,
    MODEL,
    Gateway,
    StartGateway,
    chat,
    post_bytes,
    relayed,
    serving,
    until,
)
from tests.support.recordings import Recording, all_recordings, load
from tests.support.script import DONE, Answer, Gate, Script, event_stream, json_answer, play
from tests.support.splits import Plan, byte_by_byte, cut_at, pieces, random_plans
from tests.support.upstream import ScriptedUpstream

STREAMS = [recording for recording in all_recordings(streams=True) if not recording.name.startswith("q_full_")]
ONE_OF_EACH = [
    ("vllm", "chat_stream_usage"),
    ("vllm", "comp_stream_usage"),
    ("vllm", "messages_stream"),
    ("vllm", "responses_stream"),
    ("sglang", "chat_stream_usage"),
    ("lmdeploy", "chat_stream_usage"),
]


@pytest.fixture
async def for_recordings(start_gateway: StartGateway, upstream: ScriptedUpstream) -> Gateway:
    """A gateway that serves the model of every recording, as ``public/`` and the engine's own name."""
    own = {recording.request_json()["model"] for recording in STREAMS}
    return await start_gateway(serving(upstream, models={f"public/{name}": name for name in own}))


async def assert_the_same(
    upstream: ScriptedUpstream, client: RawClient, recording: Recording, script: Script, plans: list[Plan]
) -> None:
    """Play a script under each plan; the client gets whole events, and the same as from one single read."""
    request = chat(stream=True, prompt="x", input="x", model=f"public/{recording.request_json()['model']}")

    async def ask(played: Script) -> Response:
        upstream.queue(played, path=recording.path)
        client.post(recording.path, request, AUTH)
        return await client.response()

    whole = await ask(script)
    assert (whole.status, whole.complete) == (200, True), recording
    for plan in plans:
        answer = await ask(script.cut(plan))
        assert answer.body == whole.body, (str(recording), plan)
        assert all(chunk.endswith(b"\n\n") for chunk in answer.chunks), (str(recording), plan)


async def test_streams_cut_at_random(for_recordings: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    """Cuts fall into heads, size lines, events and needles alike; all streams share one connection on either side."""
    client = await connect(for_recordings.url)
    for recording in STREAMS:
        script = play(recording)
        plans = list(random_plans(script.data, seed=4, count=3))
        await assert_the_same(upstream, client, recording, script, plans)
    # One connection, or a second one where the client asked again before the engine's terminating chunk was there.
    assert for_recordings.replica.pool.endpoints[0].connections.accepted <= 2


@pytest.mark.parametrize(("engine", "name"), ONE_OF_EACH)
async def test_streams_byte_by_byte(
    for_recordings: Gateway, upstream: ScriptedUpstream, connect: Connect, engine: str, name: str
) -> None:
    """The first and the last of its bytes: the events between are alike."""
    recording = load(engine, name)
    script = play(recording)
    client = await connect(for_recordings.url)
    plan = tuple(cut for cut in byte_by_byte(script.data) if not 400 < cut < len(script.data) - 400)
    await assert_the_same(upstream, client, recording, script, [plan])


async def test_a_stream_cut_at_every_byte(
    for_recordings: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    recording = load("vllm", "chat_stream_length")
    script = play(recording)
    client = await connect(for_recordings.url)
    await assert_the_same(upstream, client, recording, script, list(cut_at(range(1, len(script.data)))))


async def test_trailers_end_a_stream_like_any_other(
    for_recordings: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """A body whose text ends like a terminating chunk does not end it either."""
    first = b'data: {"model":"smollm2","choices":[{"delta":{"content":"0\\r\\n\\r\\n"}}]}\n\n'
    client = await connect(for_recordings.url)
    for trailers in ([], [("x-checksum", "0")], [("x-a", "0\r\nx-b: 0")]):
        script = event_stream([first, b": 0\r\n\r\n", DONE], trailers=trailers)
        plans = list(random_plans(script.data, seed=5, count=15))
        await assert_the_same(upstream, client, load("vllm", "chat_stream"), script, plans)


async def test_a_request_cut_at_every_byte(gateway: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    """The engine gets the same request, and each is answered, on one connection."""
    upstream.always(json_answer(b'{"model":"smollm2"}'), path=CHAT)
    request = post_bytes(chat())
    client = await connect(gateway.url)
    plans = [byte_by_byte(request), *cut_at(range(1, len(request)), apart=20)]
    for plan in plans:
        await client.send_pieces(pieces(request, plan))
        assert (await client.response()).json() == {"model": MODEL}, plan
    assert {seen.body for seen in relayed(upstream)} == {relayed(upstream)[0].body}
    assert len(relayed(upstream)) == len(plans)


async def test_chunked_requests_are_taken(gateway: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    """A client need not know the length; the engine is always told it."""
    upstream.always(json_answer(b"{}"), path=CHAT)
    body = post_bytes(chat()).partition(b"\r\n\r\n")[2]
    client = await connect(gateway.url)
    for plan in [(), (5,), byte_by_byte(body)]:
        client.request("POST", CHAT, [("content-type", "application/json"), *AUTH], pieces(body, plan))
        assert (await client.response()).status == 200
    assert {seen.header("content-length") for seen in relayed(upstream)} == {str(len(relayed(upstream)[0].body))}
    assert {seen.header("transfer-encoding") for seen in relayed(upstream)} == {None}


async def test_engines_connections_are_kept(gateway: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    """Whatever the answers were (whole, streamed, refused), one client at a time needs one connection."""
    answers = ["chat_basic", "chat_stream", "err_badjson", "chat_stream_usage", "lora_unknown_model", "chat_n2"]
    upstream.queue(*[play(load("vllm", name)) for name in answers] * 5, path=CHAT)
    client = await connect(gateway.url)
    for name in answers * 5:
        client.post(CHAT, chat(stream="stream" in name), AUTH)
        await client.response()
    assert gateway.replica.pool.endpoints[0].connections.accepted == 1
    assert len({seen.connection for seen in relayed(upstream)}) == 1


async def test_as_many_connections_as_requests_at_once(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    clients = [await connect(gateway.url) for _ in range(8)]
    for number in range(1, 4):
        gate = Gate()
        upstream.always(play(load("vllm", "chat_stream")).do(gate, 0), path=CHAT)
        for client in clients:
            client.post(CHAT, chat(stream=True), AUTH)
        await upstream.saw("gate", times=8 * number)
        gate.open()
        for client in clients:
            assert (await client.response()).complete
    connections = gateway.replica.pool.endpoints[0].connections
    assert (connections.accepted, connections.open) == (8, 8)


async def test_the_bound_on_connections_holds(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """What is more than the engine may be sent waits, and is served once there is room."""
    gateway = await start_gateway(serving(upstream, max_connections=2))
    gate = Gate()
    upstream.always(json_answer(b"{}").do(gate, 0), path=CHAT)
    clients = [await connect(gateway.url) for _ in range(3)]
    for client in clients[:2]:
        client.post(CHAT, chat(), AUTH)
    await until(lambda: len(relayed(upstream)) == 2, "the engine was not asked")
    clients[2].post(CHAT, chat(), AUTH)
    await until(lambda: gateway.replica.admission.queue.count == 1, "nobody waits")
    assert len(relayed(upstream)) == 2
    gate.open()
    for client in clients:
        assert (await client.response()).status == 200
    assert gateway.replica.pool.endpoints[0].connections.accepted == 2


async def test_a_slow_reader_gets_everything_and_makes_the_engine_wait(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """8 MB that nobody takes, more than the kernel takes from the engine meanwhile, are not held here: the engine's own
    writes stop."""
    gateway.hold_little()
    pad = b'data: {"pad":"%b"}\n\n' % (b"x" * 60_000)
    events = [b'data: {"model":"smollm2"}\n\n', *[pad] * 135, DONE]
    upstream.queue(event_stream(events), path=CHAT)
    client = await connect(gateway.url, receive_buffer=4096)
    client.post(CHAT, chat(stream=True), AUTH)
    await client.head()
    client.stop_reading()
    await gateway.paused()
    for _ in range(200):
        await asyncio.sleep(0)
    assert upstream.journal.find("unblocked") == []
    client.read_on()
    assert await client.events() == [events[0].replace(b"smollm2", MODEL.encode()), *events[1:]]
    assert (await gateway.line())["outcome"] == "ok"


async def test_a_slow_reader_does_not_slow_others(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    gateway.hold_little()
    pad = b'data: {"pad":"%b"}\n\n' % (b"x" * 60_000)
    upstream.queue(event_stream([*[pad] * 50, DONE]), path=CHAT)
    slow = await connect(gateway.url, receive_buffer=4096, name="slow")
    slow.post(CHAT, chat(stream=True), AUTH)
    await slow.head()
    slow.stop_reading()
    await gateway.paused()
    upstream.always(play(load("vllm", "chat_stream")), path=CHAT)
    for _ in range(5):
        assert (await gateway.ask(chat(stream=True))).complete
    slow.read_on()
    assert (await slow.response()).complete


async def test_large_answers_and_requests_pass(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """5 MB each way, read off the event loop on the way in."""
    answer: dict[str, Any] = {"model": ENGINE_MODEL, "text": "é" * 2_500_000}
    upstream.queue(json_answer(json.dumps(answer, ensure_ascii=False).encode()), path=CHAT)
    got = await gateway.ask(json.dumps(chat(user="ü" * 2_500_000), ensure_ascii=False).encode())
    assert got.json() == {**answer, "model": MODEL}
    assert relayed(upstream)[0].json()["user"] == "ü" * 2_500_000


async def test_an_answer_larger_than_allowed_is_a_502(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    """What is read before the status is known is bounded."""
    gateway = await start_gateway(upstream, bounds=Bounds(response=1000))
    upstream.queue(json_answer(b'"%b"' % (b"x" * 2000)), Answer(500, pieces=[b"x" * 2_000_000]).script(), path=CHAT)
    for bound in (1000, 1 << 20):
        answer = await gateway.ask(chat())
        assert answer.status == 502
        assert f"longer than {bound} bytes" in answer.json()["error"]["message"]
    assert gateway.replica.pool.endpoints[0].connections.open == 0
