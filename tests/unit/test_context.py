"""The cap on context holds exactly: a bound where it is enough, an engine's count where it is not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Generator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.context import fit_context
from gateway.api.media import MediaRules
from gateway.api.peek import Asked, read_body
from gateway.api.routes import RELAYED
from gateway.errors import Kind, Refusal
from gateway.serving import tokens
from gateway.serving.pending import Pending
from gateway.serving.tokens import TEMPLATE_TOKENS, Uncounted, count_tokens
from gateway.serving.upstream import Loss
from gateway.settings import Caps
from tests.support.table import each
from tests.unit.ports import CHAT, MODEL, OWN, FakeConnection, Stage

COMPLETIONS, RESPONSES, MESSAGES = "/v1/completions", "/v1/responses", "/v1/messages"
HI = [{"role": "user", "content": "Hi"}]


def asked(path: str, fields: dict[str, Any], caps: Caps) -> Asked:
    body = json.dumps({"model": MODEL, **fields}).encode()
    found = read_body(body, RELAYED[path], caps, MediaRules())
    assert isinstance(found, Asked)
    return found


def fit(
    path: str, fields: dict[str, Any], cap: int | Caps, size: int, counted: int | Uncounted | None = None
) -> tuple[Asked, Refusal | None]:
    """Fit a request; ``counted`` is what an engine would say, None: none may be asked."""
    caps = cap if isinstance(cap, Caps) else Caps(context=cap)
    found = asked(path, fields, caps)
    steps: Generator[Pending, Any, Refusal | None] = fit_context(found, MODEL, RELAYED[path], caps, Stage().pool, size)
    try:
        pending = next(steps)
    except StopIteration as end:
        assert counted is None, "no engine was asked"
        return found, end.value
    pending.awaitable.close()
    assert counted is not None, "an engine was asked"
    with pytest.raises(StopIteration) as stop:
        steps.send(counted)
    return found, stop.value.value


def refused(refusal: Refusal | None, kind: Kind = Kind.TOO_LONG) -> str:
    assert refusal is not None
    assert refusal.kind is kind
    return refusal.message


def test_a_small_request_fits_for_certain() -> None:
    found, refusal = fit(CHAT, {"messages": HI, "max_tokens": 100}, cap=1000, size=1000 - TEMPLATE_TOKENS - 100)
    assert refusal is None
    assert found.max_tokens == 100


def test_one_byte_more_must_be_counted() -> None:
    size = 1000 - TEMPLATE_TOKENS - 100 + 1
    for counted in (5, 900):
        found, refusal = fit(CHAT, {"messages": HI, "max_tokens": 100}, 1000, size, counted)
        assert refusal is None
        assert found.max_tokens == 100
    message = refused(fit(CHAT, {"messages": HI, "max_tokens": 100}, 1000, size, 901)[1])
    assert "901" in message
    assert "1000" in message


def test_an_output_limit_beyond_the_cap_needs_no_count() -> None:
    assert "1001" in refused(fit(CHAT, {"messages": HI, "max_tokens": 1001}, 1000, 10)[1])


def test_without_a_limit_the_answer_gets_what_is_left() -> None:
    """Of a bound only where that leaves most; else a long prompt of few tokens would get a short answer."""
    found, refusal = fit(CHAT, {"messages": HI}, cap=8000, size=1000)
    assert refusal is None
    assert found.max_tokens == 8000 - 1000 - TEMPLATE_TOKENS
    assert bytes(found.fields["max_tokens"]) == b"%d" % found.max_tokens
    found, refusal = fit(CHAT, {"messages": HI}, cap=8000, size=1600, counted=400)
    assert refusal is None
    assert found.max_tokens == 7600
    refused(fit(CHAT, {"messages": HI}, cap=8000, size=10**6, counted=8000)[1])
    assert fit(CHAT, {"messages": HI}, cap=8000, size=10**6, counted=7999)[0].max_tokens == 1


def test_a_completion_gets_no_more_than_it_would_by_itself() -> None:
    assert fit(COMPLETIONS, {"prompt": "x"}, cap=8000, size=100)[0].max_tokens == 16
    assert fit(COMPLETIONS, {"prompt": "x"}, cap=8000, size=10**6, counted=7990)[0].max_tokens == 10


def test_a_cap_on_output_holds_beside_the_one_on_context() -> None:
    """Whichever leaves less; a cap on output larger than the context is no reason to refuse."""
    for most, written in ((100, 100), (10_000, 8000 - 400)):
        caps = Caps(context=8000, max_tokens=most)
        found, refusal = fit(CHAT, {"messages": HI}, caps, size=5000, counted=400)
        assert refusal is None
        assert found.max_tokens == int(bytes(found.fields["max_tokens"])) == written


def test_without_a_cap_nothing_is_done() -> None:
    found, refusal = fit(CHAT, {"messages": HI}, Caps(), size=10**9)
    assert (refusal, found.max_tokens) == (None, None)


def test_paths_without_output_need_room_for_the_prompt_alone() -> None:
    found, refusal = fit("/v1/embeddings", {"input": "x"}, 1000, 1000 - TEMPLATE_TOKENS)
    assert refusal is None
    assert set(found.fields) == {"model", "input"}
    assert fit("/v1/embeddings", {"input": "x"}, 1000, 5000, counted=1000)[1] is None
    refused(fit("/v1/embeddings", {"input": "x"}, 1000, 5000, counted=1001)[1])


def test_media_are_always_counted() -> None:
    """A hundred bytes may be an image of a thousand tokens."""
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
    refused(fit(CHAT, body, cap=5000, size=200, counted=5000)[1])
    assert fit(CHAT, body, cap=5000, size=200, counted=4999)[1] is None


def test_when_no_engine_can_tell_it_is_to_be_tried_again() -> None:
    refusal = fit(CHAT, {"messages": HI}, 1000, 5000, Uncounted.NOT_NOW)[1]
    refused(refusal, Kind.NO_ENGINE)
    assert refusal is not None
    assert refusal.retry_after == 1


def test_what_cannot_be_counted_is_too_long_for_good() -> None:
    """Trying again would not help, so the client is not told to."""
    refusal = fit("/v1/rerank", {"query": "q", "documents": ["d"]}, 1000, 5000, Uncounted.NEVER)[1]
    assert "5000 bytes" in refused(refusal)


@given(
    cap=st.integers(1, 5000),
    size=st.integers(1, 6000),
    limit=st.none() | st.integers(1, 6000),
    density=st.floats(0, 1),
    path=st.sampled_from([CHAT, COMPLETIONS, MESSAGES]),
)
def test_prompt_and_output_together_never_exceed_the_cap(
    cap: int, size: int, limit: int | None, density: float, path: str
) -> None:
    """Whatever share of its bytes a prompt has in tokens, with all that a template adds."""
    prompt = int((size + TEMPLATE_TOKENS) * density)
    caps = Caps(context=cap)
    found = asked(path, {"messages": HI} if limit is None else {"messages": HI, "max_tokens": limit}, caps)
    steps = fit_context(found, MODEL, RELAYED[path], caps, Stage().pool, size)
    refusal: Refusal | None = None
    try:
        next(steps).awaitable.close()
        steps.send(prompt)
    except StopIteration as end:
        refusal = end.value
    if refusal is None:
        assert found.max_tokens is not None
        assert prompt + found.max_tokens <= cap
        assert int(bytes(found.fields["max_tokens"])) == found.max_tokens
        assert limit is None or found.max_tokens == limit
    else:
        assert prompt + (1 if limit is None else limit) > cap


# --- counting ----------------------------------------------------------------------------------------------------


async def attempt_number(stage: Stage, number: int) -> None:
    """Wait until an engine was asked so many times."""
    for _ in range(20):
        if len(stage.attempts) >= number:
            break
        await asyncio.sleep(0)
    assert len(stage.attempts) == number


async def count(stage: Stage, path: str, answers: list[tuple[int, bytes]], **fields: Any) -> int | Uncounted:
    """Count a request while an engine gives these answers, one after the other."""
    raw = {name: msgspec.Raw(json.dumps(value).encode()) for name, value in fields.items()}
    task = asyncio.ensure_future(count_tokens(stage.pool, MODEL, path, raw))
    for number, (status, body) in enumerate(answers, start=1):
        await attempt_number(stage, number)
        stage.attempt.answer(status, body)
    found = await task
    assert len(stage.attempts) == len(answers)
    assert stage.in_flight == 0
    return found


async def test_an_engine_counts_a_chat_with_its_template() -> None:
    stage = Stage()
    tools = [{"type": "function", "function": {"name": "f"}}]
    fields = {"messages": HI, "tools": tools, "chat_template_kwargs": {"a": 1}, "temperature": 0, "max_tokens": 5}
    assert await count(stage, CHAT, [(200, b'{"count":31,"tokens":[1]}')], **fields) == 31
    assert stage.attempt.payload.startswith(b"POST /tokenize HTTP/1.1\r\n")
    assert stage.attempt.body == {"model": OWN, "messages": HI, "tools": tools, "chat_template_kwargs": {"a": 1}}


DIALECTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (RESPONSES, {"input": "Hi"}, {"messages": HI}),
    (RESPONSES, {"input": HI, "instructions": "Be."}, {"messages": [{"role": "system", "content": "Be."}, *HI]}),
    (MESSAGES, {"messages": HI, "system": "Be."}, {"messages": [{"role": "system", "content": "Be."}, *HI]}),
    (
        MESSAGES,
        {"messages": HI, "tools": [{"name": "f", "input_schema": {"type": "object"}}]},
        {
            "messages": HI,
            "tools": [
                {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
            ],
        },
    ),
    (COMPLETIONS, {"prompt": "Hi"}, {"prompt": "Hi"}),
    (COMPLETIONS, {"prompt": ["Hi"]}, {"prompt": "Hi"}),
    ("/v1/embeddings", {"input": "Hi"}, {"prompt": "Hi"}),
    ("/v1/embeddings", {"messages": HI}, {"messages": HI}),
    ("/tokenize", {"prompt": "Hi"}, {"prompt": "Hi"}),
    ("/tokenize", {"messages": HI}, {"messages": HI}),
]


@each(("path", "fields", "sent"), DIALECTS)
async def test_every_dialect_is_counted_as_its_engine_reads_it(
    path: str, fields: dict[str, Any], sent: dict[str, Any]
) -> None:
    stage = Stage()
    assert await count(stage, path, [(200, b'{"count":7}')], **fields) == 7
    assert stage.attempt.body == {"model": OWN, **sent}


async def test_of_several_prompts_the_longest_counts() -> None:
    answers = [(200, b'{"count":3}'), (200, b'{"count":9}'), (200, b'{"count":4}')]
    assert await count(Stage(), COMPLETIONS, answers, prompt=["a", "bb", "c"]) == 9


async def test_a_single_prompt_is_always_asked_for() -> None:
    """Whoever asks knows better than its bytes: there is an image in it."""
    stage = Stage()
    task = asyncio.create_task(count_tokens(stage.pool, MODEL, CHAT, {"messages": msgspec.Raw(b"[]")}, 10**6))
    await attempt_number(stage, 1)
    stage.attempt.answer(200, b'{"count":5}')
    assert await task == 5


async def test_short_prompts_among_many_are_not_counted() -> None:
    """Their bytes say enough; the long one is asked for."""
    stage = Stage()
    prompts = msgspec.Raw(json.dumps(["x" * 10] * 1000 + ["y" * 500]).encode())
    task = asyncio.create_task(count_tokens(stage.pool, MODEL, COMPLETIONS, {"prompt": prompts}, 900))
    await attempt_number(stage, 1)
    assert stage.attempt.body["prompt"] == "y" * 500
    stage.attempt.answer(200, b'{"count":5}')
    assert await task == 12 + TEMPLATE_TOKENS
    assert len(stage.attempts) == 1


@each(
    ("prompt", "longest"),
    [([1, 2, 3], 3), ([[1], [1, 2]], 2), ([[1.0, 2.0]], 2), ([{"a": 1}], 1), ([], 0), ([[]], 0)],
)
async def test_token_ids_are_counted_here(prompt: object, longest: int) -> None:
    """Whatever is in the list: the engine refuses what it does not take."""
    assert await count(Stage(), COMPLETIONS, [], prompt=prompt) == longest


NEVER = [("/v1/rerank", {"query": "q", "documents": ["d"]}), ("/v1/score", {"text_1": "a", "text_2": "b"}),
         (CHAT, {}), (RESPONSES, {}), (MESSAGES, {"messages": 5}), (COMPLETIONS, {"prompt": None})]  # fmt: skip


@each(("path", "fields"), NEVER)
async def test_what_no_tokenizer_takes(path: str, fields: dict[str, Any]) -> None:
    assert await count(Stage(), path, [], **fields) is Uncounted.NEVER


ANSWERS = [
    (400, b'{"error":{}}', Uncounted.NEVER),
    (422, b"", Uncounted.NEVER),
    (401, b"", Uncounted.NOT_NOW),
    (404, b"", Uncounted.NOT_NOW),
    (429, b"", Uncounted.NOT_NOW),
    (503, b"", Uncounted.NOT_NOW),
    (500, b"", Uncounted.NOT_NOW),
    (200, b"", Uncounted.NOT_NOW),
    (200, b"[]", Uncounted.NOT_NOW),
    (200, b'{"count":"7"}', Uncounted.NOT_NOW),
    (200, b'{"\xff":1,"count":"\xff"}', Uncounted.NOT_NOW),
]


@each(("status", "body", "found"), ANSWERS)
async def test_other_answers_than_a_count(status: int, body: bytes, found: Uncounted) -> None:
    assert await count(Stage(), CHAT, [(status, body)], messages=HI) is found


async def test_a_list_of_tokens_without_end_is_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_COUNT_ANSWER", 20)
    assert await count(Stage(), CHAT, [(200, b'{"count":7,"tokens":[1,2,3]}')], messages=HI) is Uncounted.NOT_NOW


async def test_without_an_engine_there_is_no_count() -> None:
    stage = Stage()
    stage.endpoint.down("gone")
    assert await count(stage, CHAT, [], messages=HI) is Uncounted.NOT_NOW


async def counting(stage: Stage) -> asyncio.Task[int | Uncounted]:
    """A count that waits for its engine."""
    task = asyncio.create_task(count_tokens(stage.pool, MODEL, CHAT, {"messages": msgspec.Raw(b"[]")}))
    await attempt_number(stage, 1)
    return task


@pytest.mark.parametrize("loss", [Loss.CONNECT, Loss.CLOSED, Loss.GARBAGE])
async def test_an_engine_that_is_lost_gives_no_count(loss: Loss) -> None:
    stage = Stage()
    task = await counting(stage)
    stage.attempt.lose(loss)
    assert await task is Uncounted.NOT_NOW
    assert len(stage.attempts) == 1


async def test_a_stale_connection_is_replayed_once() -> None:
    stage = Stage(kept=True)
    task = await counting(stage)
    stage.attempt.lose(Loss.STALE)
    await attempt_number(stage, 2)
    assert stage.attempt.fresh
    stage.attempt.answer(200, b'{"count":5}')
    assert await task == 5


async def test_an_engine_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "COUNT_TIMEOUT", 0)
    stage = Stage()
    assert await count_tokens(stage.pool, MODEL, CHAT, {"messages": msgspec.Raw(b"[]")}) is Uncounted.NOT_NOW
    assert stage.attempt.ended == "aborted"


async def test_a_client_that_leaves_stops_the_count() -> None:
    stage = Stage()
    task = await counting(stage)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stage.attempt.ended == "aborted"


async def test_an_answered_connection_is_not_closed_behind_its_next_user() -> None:
    """The client leaves in the same turn in which the count comes."""
    stage = Stage()
    task = await counting(stage)
    attempt: FakeConnection = stage.attempt
    attempt.answer(200, b'{"count":5}')
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert attempt.ended == "whole"
