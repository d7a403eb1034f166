"""URLs inside messages, as clients send them: what an engine may be made to fetch, and how much may come in line."""

from __future__ import annotations

import json
from typing import Any

from pydantic import SecretStr

from gateway.settings import Caps, KeySettings, Media
from tests.support.gateway import AUTH, CHAT, KEY, MODEL, Gateway, StartGateway, chat, relayed
from tests.support.recordings import load
from tests.support.script import play
from tests.support.upstream import ScriptedUpstream

DATA = "data:image/png;base64," + "iVBORw0K" * 100
METADATA_SERVICE = "http://169.254.169.254/latest/meta-data"


def with_part(part: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    """Return a request whose message holds a text and this part."""
    text = {"type": "input_text" if path == "/v1/responses" else "text", "text": "What is this?"}
    name = "input" if path == "/v1/responses" else "messages"
    return {"model": MODEL, "max_tokens": 5, name: [{"role": "user", "content": [text, part]}]}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


REMOTE: list[tuple[str, dict[str, Any]]] = [
    (CHAT, image(METADATA_SERVICE)),
    (CHAT, {"type": "image_url", "image_url": METADATA_SERVICE}),
    (CHAT, {"type": "audio_url", "audio_url": {"url": METADATA_SERVICE}}),
    (CHAT, {"type": "video_url", "video_url": {"url": METADATA_SERVICE}}),
    (CHAT, image("file:///etc/passwd")),
    (CHAT, image("FILE:///etc/passwd")),
    (CHAT, image(" http://host/x")),
    (CHAT, image("ftp://host/x")),
    (CHAT, image("//host/x")),
    (CHAT, image("/etc/passwd")),
    ("/v1/responses", {"type": "input_image", "image_url": METADATA_SERVICE}),
    ("/v1/messages", {"type": "image", "source": {"type": "url", "url": METADATA_SERVICE}}),
]


async def test_nothing_is_fetched_by_default(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """Whatever the dialect and the spelling; the answer says how to send it instead."""
    for path, part in REMOTE:
        answer = await gateway.ask(with_part(part, path), path)
        error = answer.json()["error"]
        assert answer.status == 400, (path, part)
        assert "data URL" in error["message"]
        if path != "/v1/messages":
            assert error["code"] == "media_not_allowed"
    assert relayed(upstream) == []


async def test_a_url_cannot_hide_behind_an_escape(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """Neither its scheme nor the name of its field."""
    body = json.dumps(with_part(image(METADATA_SERVICE)))
    for old, new in (("http:", r"\u0068ttp:"), ('"url"', r'"\u0075rl"'), ('"image_url": {', r'"image_\u0075rl": {')):
        assert old in body
        answer = await gateway.ask(body.replace(old, new).encode())
        assert (answer.status, answer.json()["error"]["code"]) == (400, "media_not_allowed")
    assert relayed(upstream) == []


async def test_data_urls_pass_within_their_limit(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    """Per path and per key, whichever is smaller."""
    keys = (
        KeySettings(name="alice", key=SecretStr(KEY)),
        KeySettings(name="small", key=SecretStr("fb-small"), caps=Caps(media=len(DATA) - 1)),
    )
    media = Media(data_url=len(DATA), paths={"/v1/messages": len(DATA) - 1})
    gateway = await start_gateway(upstream, keys=keys, media=media)
    upstream.always(play(load("vllm", "chat_basic")), path=CHAT)
    assert (await gateway.ask(with_part(image(DATA)))).status == 200
    assert relayed(upstream)[0].json()["messages"] == with_part(image(DATA))["messages"]
    source = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}}
    refused = [
        await gateway.ask(with_part(image(DATA + "="))),
        await gateway.ask(with_part(image(DATA)), headers=[("authorization", "Bearer fb-small")]),
        await gateway.ask(with_part(source), "/v1/messages"),
    ]
    assert [answer.status for answer in refused] == [413, 413, 413]
    assert len(relayed(upstream)) == 1


HOSTS = [
    ("https://images.example/a.png", True),
    ("HTTPS://IMAGES.EXAMPLE/a.png", True),
    ("https://images.example:443/a.png", True),
    ("https://images.example.evil.test/a.png", False),
    ("https://evil.test/images.example", False),
    ("https://images.example@evil.test/a.png", False),
    ("https://evil.test#@images.example/a.png", False),
    ("https://images.example:8000/a.png", False),
    ("https://images.example\\@evil.test/", False),
    ("https://images.example\t.evil.test/", False),
    (METADATA_SERVICE, False),
]


async def test_only_named_hosts_may_be_fetched_from(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    """Where the operator names hosts: those, exactly, and nothing that two parsers could read differently."""
    gateway = await start_gateway(upstream, media=Media(remote="engine", hosts=("images.example",)))
    upstream.always(play(load("vllm", "chat_basic")), path=CHAT)
    for url, passes in HOSTS:
        answer = await gateway.ask(with_part(image(url)))
        assert answer.status == (200 if passes else 400), url
    assert len(relayed(upstream)) == sum(passes for _, passes in HOSTS)


async def test_text_about_urls_is_text(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """What only the model reads may hold any URL, also in lists of parts and in what a tool answered."""
    upstream.always(play(load("vllm", "chat_basic")), path=CHAT)
    messages = [
        {"role": "system", "content": f"Never fetch {METADATA_SERVICE}"},
        {
            "role": "user",
            "content": [{"type": "text", "text": METADATA_SERVICE}, {"type": "text", "text": "file:///x"}],
        },
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"url":"http://x/"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "https://example.test says: data"},
    ]
    answer = await gateway.ask(chat(messages=messages), headers=AUTH)
    assert answer.status == 200
    assert relayed(upstream)[0].json()["messages"] == messages
