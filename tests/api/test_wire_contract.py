"""What strict clients depend on: one error envelope, the status table, ids and headers, on both faces."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import SecretStr

from gateway.api.routes import RELAYED
from gateway.settings import Bounds, KeySettings, Stream
from tests.conftest import Connect
from tests.support.client import Response
from tests.support.gateway import AUTH, CHAT, MODEL, Gateway, StartGateway, chat, relayed, serving
from tests.support.journal import Journal
from tests.support.recordings import ENGINES, Recording, all_recordings, load
from tests.support.script import DONE, Answer, Gate, Script, event_stream, json_answer, nothing, play
from tests.support.script import Do as Fault
from tests.support.table import each
from tests.support.upstream import ScriptedUpstream

# What SGLang says to whoever loads adapters is no answer to a client.
FAILED = [r for r in all_recordings() if r.status != 200 and not r.path.endswith("load_lora_adapter")]
ENGINE_OWN_KEY = (502, "server_error", "engine_failed", None)
OVERLOADED = (503, "service_unavailable_error", "server_is_overloaded", None)
NOT_OFFERED = (400, "invalid_request_error", "unsupported_operation", None)
TOO_LONG = "context_length_exceeded"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the client must see of an engine's error: status, type, code, param, and the engine's message or not."""

    status: int
    type: str
    code: str | None
    param: str | None


def wanted(recording: Recording) -> Wanted:
    """Return what the wire contract says of a recorded error, by the status and shape the engine gave it."""
    body = recording.json()
    if recording.status in (401, 403):
        return Wanted(*ENGINE_OWN_KEY)
    if "detail" in body:
        return Wanted(*NOT_OFFERED)
    # 404 for a name the gateway resolved, a full queue, an engine that shuts down: none of them is the client's fault.
    if recording.status in (404, 503) or "after shutdown" in str(body):
        return Wanted(*OVERLOADED)
    inner = body["error"] if isinstance(body.get("error"), dict) else body
    is_long = any(name in recording.name for name in ("too_long", "toolong", "max_tokens_too_big", "err_maxtokens"))
    return Wanted(400, "invalid_request_error", TOO_LONG if is_long else None, inner.get("param"))


def words_of(recording: Recording) -> str:
    """Return what the client should read of the engine's message: all of it up to where a path of the server begins."""
    body = recording.json()
    inner = body["error"] if isinstance(body.get("error"), dict) else body
    words: str = inner["message"]
    if 'File "' in words:
        return words.partition("\n\n  File")[0]
    if "/project/cpp/" in words:
        before, _, rest = words.partition("/project/cpp/")
        return f"{before}[path]:{rest.partition(':')[2]}"
    return words


def assert_envelope(answer: Response) -> dict[str, Any]:
    """Check the form of an OpenAI error answer and return the error."""
    assert answer.header("content-type") == "application/json"
    body = answer.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert all(error[name] is None or isinstance(error[name], str) for name in ("param", "code"))
    assert answer.header_values("x-request-id")[0].startswith("req_")
    assert len(answer.header_values("x-request-id")) == 1
    return error


@pytest.mark.parametrize("engine", ENGINES)
async def test_an_engines_error_of_any_shape_is_told_in_one_envelope(
    gateway: Gateway, upstream: ScriptedUpstream, engine: str
) -> None:
    """Every error that was recorded of three engines, whatever path it was recorded on."""
    failed = [recording for recording in FAILED if recording.engine == engine]
    assert len(failed) > 10
    for index, recording in enumerate(failed):
        upstream.queue(play(recording), path=CHAT)
        answer = await gateway.ask(chat())
        assert_told(recording, answer)
        line = await gateway.line(index=index)
        outcome = {400: "refused", 502: "engine_failed", 503: "busy"}[answer.status]
        if recording.status == 404 and answer.status == 503:
            outcome = "no_engine"
        logged = (line["status"], line["outcome"], line["request_id"])
        assert logged == (answer.status, outcome, answer.header("x-request-id")), str(recording)
    await gateway.idle()


def assert_told(recording: Recording, answer: Response) -> None:
    """Check that an engine's error reached the client as the wire contract says."""
    error = assert_envelope(answer)
    told = Wanted(answer.status, error["type"], error["code"], error["param"])
    assert told == wanted(recording), str(recording)
    assert answer.header("retry-after") == ("1" if answer.status == 503 else None), str(recording)
    for secret in ("/lab/", "/project/", "site-packages", 'File "'):
        assert secret not in error["message"], str(recording)
    if answer.status == 400 and "detail" not in recording.json():
        assert error["message"] == words_of(recording), str(recording)


REDACTED = [
    ("no /opt/models/qwen/config.json here", "no [path] here"),
    ("cannot open '/home/ai user/x'", "cannot open '[path] user/x'"),
    ('failed\n\n  File "/opt/engine/x.py", line 1, in f\n    secret()', "failed"),
    ("see https://host/docs/a for more", "see https://host/docs/a for more"),
    ("POST /v1/chat/completions: bad", "POST /v1/chat/completions: bad"),
    ("a/b, 1/2 and and/or are no paths", "a/b, 1/2 and and/or are no paths"),
    ("x" * 5000, "x" * 1999 + "…"),
    # A client's text that an engine repeats must not hold the event loop: this took a minute once.
    ("/" + "\n" * 4000, "/" + "\n" * 1998 + "…"),
]


async def test_paths_of_the_server_are_taken_out(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """File paths go, URLs and API paths stay, and no message is longer than a person reads."""
    for text, told in REDACTED:
        upstream.queue(json_answer(json.dumps({"error": {"message": text}}).encode(), status=400), path=CHAT)
        assert (await gateway.ask(chat())).json()["error"]["message"] == told


NO_ANSWERS = [
    (500, b""),
    (500, b"Internal Server Error"),
    (500, b'{"error": null}'),
    (500, b'["list"]'),
    (500, b"\xff\xfe\x00"),
    (502, b"<html>bad gateway</html>"),
    (418, b"{"),
    (204, b""),
    (302, b""),
    (200, b"not json"),
    (200, b'["a list"]'),
    (200, b""),
]


async def test_an_answer_that_is_none_is_an_error(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """Whatever an engine sends instead of an answer, the client gets the envelope and never a 2xx or 3xx."""
    for status, body in NO_ANSWERS:
        upstream.queue(Answer(status, [("content-type", "application/json")], [body]).script(), path=CHAT)
        answer = await gateway.ask(chat())
        error = assert_envelope(answer)
        wanted_answer = (400, None) if status == 418 else (502, "engine_failed")
        assert (answer.status, error["code"]) == wanted_answer, (status, body)
        await gateway.idle()


async def test_the_anthropic_path_has_its_own_envelope(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """``/v1/messages``: type, error and request_id, and 529 where OpenAI's paths say 503."""
    upstream.queue(
        play(load("vllm", "s2_over_4")),
        play(load("vllm", "messages_err")),
        play(load("vllm", "auth_wrong")),
        play(load("vllm", "err_temperature_neg")),
        play(load("lmdeploy", "messages_anthropic")),
        path="/v1/messages",
    )
    seen = []
    for _ in range(5):
        answer = await gateway.ask(chat(max_tokens=4), "/v1/messages")
        body = answer.json()
        assert list(body) == ["type", "error", "request_id"]
        assert (body["type"], body["request_id"]) == ("error", answer.header("x-request-id"))
        assert list(body["error"]) == ["type", "message"]
        seen.append((answer.status, body["error"]["type"]))
    assert seen == [
        (529, "overloaded_error"),
        (529, "overloaded_error"),
        (502, "api_error"),
        (400, "invalid_request_error"),
        (400, "invalid_request_error"),
    ]


async def test_refusals_on_the_anthropic_path_speak_its_dialect(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    """Each kind of refusal before an engine is asked."""
    limited = KeySettings(name="limited", key=SecretStr("fb-limited"), models=("other",))
    gateway = await start_gateway(upstream, keys=(limited,), bounds=Bounds(body=1000))
    key = [("x-api-key", "fb-limited")]
    asked: list[tuple[Any, list[tuple[str, str]], int, str]] = [
        (chat(), [], 401, "authentication_error"),
        (chat(), key, 403, "permission_error"),
        (chat(model="ghost"), key, 404, "not_found_error"),
        (chat(user="x" * 1000), key, 413, "request_too_large"),
        (b"{", key, 400, "invalid_request_error"),
        (chat(chat_template="x"), key, 400, "invalid_request_error"),
    ]
    for body, headers, status, kind in asked:
        answer = await gateway.ask(body, "/v1/messages", headers)
        assert (answer.status, answer.json()["error"]["type"]) == (status, kind)
        assert answer.json()["request_id"] == answer.header("x-request-id")
    assert relayed(upstream) == []


async def test_a_path_the_engine_lacks_is_a_400(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """An engine's web framework says 404 for a path it was not started for: the request is at fault, not the name."""
    for path in RELAYED:
        upstream.always(play(load("vllm", "err_embeddings")), path=path)
        answer = await gateway.ask(chat(input="x", prompt="x"), path)
        assert answer.status == 400
        error = answer.json()["error"]
        assert error["message"] == f"The engine that serves '{MODEL}' does not offer {path}."
        assert error.get("code") == (None if path == "/v1/messages" else "unsupported_operation")


async def test_an_unknown_model_is_a_404_before_any_engine_sees_it(
    gateway: Gateway, upstream: ScriptedUpstream
) -> None:
    """Also the engine's own name of the model is unknown: only published names count."""
    for model in ("ghost", "smollm2", MODEL.upper(), MODEL + " ", "*"):
        answer = await gateway.ask(chat(model=model))
        error = assert_envelope(answer)
        assert (answer.status, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert model in error["message"]
    assert relayed(upstream) == []


async def test_a_key_without_the_right_gets_a_403(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    """No engine sees the request."""
    gateway = await start_gateway(
        upstream, keys=(KeySettings(name="limited", key=SecretStr("fb-limited"), models=("other",)),)
    )
    answer = await gateway.ask(chat(), headers=[("authorization", "Bearer fb-limited")])
    error = assert_envelope(answer)
    assert (answer.status, error["type"], error["param"]) == (403, "permission_error", "model")
    assert relayed(upstream) == []


async def test_no_healthy_engine_is_a_503_that_says_when_to_try_again(
    gateway: Gateway, upstream: ScriptedUpstream
) -> None:
    """The engine's port is closed: the attempt fails, and so does the next request without one."""
    upstream.refuse()
    for connection in upstream.connections:
        connection.finish(Fault.CLOSE)
    for _ in range(2):
        answer = await gateway.ask(chat())
        error = assert_envelope(answer)
        assert (answer.status, error["code"]) == (503, "server_is_overloaded")
        assert (answer.header("retry-after"), answer.header("retry-after-ms")) == ("1", "1000")
    assert [line["outcome"] for line in gateway.lines("request")] == ["no_engine", "no_engine"]


@pytest.mark.parametrize("ending", [Fault.CLOSE, Fault.RESET])
async def test_an_engine_that_dies_before_its_answer_is_a_502(
    gateway: Gateway, upstream: ScriptedUpstream, ending: Fault
) -> None:
    """Streamed or not: nothing has reached the client, so it gets JSON."""
    for stream in (False, True):
        upstream.queue(nothing().do(ending), path=CHAT)
        answer = await gateway.ask(chat(stream=stream))
        assert (answer.status, assert_envelope(answer)["code"]) == (502, "engine_failed")
    await gateway.idle()


@pytest.mark.parametrize(
    ("path", "ends"),
    [
        (CHAT, b'data: {"error":{"message":"The engine closed the connection before its answer was whole.",'),
        (
            "/v1/completions",
            b'data: {"error":{"message":"The engine closed the connection before its answer was whole.",',
        ),
        ("/v1/responses", b'event: error\ndata: {"type":"error","code":"engine_failed","message":"The engine closed'),
        (
            "/v1/messages",
            b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"The engine closed',
        ),
    ],
)
async def test_a_stream_that_breaks_ends_with_an_error_event(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect, path: str, ends: bytes
) -> None:
    """A clean end would be silent success in the SDKs, so the last event is an error, and then the end."""
    name = {CHAT: "chat_stream", "/v1/completions": "comp_stream_usage"}.get(path) or path[4:] + "_stream"
    script = play(load("vllm", name), pieces=load("vllm", name).events())
    upstream.always(script.do(Fault.CLOSE, script.inside_frame(3)), path=path)
    client = await connect(gateway.url)
    client.post(path, chat(stream=True, prompt="x", input="x"), AUTH)
    head = await client.head()
    events = await client.events()
    assert await client.ended() == "close"
    assert len(events) == 4
    assert events[-1].startswith(ends)
    assert events[-1].endswith(b"}\n\n")
    sequence = json.loads(events[-1].partition(b"data: ")[2])
    if path == "/v1/responses":
        assert sequence["sequence_number"] == 3
    if path == "/v1/messages":
        assert sequence["request_id"] == head.header("x-request-id")
    line = await gateway.line()
    assert (line["outcome"], line["status"], line["events"]) == ("engine_failed", 200, 3)


async def test_a_stream_without_its_end_mark_ends_with_an_error_event(
    gateway: Gateway, upstream: ScriptedUpstream
) -> None:
    """The engine's HTTP answer is whole, the stream is not, and it is none that could go on or be ended for it."""
    events = load("vllm", "chat_stream").events()[:-1]
    upstream.always(event_stream(events), path=CHAT)
    answer = await gateway.ask(chat(stream=True, seed=1))
    assert answer.complete
    assert json.loads(answer.events()[-1].removeprefix(b"data: "))["error"]["code"] == "engine_failed"
    assert len(answer.events()) == len(events) + 1


async def test_an_engines_error_event_is_told_in_the_envelope(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """In the middle of a stream the engine's own error object is re-wrapped; nothing follows it, not even [DONE]."""
    first = load("vllm", "chat_stream").events()[:2]
    broken = (
        b'data: {"error":{"message":"died in /opt/x/y.py","type":"InternalServerError","param":null,"code":500}}\n\n'
    )
    upstream.always(event_stream([*first, broken, DONE]), path=CHAT)
    answer = await gateway.ask(chat(stream=True))
    assert len(answer.events()) == 3
    assert json.loads(answer.events()[-1].removeprefix(b"data: ")) == {
        "error": {"message": "died in [path]", "type": "server_error", "param": None, "code": "engine_failed"}
    }


async def test_ids_retries_and_lone_events_never_reach_a_client(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """The Python SDK raises on them; only ``data:`` passes on OpenAI's paths."""
    chunk = b'{"id":"c","model":"smollm2","choices":[]}'
    upstream.always(
        event_stream(
            [
                b": engine's own keep-alive\n\n",
                b"retry: 100\n\n",
                b"id: 1\nevent: chunk\ndata: " + chunk + b"\nretry: 5\n\n",
                b"event: ping\n\n",
                b"data:" + chunk + b"\r\n\r\n",
                b"id: 2\n\n",
                b"data: [DONE]\nid: 3\n\n",
            ]
        ),
        path=CHAT,
    )
    answer = await gateway.ask(chat(stream=True))
    renamed = b'data: {"id":"c","model":"public/model","choices":[]}\n\n'
    assert answer.events() == [renamed, renamed, DONE]


async def test_typed_events_keep_their_type(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """On Anthropic's path ``event:`` is part of the dialect; ids and retries are not."""
    upstream.always(
        event_stream(
            [
                b'id: 1\nevent: message_start\ndata: {"type":"message_start","message":{"model":"smollm2"}}\n\n',
                b'event: ping\nretry: 9\ndata: {"type":"ping"}\n\n',
                b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
            ]
        ),
        path="/v1/messages",
    )
    answer = await gateway.ask(chat(stream=True), "/v1/messages")
    assert answer.events() == [
        b'event: message_start\ndata: {"type":"message_start","message":{"model":"public/model"}}\n\n',
        b'event: ping\ndata: {"type":"ping"}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    ]


# --- ids and headers -------------------------------------------------------------------------------------------------


async def test_every_answer_has_an_id_of_its_own(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    """Also what is refused before or instead of being read as a request, and what FastAPI answers."""
    gateway = await start_gateway(upstream, bounds=Bounds(body=1000, header_count=20))
    upstream.always(play(load("vllm", "chat_basic")), path=CHAT)
    many = [(f"x-{index}", "1") for index in range(30)]
    answers = {
        200: await gateway.ask(chat()),
        401: await gateway.ask(chat(), headers=[]),
        404: await gateway.get("/nothing"),
        405: await gateway.get(CHAT),
        413: await gateway.ask(chat(user="x" * 1000)),
        415: await gateway.ask(chat(), headers=[*AUTH, ("content-encoding", "gzip")]),
        431: await gateway.get("/v1/models", many),
        400: await gateway.ask(b"{"),
    }
    for status, answer in answers.items():
        assert answer.status == status
        if status != 200:
            assert_envelope(answer)
    public = [await gateway.get(path, AUTH) for path in ("/v1/models", "/health/live", "/health/ready", "/v1/models/x")]
    admin = [
        await gateway.get(path, admin=True)
        for path in ("/metrics", "/docs", "/openapi.json", "/nothing", "/health/ready")
    ]
    ids = [answer.header("x-request-id") for answer in [*answers.values(), *public, *admin]]
    assert None not in ids
    assert len(set(ids)) == len(ids)


async def test_garbage_gets_an_id_too(gateway: Gateway, connect: Connect) -> None:
    client = await connect(gateway.url)
    client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    answer = await client.response()
    assert answer.status == 400
    assert_envelope(answer)


async def test_the_engine_gets_the_clients_id_and_nothing_of_the_client(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    """The engine's header set is the gateway's own: its key, the request's id, and no header a client sent."""
    gateway = await start_gateway(serving(upstream, api_key=SecretStr("sk-engine")))
    upstream.always(play(load("vllm", "chat_basic")), path=CHAT)
    sent = [
        *AUTH,
        ("x-api-key", "fb-client"),
        ("connection", "keep-alive, x-hop"),
        ("x-hop", "1"),
        ("keep-alive", "timeout=5"),
        ("proxy-authorization", "Basic x"),
        ("te", "trailers"),
        ("cookie", "a=b"),
        ("x-request-id", "mine"),
        ("x-client-request-id", "mine-too"),
        ("x-forwarded-for", "1.2.3.4"),
        ("forwarded", "for=1.2.3.4"),
        ("x-data-parallel-rank", "3"),
        ("accept-encoding", "gzip"),
        ("openai-organization", "org"),
        ("user-agent", "x"),
    ]
    answer = await gateway.ask(chat(), headers=sent)
    request = relayed(upstream)[0]
    request_id = answer.header("x-request-id")
    assert [(name.lower(), value) for name, value in request.headers] == [
        ("host", f"127.0.0.1:{upstream.port}"),
        ("content-type", "application/json"),
        ("accept", "application/json, text/event-stream"),
        ("authorization", "Bearer sk-engine"),
        ("x-request-id", request_id),
        ("content-length", str(len(request.body))),
    ]


async def test_nothing_of_the_engines_headers_reaches_a_client(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """Neither its server software, its cookies nor its own id."""
    leaked = [
        ("server", "uvicorn"),
        ("x-request-id", "engine"),
        ("set-cookie", "a=b"),
        ("x-engine", "7"),
        ("connection", "x"),
    ]
    recording = load("vllm", "chat_basic")
    upstream.always(json_answer(recording.body, headers=leaked), path=CHAT)
    answer = await gateway.ask(chat())
    names = [name.lower() for name, _ in answer.headers]
    assert not {"server", "set-cookie", "x-engine", "connection"} & set(names)
    assert answer.header_values("x-request-id") == [(await gateway.line())["request_id"]]
    assert sorted(names) == sorted(set(names)), "no header stands twice"


@pytest.mark.parametrize("stream", [False, True])
async def test_the_time_an_answer_took_is_told(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect, stream: bool
) -> None:
    """``openai-processing-ms``: from the request's headers to the answer's."""
    gate = Gate()
    upstream.always(play(load("vllm", "chat_stream" if stream else "chat_basic")).do(gate, 0), path=CHAT)
    client = await connect(gateway.url)
    client.post(CHAT, chat(stream=stream), AUTH)
    await upstream.saw("gate")
    gateway.advance(1.25)
    gate.open()
    assert (await client.response()).header("openai-processing-ms") == "1250"


async def test_a_browser_may_read_the_headers(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    upstream.always(play(load("vllm", "chat_basic")), path=CHAT)
    for answer in (await gateway.ask(chat()), await gateway.ask(chat(), headers=[])):
        exposed = (answer.header("access-control-expose-headers") or "").split(", ")
        assert {"x-request-id", "retry-after", "retry-after-ms", "x-should-retry"} <= set(exposed)


@each("value", ["trace-7", "x" * 512, "a b;c=d"])
async def test_a_clients_own_id_is_logged(gateway: Gateway, upstream: ScriptedUpstream, value: str) -> None:
    """ASCII of at most 512 characters; the engine does not get it."""
    upstream.always(play(load("vllm", "chat_basic")), path=CHAT)
    answer = await gateway.ask(chat(), headers=[*AUTH, ("x-client-request-id", value)])
    assert answer.status == 200
    assert (await gateway.line(index=len(relayed(upstream)) - 1))["client_request_id"] == value
    assert value.encode() not in relayed(upstream)[-1].head


@pytest.mark.parametrize("value", ["x" * 513, "ünïcode"])
async def test_a_clients_own_id_that_is_none_is_refused(
    gateway: Gateway, upstream: ScriptedUpstream, value: str
) -> None:
    """OpenAI's rule: ASCII, at most 512 characters, else 400; the log does not carry it."""
    answer = await gateway.ask(chat(), headers=[*AUTH, ("x-client-request-id", value)])
    assert answer.status == 400
    assert "x-client-request-id" in assert_envelope(answer)["message"]
    assert "client_request_id" not in await gateway.line()
    assert relayed(upstream) == []


async def test_an_sdks_retry_can_be_seen(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """``x-stainless-retry-count`` is retry pressure: in the log, and counted."""
    upstream.always(play(load("vllm", "chat_basic")), path=CHAT)
    for value in ("0", "2", "x", "99999999999999999999"):
        assert (await gateway.ask(chat(), headers=[*AUTH, ("x-stainless-retry-count", value)])).status == 200
    assert [line.get("sdk_retry", 0) for line in gateway.lines("request")] == [0, 2, 0, 9999]
    assert b"forebay_client_retries_total 2.0" in (await gateway.get("/metrics", admin=True)).body


# --- where a retry ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recording", "status"),
    [
        ("s2_over_4", 200),
        ("auth_wrong", 200),
        ("lora_unknown_model", 200),
        ("sigterm_drain25_new_request", 200),
        ("err_temperature_neg", 400),
    ],
)
async def test_another_engine_is_asked_when_it_may_know_better(
    start_gateway: StartGateway, upstream: ScriptedUpstream, journal: Journal, recording: str, status: int
) -> None:
    """What one engine refuses for its own reasons another may serve; a client's mistake is one everywhere."""
    async with ScriptedUpstream(journal=journal, name="other") as other:
        gateway = await start_gateway(upstream, other)
        # Whichever is asked first refuses, the second one answers.
        refused: list[str] = []

        def answer(name: str) -> Any:
            def respond(_: Any) -> Script:
                refused.append(name)
                return play(load("vllm", recording if len(refused) == 1 else "chat_basic"))

            return respond

        upstream.always(answer("upstream"), path=CHAT)
        other.always(answer("other"), path=CHAT)
        got = await gateway.ask(chat())
        assert got.status == status
        assert len(set(refused)) == len(refused) == (2 if status == 200 else 1)
        assert (await gateway.line())["attempts"] == len(refused)


async def test_retries_can_be_switched_off(
    start_gateway: StartGateway, upstream: ScriptedUpstream, journal: Journal
) -> None:
    async with ScriptedUpstream(journal=journal, name="other") as other:
        gateway = await start_gateway(upstream, other, stream=Stream(retries=0))
        for one in (upstream, other):
            one.always(play(load("vllm", "s2_over_4")), path=CHAT)
        assert (await gateway.ask(chat())).status == 503
        assert len(relayed(upstream)) + len(relayed(other)) == 1
