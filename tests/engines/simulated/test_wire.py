"""What vLLM was recorded to answer and what the simulated engine answers have one form, and errors the same words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engines.simulated.conftest import RunningEngine, Start, make_adapter
from tests.support.recordings import Recording, all_recordings, load
from tests.support.table import each, named

# What these show the simulated engine does not do: prompts' text goes on after a suffix, grammars, logit_bias.
_NOT_DONE = {"err_bad_regex", "err_logit_bias", "chat_structured_regex"}
_ADAPTERS = ("banana", "ra", "rb", "rc", "rs4")


def _is_covered(recording: Recording) -> bool:
    groups = ("chat_", "comp_", "err_", "messages", "responses", "tokenize", "detokenize", "get_models", "lora_chat")
    return recording.name.startswith((*groups, "lora_unknown", "get_health", "get_ping", "get_version", "get_load"))


COVERED = sorted(
    {one.name: one for one in all_recordings("vllm") if _is_covered(one) and one.name not in _NOT_DONE}.values(),
    key=lambda one: one.name,
)


def paths(value: Any, where: str = "") -> set[tuple[str, str]]:
    """Every place in a JSON value with the type that is there; what a list holds is one place."""
    if isinstance(value, dict):
        # Names that are made of tokens are data.
        inner = {
            (where + "." + (key if key.isidentifier() and not _is_token_map(where) else "*"), key) for key in value
        }
        return {(where, "object")}.union(*(paths(value[key], place) for place, key in inner))
    if isinstance(value, list):
        return {(where, "array")}.union(*(paths(one, where + "[]") for one in value))
    kind = "number" if isinstance(value, float) else type(value).__name__
    return {(where, kind)}


def _is_token_map(where: str) -> bool:
    return where.endswith(("top_logprobs[]", "prompt_logprobs[]")) and "content" not in where


def events(text: str) -> list[tuple[str | None, Any]]:
    """The events of a stream: name and JSON."""
    found = []
    for block in text.replace("\r\n", "\n").strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields:
            data = fields["data"]
            found.append((fields.get("event"), data if data == "[DONE]" else json.loads(data)))
    return found


def stream_paths(text: str) -> set[tuple[str, str]]:
    """Places and types of all events of a stream together."""
    return set().union(*(paths(value, name or "") for name, value in events(text)))


@pytest.fixture
async def engine(start: Start, tmp_path: Path) -> RunningEngine:
    running = await start()
    for name in _ADAPTERS:
        await running.client.post(
            "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(make_adapter(tmp_path / name, name))}
        )
    return running


async def _ask(engine: RunningEngine, recording: Recording) -> httpx.Response:
    content = recording.request_body
    if b"word word" in content:
        # The same text is fewer tokens here.
        content = content.replace(b"word word", b"word wordword wordword word")
    # Its answers are other words: one of those to stop at, and room for all where the recorded one came to its end.
    content = re.sub(rb'"Paris"\s*\]', b'"adapt"]', content)
    if recording.name == "responses":
        content = re.sub(rb'"max_output_tokens":\s*12', b'"max_output_tokens":1000', content)
    headers = {name: value for name, value in recording.request_headers if name.lower() != "authorization"}
    return await engine.client.request(recording.method, recording.path, content=content, headers=headers)


async def test_answers_have_the_recorded_form(engine: RunningEngine) -> None:
    """The same request gets the same status, type of content, keys and types of values; errors the same words."""
    for recording in COVERED:
        with named(recording=recording):
            _same_form(await _ask(engine, recording), recording)


def _same_form(answer: httpx.Response, recording: Recording) -> None:
    assert answer.status_code == recording.status, answer.text
    assert answer.headers.get("content-type") == recording.header("content-type")
    if recording.is_stream:
        assert stream_paths(answer.text) == stream_paths(recording.body.decode())
        last, recorded = (events(text)[-1] for text in (answer.text, recording.body.decode()))
        assert (last[0], last[1] == "[DONE]") == (recorded[0], recorded[1] == "[DONE]")
    elif recording.status != 200:
        assert answer.json() == recording.json()
    elif recording.header("content-type") is None:
        assert answer.content == recording.body
    elif recording.name != "get_version":
        assert paths(answer.json()) == paths(recording.json())


# ruff: noqa: E501 - vLLM's sentences are long
# As vLLM 0.32.0 answered on the same machine as the recordings, the adapters' directory left out.
_TWICE = "has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True."
_WORKER = "Call to add_lora method failed: Worker failed with error '{}', please check the stack trace above for the root cause"
_ONLY = 'vLLM only supports modules_to_save being either None or ["classifier", "score"] for classification models.'
_JSON = "1 validation error:\n  {'type': 'json_invalid', 'loc': 'body.13', 'msg': 'JSON decode error', 'input': '<dict of 0 items>', 'ctx': {'error': 'Expecting value'}}"
_FIELD = "1 validation error:\n  {'type': 'missing', 'loc': 'body.lora_path', 'msg': 'Field required', 'input': '<dict of 1 items>'}"
CALLS = [
    ("load", '{"lora_name":', 400, "Bad Request", _JSON),
    ("load", '{"lora_name":"x"}', 400, "Bad Request", _FIELD),
    ("load", '{"lora_name":"","lora_path":"/x"}', 400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided."),
    ("load", '{"lora_name":"smollm2","lora_path":"/x"}', 400, "InvalidUserInput", "The lora adapter 'smollm2' conflicts with a served base model."),
    ("load", '{"lora_name":"banana","lora_path":"/x"}', 400, "InvalidUserInput", f"The lora adapter 'banana' {_TWICE}"),
    ("load", '{"lora_name":"nope","lora_path":"/nowhere"}', 404, "NotFoundError", "Loading lora nope failed: No adapter found for /nowhere"),
    ("unload", '{"lora_name":"smollm2"}', 404, "NotFoundError", "The lora adapter 'smollm2' cannot be found."),
    ("unload", '{"lora_name":"ghost"}', 404, "NotFoundError", "The lora adapter 'ghost' cannot be found."),
]  # fmt: skip


@each(("verb", "body", "status", "kind", "message"), CALLS)
async def test_calls_for_adapters_fail_in_vllms_words(
    engine: RunningEngine, verb: str, body: str, status: int, kind: str, message: str
) -> None:
    headers = {"content-type": "application/json"}
    answer = await engine.client.post(f"/v1/{verb}_lora_adapter", content=body, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["message"]) == (status, kind, message)


@pytest.mark.parametrize(
    ("kind", "config", "why"),
    [
        ("rank", {"r": 32}, "LoRA rank 32 is greater than max_lora_rank 16."),
        ("dora", {"use_dora": True}, "vLLM does not yet support DoRA."),
        ("modules", {"modules_to_save": ["lm_head"]}, f"{_ONLY} Unsupported modules_to_save: ['lm_head']"),
        ("corrupt", {}, "Error while deserializing header: invalid header length"),
        ("no weights", {}, "<path> doesn't contain tensors"),
    ],
)
async def test_adapters_are_refused_in_vllms_words(
    start: Start, tmp_path: Path, kind: str, config: dict[str, Any], why: str
) -> None:
    """Each kind of directory that vLLM was seen to refuse."""
    engine = await start("--max-lora-rank", "16")
    folder = make_adapter(tmp_path / "adapter", **config)
    if kind == "corrupt":
        (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)
    elif kind == "no weights":
        (folder / "adapter_model.safetensors").unlink()
    call = {"lora_name": "nope", "lora_path": str(folder)}
    answer = await engine.client.post("/v1/load_lora_adapter", json=call)
    error = {"message": _WORKER.format(why.replace("<path>", str(folder))), "type": "InternalServerError"}
    assert (answer.status_code, answer.json()) == (500, {"error": {**error, "param": None, "code": 500}})


async def test_an_adapter_comes_and_goes(start: Start, tmp_path: Path) -> None:
    """Loaded and unloaded with vLLM's plain words; afterwards its name is unknown."""
    engine = await start()
    call = {"lora_name": "banana", "lora_path": str(make_adapter(tmp_path / "adapter"))}
    answer = await engine.client.post("/v1/load_lora_adapter", json=call)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'banana' added successfully.")
    answer = await engine.client.post("/v1/unload_lora_adapter", json={"lora_name": "banana"})
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'banana' removed successfully.")
    answer = await engine.client.post("/v1/completions", json={"model": "banana", "prompt": "x"})
    assert answer.status_code == 404


async def test_a_key_is_asked_for_where_vllm_asks(start: Start) -> None:
    engine = await start("--api-key", "secret")
    for name in ("auth_missing", "auth_wrong", "auth_models_401", "auth_tokenize_open", "auth_health_open"):
        recording = load("vllm", name)
        headers = dict(recording.request_headers)
        answer = await engine.client.request(
            recording.method, recording.path, content=recording.request_body, headers=headers
        )
        assert answer.status_code == recording.status, name
        if recording.status == 401:
            assert answer.content == recording.body
    answer = await engine.client.get("/v1/models", headers={"authorization": "Bearer secret"})
    assert answer.status_code == 200


async def test_too_many_are_refused_as_recorded(start: Start) -> None:
    """What comes beyond the bound, which counts those that run, gets vLLM's 503."""
    engine = await start("--profile", "h100-8b", "--max-num-seqs", "1", "--max-num-queued-reqs", "2")
    recording = load("vllm", "s2_over_4")
    asked = {**recording.request_json(), "max_tokens": 60}
    async with (
        engine.client.stream("POST", recording.path, json=asked) as first,
        engine.client.stream("POST", recording.path, json=asked) as second,
    ):
        third = await engine.client.post(recording.path, json=asked)
        assert (first.status_code, second.status_code) == (200, 200)
        assert (third.status_code, third.json()) == (503, recording.json())
