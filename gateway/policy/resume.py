"""Whether a stream that its engine broke off goes on at another one, and with what is left of its limit.

Rule 1: a stream goes on only where nobody could tell the seam by more than the words a model happened to choose.
Rule 2: what is not known to be harmless hinders: a field that nobody here has thought about is one.
Rule 3: an answer is never given more tokens than were asked for, so where what was delivered cannot be counted and a
limit holds, it does not go on.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping

import msgspec

from gateway.policy.retry import Cause


class Reason(enum.StrEnum):
    """Why a stream does not go on elsewhere; a metric label."""

    OFF = "off"
    """It is switched off, or the stream is a copy that nobody reads."""
    DIALECT = "dialect"
    """Its path's streams are not continued."""
    TOOLS = "tools"
    """A tool was called, or had to be."""
    FORMAT = "format"
    """The answer has to have a form, of which the rest alone would not."""
    LOGPROBS = "logprobs"
    SEVERAL = "several"
    """Several answers in one stream."""
    SEED = "seed"
    """The same seed would draw the beginning's numbers once more."""
    REASONING = "reasoning"
    """What the model thought is not part of what can be given back to it."""
    PENALTIES = "penalties"
    """They count what was written, and would begin anew."""
    STOP = "stop"
    """A stop string may lie across the seam, and makes engines hold back text in the middle of a token."""
    PROMPT = "prompt"
    """What was asked is not one text, or not one conversation, that can be written on."""
    CONTINUES = "continues"
    """The request continues an answer by itself."""
    FIELD = "field"
    """It has a field, or its stream brought one, of which it is not known what it means for the rest."""
    LIMIT = "limit"
    """It has a limit of tokens, and it is not known how many were delivered."""
    SPACE = "space"
    """It broke off after white space, which chat templates may cut off: it would come twice."""
    BYTES = "bytes"
    """More text was delivered than is kept of a stream."""
    MEMORY = "memory"
    """More is kept of all streams together than may be."""
    UNREADABLE = "unreadable"
    """What was delivered could not be read."""
    REQUEST = "request"
    """The engine says that the request is at fault."""
    ATTEMPTS = "attempts"
    """It has been continued as often as may be."""
    BUDGET = "budget"
    """As many streams as may be have been continued lately."""


class ResumeRules(msgspec.Struct, frozen=True, gc=False):
    """``max_bytes``: text kept of one stream, ``total_bytes``: of all together, with what they were asked.

    ``attempts``: how often one stream is continued; ``share``: of everything under way that may be continued within
    ``window`` seconds, and ``spare`` more, so that a small gateway may lose an engine too.
    """

    enabled: bool = True
    max_bytes: int = 256 * 1024
    total_bytes: int = 256 * 1024 * 1024
    attempts: int = 3
    share: float = 1.0
    spare: float = 32.0
    window: float = 10.0


# --- what was asked --------------------------------------------------------------------------------------------------

_HARMLESS = frozenset(
    {
        "model",
        "messages",
        "prompt",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "max_tokens",
        "max_completion_tokens",
        "logit_bias",
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "reasoning_effort",
        "chat_template_kwargs",
        "tools",
        "parallel_tool_calls",
        "ignore_eos",
        "stop_token_ids",
        "verbosity",
    }
)
"""They mean for the rest of an answer what they meant for its beginning; tools do while none is called."""

_decode = msgspec.json.Decoder().decode
_Harmless = Callable[[object], bool]


def _nothing(value: object) -> bool:
    """Nothing, or false: as if it had not been said. A zero may mean something."""
    return value is None or value is False or value == [] or value == {} or value == ""


def _at(neutral: float) -> _Harmless:
    return lambda value: value is None or (not isinstance(value, bool) and value == neutral)


def _short(value: object) -> bool:
    """No stop string of more than a character: one of a character lies across nothing."""
    strings = value if isinstance(value, list) else [value]
    return all(one is None or (isinstance(one, str) and len(one) <= 1) for one in strings)


def _text(value: object) -> bool:
    return value is None or (isinstance(value, dict) and value.get("type") == "text")


_CHECKED: Mapping[str, tuple[_Harmless, Reason]] = {
    "n": (_at(1), Reason.SEVERAL),
    "best_of": (_at(1), Reason.SEVERAL),
    "use_beam_search": (_nothing, Reason.SEVERAL),
    "echo": (_nothing, Reason.PROMPT),
    "suffix": (_nothing, Reason.PROMPT),
    "logprobs": (_nothing, Reason.LOGPROBS),
    "top_logprobs": (_at(0), Reason.LOGPROBS),
    "prompt_logprobs": (lambda value: value is None, Reason.LOGPROBS),
    "return_token_ids": (_nothing, Reason.LOGPROBS),
    "seed": (lambda value: value is None, Reason.SEED),
    "presence_penalty": (_at(0), Reason.PENALTIES),
    "frequency_penalty": (_at(0), Reason.PENALTIES),
    "repetition_penalty": (_at(1), Reason.PENALTIES),
    "stop": (_short, Reason.STOP),
    "tool_choice": (lambda value: value in (None, "auto", "none"), Reason.TOOLS),
    "functions": (_nothing, Reason.TOOLS),
    "function_call": (_nothing, Reason.TOOLS),
    "response_format": (_text, Reason.FORMAT),
    "structured_outputs": (_nothing, Reason.FORMAT),
    "guided_json": (_nothing, Reason.FORMAT),
    "guided_regex": (_nothing, Reason.FORMAT),
    "guided_choice": (_nothing, Reason.FORMAT),
    "guided_grammar": (_nothing, Reason.FORMAT),
    "json_schema": (_nothing, Reason.FORMAT),
    "regex": (_nothing, Reason.FORMAT),
    "ebnf": (_nothing, Reason.FORMAT),
    "modalities": (lambda value: value in (None, ["text"]), Reason.FORMAT),
    "min_tokens": (_at(0), Reason.LIMIT),
    "length_penalty": (_at(1), Reason.FIELD),
    "skip_special_tokens": (lambda value: value in (None, True), Reason.FIELD),
    "continue_final_message": (_nothing, Reason.CONTINUES),
    "add_generation_prompt": (lambda value: value in (None, True), Reason.CONTINUES),
}


def hindrance(fields: Mapping[str, msgspec.Raw], *, chat: bool) -> Reason | None:
    """Return why an answer to this body could not be continued, whatever is delivered of it; None: it could.

    ``fields`` are the body's, each as JSON; ``chat`` tells a conversation from a plain prompt.
    """
    asked = bytes(fields.get("messages" if chat else "prompt", b"")).strip()
    if not (asked.startswith(b"[") and asked[1:].strip() != b"]" if chat else asked.startswith(b'"')):
        return Reason.PROMPT
    if _HARMLESS.issuperset(fields):
        return None
    for name, raw in fields.items():
        if name not in _HARMLESS:
            reason = _hinders(name, raw)
            if reason is not None:
                return reason
    return None


def _hinders(name: str, raw: msgspec.Raw) -> Reason | None:
    try:
        value = _decode(raw)
    except (ValueError, RecursionError):
        return Reason.FIELD
    harmless, reason = _CHECKED.get(name, (_nothing, Reason.FIELD))
    return None if harmless(value) else reason


# --- what was delivered ----------------------------------------------------------------------------------------------


class Delivered(msgspec.Struct, frozen=True, gc=False):
    """What of an answer has reached the client."""

    text: str
    tokens: int
    told: bool = False
    """Whether the engines told how many tokens it is; else its chunks were counted."""
    chunked: bool = True
    """Whether the engines put one token into a chunk."""
    finish: str | None = None
    """The reason for its end, where that was told."""

    @property
    def counted(self) -> bool:
        """Whether it is known how many tokens it is. More words than chunks: some chunks held more than a token."""
        return self.told or (self.chunked and len(self.text.split()) <= self.tokens)


class Resume(msgspec.Struct, frozen=True, gc=False):
    """It goes on elsewhere; ``left``: the tokens that it may still have, None where no limit holds."""

    left: int | None


class Finish(msgspec.Struct, frozen=True, gc=False):
    """Everything was said but the end; ``reason``: the one that is still to be told."""

    reason: str | None = None


_THOUGHT = ("<think>", "</think>")
"""What a model thinks where the engine does not tell it apart; chat templates leave it out."""


def decide(
    cause: Cause, delivered: Delivered, limit: int | None, moves: int, rules: ResumeRules, *, chat: bool
) -> Resume | Finish | Reason:
    """Return what becomes of a stream that broke off; ``limit``: the tokens its answer may have, ``moves``: how often
    it was continued before."""
    if delivered.finish is not None:
        return Finish()
    if cause is Cause.REQUEST:
        return Reason.REQUEST
    text = delivered.text
    if chat and text:
        if text[-1].isspace():
            return Reason.SPACE
        if any(mark in text for mark in _THOUGHT):
            return Reason.REASONING
    left = None
    if limit is not None:
        if not delivered.counted:
            return Reason.LIMIT
        left = limit - delivered.tokens
        if left <= 0:
            return Finish("length")
    return Reason.ATTEMPTS if moves >= rules.attempts else Resume(left)


# --- how many at once ------------------------------------------------------------------------------------------------


class Moves(msgspec.Struct, frozen=True, gc=False):
    """How many streams were continued lately, and how many requests were under way, as of ``at`` (seconds of one
    monotonic clock); both fade."""

    lately: float = 0.0
    under_way: float = 0.0
    at: float = 0.0


def moved(moves: Moves, now: float, under_way: int, rules: ResumeRules) -> Moves | None:
    """Return the same after one more stream is continued, None when none may be now.

    The budget of retries is not asked: it is a share of the requests that come, and a dead engine breaks off those of
    minutes at once. What is bounded here is how much of all work may be done a second time.
    """
    kept = math.exp(-max(0.0, now - moves.at) / rules.window)
    lately = moves.lately * kept + 1.0
    # What ends in good order must not take away what those that are left may do.
    under_way_lately = max(float(under_way), moves.under_way * kept)
    if lately > rules.spare + rules.share * under_way_lately:
        return None
    return Moves(lately, under_way_lately, max(now, moves.at))
