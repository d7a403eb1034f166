"""Who is let in, what each may use, whose address the log shows, and that no key and no prompt is ever kept."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from gateway.settings import KeySettings, Listen, Log, MetricsSettings, Upstream
from tests.support.gateway import (
    AUTH,
    CHAT,
    ENGINE_MODEL,
    KEY,
    MODEL,
    Face,
    Gateway,
    StartGateway,
    chat,
    relayed,
    serving,
)
from tests.support.recordings import load
from tests.support.script import Do, event_stream, json_answer, nothing, play
from tests.support.sockets import free_port
from tests.support.upstream import ScriptedUpstream

GOOD = play(load("vllm", "chat_basic"))
Header = tuple[str, str]


def bearer(key: str) -> list[Header]:
    return [("authorization", f"Bearer {key}")]


async def status_of(gateway: Gateway, headers: list[Header], **fields: Any) -> int:
    return (await gateway.ask(chat(**fields), headers=headers)).status


# --- keys ------------------------------------------------------------------------------------------------------------


async def test_keys_come_from_every_place_the_configuration_knows(
    start_gateway: StartGateway, upstream: ScriptedUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the file itself, as its SHA-256 (a key made elsewhere), in a file of its own, in the environment."""
    (tmp_path / "carol").write_text("carols-key\n")
    monkeypatch.setenv("DAVES_KEY", "sk-dave")
    keys = (
        KeySettings(name="alice", key=SecretStr("fb-alice")),
        KeySettings(name="bob", sha256=hashlib.sha256(b"any opaque string".replace(b" ", b"-")).hexdigest().upper()),
        KeySettings(name="carol", key_file=tmp_path / "carol"),
        KeySettings(name="dave", key_env="DAVES_KEY", tenant="research"),
    )
    gateway = await start_gateway(upstream, keys=keys)
    upstream.always(GOOD, path=CHAT)
    given = {"alice": "fb-alice", "bob": "any-opaque-string", "carol": "carols-key", "dave": "sk-dave"}
    for key in given.values():
        assert await status_of(gateway, bearer(key)) == 200
    lines = gateway.lines("request")
    assert [line["key"] for line in lines] == list(given)
    assert [line["tenant"] for line in lines] == ["alice", "bob", "carol", "research"]


WRONG: list[tuple[str, list[Header]]] = [
    ("You didn't provide an API key.", []),
    ("You didn't provide an API key.", [("authorization", "")]),
    ("You didn't provide an API key.", [("authorization", "Bearer ")]),
    ("You didn't provide an API key.", [("authorization", "Basic " + KEY)]),
    ("You didn't provide an API key.", [("authorization", KEY)]),
    ("You didn't provide an API key.", [("cookie", f"authorization=Bearer {KEY}")]),
    ("Incorrect API key provided.", bearer("wrong")),
    ("Incorrect API key provided.", bearer(KEY + "x")),
    ("Incorrect API key provided.", bearer(KEY[:-1])),
    ("Incorrect API key provided.", bearer(KEY.upper())),
    ("Incorrect API key provided.", bearer("x" * 513)),
    ("Incorrect API key provided.", bearer(f"{KEY} {KEY}")),
    ("Incorrect API key provided.", bearer("ümlaut")),
    ("Incorrect API key provided.", [("x-api-key", "wrong")]),
    ("Incorrect API key provided.", [*bearer("wrong"), ("x-api-key", KEY)]),
    ("Incorrect API key provided.", bearer(hashlib.sha256(KEY.encode()).hexdigest())),
]


async def test_nobody_else_is_let_in(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """The answer says which of the two it is and where a key goes, and never repeats one."""
    for told, headers in WRONG:
        answer = await gateway.ask(chat(), headers=headers)
        error = answer.json()["error"]
        assert (answer.status, error["type"], error["code"]) == (401, "invalid_request_error", "invalid_api_key")
        assert error["message"].startswith(told), headers
        assert KEY not in answer.body.decode()
        models = await gateway.get("/v1/models", headers)
        assert (models.status, models.json()["error"]["message"]) == (401, error["message"])
    assert relayed(upstream) == []


async def test_a_key_is_taken_as_clients_send_it(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """The scheme's case and spaces around the key do not matter; Anthropic's header is taken on every path."""
    upstream.always(GOOD, path=CHAT)
    upstream.always(play(load("vllm", "messages")), path="/v1/messages")
    ways: list[list[Header]] = [
        [("Authorization", f"bearer {KEY}")],
        [("AUTHORIZATION", f"BEARER   {KEY}  ")],
        [("x-api-key", KEY)],
        [("X-API-Key", f" {KEY} ")],
        [*bearer(KEY), ("x-api-key", "wrong")],
        [("authorization", "Basic eDp5"), ("x-api-key", KEY)],
    ]
    for headers in ways:
        assert await status_of(gateway, headers) == 200, headers
        anthropic = await gateway.ask(
            chat(max_tokens=4), "/v1/messages", [*headers, ("anthropic-version", "2023-06-01")]
        )
        assert (anthropic.status, anthropic.json()["type"]) == (200, "message")


async def test_a_key_expires(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    """From its moment on; the answer says that it is not a typing mistake."""
    now = datetime.now(UTC)
    keys = (
        KeySettings(name="old", key=SecretStr("fb-old"), expires=now - timedelta(seconds=1)),
        KeySettings(name="new", key=SecretStr("fb-new"), expires=now + timedelta(hours=1)),
    )
    gateway = await start_gateway(upstream, keys=keys)
    upstream.always(GOOD, path=CHAT)
    answer = await gateway.ask(chat(), headers=bearer("fb-old"))
    assert (answer.status, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert answer.json()["error"]["message"].startswith("This API key has expired.")
    assert await status_of(gateway, bearer("fb-new")) == 200


@pytest.mark.parametrize(
    ("patterns", "may"),
    [
        (None, {"qwen3-8b", "qwen3-30b", "smol", "team/x"}),
        ((), set()),
        (("smol",), {"smol"}),
        (("qwen3-*",), {"qwen3-8b", "qwen3-30b"}),
        (("qwen3-*", "team/*"), {"qwen3-8b", "qwen3-30b", "team/x"}),
        (("*",), {"qwen3-8b", "qwen3-30b", "smol", "team/x"}),
        (("qwen3-",), set()),
    ],
)
async def test_a_key_may_be_limited_to_models(
    start_gateway: StartGateway, upstream: ScriptedUpstream, patterns: tuple[str, ...] | None, may: set[str]
) -> None:
    """Exact names and beginnings; what it may not use it neither gets nor sees in the list."""
    names = ["qwen3-8b", "qwen3-30b", "smol", "team/x"]
    keys = (KeySettings(name="alice", key=SecretStr(KEY), models=patterns),)
    gateway = await start_gateway(serving(upstream, models=dict.fromkeys(names, ENGINE_MODEL)), keys=keys)
    upstream.always(GOOD, path=CHAT)
    for name in names:
        answer = await gateway.ask(chat(model=name))
        assert answer.status == (200 if name in may else 403)
        if name not in may:
            error = answer.json()["error"]
            assert (error["type"], error["code"], error["param"]) == ("permission_error", "model_not_allowed", "model")
        assert (await gateway.get(f"/v1/models/{name}", AUTH)).status == (200 if name in may else 403)
    listed = (await gateway.get("/v1/models", AUTH)).json()["data"]
    assert {model["id"] for model in listed} == may
    assert len(relayed(upstream)) == len(may)


async def test_without_authentication_everybody_is_let_in(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    """For a laptop: no key, any key; all of them are one tenant. On loopback nothing is said about it."""
    gateway = await start_gateway(upstream, auth="none", keys=())
    upstream.always(GOOD, path=CHAT)
    for headers in ([], bearer("anything"), [("x-api-key", "else")]):
        assert await status_of(gateway, headers) == 200
    assert (await gateway.get("/v1/models")).status == 200
    assert {(line["key"], line["tenant"]) for line in gateway.lines("request")} == {("anonymous", "anonymous")}
    assert gateway.lines("open_to_everybody") == []


async def test_an_open_gateway_says_so_loudly(
    start_gateway: StartGateway, upstream: ScriptedUpstream, face: Face
) -> None:
    """Without authentication on an address that others can reach."""
    gateway = await start_gateway(
        upstream, auth="none", keys=(), listen=Listen(host="0.0.0.0", port=free_port(), face=face)
    )
    (line,) = gateway.lines("open_to_everybody")
    assert line["level"] == "warning"
    assert "0.0.0.0" in line["why"]


# --- addresses -------------------------------------------------------------------------------------------------------

FORWARDED: list[tuple[list[str], str]] = [
    (["203.0.113.7"], "203.0.113.7"),
    (["203.0.113.7, 10.1.2.3"], "203.0.113.7"),
    (["198.51.100.1, 203.0.113.7, 10.1.2.3"], "203.0.113.7"),
    (["198.51.100.1", "203.0.113.7", "10.1.2.3, 10.0.0.1"], "203.0.113.7"),
    (["10.9.9.9, 10.1.2.3"], "10.9.9.9"),
    (["203.0.113.7:4711"], "203.0.113.7"),
    (["2001:db8::1"], "2001:db8::1"),
    (["[2001:db8::1]:443"], "2001:db8::1"),
    (["rubbish"], "127.0.0.1"),
    (["203.0.113.7, rubbish, 10.1.2.3"], "10.1.2.3"),
    ([""], "127.0.0.1"),
    ([], "127.0.0.1"),
]


async def test_trusted_proxies_tell_the_clients_address(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    """The last hop that is no proxy of ours counts: what a client writes in front of it does not."""
    trusted = tuple(ip_network(text) for text in ("127.0.0.1", "10.0.0.0/8"))
    gateway = await start_gateway(upstream, trusted_proxies=trusted)
    for lines, _ in FORWARDED:
        await gateway.ask(chat(), headers=[("x-forwarded-for", line) for line in lines])
    seen = [line["client"] for line in gateway.lines("request")]
    assert dict(zip(map(str, FORWARDED), seen, strict=True)) == {str(row): row[1] for row in FORWARDED}


async def test_nobody_elses_word_on_addresses_counts(gateway: Gateway) -> None:
    """Without trusted proxies the header is a claim of the client."""
    for lines, _ in FORWARDED:
        await gateway.ask(chat(), headers=[("x-forwarded-for", line) for line in lines])
    assert {line["client"] for line in gateway.lines("request")} == {"127.0.0.1"}


# --- what is kept ----------------------------------------------------------------------------------------------------

PROMPT = "zebra-prompt-4711"
SECRETS = (PROMPT, KEY, "fb-wrong-secret", "sk-engine-secret", "image-bytes-4711")


async def everything(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """Ask in every way there is, each time with a prompt and a key that must not be kept."""
    message = [{"role": "user", "content": PROMPT}]
    data_url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,image-bytes-4711"}}
    wrong = bearer("fb-wrong-secret")
    quoted = json.dumps({"error": {"message": f"input: '{PROMPT}'", "code": 400}}).encode()
    flat = json.dumps({"object": "error", "message": f"bad '{PROMPT}'", "code": 400}).encode()
    failed = json.dumps({"error": {"message": "died", "code": 500}}).encode()
    in_stream = b"data: " + json.dumps({"error": {"message": f"bad '{PROMPT}'", "code": 400}}).encode() + b"\n\n"
    first = load("vllm", "chat_stream").events()[0]
    for script in (
        GOOD,
        play(load("vllm", "chat_stream")),
        json_answer(quoted, status=400),
        json_answer(flat, status=422),
        json_answer(failed, status=500),
        nothing().do(Do.CLOSE),
        event_stream([in_stream]),
        event_stream([first, in_stream]),
    ):
        for stream in (False, True):
            upstream.queue(script, path=CHAT)
            await gateway.ask(chat(messages=message, stream=stream))
    await gateway.ask(chat(messages=[{"role": "user", "content": [data_url]}], max_tokens="x"))
    for body, headers in (
        (chat(messages=message), wrong),
        (chat(messages=message, model="ghost"), AUTH),
        (chat(messages=PROMPT, priority=PROMPT), AUTH),
        (chat(messages=message, max_tokens=PROMPT), AUTH),
        (json.dumps(chat(messages=message)).encode()[:-1], AUTH),
        (f'{{"{PROMPT}": {PROMPT}'.encode(), AUTH),
        (f'"{PROMPT}"'.encode(), AUTH),
        (chat(messages=[{"role": "user", "content": [{"type": "x", "x_url": f"ftp://{PROMPT}"}]}]), AUTH),
    ):
        await gateway.ask(body, headers=headers)
    for path in ("/v1/messages", "/v1/responses", "/v1/completions", "/v1/embeddings", "/tokenize"):
        upstream.queue(json_answer(quoted, status=400), path=path)
        await gateway.ask(chat(messages=message, input=PROMPT, prompt=PROMPT), path)
    await gateway.get(f"/v1/models/x?key={KEY}", wrong)
    await gateway.get(f"/nothing?prompt={PROMPT}", AUTH)


@pytest.mark.parametrize("form", ["json", "console"])
async def test_no_key_and_no_prompt_is_kept(
    start_gateway: StartGateway,
    upstream: ScriptedUpstream,
    tmp_path: Path,
    form: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Not in the log, not in the metrics, not on standard error: also where an engine quotes the request."""
    file = tmp_path / "lines.log"
    engine = serving(upstream, api_key=SecretStr("sk-engine-secret"))
    gateway = await start_gateway(engine, log=Log(file=file, format=form, level="debug"))
    await everything(gateway, upstream)
    gateway.replica.log.flush()
    kept = {
        "log": file.read_text(),
        "metrics": (await gateway.get("/metrics", admin=True)).body.decode(),
        "health": (await gateway.get("/health/ready")).body.decode(),
        "standard error": "".join(capfd.readouterr()),
    }
    assert kept["log"].count("request") > 30
    for secret in SECRETS:
        for place, text in kept.items():
            assert secret not in text, place


async def test_tenants_beyond_the_bound_share_a_label(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    """Labels are bounded whatever the number of keys."""
    keys = tuple(KeySettings(name=f"tenant{number}", key=SecretStr(f"fb-{number}")) for number in range(5))
    gateway = await start_gateway(upstream, keys=keys, metrics=MetricsSettings(max_label_values=3))
    upstream.always(GOOD, path=CHAT)
    for number in range(5):
        assert await status_of(gateway, bearer(f"fb-{number}")) == 200
    text = (await gateway.get("/metrics", admin=True)).body.decode()
    counted = [line for line in text.splitlines() if line.startswith("forebay_requests_total{")]
    tenants = {line.split('tenant="')[1].split('"')[0]: float(line.split()[-1]) for line in counted}
    assert "other" in tenants
    assert len(tenants) <= 4
    assert sum(tenants.values()) == 5
    assert {line["tenant"] for line in gateway.lines("request")} == {f"tenant{number}" for number in range(5)}


async def test_models_of_one_name_at_two_engines_are_one_model(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    """The public name maps to each engine's own, and the client never sees either."""
    async with ScriptedUpstream(name="other") as other:
        gateway = await start_gateway(
            serving(upstream), serving(other, models={MODEL: "/models/other"}), keys=(), auth="none"
        )
        for one in (upstream, other):
            one.always(GOOD, path=CHAT)
        for _ in range(4):
            answer = await gateway.ask(chat(), headers=())
            assert answer.json()["model"] == MODEL
        asked = [request.json()["model"] for one in (upstream, other) for request in relayed(one)]
        assert asked == [ENGINE_MODEL, ENGINE_MODEL, "/models/other", "/models/other"]
        assert isinstance(gateway.replica.settings.upstreams[0], Upstream)


async def test_a_line_of_the_console_is_one_line(
    start_gateway: StartGateway, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """What an engine says can neither begin a line that looks like another request nor move a terminal's cursor."""
    file = tmp_path / "console.log"
    gateway = await start_gateway(upstream, log=Log(file=file, format="console"))
    gateway.replica.log.flush()
    before = len(file.read_text().splitlines())
    body = json.dumps({"error": {"message": "died\n12:00:00.000 info    request  outcome=ok\x1b[2J", "code": 500}})
    upstream.always(json_answer(body.encode(), status=500), path=CHAT)
    assert (await gateway.ask(chat())).status == 502
    gateway.replica.log.flush()
    lines = file.read_text().splitlines()[before:]
    assert len(lines) == 1
    assert "outcome=engine_failed" in lines[0]
    assert "\x1b" not in lines[0]
