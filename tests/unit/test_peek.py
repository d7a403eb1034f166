"""Bodies of clients: everything that can be said without an engine is said here, and what was read is what is sent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.protocol import Dispatch, plain_target
from engines.registry import ENGINES
from engines.vllm import Vllm
from gateway.api.media import MediaRules
from gateway.api.peek import (
    FORBIDDEN,
    MAX_MODEL_NAME,
    Asked,
    _at_a_glance,
    _field_by_field,
    _take_apart,
    check_surrogates,
    read_body,
)
from gateway.api.routes import RELAYED
from gateway.errors import Kind, Refusal
from gateway.settings import Caps
from tests.support.table import each

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
MEDIA = MediaRules()
UNCAPPED = Caps()


def read(body: bytes | str, path: str = CHAT, caps: Caps = UNCAPPED) -> Asked | Refusal:
    return read_body(body.encode() if isinstance(body, str) else body, RELAYED[path], caps, MEDIA)


def ask(path: str = CHAT, caps: Caps = UNCAPPED, /, **fields: Any) -> Asked | Refusal:
    return read(json.dumps({"model": "m", **fields}), path, caps)


def asked(answer: Asked | Refusal) -> Asked:
    assert isinstance(answer, Asked), answer
    return answer


def refused(answer: Asked | Refusal, kind: Kind = Kind.INVALID, param: str | None = None) -> str:
    assert isinstance(answer, Refusal), answer
    assert (answer.kind, answer.param) == (kind, param), answer
    return answer.message


def sent(answer: Asked | Refusal, path: str = CHAT) -> dict[str, Any]:
    """What an engine would get, every key as often as it stands there."""
    body = Vllm().prepare(path, asked(answer).fields, Dispatch(plain_target("m"), ask_usage=False))
    pairs: list[tuple[str, Any]] = json.loads(body, object_pairs_hook=lambda found: found)
    assert len(dict(pairs)) == len(pairs)
    decoded: dict[str, Any] = json.loads(body)
    return decoded


# --- what is no request ------------------------------------------------------------------------------------------

MALFORMED: list[tuple[bytes, str]] = [
    (b"", "empty"),
    (b" ", "not valid JSON"),
    (b'{"model":"m"', "not valid JSON"),
    (b'{"model":"m","messages":[{"role":"us', "not valid JSON"),
    (b'{"model":"m",}', "not valid JSON"),
    (b'{"model":"m"}{"model":"m"}', "not valid JSON"),
    (b'{"model":"m"}\x00', "not valid JSON"),
    (b"{'model':'m'}", "not valid JSON"),
    (b'{model:"m"}', "not valid JSON"),
    (b'{"model":"m","a":NaN}', "not valid JSON"),
    (b'{"model":"m","a":[NaN]}', "not valid JSON"),
    (b'{"model":"m","a":Infinity}', "not valid JSON"),
    (b'{"model":"m","a":-Infinity}', "not valid JSON"),
    (b'{"model":"m","a":01}', "not valid JSON"),
    (b'{"model":"m","a":+1}', "not valid JSON"),
    (b'{"model":"m","a":.5}', "not valid JSON"),
    (b'{"model":"m","a":1.}', "not valid JSON"),
    (b'{"model":"m","a":0x10}', "not valid JSON"),
    (b'{"model":"m","a":"\x01"}', "not valid JSON"),
    (b'{"model":"m","a":"line\nbreak"}', "not valid JSON"),
    (b'{"model":"m","a":"\\x41"}', "not valid JSON"),
    (b'{"model":"m","a":"\\u12"}', "not valid JSON"),
    (b'{"model":"m"/*c*/}', "not valid JSON"),
    (b'\xef\xbb\xbf{"model":"m"}', "not valid JSON"),
    ('{"model":"m"}'.encode("utf-16"), "not valid UTF-8"),
    (b'{"model":"\xff"}', "not valid UTF-8"),
    (b'{"model":"m","\xff":1}', "not valid UTF-8"),
    (b'{"model":"m","messages":["\xc3"]}', "not valid UTF-8"),
    (b'{"model":"m","messages":["\xed\xa0\x80"]}', "not valid UTF-8"),
    (b'{"model":"m","messages":["\xc0\xaf"]}', "not valid UTF-8"),
    (b"[]", "no object"),
    (b'["model"]', "no object"),
    (b'"model"', "no object"),
    (b"7", "no object"),
    (b"null", "no object"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a":' * 100_000, "nested too deeply"),
    (b'{"model":"m","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    (b'{"model":"m","messages":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "nested too deeply"),
]


@each(("body", "told"), MALFORMED)
@each("path", [CHAT, RESPONSES])
def test_what_is_no_json_object_is_refused(body: bytes, told: str, path: str) -> None:
    message = refused(read(body, path)).lower()
    if told == "no object" or body.startswith(b"["):
        assert "object" in message or "nested" in message
    else:
        assert told.lower() in message


@each("size", [1, 10, 25, 40, 60])
def test_a_truncated_body_is_refused_wherever_it_breaks_off(size: int) -> None:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "naïve é€😀"}], "n": 1}).encode()
    assert isinstance(read(body), Asked)
    refused(read(body[:size]))
    refused(read(body[:-1]))


MODELS: list[Any] = [None, 5, True, [], ["m"], {"name": "m"}, "", "x" * (MAX_MODEL_NAME + 1)]


@each("model", MODELS)
def test_a_model_is_needed(model: object) -> None:
    """vLLM would serve its base model without one, whatever the key may use."""
    refused(ask(model=model), param="model")


def test_a_missing_model_is_told_where_to_find_one() -> None:
    assert "/v1/models" in refused(read('{"messages":[]}'), param="model")


def test_a_model_may_have_any_characters() -> None:
    name = "org/näme:ver@1 \t\"'" + "x" * 200
    assert asked(ask(model=name)).model == name


FLAGS = [('"true"', None), ("1", None), ("0", None), ("[]", None), ("{}", None), ('""', None), ("1.0", None),
         ("true", True), ("false", False), ("null", False)]  # fmt: skip


@each(("raw", "stream"), FLAGS)
def test_stream_is_a_boolean(raw: str, stream: bool | None) -> None:
    """An engine may take "true" or 1 for it; then one side would stream and the other not."""
    answer = read(f'{{"model":"m", "stream" : {raw} }}')
    if stream is None:
        refused(answer, param="stream")
    else:
        assert asked(answer).stream is stream


@each("path", sorted(RELAYED))
def test_only_some_paths_stream(path: str) -> None:
    answer = ask(path, stream=True)
    if RELAYED[path].streams:
        assert asked(answer).stream
    else:
        assert path in refused(answer, param="stream")
    assert not asked(ask(path, stream=False)).stream


OPTIONS: list[tuple[Any, bool]] = [({"include_usage": True}, True),
           ({"include_usage": False}, False), ({}, False), (None, False),
           ({"continuous_usage_stats": True}, False), ({"include_usage": None}, False), ({"include_usage": 1}, True),
           ([], True), ("yes", True)]  # fmt: skip


@each(("options", "wants"), OPTIONS)
def test_whether_the_client_asks_for_usage(options: object, wants: bool) -> None:
    """What is malformed is the engine's to refuse: nothing is hidden then."""
    assert asked(ask(stream=True, stream_options=options)).wants_usage is wants
    assert not asked(ask(stream=True)).wants_usage


# --- what is sent ------------------------------------------------------------------------------------------------


def test_of_two_equal_keys_the_last_one_counts_and_is_sent_alone() -> None:
    """Also when one of them is spelt with escapes: engines differ in which one they would take."""
    body = '{"model":"a","n":9,"messages":[1],"\\u006e":1,"model":"m","messages":[2]}'
    answer = asked(read(body, caps=Caps(n=1)))
    assert answer.model == "m"
    assert sent(answer) == {"model": "m", "n": 1, "messages": [2]}
    refused(read('{"model":"m","n":1,"\\u006e":9}', caps=Caps(n=1)), param="n")


def test_a_control_field_is_not_hidden_by_its_double() -> None:
    refused(read('{"model":"m","priority":null,"priority":1}'), Kind.FORBIDDEN_FIELD, "priority")
    refused(read('{"model":"m","priorit\\u0079":1}'), Kind.FORBIDDEN_FIELD, "priority")


@each("field", sorted(FORBIDDEN))
@each("path", [CHAT, RESPONSES, MESSAGES, "/v1/embeddings"])
def test_what_steers_an_engine_is_not_for_clients(field: str, path: str) -> None:
    """Even as null: the field's presence is what some engines look at."""
    values: list[Any] = [None, 1, "x", {}]
    for value in values:
        message = refused(ask(path, **{field: value}), Kind.FORBIDDEN_FIELD, field)
        assert field in message


def test_every_engines_control_fields_are_refused_for_all() -> None:
    for engine in ENGINES.values():
        assert engine.control_fields <= FORBIDDEN


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
UNREAD = st.text(max_size=10).filter(lambda name: name not in FORBIDDEN | {"model", "stream", "n", "messages"})


@given(fields=st.dictionaries(UNREAD, VALUES, max_size=6), indent=st.sampled_from([None, 2]), plain=st.booleans())
def test_everything_else_passes_as_it_came(fields: dict[str, Any], indent: int | None, plain: bool) -> None:
    """Field by field the very bytes, so that no number and no escape is read and written again."""
    body = json.dumps({"model": "m", **fields}, indent=indent, ensure_ascii=plain)
    answer = asked(read(body))
    assert sent(answer) == {"model": "m", **fields}
    if indent is None:
        for name, value in fields.items():
            assert bytes(answer.fields[name]).decode() == json.dumps(value, ensure_ascii=plain)


@given(body=st.binary(max_size=60) | st.text(alphabet='{}[]":,\\umodelstrn0eE.-1 ', max_size=40).map(str.encode))
def test_no_bytes_make_it_fail(body: bytes) -> None:
    """Every answer is one of two: a request, or a refusal."""
    for text in (body, b'{"model":"m",' + body + b"}", b'{"model":"m","messages":[' + body + b'],"n":1,"data":"url"}'):
        for path in (CHAT, COMPLETIONS, RESPONSES):
            assert isinstance(read(text, path, Caps(n=1, max_tokens=5)), Asked | Refusal)


FIELD_NAMES = [
    "model",
    "stream",
    "stream_options",
    "n",
    "best_of",
    "max_tokens",
    "max_completion_tokens",
    "prompt",
    "messages",
    "input",
    "chat_template_kwargs",
    "temperature",
    "max_output_tokens",
    "background",
    "x",
]


@given(
    fields=st.dictionaries(st.sampled_from(FIELD_NAMES), VALUES, max_size=8),
    path=st.sampled_from(sorted(RELAYED)),
    capped=st.booleans(),
)
def test_no_types_of_known_fields_make_it_fail(fields: dict[str, Any], path: str, capped: bool) -> None:
    caps = Caps(n=2, max_tokens=7) if capped else UNCAPPED
    assert isinstance(read(json.dumps(fields), path, caps), Asked | Refusal)
    assert isinstance(read(json.dumps({**fields, "model": "m"}), path, caps), Asked | Refusal)


NOT_BINDING = Caps(max_tokens=2**31 - 1, context=1)
"""Caps that refuse nothing here and write nothing: what they change is only how the body is read."""
COUNT = st.sampled_from([None, -1, 0, 1, 7, 7.0, 2**31 - 1, 2**31])
KNOWN = st.fixed_dictionaries(
    {},
    optional={
        "model": st.sampled_from(["m", "m", "m", "", None, 5]),
        "stream": st.booleans() | VALUES,
        "max_tokens": COUNT | VALUES,
        "max_completion_tokens": COUNT | VALUES,
        "max_output_tokens": COUNT | VALUES,
        "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans() | VALUES}) | VALUES,
        "temperature": st.floats(allow_nan=False, allow_infinity=False) | VALUES,
        "top_p": st.integers() | VALUES,
        "x": VALUES,
    },
)


@given(
    fields=KNOWN, path=st.sampled_from(sorted(RELAYED)), huge=st.sampled_from([None, "temperature", "max_tokens", "n"])
)
def test_keys_with_and_without_caps_are_read_alike(fields: dict[str, Any], path: str, huge: str | None) -> None:
    """What holds caps reads field by field, what need not may read at a glance: both say the same."""
    body = json.dumps(fields)
    if huge is not None:
        body = body[:-1] + ("," if fields else "") + f'"{huge}":1e999}}'
    plain, capped = read(body, path), read(body, path, NOT_BINDING)
    assert type(plain) is type(capped)
    if isinstance(plain, Asked) and isinstance(capped, Asked):
        assert {name: bytes(raw) for name, raw in plain.fields.items()} == {
            name: bytes(raw) for name, raw in capped.fields.items()
        }
        for name in ("model", "stream", "wants_usage", "max_tokens"):
            assert getattr(plain, name) == getattr(capped, name)
    else:
        assert plain == capped


# --- numbers -----------------------------------------------------------------------------------------------------

COUNTS = ["1.5", "1.0", '"1"', "true", "[1]", "{}", "1e3", "1e999", "-1", "2147483648", "9" * 400]


@each("raw", COUNTS)
@each(
    ("path", "name"),
    [
        (CHAT, "n"),
        (CHAT, "max_tokens"),
        (CHAT, "max_completion_tokens"),
        (COMPLETIONS, "best_of"),
        (RESPONSES, "max_output_tokens"),
        (MESSAGES, "max_tokens"),
    ],
)
def test_counts_are_whole_numbers(path: str, name: str, raw: str) -> None:
    body = f'{{"model":"m","{name}":{raw}}}'
    refused(read(body, path, Caps(n=10)), param=name)
    if name not in RELAYED[path].n_fields:
        refused(read(body, path), param=name)


@each("raw", ["1e999", "-1e999", "1e400", "123456789e400"])
@each("name", ["temperature", "top_p", "presence_penalty", "repetition_penalty"])
def test_numbers_no_float_can_hold_are_refused(name: str, raw: str) -> None:
    """JSON allows them; an engine would compute with infinity."""
    refused(read(f'{{"model":"m","{name}":{raw}}}'), param=name)


@each("raw", ["0.1", "1e-400", "-0", "2", '"0.5"', "null", "1E2", "{}"])
def test_other_numbers_and_types_are_the_engines_to_judge(raw: str) -> None:
    assert bytes(asked(read(f'{{"model":"m","temperature":{raw}}}')).fields["temperature"]) == raw.encode()


# --- surrogates --------------------------------------------------------------------------------------------------

HALVES = ["\\ud83d\\ud83d\\ude00",
          "\\ud800", "\\udfff", "\\uDBFF", "\\uDC00", "\\ud83d\\ud83d", "\\ude00\\ud83d", "\\ud83d x \\ude00",
          "\\ud83d\\\\ude00", "\\ud83d\\n\\ude00", "\\\\\\ud800", "a\\\\\\\\\\udc00", "\\ud83d\\u0041",
          "\\ud83d\\ude00\\ud83d", "\\ud83d\\ude00\\ude00", "\\ud83d" + "x" * 50]  # fmt: skip
WHOLE = ["\\ud83d\\ude00",
         "\\uD83D\\uDE00", "\\\\ud800", "\\\\\\\\ud800", "\\\\\\ud83d\\ude00", "\\u00e9", "\\u005cud800",
         "\\ud83d\\ude00\\ud83d\\ude01", "ud800", "\\\\u005cud800", "\\ue000\\ud7ff"]  # fmt: skip


def encodes(text: str) -> bool:
    """Whether Python's reader finds text in a JSON string that can be written as UTF-8: the definition."""
    try:
        json.loads(text).encode()
    except UnicodeEncodeError:
        return False
    return True


@each("text", HALVES)
@each("form", ['{"model":"m","stop":"%s"}', '{"model":"m","a":[{"b":"%s"}],"c":"ddddddddddddddddd"}',
                                  '{"model":"m","%s":1}', '{"model":"%s"}'])  # fmt: skip
def test_half_a_surrogate_pair_is_refused(text: str, form: str) -> None:
    """vLLM answers 500 to one; the client is told what is wrong, wherever it stands."""
    assert not encodes(f'"{text}"')
    assert "half of a surrogate pair" in refused(read(form % text))


@each("text", WHOLE)
def test_whole_pairs_and_escaped_backslashes_pass(text: str) -> None:
    assert encodes(f'"{text}"')
    assert bytes(asked(read(f'{{"model":"m","stop":"{text}"}}')).fields["stop"]).decode() == f'"{text}"'


PIECES = st.lists(
    st.sampled_from(["\\ud83d", "\\ude00", "\\uD800", "\\uDFFF", "\\\\", "\\u0041", "ud800", '\\"', "x", "é", "\\n"]),
    max_size=8,
).map("".join)


@given(text=PIECES, where=st.integers(0, 5))
def test_surrogates_are_judged_as_python_does(text: str, where: int) -> None:
    string = f'"{"p" * where}{text}"'
    found = check_surrogates(string.encode())
    assert (found is None) == encodes(string)
    answer = read(f'{{"model":"m","x":{string}}}')
    assert isinstance(answer, Asked) == encodes(string)


class CountingBytes(bytes):
    """Counts single bytes looked at."""

    looks = 0

    def __getitem__(self, where):  # type: ignore[no-untyped-def]
        self.looks += 1
        return super().__getitem__(where)


def test_many_backslashes_cost_no_more_than_their_number() -> None:
    """Each run is walked back once, however many escapes there are."""
    body = CountingBytes((b"\\\\" * 300 + b"\\ud83d\\ude00") * 300)
    assert check_surrogates(body) is None
    assert 300 * 600 <= body.looks <= len(body)


# --- caps --------------------------------------------------------------------------------------------------------

LIMITS = [(CHAT, "max_tokens"), (CHAT, "max_completion_tokens"), (COMPLETIONS, "max_tokens"),
          (RESPONSES, "max_output_tokens"), (MESSAGES, "max_tokens")]  # fmt: skip


@each(("path", "name"), LIMITS)
def test_the_output_limit_is_capped(path: str, name: str) -> None:
    caps = Caps(max_tokens=100)
    assert sent(ask(path, caps, **{name: 100}), path)[name] == 100
    assert asked(ask(path, caps, **{name: 100})).max_tokens == 100
    message = refused(ask(path, caps, **{name: 101}), param=name)
    assert "100" in message
    assert "101" in message
    assert asked(ask(path, **{name: 10**6})).max_tokens == 10**6
    assert "at least 1" in refused(ask(path, **{name: 0}), Kind.INVALID, name)
    assert "at least 1" in refused(ask(path, caps, **{name: 0}), Kind.INVALID, name)


@pytest.mark.parametrize(
    ("path", "name", "written"),
    [
        (CHAT, "max_tokens", 100),
        (RESPONSES, "max_output_tokens", 100),
        (MESSAGES, "max_tokens", 100),
        (COMPLETIONS, "max_tokens", 16),
    ],
)
def test_where_no_limit_is_stated_the_cap_is_written(path: str, name: str, written: int) -> None:
    """But never more than the path gives by itself: OpenAI's completions stop after 16 tokens."""
    for stated in ({}, {name: None}):
        answer = asked(ask(path, Caps(max_tokens=100), **stated))
        assert answer.max_tokens == written
        assert sent(answer, path)[name] == written
    assert asked(ask(path)).max_tokens is None
    assert name not in sent(ask(path), path)
    assert asked(ask(path, Caps(max_tokens=5))).max_tokens == 5


def test_both_names_of_the_limit_are_capped() -> None:
    """An engine may take either one."""
    caps = Caps(max_tokens=100)
    refused(ask(CHAT, caps, max_completion_tokens=5, max_tokens=500), param="max_tokens")
    refused(ask(CHAT, caps, max_completion_tokens=500, max_tokens=5), param="max_completion_tokens")
    answer = asked(ask(CHAT, caps, max_completion_tokens=5, max_tokens=50))
    assert answer.max_tokens == 5
    assert asked(ask(CHAT, max_completion_tokens=5, max_tokens=50)).max_tokens == 5
    assert sent(answer) == {"model": "m", "max_completion_tokens": 5, "max_tokens": 50}
    assert sent(ask(CHAT, caps, max_completion_tokens=5)) == {"model": "m", "max_completion_tokens": 5}


def test_paths_without_output_get_no_limit() -> None:
    for path in ("/v1/embeddings", "/v1/rerank", "/v1/score", "/tokenize"):
        assert sent(ask(path, Caps(max_tokens=5)), path) == {"model": "m"}


PROMPTS: list[tuple[Any, int]] = [
    ("text", 1),
    ([1, 2, 3], 1),
    ([-1], 1),
    (["a"], 1),
    (["a", "b", "c"], 3),
    ([[1], [2]], 2),
    ([[1.0], [2.0], [3]], 3),
    ([["1"], ["2"]], 2),
    ([[], [], []], 3),
    (["a", {"b": 1}, None], 3),
    ([], 1),
    (None, 1),
    ({"a": 1}, 1),
]


@each(("prompt", "count"), PROMPTS)
def test_answers_are_counted_over_all_prompts(prompt: object, count: int) -> None:
    """In every spelling that an engine takes for a list of prompts."""
    for n in (None, 1, 2):
        total = count * (n or 1)
        assert isinstance(ask(COMPLETIONS, Caps(n=total), prompt=prompt, n=n), Asked)
        if total > 1:
            message = refused(ask(COMPLETIONS, Caps(n=total - 1), prompt=prompt, n=n), param="n")
            assert str(total) in message


def test_best_of_is_capped_like_n() -> None:
    """An engine computes all of them."""
    refused(ask(COMPLETIONS, Caps(n=2), n=1, best_of=3), param="best_of")
    assert isinstance(ask(COMPLETIONS, Caps(n=3), n=1, best_of=3), Asked)
    assert isinstance(ask(COMPLETIONS, n=1, best_of=3), Asked)


def test_n_is_capped_on_chat() -> None:
    refused(ask(CHAT, Caps(n=2), n=3), param="n")
    assert sent(ask(CHAT, Caps(n=2), n=2))["n"] == 2
    assert isinstance(ask(CHAT, Caps(n=1)), Asked)


# --- fields that cannot be served --------------------------------------------------------------------------------

STATEFUL = [("previous_response_id", "resp_1"), ("previous_response_id", ""), ("conversation", {"id": "c"}),
            ("conversation", "c"), ("background", True), ("background", 1), ("background", "true")]  # fmt: skip


@each(("name", "value"), STATEFUL)
def test_what_needs_state_in_one_engine_is_refused(name: str, value: object) -> None:
    message = refused(ask(RESPONSES, input="x", **{name: value}), Kind.UNSUPPORTED, name)
    assert name in message
    # On other paths it is an unknown field, and the engine's to judge.
    assert isinstance(ask(CHAT, **{name: value}), Asked)


@pytest.mark.parametrize("name", ["previous_response_id", "conversation", "background"])
def test_a_field_that_is_off_is_no_harm(name: str) -> None:
    """SDKs send nulls."""
    assert isinstance(ask(RESPONSES, input="x", **{name: None}), Asked)
    assert isinstance(ask(RESPONSES, input="x", background=False), Asked)


SMUGGLED = ['{"chat_template":"{{x}}"}', '{"chat_templat\\u0065":"x"}', '{"a":1,"chat_template":null}',
            '{"tokenize":false}', '{"conversation":[]}', '{"documents":[]}', '{"tools":[]}']  # fmt: skip


@each("raw", SMUGGLED)
@each("path", [CHAT, MESSAGES, "/tokenize"])
def test_a_template_is_not_smuggled_in_among_its_arguments(raw: str, path: str) -> None:
    refused(read(f'{{"model":"m","chat_template_kwargs":{raw}}}', path), Kind.FORBIDDEN_FIELD, "chat_template_kwargs")


def test_arguments_of_the_template_pass() -> None:
    for given_ in ({"enable_thinking": False}, {}, None):
        assert sent(ask(CHAT, chat_template_kwargs=given_))["chat_template_kwargs"] == given_
    for wrong in ("x", [1], 5):
        refused(ask(CHAT, chat_template_kwargs=wrong), param="chat_template_kwargs")


_KNOWN = ("model", "stream", "max_tokens", "max_completion_tokens", "max_output_tokens", "temperature", "top_p")
_RAW = st.sampled_from(
    ("null", "true", "1", "-1", "0.5", "1e999", "4294967296", '"m"', '""', "[]", "{}", '"x' + "y" * 300 + '"')
)


@given(st.lists(st.tuples(st.sampled_from(_KNOWN), _RAW), max_size=8), st.sampled_from(sorted(RELAYED)))
def test_a_glance_says_what_a_look_at_each_field_says(pairs: list[tuple[str, str]], path: str) -> None:
    """The fast reading of a body either gives up or agrees with the slow one, whatever the fields hold."""
    body = ("{" + ",".join([f'"{name}":{raw}' for name, raw in [("model", '"m"'), *pairs]]) + "}").encode()
    fields = _take_apart(body)
    assert not isinstance(fields, Refusal)
    glance = _at_a_glance(fields, RELAYED[path], Caps())
    if glance is not None:
        assert glance == _field_by_field(dict(fields), RELAYED[path], Caps())
