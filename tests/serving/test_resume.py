"""What is kept of a stream: its text, however events come and look, and the rest made one answer with it."""

from __future__ import annotations

import json
from typing import Any
from unittest.mock import patch

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.protocol import Capability
from gateway.api.routes import RELAYED
from gateway.policy.resume import Finish, Reason, Resume, ResumeRules
from gateway.policy.retry import Cause
from gateway.serving import resume
from gateway.serving.meter import Usage
from gateway.serving.resume import DONE, Kept, Memory, keep
from tests.support.examples import examples
from tests.support.table import each

CHAT, COMPLETIONS = RELAYED["/v1/chat/completions"], RELAYED["/v1/completions"]
TOKENS = Capability.TOKEN_CHUNKS
RULES = ResumeRules()
PIECES = st.text(st.sampled_from('a b"\\\n\tö你🙂{}:,'), max_size=4)


def chunk(choice: dict[str, Any] | None, *, number: int = 1, created: int = 7, **more: Any) -> bytes:
    choices = [] if choice is None else [{"index": 0, **choice}]
    value = {"id": f"chatcmpl-{number}", "object": "chat.completion.chunk", "created": created, "model": "m"}
    return b"data: " + msgspec.json.encode({**value, "choices": choices, **more}) + b"\n\n"


def said(text: str, **more: Any) -> bytes:
    return chunk({"delta": {"content": text}, "logprobs": None, "finish_reason": None}, **more)


def opening(**more: Any) -> bytes:
    return chunk({"delta": {"role": "assistant", "content": ""}, "finish_reason": None}, **more)


def closing(reason: str = "stop", **more: Any) -> bytes:
    return chunk({"delta": {}, "finish_reason": reason}, **more)


def kept_of(memory: Memory | None = None, rules: ResumeRules = RULES, **fields: Any) -> Kept:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True, **fields}
    kept = keep(CHAT, raw(body), 100, rules, memory or Memory())
    assert isinstance(kept, Kept)
    return kept


def raw(body: dict[str, Any]) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in body.items()}


def broke(kept: Kept, usage: Usage | None = None, engine: Capability = TOKENS) -> Resume | Finish | Reason:
    return kept.broke(Cause.BROKEN, usage, engine, lambda chunks: 2 * chunks)


def text_of(out: bytes) -> str:
    found = ""
    for event in out.split(b"\n\n"):
        if event and event != b"data: [DONE]":
            for choice in json.loads(event.removeprefix(b"data: "))["choices"]:
                found += choice["delta"].get("content") or ""
    return found


@settings(max_examples=examples(25))
@given(
    st.lists(PIECES, max_size=30),
    st.integers(1, 12),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.sampled_from(["same", "a second passes", "spaces", "usage"]),
)
def test_text_and_chunks_are_found_however_they_come(
    pieces: list[str], batch: int, reads: list[int], manner: str
) -> None:
    """Few or many events in a read, put aside for long or not, alike or not."""
    events = [opening()]
    for at, piece in enumerate(pieces):
        more: dict[str, Any] = {"created": at} if manner == "a second passes" else {}
        event = said(piece, **more, **({"usage": {"prompt_tokens": at}} if manner == "usage" else {}))
        events.append(event.replace(b'"content":', b'"content": ') if manner == "spaces" else event)
    memory = Memory()
    with patch.object(resume, "BATCH", batch):
        kept = kept_of(memory)
        at = 0
        while at < len(events):
            size = reads[at % len(reads)]
            block = b"".join(events[at : at + size])
            assert kept.take(block) == block
            at += size
        text = "".join(pieces)
        then = broke(kept)
        if text and text[-1].isspace():
            assert then is Reason.SPACE
        else:
            assert then == Resume(None)
            assert kept.begun == text
            # Chunks after the last one with text are said anew.
            last = max((at for at, piece in enumerate(pieces) if piece), default=-1)
            assert kept._carried == last + 1
        kept.drop()
    assert memory.used == 0


@settings(max_examples=examples(25))
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=3), max_size=12), st.data())
def test_delivered_and_the_rest_are_the_whole(pieces: list[str], data: st.DataObject) -> None:
    """For any cut at the end of an event: no text twice, none missing, one id, one role, one sum of tokens."""
    cut = data.draw(st.integers(0, len(pieces)))
    kept = kept_of(max_tokens=50)
    out = b"".join(kept.take(event) for event in [opening(), *map(said, pieces[:cut])])
    then = broke(kept)
    if not isinstance(then, Resume):
        # It ends in white space, or has more words than chunks.
        assert then in (Reason.SPACE, Reason.LIMIT)
        return
    assert kept.begun == "".join(pieces[:cut])
    assert int(bytes(kept.fields()["max_tokens"])) == then.left == 50 - cut
    usage = {"prompt_tokens": 10 + cut, "completion_tokens": len(pieces) - cut + 1, "total_tokens": 11 + len(pieces)}
    rest = [opening(number=2, created=9), *(said(one, number=2, created=9) for one in pieces[cut:])]
    rest += [closing(number=2, created=9), chunk(None, number=2, created=9, usage=usage), DONE]
    for event in rest:
        out += kept.take(event)
    assert out.endswith(DONE)
    assert text_of(out) == "".join(pieces)
    seen = [json.loads(event.removeprefix(b"data: ")) for event in out.split(b"\n\n")[:-2]]
    assert {(one["id"], one["created"], one["model"]) for one in seen} == {("chatcmpl-1", 7, "m")}
    assert sum("role" in choice["delta"] for one in seen for choice in one["choices"]) == 1
    told = {"prompt_tokens": 10, "completion_tokens": len(pieces) + 1, "total_tokens": 11 + len(pieces)}
    assert seen[-1]["usage"] == told
    assert kept.total(Usage(usage["prompt_tokens"], usage["completion_tokens"])) == Usage(
        told["prompt_tokens"], told["completion_tokens"]
    )
    assert kept.counted == bool(cut)


def test_what_was_told_is_not_counted() -> None:
    """A client that asks for running usage has the tokens of every part told."""
    kept = kept_of()
    kept.take(opening() + said("a b c") + said(" d"))
    assert broke(kept, Usage(10, 5, 4)) == Resume(None)
    assert kept.so_far() == Usage(10, 5)
    kept.take(opening(number=2) + said(" e", number=2))
    assert kept.so_far() is None
    assert broke(kept, Usage(15, 1, 12)) == Resume(None)
    assert kept.total(Usage(16, 2, 14)) == Usage(10, 8, 10)
    assert not kept.counted


def test_chunks_that_are_no_tokens_are_estimated() -> None:
    kept = kept_of()
    kept.take(opening() + said("a") + said("b") + said(""))
    assert broke(kept, engine=Capability(0)) == Resume(None)
    assert kept.total(Usage(14, 1)) == Usage(10, 5)
    limited = kept_of(max_tokens=9)
    limited.take(opening() + said("a"))
    assert broke(limited, engine=Capability(0)) is Reason.LIMIT


HINDERS = [
    (chunk({"delta": {"tool_calls": [{"index": 0}]}}), Reason.TOOLS),
    (chunk({"delta": {"function_call": {"name": "f"}}}), Reason.TOOLS),
    (chunk({"delta": {"reasoning": "Well"}}), Reason.REASONING),
    (chunk({"delta": {"content": None, "reasoning_content": "Well"}}), Reason.REASONING),
    (chunk({"delta": {"content": "a", "audio": {"id": "x"}}}), Reason.FIELD),
    (chunk({"delta": {"content": "a"}, "logprobs": {"content": []}}), Reason.LOGPROBS),
    (chunk({"index": 1, "delta": {"content": "a"}}), Reason.SEVERAL),
    (chunk({"delta": {"content": 5}}), Reason.UNREADABLE),
    (b"data: {oops\n\n", Reason.UNREADABLE),
]


@each(("event", "why"), HINDERS)
def test_what_a_stream_brings_may_hinder(event: bytes, why: Reason) -> None:
    """Whether it comes first, last, or between chunks that are all alike; then nothing is kept any more."""
    for before, after in ((0, 2), (2, 0), (3, 3)):
        memory = Memory()
        kept = kept_of(memory)
        kept.take(opening())
        for _ in range(before):
            kept.take(said("a"))
        kept.take(event)
        for _ in range(after):
            kept.take(said("a"))
        assert broke(kept) is why
        assert memory.used == 0
        assert kept.take(said("a")) == said("a")


def test_what_means_nothing_hinders_nothing() -> None:
    """SGLang names its reasoning in every chunk, LMDeploy the role."""
    kept = kept_of()
    for text in ("a", "b", "c"):
        kept.take(chunk({"delta": {"reasoning_content": None, "role": "assistant", "content": text}}))
    assert broke(kept) == Resume(None)
    assert (kept.begun, kept._carried) == ("abc", 3)


def test_a_limit_that_is_reached_is_told() -> None:
    """SGLang tells the reason in a chunk of its own, which may be what is missing."""
    kept = kept_of(max_completion_tokens=2, max_tokens=7)
    kept.take(opening() + said("a") + said("b"))
    then = broke(kept)
    assert then == Finish("length")
    last, done, _ = kept.ending(then, usage=True).split(b"\n\n")
    assert json.loads(last.removeprefix(b"data: ")) == {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 7,
        "model": "m",
        "choices": [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}],
    }
    assert done + b"\n\n" == DONE


def test_the_end_tells_a_usage_that_was_told() -> None:
    kept = kept_of()
    kept.take(opening() + said("a") + closing())
    then = broke(kept, Usage(10, 2))
    assert then == Finish()
    assert kept.ending(then, usage=False) == DONE
    told, _, _ = kept.ending(then, usage=True).split(b"\n\n")
    assert json.loads(told.removeprefix(b"data: "))["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "total_tokens": 12,
    }


def test_a_completion_has_a_limit_where_none_is_stated() -> None:
    """OpenAI's sixteen tokens: the rest is told what is left of them."""
    body = raw({"model": "m", "prompt": "Once", "stream": True})
    kept = keep(COMPLETIONS, body, 0, RULES, Memory())
    assert isinstance(kept, Kept)
    for text in (" upon", " a"):
        kept.take(chunk({"text": text, "finish_reason": None}))
    assert broke(kept) == Resume(14)
    assert int(bytes(kept.fields()["max_tokens"])) == 14
    assert kept.begun == " upon a"


def test_what_is_kept_is_bounded() -> None:
    rules = ResumeRules(max_bytes=100, total_bytes=20_000)
    memory = Memory()
    first, second = kept_of(memory, rules), kept_of(memory, rules)
    third = keep(CHAT, raw({"messages": [1]}), 20_000, rules, memory)
    assert third is Reason.MEMORY
    first.take(said("x" * 101))
    assert broke(first) is Reason.BYTES
    memory.used += 20_000
    second.take(said("x" * 99))
    assert broke(second) is Reason.MEMORY
    assert memory.used == 20_000


def test_whoever_is_not_continued_is_not_kept() -> None:
    body = raw({"messages": [{"role": "user"}], "model": "m"})
    assert keep(CHAT, body, 0, ResumeRules(enabled=False), Memory()) is Reason.OFF
    for path in ("/v1/responses", "/v1/messages"):
        assert keep(RELAYED[path], body, 0, RULES, Memory()) is Reason.DIALECT
    assert keep(CHAT, {**body, "seed": msgspec.Raw(b"1")}, 0, RULES, Memory()) is Reason.SEED


def test_what_cannot_be_read_passes_as_it_is() -> None:
    kept = kept_of()
    kept.take(opening() + said("a"))
    assert broke(kept) == Resume(None)
    strange = b"data: {oops\n\n"
    assert kept.take(strange + said("b", number=2)) == strange + said("b")
