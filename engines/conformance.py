"""What a client of the gateway may rely on, whatever engine is behind it: one list of checks for all of them.

The project's tests run these over every engine, and ``forebay engines check`` over yours. Each check speaks to a
gateway that has the engine behind it, as any client would. What an engine cannot do is a declared ``Capability``: the
check is then reported as not offered, never passed over in silence.
"""

from __future__ import annotations

import asyncio
import enum
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from engines.protocol import Capability, EngineLoad
from engines.registry import ENGINES

CHAT = "/v1/chat/completions"
NONE = Capability(0)
FREED_WITHIN = 60.0
"""Seconds an engine may show a request that its client has left: LMDeploy tells what was 10 s ago, an SGLang without
work looks at its queue every 30 s."""
_QUESTION = "What is the capital of France?"
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class CheckFailed(Exception):  # noqa: N818 - a finding, not a fault of this program
    """The engine does not do what was asked; the text says what came instead."""


class TrialError(Exception):
    """The checks cannot be run; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Subject:
    """An engine behind a gateway.

    ``client`` speaks to the gateway and carries a key. ``adapter`` is a public name whose answers differ from those of
    ``model``, where there is one. ``max_model_len`` is in tokens. ``load`` reads the engine's own figures.
    """

    client: httpx.AsyncClient
    model: str
    capabilities: Capability
    max_model_len: int = 2048
    adapter: str | None = None
    load: Callable[[], Awaitable[EngineLoad | None]] | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to rely on. ``needs`` is what an engine must declare for it to hold."""

    name: str
    told: str
    needs: Capability
    run: Callable[[Subject], Awaitable[None]]
    with_load: bool = False

    @property
    def with_adapter(self) -> bool:
        """Whether it can be tried only where an adapter is served."""
        return Capability.ADAPTERS in self.needs


CHECKS: dict[str, Check] = {}


def check(
    needs: Capability = NONE, *, with_load: bool = False
) -> Callable[[Callable[[Subject], Awaitable[None]]], Callable[[Subject], Awaitable[None]]]:
    """Add a function to the list; its docstring is what the check says of itself."""

    def add(run: Callable[[Subject], Awaitable[None]]) -> Callable[[Subject], Awaitable[None]]:
        name = run.__name__.removeprefix("check_")
        told = (run.__doc__ or "").strip().splitlines()[0]
        CHECKS[name] = Check(name, told, needs, run, with_load)
        return run

    return add


class Verdict(enum.StrEnum):
    """What a check came to."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_OFFERED = "not offered"
    """The engine declares that it cannot."""
    NOT_TRIED = "not tried"
    """There was no adapter, or no way to the engine's own figures."""


@dataclass(frozen=True, slots=True)
class Result:
    """One check's verdict, why, and how many seconds it took."""

    check: Check
    verdict: Verdict
    detail: str = ""
    seconds: float = 0.0


async def run_check(wanted: Check, subject: Subject) -> Result:
    """Run one check."""
    missing = wanted.needs & ~subject.capabilities
    if missing:
        return Result(wanted, Verdict.NOT_OFFERED, f"the engine does not declare {missing.name}")
    if wanted.with_adapter and subject.adapter is None:
        return Result(wanted, Verdict.NOT_TRIED, "no adapter was named (--adapter NAME)")
    if wanted.with_load and subject.load is None:
        return Result(wanted, Verdict.NOT_TRIED, "the engine's own figures cannot be read")
    started = time.monotonic()
    try:
        await wanted.run(subject)
    except (CheckFailed, httpx.HTTPError, KeyError, IndexError, TypeError, ValueError) as error:
        detail = str(error) if isinstance(error, CheckFailed) else f"{type(error).__name__}: {error}"
        return Result(wanted, Verdict.FAILED, detail, time.monotonic() - started)
    return Result(wanted, Verdict.PASSED, "", time.monotonic() - started)


async def run_checks(subject: Subject, names: Iterable[str] = ()) -> AsyncIterator[Result]:
    """Run the named checks, all of them when none is named, one after the other."""
    for name in names or CHECKS:
        yield await run_check(CHECKS[name], subject)


# --- asking ------------------------------------------------------------------------------------------------------


def _want(holds: object, told: str) -> None:
    if not holds:
        raise CheckFailed(told)


def _chat(subject: Subject, **fields: object) -> dict[str, object]:
    turns = [{"role": "user", "content": _QUESTION}]
    return {"model": subject.model, "messages": turns, "max_tokens": 16, "temperature": 0, **fields}


async def _ask(subject: Subject, body: dict[str, object], path: str = CHAT) -> dict[str, Any]:
    """Send a request that must succeed; return the answer, which must bear the model's public name."""
    answer = await subject.client.post(path, json=body)
    _want(answer.status_code == 200, f"{path} answered {answer.status_code}: {answer.text[:300]}")
    value: dict[str, Any] = answer.json()
    _want(value["model"] == body["model"], f"asked for {body['model']!r}, the answer's model is {value['model']!r}")
    return value


async def _answer(subject: Subject, **fields: object) -> dict[str, Any]:
    """Ask for a chat; return its first choice."""
    choice: dict[str, Any] = (await _ask(subject, _chat(subject, **fields)))["choices"][0]
    return choice


@asynccontextmanager
async def _stream(subject: Subject, **fields: object) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """Open a stream of chat chunks; the end mark is checked when it is read to its end."""
    body = _chat(subject, stream=True, **fields)
    async with subject.client.stream("POST", CHAT, json=body) as answer:
        if answer.status_code != 200:
            await answer.aread()
            raise CheckFailed(f"the stream answered {answer.status_code}: {answer.text[:300]}")
        kind = answer.headers["content-type"]
        _want(kind.startswith("text/event-stream"), f"the stream's content type is {kind}")
        yield _chunks(answer)


async def _chunks(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if not line:
            continue
        _want(line.startswith("data: "), f"a line of the stream is {line[:100]!r}")
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        chunk: dict[str, Any] = json.loads(data)
        _want("error" not in chunk, f"the stream broke: {data[:300]}")
        yield chunk
    raise CheckFailed("the stream ended without its end mark")


async def _refused(subject: Subject, status: int, code: str | None, body: dict[str, object]) -> None:
    """Send a request that must be refused; see that it is told in the one envelope."""
    answer = await subject.client.post(CHAT, json=body)
    shown = f"{json.dumps(body)[:120]} answered {answer.status_code}: {answer.text[:300]}"
    _want(answer.status_code == status, shown)
    error = answer.json()["error"]
    _want(set(error) == {"message", "type", "param", "code"}, f"the envelope has {sorted(error)}")
    _want(error["type"] == "invalid_request_error", shown)
    _want(code is None or error["code"] == code, shown)
    _want("/site-packages/" not in error["message"], f"the message tells the engine's own files: {shown}")


def _text(choice: dict[str, Any]) -> str:
    content = choice["message"]["content"]
    return content if isinstance(content, str) else ""


# --- the checks --------------------------------------------------------------------------------------------------


@check()
async def check_models(subject: Subject) -> None:
    """The model is listed."""
    listed = [model["id"] for model in (await subject.client.get("/v1/models")).json()["data"]]
    _want(subject.model in listed, f"/v1/models lists {listed}")


@check()
async def check_chat(subject: Subject) -> None:
    """A chat is answered, under the model's public name, with its tokens counted."""
    value = await _ask(subject, _chat(subject))
    choice, usage = value["choices"][0], value["usage"]
    _want(_text(choice).strip(), "the answer is empty")
    _want(choice["finish_reason"] in ("stop", "length"), f"finish_reason is {choice['finish_reason']!r}")
    _want(usage["prompt_tokens"] > 0 and 0 < usage["completion_tokens"] <= 16, f"usage is {usage}")


@check()
async def check_same_answer(subject: Subject) -> None:
    """At temperature 0 the same question gets the same answer."""
    first, second = await _answer(subject), await _answer(subject)
    _want(_text(first) == _text(second), f"{_text(first)!r} and then {_text(second)!r}")


@check()
async def check_stream(subject: Subject) -> None:
    """A stream carries the same text as the whole answer, chunk by chunk, and tells no usage unasked."""
    text, finish, count = "", None, 0
    async with _stream(subject) as chunks:
        async for chunk in chunks:
            count += 1
            _want(chunk["model"] == subject.model, f"a chunk's model is {chunk['model']!r}")
            _want(not chunk.get("usage"), f"usage came unasked: {chunk}")
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                finish = choice.get("finish_reason") or finish
    whole = await _answer(subject)
    _want(count > 2, f"the stream had {count} chunks")
    _want(text == _text(whole), f"streamed {text!r}, whole {_text(whole)!r}")
    _want(finish == whole["finish_reason"], f"finish_reason {finish!r}, whole {whole['finish_reason']!r}")


@check()
async def check_stream_usage(subject: Subject) -> None:
    """A stream that is asked for usage tells it once, in a last chunk without choices."""
    async with _stream(subject, stream_options={"include_usage": True}) as chunks:
        seen = [chunk async for chunk in chunks]
    told = [chunk for chunk in seen if chunk.get("usage")]
    _want(len(told) == 1 and told[0] is seen[-1], f"{len(told)} of {len(seen)} chunks tell usage")
    _want(told[0]["choices"] == [], f"the usage chunk has choices: {told[0]}")
    usage = told[0]["usage"]
    _want(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"], f"usage is {usage}")


@check()
async def check_completions(subject: Subject) -> None:
    """A text completion is answered."""
    body: dict[str, object] = {"model": subject.model, "prompt": "Once upon a", "max_tokens": 4, "temperature": 0}
    value = await _ask(subject, body, "/v1/completions")
    _want(value["choices"][0]["text"], "the completion is empty")
    _want(value["usage"]["completion_tokens"] <= 4, f"usage is {value['usage']}")


@check()
async def check_length(subject: Subject) -> None:
    """max_tokens ends an answer with finish_reason "length"."""
    value = await _ask(subject, _chat(subject, max_tokens=2))
    _want(
        value["choices"][0]["finish_reason"] == "length", f"finish_reason is {value['choices'][0]['finish_reason']!r}"
    )
    _want(value["usage"]["completion_tokens"] == 2, f"usage is {value['usage']}")


@check(Capability.STOP_WORDS)
async def check_stop(subject: Subject) -> None:
    """A stop word ends an answer before it."""
    words = _text(await _answer(subject)).split()
    _want(len(words) > 1, f"the answer {words} is too short to be stopped")
    stopped = await _answer(subject, stop=[words[1]])
    _want(words[1] not in _text(stopped), f"{words[1]!r} is in {_text(stopped)!r}")
    _want(stopped["finish_reason"] == "stop", f"finish_reason is {stopped['finish_reason']!r}")


@check(Capability.SEVERAL_ANSWERS)
async def check_several_answers(subject: Subject) -> None:
    """n=2 gives two answers, whole and streamed."""
    value = await _ask(subject, _chat(subject, n=2, temperature=0.8))
    _want([choice["index"] for choice in value["choices"]] == [0, 1], f"{len(value['choices'])} answers")
    seen = set()
    async with _stream(subject, n=2, temperature=0.8) as chunks:
        async for chunk in chunks:
            seen |= {choice["index"] for choice in chunk["choices"]}
    _want(seen == {0, 1}, f"the stream had answers {seen}")


@check(Capability.CONTINUE)
async def check_continue(subject: Subject) -> None:
    """An answer that has begun goes on from there, at the price of the tokens that it has begun with."""
    async with _stream(subject, max_tokens=6, stream_options={"include_usage": True}) as chunks:
        seen = [chunk async for chunk in chunks]
    texts = [choice["delta"].get("content") for chunk in seen for choice in chunk["choices"]]
    begun = [text for text in texts if text][:3]
    _want(len(begun) == 3, f"the stream's texts are {texts}")
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": "".join(begun)}]
    asked = _chat(subject, messages=turns, max_tokens=3, continue_final_message=True, add_generation_prompt=False)
    value = await _ask(subject, asked)
    rest = _text(value["choices"][0])
    _want(rest.strip() and not rest.startswith(begun[0]), f"{''.join(begun)!r} goes on with {rest!r}")
    more = value["usage"]["prompt_tokens"] - seen[-1]["usage"]["prompt_tokens"]
    _want(more == 3, f"3 chunks of an answer are {more} tokens of a prompt")


@check(Capability.TOKEN_CHUNKS)
async def check_token_chunks(subject: Subject) -> None:
    """A chunk of a stream with text is one token."""
    async with _stream(subject, stream_options={"include_usage": True}) as chunks:
        seen = [chunk async for chunk in chunks]
    texts = [choice["delta"].get("content") for chunk in seen for choice in chunk["choices"]]
    count, tokens = sum(bool(text) for text in texts), seen[-1]["usage"]["completion_tokens"]
    # The token that ends an answer has no text.
    _want(tokens - count in (0, 1), f"{tokens} tokens came in {count} chunks")


@check(Capability.LOGPROBS)
async def check_logprobs(subject: Subject) -> None:
    """logprobs tell each token's probability and its rivals'."""
    content = (await _answer(subject, logprobs=True, top_logprobs=2, max_tokens=4))["logprobs"]["content"]
    _want(len(content) >= 1, "there are none")
    _want(all(token["logprob"] <= 0 and 1 <= len(token["top_logprobs"]) <= 2 for token in content), f"{content[0]}")


@check(Capability.TOOLS)
async def check_tools(subject: Subject) -> None:
    """Tools may be offered: the answer is text or a well-formed call."""
    choice = await _answer(subject, tools=[_TOOL], max_tokens=48)
    for call in choice["message"].get("tool_calls") or ():
        json.loads(call["function"]["arguments"])
    _want(choice["finish_reason"] in ("stop", "length", "tool_calls"), f"finish_reason is {choice['finish_reason']!r}")


@check(Capability.FORCED_TOOLS)
async def check_forced_tool(subject: Subject) -> None:
    """A tool that is named is called."""
    named = {"type": "function", "function": {"name": "get_weather"}}
    choice = await _answer(subject, tools=[_TOOL], tool_choice=named, max_tokens=64)
    calls = choice["message"]["tool_calls"]
    _want(calls and calls[0]["function"]["name"] == "get_weather", f"the answer is {choice['message']}")


@check(Capability.JSON_SCHEMA)
async def check_json_schema(subject: Subject) -> None:
    """An answer with a schema is JSON of that form."""
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": _SCHEMA, "strict": True}}
    choice = await _answer(subject, response_format=form, max_tokens=64)
    try:
        value = json.loads(_text(choice))
    except ValueError:
        raise CheckFailed(f"the answer is no JSON: {_text(choice)[:200]!r}") from None
    _want(set(value) == {"name", "age"} and isinstance(value["age"], int), f"the answer is {value}")


@check()
async def check_too_long(subject: Subject) -> None:
    """A prompt beyond the context is a 400 with code context_length_exceeded, streamed or not."""
    turns = [{"role": "user", "content": "word " * (subject.max_model_len + 64)}]
    for stream in (False, True):
        fields = _chat(subject, messages=turns, stream=stream)
        await _refused(subject, 400, "context_length_exceeded", fields)


@check(Capability.LENGTH_CHECKED)
async def check_too_many_tokens(subject: Subject) -> None:
    """More output than the context holds is a 400, not silently less."""
    await _refused(subject, 400, None, _chat(subject, max_tokens=subject.max_model_len * 64))


BAD: tuple[dict[str, object], ...] = (
    {"temperature": -1},
    {"temperature": "hot"},
    {"top_p": 2},
    {"max_tokens": 0},
    {"max_tokens": "many"},
    {"n": 0},
    {"messages": []},
    {"messages": "hello"},
    {"stop": 7},
    {"stream": "yes"},
)
"""Changes to a good request that make it a bad one everywhere."""


@check()
async def check_bad_parameters(subject: Subject) -> None:
    """What is wrong with a request is a 400 in the one envelope."""
    for change in BAD:
        await _refused(subject, 400, None, _chat(subject, **change))
    await _refused(subject, 400, None, {"model": subject.model})


@check()
async def check_unknown_model(subject: Subject) -> None:
    """A model nobody serves is a 404, and never another model's answer."""
    for name in ("no-such-model", f"{subject.model}:nobody", f"{subject.model} "):
        await _refused(subject, 404, "model_not_found", _chat(subject, model=name))


@check()
async def check_control_fields(subject: Subject) -> None:
    """Fields that steer the engine are refused."""
    for name in sorted(frozenset().union(*(engine.control_fields for engine in ENGINES.values()))):
        await _refused(subject, 400, None, _chat(subject, **{name: "x"}))


@check(Capability.ADAPTERS)
async def check_adapter(subject: Subject) -> None:
    """An adapter answers under its own name, otherwise than its base; the base stays as it was."""
    base = _text(await _answer(subject))
    value = await _ask(subject, _chat(subject, model=subject.adapter))
    _want(_text(value["choices"][0]) != base, f"the adapter answers as its base does: {base!r}")
    _want(_text(await _answer(subject)) == base, "the base answers otherwise after the adapter was used")


@check(Capability.ADAPTERS)
async def check_adapter_in_a_crowd(subject: Subject) -> None:
    """Requests for adapter and base at the same time get their own answers."""
    names = [subject.model, subject.adapter] * 4
    alone = {name: _text((await _ask(subject, _chat(subject, model=name)))["choices"][0]) for name in set(names)}
    together = await asyncio.gather(*(_ask(subject, _chat(subject, model=name)) for name in names))
    for name, value in zip(names, together, strict=True):
        text, other = _text(value["choices"][0]), alone[names[0] if name == names[1] else names[1]]
        _want(text != other, f"{name} answered as the other does: {text!r}")


@check(with_load=True)
async def check_left_client(subject: Subject) -> None:
    """A client that leaves frees the engine."""
    assert subject.load is not None
    async with _stream(subject, max_tokens=1000, ignore_eos=True) as chunks:
        async for _ in chunks:
            break
    deadline = time.monotonic() + FREED_WITHIN
    while (load := await subject.load()) is None or load.running or load.waiting:
        _want(time.monotonic() < deadline, f"{FREED_WITHIN:g} s later the engine still shows {load}")
        await asyncio.sleep(0.25)
