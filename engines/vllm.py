"""vLLM: its paths, the fields it must not take from a client, and how its errors look.

Shown on vLLM 0.32.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from engines import wire
from engines.devices import Device, cpu_environment, usable_processors
from engines.launch import LaunchSpec
from engines.minder import Phase
from engines.protocol import Dispatch, EngineError, Fields

_encode = msgspec.json.encode
_USAGE_ONLY = msgspec.Raw(b'{"include_usage":true}')

_OPENAI_STREAMS = frozenset({"/v1/chat/completions", "/v1/completions"})
_SALTED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})


class Vllm:
    """vLLM's OpenAI-compatible server."""

    name = "vllm"
    control_fields = frozenset(
        {
            # Who is served, in which order, with whose cache: the gateway's decisions.
            "cache_salt",
            "priority",
            "request_id",
            "session_id",
            # Between engines, never from a client.
            "ec_transfer_params",
            "kv_transfer_params",
            "vllm_xargs",
            # Code and tensors: a template runs in the engine, tensors are unpickled there.
            "chat_template",
            "logits_processors",
            "mm_payload",
            "prompt_embeds",
            "return_mm_kwargs",
        }
    )
    paths: Mapping[str, str] = {
        path: path
        for path in (
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/responses",
            "/v1/messages",
            "/v1/embeddings",
            "/v1/rerank",
            "/v1/score",
            "/tokenize",
        )
    }
    ready_path = "/health"
    models_path = "/v1/models"
    loading_phases: tuple[Phase, ...] = (
        Phase(re.compile(r"non-default args"), "reading the model's configuration"),
        Phase(re.compile(r"Initializing a V1 LLM engine"), "starting the engine process"),
        Phase(re.compile(r"\.safetensors:\s+\d+%"), "downloading weights"),
        Phase(re.compile(r"Loading safetensors .*\| (?P<done>\d+)/(?P<total>\d+) "), "loading weights"),
        Phase(re.compile(r"Starting to load model"), "loading weights"),
        Phase(re.compile(r"KV cache size"), "warming up"),
        Phase(re.compile(r"Capturing CUDA graphs.*\| (?P<done>\d+)/(?P<total>\d+) "), "capturing CUDA graphs"),
        Phase(re.compile(r"Starting vLLM server"), "opening its port"),
    )

    def prepare(self, path: str, fields: Fields, dispatch: Dispatch) -> bytes:
        """Name the model as the engine knows it, and ask for usage where the client did not."""
        fields["model"] = dispatch.model
        if dispatch.ask_usage and path in _OPENAI_STREAMS:
            fields["stream_options"] = _with_usage(fields.get("stream_options"))
        if dispatch.cache_salt is not None and path in _SALTED:
            fields["cache_salt"] = msgspec.Raw(_encode(dispatch.cache_salt))
        return _encode(fields)

    def read_error(self, status: int, body: bytes) -> EngineError:
        """Read an answer whose status was not 200."""
        return wire.read_error(status, body)

    def read_stream_error(self, payload: bytes) -> EngineError | None:
        """Read an event's JSON; vLLM reports a failure in a stream as an event ``{"error": {...}}``."""
        value = wire.parse(payload)
        is_error = value.get("error") is not None or value.get("object") == "error" or value.get("type") == "error"
        if not is_error or "choices" in value:
            return None
        fields = wire.error_fields(value)
        return wire.read_error(wire.status_in(fields), payload)

    def command_line(self, spec: LaunchSpec, python: Path) -> list[str]:
        """Return the command for ``vllm serve``; what the person added comes last, so that it wins."""
        address = spec.address
        where = ("--uds", str(address.unix)) if address.unix else ("--host", address.host, "--port", str(address.port))
        command = [str(python), str(python.with_name("vllm")), "serve", spec.model, *where]
        command += ["--served-model-name", spec.served_name]
        # An empty list would allow every host; ".invalid" is no host's name (RFC 2606).
        command += ["--allowed-media-domains", *(spec.allowed_media_domains or ("none.invalid",))]
        command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
        command += ["--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
        if spec.device is Device.CPU:
            command += ["--enforce-eager", "--max-num-seqs", "32"]
        if dtype := spec.dtype or _CPU_DTYPE.get(spec.device):
            command += ["--dtype", dtype]
        if length := spec.max_model_len or _CPU_MAX_MODEL_LEN.get(spec.device):
            command += ["--max-model-len", str(length)]
        return [*command, *spec.extra_args]

    def environment(self, spec: LaunchSpec) -> dict[str, str]:
        """Return vLLM's own variables; the key is one of them since a command line can be read by every user."""
        variables = {
            "DO_NOT_TRACK": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        }
        if spec.api_key is not None:
            variables["VLLM_API_KEY"] = spec.api_key
        if spec.model_is_local:
            variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        if spec.device.visible_variable and spec.visible_devices:
            variables[spec.device.visible_variable] = ",".join(spec.visible_devices)
        if spec.device is Device.CPU:
            variables |= cpu_environment(usable_processors())
            variables["VLLM_CPU_KVCACHE_SPACE"] = "1"
            # --enforce-eager does not reach a few compiled helpers: the first request for logprobs then holds the whole
            # engine for 16 s, and without a C++ compiler on the machine it kills it.
            variables["TORCHDYNAMO_DISABLE"] = "1"
        return {**variables, **spec.extra_environment}


_CPU_DTYPE = {Device.CPU: "bfloat16"}
# One GiB of KV cache holds 22 requests of this length for SmolLM2-135M; the model's own limit may not fit once.
_CPU_MAX_MODEL_LEN = {Device.CPU: 2048}


def _with_usage(options: msgspec.Raw | None) -> msgspec.Raw:
    if options is None or bytes(options) == b"null":
        return _USAGE_ONLY
    try:
        wanted = msgspec.json.decode(options, type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError):
        # No object, a key that is not UTF-8, or too deep: the engine says what is wrong with it, in its own words.
        return options
    wanted["include_usage"] = msgspec.Raw(b"true")
    return msgspec.Raw(_encode(wanted))
