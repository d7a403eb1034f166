"""What an engine may be made to fetch is decided here: nothing by default, exact hosts where the operator names them.

Everything goes through ``read_body``, as a request does.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.media import MediaRules
from gateway.api.peek import Asked, read_body
from gateway.api.routes import RELAYED
from gateway.errors import Kind, Refusal
from gateway.settings import Caps
from tests.support.table import each

CHAT, RESPONSES, MESSAGES, EMBEDDINGS = "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"
CLOSED = MediaRules()
HOST = "img.example.com"
OPEN = MediaRules(hosts=frozenset({HOST, "::1"}))
PIXEL = "data:image/png;base64," + base64.b64encode(b"\x89PNG" * 20).decode()


def ask(body: Any, path: str = CHAT, rules: MediaRules = CLOSED, caps: Caps | None = None) -> Asked | Refusal:
    """Read a body; a string is one already written down."""
    text = body if isinstance(body, str) else json.dumps({"model": "m", **body})
    return read_body(text.encode(), RELAYED[path], caps or Caps(), rules)


def refused(answer: Asked | Refusal, kind: Kind = Kind.MEDIA) -> Refusal:
    assert isinstance(answer, Refusal), answer
    assert answer.kind is kind, answer
    return answer


def chat_with(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(parts)}]}


def image(url: str) -> dict[str, Any]:
    return chat_with({"type": "image_url", "image_url": {"url": url}})


# --- remote URLs are off -----------------------------------------------------------------------------------------

REMOTE = [
    "http://example.com/a.png",
    "https://example.com/a.png",
    "HTTP://EXAMPLE.COM/",
    "hTTps://example.com",
    " http://example.com",
    "\thttps://example.com",
    "\n\r http://example.com",
    "\x00http://example.com",
    "\x1f\x0bhttp://example.com",
    "\u00a0http://example.com",
    "ht\ttp://example.com",
    "http\n://example.com",
    "\u200bhttp://example.com",
    "\ufeffhttp://example.com",
    "http:\\\\example.com",
    "http:/\\example.com",
    "\\\\example.com\\share\\a.png",
    "http:example.com",
    "http:/example.com",
    "http:///example.com",
    "//example.com/a.png",
    "http://user:password@example.com",
    "http://example.com:8080/",
    "http://[::1]/",
    "http://[fd00::1%25eth0]/",
    "http://169.254.169.254/latest/meta-data",
    "http://2130706433/",
    "http://0x7f.1/",
    "http://exämple.com/",
    "http://xn--exmple-cua.com/",
    "http://example.com./",
    "https://ⓔxample.com",
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "file:/etc/passwd",
    "file:etc/passwd",
    "ftp://example.com/a.png",
    "gopher://example.com/",
    "s3://bucket/key",
    "httpx://example.com/",
    "jar:http://example.com!/",
    "blob:http://example.com/1",
    "view-source:http://example.com",
    "/etc/passwd",
    "../secret.png",
    "secret.png",
    "C:\\secret.png",
    "~/secret.png",
    "",
    "iVBORw0KGgo=",
]


@each("url", REMOTE)
def test_no_url_but_data_is_passed_on(url: str) -> None:
    """Also nothing an engine might take for a file of its own disk, or repair into a URL."""
    refusal = refused(ask(image(url)))
    assert refusal.param == "messages"
    refused(ask(chat_with({"type": "image_url", "image_url": url})))
    refused(ask({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": url}}]}]},
                MESSAGES))  # fmt: skip
    refused(ask({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]}, RESPONSES))


URL = "https://example.com/a"
PLACES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, chat_with({"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": URL}})),
    (CHAT, chat_with({"type": "image_url", "image_url": {"detail": "low", "url": URL}})),
    (CHAT, chat_with({"image_url": URL})),
    (CHAT, chat_with({"type": "image_url", "input": {"image_url": {"url": URL}}})),
    (CHAT, chat_with({"type": "audio_url", "audio_url": {"url": URL}})),
    (CHAT, chat_with({"type": "video_url", "video_url": {"url": URL}})),
    (CHAT, chat_with({"type": "video_url", "video_url": [URL]})),
    (CHAT, chat_with({"type": "input_audio", "input_audio": {"data": URL, "format": "wav"}})),
    (CHAT, chat_with({"type": "file", "file": {"file_data": URL}})),
    (CHAT, chat_with({"type": "image_url", "image_url": {"url": URL}}, role="tool")),
    (CHAT, chat_with({"type": "image_url", "image_url": {"url": URL}}, role="system")),
    (CHAT, {"messages": [{"role": "user", "content": "x"}, *chat_with({"image_url": {"url": URL}})["messages"]]}),
    (MESSAGES, {"messages": [], "system": [{"type": "image", "source": {"type": "url", "url": URL}}]}),
    (
        MESSAGES,
        chat_with({"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": URL}}]}),
    ),
    (MESSAGES, chat_with({"type": "document", "source": {"type": "url", "url": URL}})),
    (RESPONSES, {"input": [{"type": "function_call_output", "output": [{"type": "input_image", "image_url": URL}]}]}),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": URL}]}]}),
    (RESPONSES, {"input": [{"type": "message", "content": [{"type": "input_image", "image_url": URL}]}]}),
    (RESPONSES, {"input": "x", "previous_input_messages": [{"content": [{"image_url": URL}]}]}),
    (EMBEDDINGS, chat_with({"type": "image_url", "image_url": {"url": URL}})),
    (EMBEDDINGS, {"input": [{"image_url": URL}]}),
    ("/v1/rerank", {"query": "q", "documents": {"content": [{"type": "image_url", "image_url": {"url": URL}}]}}),
    ("/v1/rerank", {"query": {"content": [{"image_url": {"url": URL}}]}, "documents": ["d"]}),
    ("/v1/score", {"text_1": "a", "text_2": {"content": [{"image_url": {"url": URL}}]}}),
    ("/v1/score", {"data_1": {"content": [{"image_url": {"url": URL}}]}, "data_2": "b"}),
    ("/tokenize", chat_with({"type": "image_url", "image_url": {"url": URL}})),
]


@each(("path", "body"), PLACES)
def test_a_url_is_found_wherever_a_dialect_has_one(path: str, body: dict[str, Any]) -> None:
    """And the same place is open to a data URL, so it is the URL that is refused."""
    refused(ask(body, path))
    data = json.loads(json.dumps(body).replace(URL, PIXEL))
    assert isinstance(ask(data, path), Asked)


@each("path", sorted(RELAYED))
def test_every_path_looks_at_its_media(path: str) -> None:
    """A path whose field names no media would let an engine fetch unseen; only text completions have none."""
    fields = RELAYED[path].media_fields
    assert fields or path == "/v1/completions"
    for name in fields:
        part = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}]}]
        refused(ask({name: part}, path))


def escaped(text: str) -> str:
    """Write a text as JSON of nothing but ``\\u`` escapes."""
    return "".join(f"\\u{ord(char):04x}" for char in text)


KEY, SHORT, SCHEME = escaped("image_url"), escaped("url"), escaped("https://a.b/")
HIDDEN = [
    f'{{"{KEY}":{{"url":"https://a.b/"}}}}',
    f'{{"image_url":{{"{SHORT}":"https://a.b/"}}}}',
    f'{{"image_url":{{"u{escaped("r")}l":"https://a.b/"}}}}',
    f'{{"{KEY}":"{SCHEME}"}}',
    f'{{"image_url":"{escaped("h")}ttp://a.b/"}}',
    f'{{"image_url":"http{escaped(":")}//a.b/"}}',
    '{"image_url":"\\t\\r\\nhttp:\\/\\/a.b"}',
    f'{{"{escaped("image_embeds")}":"x"}}',
    f'{{"image_{escaped("embeds")}":"x"}}',
    '{"image_url":"data:,x","image_url":"http://a.b"}',
]


@each("part", HIDDEN)
@each("field", ["messages", escaped("messages")])
def test_escapes_hide_nothing(part: str, field: str) -> None:
    refused(ask(f'{{"model":"m","{field}":[{{"role":"user","content":[{part}]}}]}}'))


def test_of_two_fields_the_one_that_is_sent_is_looked_at() -> None:
    """What was judged is what goes out: the last one."""
    good, bad = json.dumps(image(PIXEL)["messages"]), json.dumps(image(URL)["messages"])
    refused(ask(f'{{"model":"m","messages":{good},"messages":{bad}}}'))
    asked = ask(f'{{"model":"m","messages":{bad},"messages":{good}}}')
    assert isinstance(asked, Asked)
    assert json.loads(bytes(asked.fields["messages"])) == json.loads(good)


@each("key", ["image_embeds", "audio_embeds", "prompt_embeds", "anything_embeds"])
@each("value", ["AAAA", {"a": "AAAA"}, None, [1]])
@each("rules", [CLOSED, OPEN])
def test_tensors_never_pass(key: str, value: object, rules: MediaRules) -> None:
    """An engine unpickles them, wherever remote URLs stand."""
    refused(ask(chat_with({"type": key, key: value}), rules=rules))


# --- remote URLs of named hosts ----------------------------------------------------------------------------------

ALLOWED = [
    f"https://{HOST}/a.png",
    f"http://{HOST}",
    f"https://{HOST}:443/a?b=c#d",
    f"http://{HOST}:80/",
    "https://IMG.Example.COM/a.png",
    f"https://{HOST}/a@b",
    f"https://{HOST}/?mail=a@b",
    f"https://{HOST}/#a@b",
    "http://[::1]/",
]


@each("url", ALLOWED)
def test_a_named_host_may_be_fetched_from(url: str) -> None:
    assert isinstance(ask(image(url), rules=OPEN), Asked)


NOT_ALLOWED = [
    "https://example.com/",
    f"https://sub.{HOST}/",
    f"https://{HOST}.evil.com/",
    f"https://{HOST}./",
    f"https://{HOST}:8443/",
    f"https://{HOST}:0x50/",
    f"https://{HOST}:99999/",
    f"https://{HOST}@evil.com/",
    f"https://evil.com@{HOST}/",
    f"https://:x@{HOST}/",
    f"https://evil.com\\@{HOST}/",
    f"https://{HOST}\\@evil.com/",
    f"https://evil.com#@{HOST}/",
    f"https://evil.com?@{HOST}/",
    f"https://{HOST}%2eevil.com/",
    f"https://{HOST}%00.evil.com/",
    f"https://{HOST}\t.evil.com/",
    f"https://{HOST}\n.evil.com/",
    f"https://{HOST} .evil.com/",
    f" https://{HOST}/",
    f"https://{HOST}/\x7f",
    f"https:{HOST}/",
    f"https:/{HOST}/",
    f"https:///{HOST}/",
    f"//{HOST}/",
    f"ftp://{HOST}/",
    f"file://{HOST}/etc/passwd",
    "https://img\u3002example\u3002com/",
    "https://\uff49mg.example.com/",
    "https://img.example.com\u2044evil.com/",
    "https://img.example.com\uff0fevil.com/",
    "http://[::1/",
    "http://[::2]/",
    "http://::1/",
    "http://[0:0:0:0:0:0:0:1]/",
    "https://",
    "https:",
]


@each("url", NOT_ALLOWED)
def test_only_named_hosts_exactly_as_written(url: str) -> None:
    """What two parsers may read differently is not judged but refused."""
    refused(ask(image(url), rules=OPEN))


@given(text=st.text(max_size=30), prefix=st.sampled_from(["", "http:", "https://", f"https://{HOST}", "HTTP://"]))
def test_whatever_passes_as_remote_begins_with_a_named_host(text: str, prefix: str) -> None:
    """Drawn URLs: one that passes is ``data:``, or has the host between its slashes and the next delimiter."""
    url = prefix + text
    answer = ask(image(url), rules=OPEN)
    if isinstance(answer, Asked) and not url.lower().startswith("data:"):
        rest = url.lower().partition("://")[2]
        assert rest.startswith((HOST, "[::1]"))
        assert rest.removeprefix(HOST).removeprefix("[::1]")[:1] in ("", "/", "?", "#", ":")
        assert not set(url) & {" ", "\\", "\t", "\n", "\r"}


# --- data URLs ---------------------------------------------------------------------------------------------------


def sized(size: int) -> str:
    return "data:image/png;base64,".ljust(size, "A")


@each(
    ("path", "key", "limit"),
    [
        (CHAT, None, 1000),
        (EMBEDDINGS, None, 200),
        (CHAT, 300, 300),
        (EMBEDDINGS, 300, 200),
        (CHAT, 5000, 1000),
    ],
)
def test_data_urls_are_bounded_by_path_and_key(path: str, key: int | None, limit: int) -> None:
    """The smaller one holds, to the byte."""
    rules = MediaRules(data_url=1000, paths={EMBEDDINGS: 200})
    caps = Caps(media=key)
    assert isinstance(ask(image(sized(limit)), path, rules, caps), Asked)
    refusal = refused(ask(image(sized(limit + 1)), path, rules, caps), Kind.TOO_LARGE)
    assert str(limit) in refusal.message


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "A" * 101, "format": "wav"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 101}},
        {"type": "file", "file": {"file_data": "A" * 101}},
        {"type": "image_url", "image_url": {"url": " DATA:" + "A" * 95}},
    ],
)
def test_base64_fields_are_bounded_likewise(part: dict[str, Any]) -> None:
    rules = MediaRules(data_url=100)
    refused(ask(chat_with(part), rules=rules), Kind.TOO_LARGE)
    assert isinstance(ask(chat_with(part), rules=MediaRules(data_url=101)), Asked)


# --- no false alarms ---------------------------------------------------------------------------------------------

TOOL = {
    "type": "function",
    "function": {
        "name": "fetch",
        "description": "https://example.com is fetched",
        "parameters": {
            "type": "object",
            "properties": {"url": {"type": "string", "format": "uri", "default": URL, "examples": ["file:///x"]}},
        },
    },
}
TOOL_CALL = {"id": "1", "type": "function", "function": {"name": "fetch", "arguments": '{"url":"http://a.b"}'}}
HARMLESS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": [{"role": "user", "content": URL}]}),
    (CHAT, {"messages": [{"role": "user", "content": "file:///etc/passwd"}]}),
    (CHAT, {"messages": [{"role": "user", "content": 'say {"url":"http://a.b"} and "image_embeds"'}]}),
    (CHAT, chat_with({"type": "text", "text": URL})),
    (CHAT, chat_with({"type": "text", "text": "data:" + "A" * 100})),
    (CHAT, chat_with(URL)),
    (CHAT, {"messages": [{"role": "user", "name": URL, "content": "x"}], "tools": [TOOL]}),
    (CHAT, {"messages": [{"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}]}),
    (
        CHAT,
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": {"url": URL, "x_embeds": 1}}}],
                }
            ]
        },
    ),
    (CHAT, {"messages": [{"role": "tool", "tool_call_id": URL, "content": f'{{"url":"{URL}"}}'}]}),
    (
        CHAT,
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": "x",
                    "reasoning": URL,
                    "reasoning_content": URL,
                    "refusal": URL,
                    "annotations": [{"type": "url_citation", "url_citation": {"url": URL, "title": "t"}}],
                }
            ]
        },
    ),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "metadata": {"url": URL}, "user": URL}),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "response_format": {"json_schema": {"url": URL}}}),
    (MESSAGES, chat_with({"type": "tool_use", "id": "1", "name": "f", "input": {"url": URL, "image_embeds": "x"}})),
    (MESSAGES, chat_with({"type": "tool_result", "tool_use_id": "1", "content": URL})),
    (MESSAGES, chat_with({"type": "text", "text": "x", "citations": [{"url": URL, "cited_text": URL}]})),
    (MESSAGES, chat_with({"type": "thinking", "thinking": URL, "signature": "abc=="})),
    (MESSAGES, {"messages": [{"role": "user", "content": URL}], "system": URL}),
    (MESSAGES, chat_with({"type": "document", "title": URL, "context": URL, "source": {"type": "text", "data": "x"}})),
    (RESPONSES, {"input": URL, "instructions": URL}),
    (RESPONSES, {"input": [{"role": "user", "content": URL}]}),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text", "text": URL}]}]}),
    (RESPONSES, {"input": [{"type": "function_call", "name": "f", "arguments": f'{{"url":"{URL}"}}'}]}),
    (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "1", "output": URL}]}),
    (RESPONSES, {"input": [{"type": "custom_tool_call", "input": URL}]}),
    (
        RESPONSES,
        {"input": [{"content": [{"type": "output_text", "text": "x", "annotations": [{"url": URL, "title": URL}]}]}]},
    ),
    ("/v1/completions", {"prompt": URL}),
    ("/v1/completions", {"prompt": [URL, "data:x"]}),
    (EMBEDDINGS, {"input": URL}),
    (EMBEDDINGS, {"input": [URL, "file:///x", "//x"]}),
    ("/v1/rerank", {"query": URL, "documents": [URL, "file:///x"]}),
    ("/v1/rerank", {"query": "url", "documents": [{"text": URL}]}),
    ("/v1/score", {"text_1": URL, "text_2": [URL]}),
    ("/tokenize", {"prompt": URL}),
]


@each(("path", "body"), HARMLESS)
def test_text_that_mentions_urls_is_only_text(path: str, body: dict[str, Any]) -> None:
    """Also when its spelling needs escapes, so that the look is not skipped."""
    for rules in (CLOSED, OPEN, MediaRules(data_url=10)):
        assert isinstance(ask(body, path, rules), Asked)
        assert isinstance(ask({**body, "user": "é\u0001data url"}, path, rules), Asked)


@given(text=st.text())
def test_no_text_of_a_message_is_refused(text: str) -> None:
    """Whatever a person writes, as a string or as a part."""
    if text.encode("utf-8", "ignore").decode() == text:
        for body in ({"messages": [{"role": "user", "content": text}]}, chat_with({"type": "text", "text": text})):
            assert isinstance(ask(body), Asked)
