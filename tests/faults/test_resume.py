"""A stream outlives its engine: another one goes on with it, and the client sees one stream.

The engines here say the same words to whoever asks, and go on from whatever they are given of them.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

import pytest
from pydantic import SecretStr

from gateway.limits import LimitSet
from gateway.report import explain_in_text
from gateway.serving.explain import explanation, row_of
from gateway.settings import KeySettings, Stream, StreamResume
from gateway.values import MIB
from tests.conftest import Connect
from tests.support.client import Response
from tests.support.gateway import AUTH, CHAT, KEY, MODEL, Gateway, StartGateway, chat, relayed, serving, until
from tests.support.journal import Journal
from tests.support.script import DONE, Do, Gate, Script, event_stream, json_answer
from tests.support.upstream import ScriptedUpstream, SeenRequest

COMPLETIONS = "/v1/completions"
WORDS = ["Once", " upon", " a", ' "time"', "\n there", " wäs", " a", " gateway", "."]
PROMPT_TOKENS = 7
HEARTBEAT = b": keep-alive\n\n"


class Speaker:
    """An engine that tells WORDS, one a chunk, from where it is asked to go on."""

    def __init__(self, created: int, *, sglang: bool = False) -> None:
        self.created = created
        self.sglang = sglang
        self.answers = count(1)

    def events(self, request: SeenRequest) -> list[bytes]:
        """Return the events of an answer, its end mark last."""
        body = request.json()
        begun, chatty = _begun(body), "messages" in body
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or (100 if chatty else 16)
        number = next(self.answers)
        start = {"id": f"cmpl-{self.created}-{number}", "object": "chunk", "created": self.created}
        start["model"] = body["model"]
        words = [*WORDS[begun : begun + limit]]
        choices: list[dict[str, Any]] = [{"delta": {"role": "assistant", "content": ""}}] if chatty else []
        choices += [{"delta": {"content": word}} if chatty else {"text": word} for word in words]
        cut = len(words) < len(WORDS) - begun
        tokens = len(words) + (not cut)
        if not cut or self.sglang:
            choices.append({"delta": {}} if chatty else {"text": ""})
        for at, choice in enumerate(choices):
            ends = at == len(choices) - 1
            choice |= {"index": 0, "logprobs": None, "finish_reason": ("length" if cut else "stop") if ends else None}
        events = [{**start, "choices": [choice]} for choice in choices]
        if (body.get("stream_options") or {}).get("include_usage"):
            prompt = PROMPT_TOKENS + begun
            usage = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
            events.append({**start, "choices": [], "usage": usage})
        return [b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n" for event in events] + [DONE]

    def __call__(self, request: SeenRequest) -> Script:
        return event_stream(self.events(request))

    def stands(self, gate: Gate, place: int, then: Do | None = None) -> Any:
        """Return a responder that stands at a gate after so many events, and perhaps goes no further."""

        def respond(request: SeenRequest) -> Script:
            script = self(request)
            at = script.after_frame(place - 1)
            script = script.do(gate, at)
            return script if then is None else script.do(then, at)

        return respond

    def dies(self, place: int, *, inside: bool = False, ending: Do = Do.RESET) -> Any:
        """Return a responder that breaks off after so many events, or inside the one after them."""

        def respond(request: SeenRequest) -> Script:
            script = self(request)
            at = script.inside_frame(place) if inside else script.after_frame(place - 1)
            return script.do(Do.UNTIL_READ, at).do(ending, at)

        return respond


def _begun(body: dict[str, Any]) -> int:
    """Return how many of the words a request has already; it must be told to go on with them."""
    if "messages" in body:
        last = body["messages"][-1]
        if last["role"] != "assistant":
            assert "continue_final_message" not in body
            return 0
        assert body["continue_final_message"] is True
        assert body["add_generation_prompt"] is False
        text = last["content"]
    else:
        text = body["prompt"].removeprefix("Tell: ")
    return ["".join(WORDS[:many]) for many in range(len(WORDS) + 1)].index(text)


class Seen:
    """What a client made of a stream."""

    def __init__(self, answer: Response) -> None:
        assert answer.status == 200
        self.events = answer.events()
        assert self.events[-1] == DONE, self.events[-1]
        chunks = [json.loads(event.removeprefix(b"data: ")) for event in self.events[:-1]]
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        self.text = [text for one in choices if (text := one.get("text") or one.get("delta", {}).get("content"))]
        self.roles = sum("role" in one.get("delta", {}) for one in choices)
        self.finishes = [one["finish_reason"] for one in choices if one["finish_reason"]]
        self.named = {(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}
        self.usage = [chunk["usage"] for chunk in chunks if "usage" in chunk]


Engines = tuple[Gateway, ScriptedUpstream, ScriptedUpstream, ScriptedUpstream]
FIRST, SECOND, THIRD = Speaker(1), Speaker(2), Speaker(3)


@pytest.fixture
async def three(start_gateway: StartGateway, journal: Journal, upstream: ScriptedUpstream) -> AsyncIterator[Engines]:
    """A gateway in front of three engines; unless they are told otherwise they answer well."""
    async with (
        ScriptedUpstream(journal=journal, name="second") as second,
        ScriptedUpstream(journal=journal, name="third") as third,
    ):
        for engine, speaker in ((upstream, FIRST), (second, SECOND), (third, THIRD)):
            for path in (CHAT, COMPLETIONS):
                engine.always(speaker, path=path)
            serving(engine)
        yield await start_gateway(upstream, second, third), upstream, second, third


def breaks_next(engines: Engines, responder: Any, path: str = CHAT) -> None:
    """Whichever engine has the next turn breaks off; the others have to go on."""
    for engine in engines[1:]:
        engine.plan.queued.clear()
    first_asked = iter([responder])

    def once(request: SeenRequest) -> Any:
        return next(first_asked, FIRST)(request)

    for engine in engines[1:]:
        engine.queue(once, path=path)


def metric(text: str, name: str, **labels: str) -> float:
    wanted = ",".join(f'{label}="{value}"' for label, value in labels.items())
    found = [line for line in text.splitlines() if line.startswith(f"{name}{{{wanted}}} ")]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


async def scraped(gateway: Gateway) -> str:
    return (await gateway.get("/metrics", admin=True)).body.decode()


BODIES = {
    "chat": (CHAT, chat(stream=True)),
    "chat with usage": (CHAT, chat(stream=True, stream_options={"include_usage": True}, max_tokens=50)),
    "chat cut short": (CHAT, chat(stream=True, stream_options={"include_usage": True}, max_completion_tokens=5)),
    "completion": (COMPLETIONS, {"model": MODEL, "prompt": "Tell: ", "stream": True}),
}


@pytest.mark.parametrize("asked", BODIES)
async def test_wherever_it_breaks_off_nothing_is_missing(three: Engines, asked: str) -> None:
    """At the end of every event and inside every one: the same text, one id, one role, one end, one sum of tokens."""
    gateway, *_ = three
    path, body = BODIES[asked]
    whole = Seen(await gateway.ask(body, path))
    for place in range(1, len(whole.events)):
        for inside in (False, True):
            breaks_next(three, FIRST.dies(place, inside=inside), path)
            seen = Seen(await gateway.ask(body, path))
            assert (seen.text, seen.roles, seen.finishes) == (whole.text, whole.roles, whole.finishes), (place, inside)
            (named,) = seen.named
            assert named[1:] == (1, MODEL), (place, inside)
            if seen.usage:
                assert seen.usage == whole.usage, (place, inside)
            else:
                # All was said but that, and nobody knows it any more.
                assert not whole.usage or place >= len(whole.events) - 2
    await gateway.idle()
    lines = gateway.lines("request")[1:]
    assert {line["outcome"] for line in lines} == {"ok"}
    assert {line.get("resumed", 0) for line in lines} == {0, 1}
    for line in lines:
        assert line["attempts"] == 1 + line.get("resumed", 0)
    # Where only the role had been said, all was said anew.
    exact = [line for line in lines if line.get("resumed") and line["settlement"] != "counted"]
    assert len(exact) <= 2


@pytest.mark.parametrize("ending", [Do.CLOSE, Do.RESET])
async def test_an_engine_that_speaks_otherwise_goes_on_too(three: Engines, ending: Do) -> None:
    """SGLang tells the reason for the end in a chunk of its own: where only that is missing, it is told."""
    gateway, *_ = three
    talker = Speaker(1, sglang=True)
    body = chat(stream=True, max_tokens=4)
    for place in range(1, 6):
        breaks_next(three, talker.dies(place, ending=ending))
        seen = Seen(await gateway.ask(body))
        assert (seen.text, seen.roles, seen.finishes) == (WORDS[:4], 1, ["length"]), place
        assert len(seen.named) == 1
    # Of the last one everything had been said: nobody else was asked.
    assert [line.get("resumed", 0) for line in gateway.lines("request")] == [1, 1, 1, 1, 0]


async def test_it_goes_on_as_often_as_engines_are_left(three: Engines) -> None:
    """The second one dies too; each is told all that was delivered, and less of what is left."""
    gateway, first, second, third = three
    first.queue(FIRST.dies(4), path=CHAT)
    second.queue(SECOND.dies(3), path=CHAT)
    seen = Seen(await gateway.ask(chat(stream=True, max_tokens=40)))
    assert (seen.text, seen.roles, seen.finishes, len(seen.named)) == (WORDS, 1, ["stop"], 1)
    bodies = [relayed(engine)[0].json() for engine in (first, second, third)]
    assert [body["max_tokens"] for body in bodies] == [40, 37, 35]
    assert [len(body["messages"]) for body in bodies] == [1, 2, 2]
    assert bodies[2]["messages"][-1] == {"role": "assistant", "content": "".join(WORDS[:5])}
    line = await gateway.line()
    assert (line["resumed"], line["attempts"], line["tokens_in"], line["tokens_out"]) == (2, 3, PROMPT_TOKENS, 10)
    text = await scraped(gateway)
    assert metric(text, "forebay_streams_resumed_total", cause="broken", outcome="continued") == 2
    assert metric(text, "forebay_streams_total", resumable="yes") == 1


async def test_where_nobody_is_left_it_ends_with_the_error(three: Engines) -> None:
    """No engine is asked twice, and what is told is why the stream broke off."""
    gateway, *engines = three
    for engine in engines:
        engine.queue(FIRST.dies(3), path=CHAT)
    answer = await gateway.ask(chat(stream=True))
    assert json.loads(answer.events()[-1].removeprefix(b"data: "))["error"]["code"] == "engine_failed"
    assert [len(relayed(engine)) for engine in engines] == [1, 1, 1]
    line = await gateway.line()
    assert (line["outcome"], line["resumed"], line["attempts"]) == ("engine_failed", 2, 3)
    text = await scraped(gateway)
    assert metric(text, "forebay_streams_resumed_total", cause="broken", outcome="engine_failed") == 1
    await gateway.idle()


async def test_no_more_often_than_may_be(start_gateway: StartGateway, three: Engines) -> None:
    _, *engines = three
    gateway = await start_gateway(*engines, stream=Stream(resume=StreamResume(attempts=1)))
    for engine in engines:
        engine.queue(FIRST.dies(3), path=CHAT)
    answer = await gateway.ask(chat(stream=True))
    assert b'"error"' in answer.events()[-1]
    assert sorted(len(relayed(engine)) for engine in engines) == [0, 1, 1]
    assert metric(await scraped(gateway), "forebay_streams_not_resumed_total", reason="attempts") == 1


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"seed": 1}, "seed"),
        ({"response_format": {"type": "json_object"}}, "format"),
        ({"stop": "the end"}, "stop"),
        ({"frequency_penalty": 0.5}, "penalties"),
    ],
)
async def test_what_cannot_go_on_faithfully_ends(three: Engines, more: dict[str, Any], reason: str) -> None:
    gateway, first, second, third = three
    first.queue(FIRST.dies(3), path=CHAT)
    answer = await gateway.ask(chat(stream=True, **more))
    assert len(answer.events()) == 4
    assert json.loads(answer.events()[-1].removeprefix(b"data: "))["error"]["code"] == "engine_failed"
    assert not relayed(second)
    assert not relayed(third)
    text = await scraped(gateway)
    assert metric(text, "forebay_streams_not_resumed_total", reason=reason) == 1
    assert metric(text, "forebay_streams_total", resumable=reason) == 1


async def test_a_tool_call_half_way_ends(three: Engines) -> None:
    """What was called so far cannot be given to another engine."""
    gateway, first, second, _ = three
    call = b'data: {"id":"x","model":"smollm2","choices":[{"index":0,"delta":{"tool_calls":[{"index":0}]}}]}\n\n'
    first.queue(event_stream([call, call]).do(Do.RESET), path=CHAT)
    answer = await gateway.ask(chat(stream=True, tools=[{"type": "function", "function": {"name": "f"}}]))
    assert b'"error"' in answer.events()[-1]
    assert not relayed(second)
    assert metric(await scraped(gateway), "forebay_streams_not_resumed_total", reason="tools") == 1


async def test_switched_off_it_ends(start_gateway: StartGateway, three: Engines) -> None:
    _, first, second, third = three
    gateway = await start_gateway(first, second, third, stream=Stream(resume=StreamResume(enabled=False)))
    for engine in (first, second, third):
        engine.queue(FIRST.dies(3), path=CHAT)
    answer = await gateway.ask(chat(stream=True))
    assert b'"error"' in answer.events()[-1]
    assert sum(len(relayed(engine)) for engine in (first, second, third)) == 1


async def test_an_engine_that_goes_silent_is_left(three: Engines, connect: Connect) -> None:
    """Its connection is closed, so that it stops, and another one goes on."""
    gateway, first, _, _ = three
    first.queue(FIRST.dies(4, ending=Do.HANG), path=CHAT)
    client = await connect(gateway.url)
    client.post(CHAT, chat(stream=True), AUTH)
    await client.head()
    for _ in range(4):
        await client.event()
    gateway.advance(120)
    rest = [event for event in await client.events() if event != HEARTBEAT]
    assert b"".join(rest).count(b'"role"') == 0
    assert rest[-1] == DONE
    assert len(rest) == len(WORDS) - 3 + 2
    await first.saw("closed", connection=relayed(first)[0].connection)
    line = await gateway.line()
    assert (line["outcome"], line["resumed"]) == ("ok", 1)
    assert metric(await scraped(gateway), "forebay_streams_resumed_total", cause="slow", outcome="continued") == 1


async def test_an_error_in_the_stream_is_no_end(three: Engines) -> None:
    """As engines tell that they failed, or are shutting down."""
    gateway, *_ = three
    for told in ("EngineCore encountered an issue", "the server is shutting down"):
        error = b'data: {"error":{"message":"%b","code":500}}\n\n' % told.encode()
        breaks_next(three, lambda request, error=error: event_stream([*FIRST.events(request)[:5], error, DONE]))
        assert Seen(await gateway.ask(chat(stream=True))).text == WORDS
    assert metric(await scraped(gateway), "forebay_streams_resumed_total", cause="broken", outcome="continued") == 1
    assert metric(await scraped(gateway), "forebay_streams_resumed_total", cause="overloaded", outcome="continued") == 1


async def test_a_request_that_the_next_engine_refuses_ends_as_it_broke(three: Engines) -> None:
    """The client's request was no worse than before."""
    gateway, first, second, third = three
    first.queue(FIRST.dies(3), path=CHAT)
    refused = json_answer(b'{"error":{"message":"roles must alternate","code":400}}', status=400)
    second.queue(refused, path=CHAT)
    third.queue(refused, path=CHAT)
    answer = await gateway.ask(chat(stream=True))
    told = json.loads(answer.events()[-1].removeprefix(b"data: "))["error"]
    assert told["code"] == "engine_failed"
    assert "alternate" not in told["message"]
    assert len(relayed(second)) + len(relayed(third)) == 1
    assert metric(await scraped(gateway), "forebay_streams_not_resumed_total", reason="request") == 1


async def test_who_cannot_go_on_with_a_chat_is_not_asked(start_gateway: StartGateway, three: Engines) -> None:
    """LMDeploy has no way to, but goes on with a text."""
    _, first, second, third = three
    gateway = await start_gateway(
        serving(first, name="first"), serving(second, engine="lmdeploy"), serving(third, name="third")
    )
    for _ in range(3):
        breaks_next(three, FIRST.dies(3))
        assert Seen(await gateway.ask(chat(stream=True, max_tokens=30))).text == WORDS
        assert not any("continue_final_message" in request.json() for request in relayed(second))


async def test_its_limits_are_charged_once(start_gateway: StartGateway, three: Engines) -> None:
    """One request, the tokens of one prompt and of one answer."""
    _, first, second, third = three
    keys = (
        KeySettings(
            name="alice", key=SecretStr(KEY), limits=LimitSet.model_validate({"requests": "60/h", "tokens": "1000/h"})
        ),
    )
    gateway = await start_gateway(first, second, third, keys=keys)
    first.queue(FIRST.dies(5), path=CHAT)
    answer = await gateway.ask(chat(stream=True))
    Seen(answer)
    line = await gateway.line()
    assert (line["settlement"], line["tokens_in"], line["tokens_out"]) == ("counted", PROMPT_TOKENS, len(WORDS) + 1)
    again = await gateway.ask(chat(stream=True, max_tokens=1))
    assert again.header("x-ratelimit-remaining-requests") == "58"
    limits = gateway.replica.edge.recent[0].charges
    assert limits is not None
    assert sorted(amount // 1000 for amount in limits.charged) == [1, PROMPT_TOKENS + len(WORDS) + 1]


def full(second: ScriptedUpstream) -> Any:
    return serving(second, max_running=1)


async def test_it_waits_for_room(start_gateway: StartGateway, three: Engines, connect: Connect) -> None:
    """In the queue, with heartbeats, as long as a request that has just come may; then it goes on."""
    _, first, second, _ = three
    gateway = await start_gateway(serving(first), full(second))
    gate, busy = Gate(), Gate()
    first.queue(FIRST.stands(gate, 3, Do.RESET), path=CHAT)
    client = await connect(gateway.url)
    client.post(CHAT, chat(stream=True), AUTH)
    await client.head()
    await gate.reached()
    gateway.replica.pool.endpoints[0].holds.add("test")
    second.queue(SECOND.stands(busy, 3), path=CHAT)
    other = await connect(gateway.url)
    other.post(CHAT, chat(stream=True), AUTH)
    await busy.reached()
    # Longer than a request may wait from its beginning on.
    gateway.advance(70)
    gate.open()
    await until(lambda: gateway.replica.admission.queue.count == 1, "it does not wait")
    for _ in range(2):
        gateway.advance(20)
    busy.open()
    events = await client.events()
    assert events.count(HEARTBEAT) >= 2
    text = [json.loads(event[6:])["choices"][0]["delta"].get("content") for event in events if b"delta" in event]
    assert [one for one in text if one] == WORDS
    assert (await other.response()).events()[-1] == DONE
    await gateway.idle()
    line = next(one for one in gateway.lines("request") if one.get("resumed"))
    assert line["outcome"] == "ok"
    assert "queued_ms" not in line


async def test_who_leaves_while_it_waits_is_gone(start_gateway: StartGateway, three: Engines, connect: Connect) -> None:
    _, first, second, _ = three
    gateway = await start_gateway(serving(first), full(second))
    gate, busy = Gate(), Gate()
    first.queue(FIRST.stands(gate, 3, Do.RESET), path=CHAT)
    client = await connect(gateway.url)
    client.post(CHAT, chat(stream=True), AUTH)
    await gate.reached()
    gateway.replica.pool.endpoints[0].holds.add("test")
    second.queue(SECOND.stands(busy, 3), path=CHAT)
    other = await connect(gateway.url)
    other.post(CHAT, chat(stream=True), AUTH)
    await busy.reached()
    gate.open()
    await until(lambda: gateway.replica.admission.queue.count == 1, "it does not wait")
    await client.close()
    await until(lambda: gateway.replica.admission.queue.count == 0, "it still waits")
    busy.open()
    await other.response()
    await gateway.idle()
    assert len(relayed(second)) == 1
    outcomes = sorted(line["outcome"] for line in gateway.lines("request"))
    assert outcomes == ["client_gone", "ok"]
    assert gateway.replica.admission.kept.used == 0
    text = await scraped(gateway)
    assert metric(text, "forebay_streams_resumed_total", cause="broken", outcome="client_gone") == 1


async def test_a_slow_reader_has_the_beginning_first(
    start_gateway: StartGateway, three: Engines, connect: Connect
) -> None:
    """What it has not taken is not overtaken: the next engine is asked once it has caught up."""
    _, first, second, _ = three
    resume = StreamResume(max_bytes=64 * MIB)
    gateway = await start_gateway(serving(first), serving(second), stream=Stream(resume=resume))
    word = "x" * 50_000
    start = {"id": "1", "created": 1, "model": "smollm2"}

    def said(text: str, finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
        return b"data: " + json.dumps({**start, "choices": [choice]}).encode() + b"\n\n"

    first.queue(event_stream([said(word)] * 400), path=CHAT)
    second.queue(event_stream([said(" end", "stop"), DONE]), path=CHAT)
    client = await connect(gateway.url, receive_buffer=4096)
    client.post(CHAT, chat(stream=True), AUTH)
    await client.head()
    client.stop_reading()
    await gateway.paused()
    one, other = gateway.replica.pool.endpoints
    one.connections.cut("the test wants it")
    assert (one.in_flight, other.in_flight) == (0, 0)
    client.read_on()
    text = [json.loads(event[6:])["choices"][0]["delta"]["content"] for event in (await client.events())[:-1]]
    assert text[-1] == " end"
    assert set(text[:-1]) == {word}
    assert relayed(second)[0].json()["messages"][-1]["content"] == "".join(text[:-1])
    await gateway.idle()


async def test_an_endpoint_is_emptied_at_once(start_gateway: StartGateway, three: Engines, connect: Connect) -> None:
    """Ejected by command, its streams go on elsewhere; one that cannot ends with an error."""
    _, first, second, _ = three
    keys = (KeySettings(name="alice", key=SecretStr(KEY), admin=True),)
    gateway = await start_gateway(serving(first, name="one"), serving(second, name="two"), keys=keys)
    cut = Gate()
    first.always(FIRST.stands(cut, 3), path=CHAT)
    asked: list[dict[str, Any]] = [{}, {"max_tokens": 30}, {"seed": 1}]
    second_held = gateway.replica.pool.endpoints[1].holds
    second_held.add("test")
    clients = [await connect(gateway.url) for _ in asked]
    for client, more in zip(clients, asked, strict=True):
        client.post(CHAT, chat(stream=True, **more), AUTH)
        await client.head()
    await first.saw("gate", times=3)
    second_held.clear()
    told = await gateway.admin("POST", "/admin/endpoints/one/eject", key=KEY)
    assert told.status == 202
    ends = [(await client.events())[-1] for client in clients]
    assert ends[:2] == [DONE, DONE]
    assert b'"error"' in ends[2]
    assert len(relayed(second)) == 2
    cut.open()
    await gateway.idle()


async def test_it_can_be_explained(three: Engines) -> None:
    gateway, first, *_ = three
    first.queue(FIRST.dies(4), path=CHAT)
    answer = await gateway.ask(chat(stream=True))
    Seen(answer)
    ticket = gateway.replica.edge.recent[0]
    first_attempt, second_attempt = ticket.tried
    assert (first_attempt.cause, first_attempt.events, first_attempt.resumes) == ("broken", 4, False)
    assert (second_attempt.cause, second_attempt.resumes) == ("", True)
    shown = explain_in_text(explanation(row_of(ticket, ticket.ended), "memory"))
    attempts = [line for line in shown.splitlines() if line.strip().startswith("attempt")]
    assert ": ended (broken) after " in attempts[0]
    assert attempts[0].endswith(", 4 events until then")
    assert ": went on with the stream, ok after " in attempts[1]
