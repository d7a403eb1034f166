"""Which streams go on at another engine: never one that could not be continued faithfully, never beyond its limit."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.policy.resume import (
    _CHECKED,
    _HARMLESS,
    Delivered,
    Finish,
    Moves,
    Reason,
    Resume,
    ResumeRules,
    decide,
    hindrance,
    moved,
)
from gateway.policy.retry import Cause
from tests.support.table import each

RULES = ResumeRules()
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
COMPLETION = {"model": "m", "prompt": "Once", "stream": True}

HINDERS = [
    ("n", 2, Reason.SEVERAL),
    ("best_of", 3, Reason.SEVERAL),
    ("use_beam_search", True, Reason.SEVERAL),
    ("echo", True, Reason.PROMPT),
    ("suffix", "end", Reason.PROMPT),
    ("logprobs", True, Reason.LOGPROBS),
    # For a completion: the probability of what was drawn, without rivals.
    ("logprobs", 0, Reason.LOGPROBS),
    ("top_logprobs", 2, Reason.LOGPROBS),
    ("prompt_logprobs", 0, Reason.LOGPROBS),
    ("return_token_ids", True, Reason.LOGPROBS),
    ("seed", 0, Reason.SEED),
    ("presence_penalty", 0.5, Reason.PENALTIES),
    ("frequency_penalty", -1, Reason.PENALTIES),
    ("repetition_penalty", 1.1, Reason.PENALTIES),
    ("stop", "ab", Reason.STOP),
    ("stop", ["a", "\n\n"], Reason.STOP),
    ("tool_choice", "required", Reason.TOOLS),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}, Reason.TOOLS),
    ("functions", [{"name": "f"}], Reason.TOOLS),
    ("function_call", "auto", Reason.TOOLS),
    ("response_format", {"type": "json_object"}, Reason.FORMAT),
    ("response_format", {"type": "json_schema", "json_schema": {}}, Reason.FORMAT),
    ("structured_outputs", {"regex": "a+"}, Reason.FORMAT),
    ("guided_json", {"type": "object"}, Reason.FORMAT),
    ("guided_regex", "a", Reason.FORMAT),
    ("guided_choice", ["a"], Reason.FORMAT),
    ("guided_grammar", "g", Reason.FORMAT),
    ("json_schema", "{}", Reason.FORMAT),
    ("regex", "a", Reason.FORMAT),
    ("ebnf", "g", Reason.FORMAT),
    ("modalities", ["text", "audio"], Reason.FORMAT),
    ("min_tokens", 5, Reason.LIMIT),
    ("length_penalty", 2, Reason.FIELD),
    ("skip_special_tokens", False, Reason.FIELD),
    ("continue_final_message", True, Reason.CONTINUES),
    ("add_generation_prompt", False, Reason.CONTINUES),
    ("something_new", 1, Reason.FIELD),
    ("something_new", 0, Reason.FIELD),
]
NEUTRAL = {
    "n": 1,
    "best_of": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0,
    "repetition_penalty": 1.0,
    "stop": ["\n", ""],
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "min_tokens": 0,
    "length_penalty": 1,
    "skip_special_tokens": True,
    "add_generation_prompt": True,
}


def raw(fields: dict[str, object]) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}


@each(("name", "value", "reason"), HINDERS)
def test_what_cannot_be_continued_faithfully_never_is(name: str, value: object, reason: Reason) -> None:
    for body, chat in ((CHAT, True), (COMPLETION, False)):
        assert hindrance(raw({**body, name: value}), chat=chat) is reason


def test_every_field_that_is_looked_at_is_tried_above() -> None:
    assert {name for name, _, _ in HINDERS} == {*_CHECKED, "something_new"}


@given(st.sets(st.sampled_from([*_CHECKED, *_HARMLESS])))
def test_what_says_nothing_hinders_nothing(names: set[str]) -> None:
    """Left out, null, or with the value that it has when it is left out."""
    for body, chat in ((CHAT, True), (COMPLETION, False)):
        assert hindrance(raw({**dict.fromkeys(names), **body}), chat=chat) is None
        assert hindrance(raw({**{name: NEUTRAL.get(name) for name in names}, **body}), chat=chat) is None


@given(st.sampled_from(HINDERS), st.sets(st.sampled_from(sorted(_HARMLESS))))
def test_no_other_field_makes_up_for_one_that_hinders(one: tuple[str, object, Reason], names: set[str]) -> None:
    name, value, _ = one
    assert hindrance(raw({**dict.fromkeys(names, 1), **CHAT, name: value}), chat=True) is not None


@pytest.mark.parametrize("asked", [[], "Hi", None, {"role": "user"}])
def test_a_chat_needs_messages(asked: object) -> None:
    assert hindrance(raw({**CHAT, "messages": asked}), chat=True) is Reason.PROMPT


@each("asked", [["a"], ["a", "b"], [1, 2], [[1], [2]], None, 5])
def test_a_completion_needs_one_text(asked: object) -> None:
    assert hindrance(raw({**COMPLETION, "prompt": asked}), chat=False) is Reason.PROMPT


def test_what_is_no_json_is_not_continued() -> None:
    assert hindrance({**raw(CHAT), "n": msgspec.Raw(b"[" * 5000)}, chat=True) is Reason.FIELD


WORDS = st.lists(st.sampled_from([" a", "b", " word", "x\ny", "é"]), max_size=8)
LIMITS = st.none() | st.integers(1, 12)


@given(WORDS, st.booleans(), st.booleans(), LIMITS, st.integers(0, 4), st.sampled_from([*Cause]), st.booleans())
@example(["x\ny"], False, True, 5, 0, Cause.BROKEN, True)
def test_the_limit_holds(
    chunks: list[str], told: bool, chunked: bool, limit: int | None, moves: int, cause: Cause, chat: bool
) -> None:
    """Delivered and left together are exactly the limit, and where that is not known nothing goes on."""
    delivered = Delivered("".join(chunks), len(chunks), told, chunked)
    then = decide(cause, delivered, limit, moves, RULES, chat=chat)
    if isinstance(then, Resume):
        assert cause is not Cause.REQUEST
        assert moves < RULES.attempts
        assert (then.left is None) == (limit is None)
        if limit is not None:
            assert then.left == limit - len(chunks) > 0
            assert told or chunked
    elif isinstance(then, Finish):
        assert then.reason == "length"
        assert limit is not None
        assert len(chunks) >= limit
    elif then is Reason.LIMIT:
        assert limit is not None
        assert not told
    else:
        assert then in (Reason.REQUEST, Reason.ATTEMPTS)


def test_more_words_than_chunks_cannot_be_counted() -> None:
    """An engine that fell behind put several tokens into a chunk."""
    merged = Delivered("one two three", 2)
    assert decide(Cause.BROKEN, merged, 10, 0, RULES, chat=True) is Reason.LIMIT
    assert decide(Cause.BROKEN, merged, None, 0, RULES, chat=True) == Resume(None)
    assert decide(Cause.BROKEN, msgspec.structs.replace(merged, told=True), 10, 0, RULES, chat=True) == Resume(8)


@each("cause", Cause)
def test_what_was_said_in_full_only_ends(cause: Cause) -> None:
    for reason in ("stop", "length", "abort"):
        assert decide(cause, Delivered("x ", 1, finish=reason), 1, 9, RULES, chat=True) == Finish()


def test_a_chat_that_broke_off_after_white_space_does_not_go_on() -> None:
    """A template may cut it off, and it would come twice; a prompt is taken as it is."""
    for text in ("word ", "word\n\n", "\n"):
        delivered = Delivered(text, 2)
        assert decide(Cause.SLOW, delivered, None, 0, RULES, chat=True) is Reason.SPACE
        assert decide(Cause.SLOW, delivered, None, 0, RULES, chat=False) == Resume(None)


def test_what_the_model_thought_is_not_given_back_to_it() -> None:
    for text in ("<think>Let me", "<think>So.</think>Well"):
        assert decide(Cause.BROKEN, Delivered(text, 9), None, 0, RULES, chat=True) is Reason.REASONING


@given(st.integers(0, 2000), st.integers(0, 300), st.floats(0, 0.2), st.floats(0, 2))
def test_no_more_go_on_at_once_than_may(under_way: int, wanted: int, gap: float, share: float) -> None:
    rules = ResumeRules(share=share, window=10.0)
    moves, allowed, now = Moves(), 0, 0.0
    for _ in range(wanted):
        now += gap
        after = moved(moves, now, under_way, rules)
        if after is not None:
            moves, allowed = after, allowed + 1
    # Evenly spread, what fades of them within their time comes on top.
    most = (rules.spare + share * under_way) * (1 + now / rules.window) + 1
    assert allowed <= most
    assert allowed >= min(wanted, int(rules.spare))
    assert moved(moves, now + 1000, 0, rules) is not None


def test_one_engine_of_two_may_die_at_once() -> None:
    """All that it had goes on, however small or large the gateway is."""
    for under_way in (2, 64, 10_000):
        moves = Moves()
        for _ in range(under_way // 2):
            after = moved(moves, 1.0, under_way, RULES)
            assert after is not None
            moves = after
