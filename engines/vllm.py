"""vLLM: its paths, the fields it must not take from a client, and how its errors look.

Shown on vLLM 0.32.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from engines import wire
from engines.devices import Device, Quantization, cpu_environment, usable_processors
from engines.launch import LaunchSpec, common_environment
from engines.minder import Phase
from engines.protocol import (
    Call,
    Capability,
    Dispatch,
    EngineError,
    EngineLoad,
    Fields,
    ServedModel,
    Target,
    plain_target,
)

_encode = msgspec.json.encode

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
    base_only_paths: frozenset[str] = frozenset()
    unsalted_paths: frozenset[str] = frozenset()
    ready_path = "/health"
    models_path = "/v1/models"
    metrics_path = "/metrics"
    capabilities = (
        Capability.TOOLS
        | Capability.FORCED_TOOLS
        | Capability.JSON_SCHEMA
        | Capability.LOGPROBS
        | Capability.STOP_WORDS
        | Capability.SEVERAL_ANSWERS
        | Capability.MODELS_CHECKED
        | Capability.LENGTH_CHECKED
        | Capability.CACHE_SALT
        | Capability.PRIORITY
        | Capability.BOUNDED_QUEUE
        | Capability.ADAPTERS
        | Capability.ADAPTER_LOADING
        | Capability.UNIX_SOCKET
        | Capability.CONTINUE
        | Capability.TOKEN_CHUNKS
    )
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
        fields["model"] = dispatch.target.model
        if dispatch.begun:
            wire.continue_answer(path, fields, dispatch.begun)
        if dispatch.ask_usage and path in _OPENAI_STREAMS:
            fields["stream_options"] = wire.with_usage(fields.get("stream_options"))
        if dispatch.cache_salt is not None and path in _SALTED:
            fields["cache_salt"] = msgspec.Raw(_encode(dispatch.cache_salt))
        return _encode(fields)

    def read_error(self, status: int, body: bytes) -> EngineError:
        """Read an answer whose status was not 200."""
        return wire.read_error(status, body)

    def read_stream_error(self, payload: bytes) -> EngineError | None:
        """Read an event's JSON; vLLM reports a failure in a stream as an event ``{"error": {...}}``."""
        return wire.read_stream_error(payload)

    def target(self, name: str, base: str | None = None) -> Target:
        """An adapter is named like a model."""
        return plain_target(name)

    def read_models(self, body: bytes) -> tuple[ServedModel, ...]:
        """Read the list of models; adapters name their base as ``parent``."""
        return wire.read_models(body)

    def read_load(self, body: bytes) -> EngineLoad | None:
        """Read vLLM's gauges."""
        return wire.load_from(wire.read_gauges(body, _GAUGES))

    def load_adapter(self, name: str, directory: str) -> Call:
        """Load without ``load_inplace``: with it the worker reads the directory anew whenever it likes."""
        body = _encode({"lora_name": name, "lora_path": directory})
        return Call("POST", "/v1/load_lora_adapter", body)

    def unload_adapter(self, name: str) -> Call:
        """Forget the name; streams under way finish."""
        return Call("POST", "/v1/unload_lora_adapter", _encode({"lora_name": name}))

    def read_adapter_answer(self, status: int, body: bytes) -> EngineError | None:
        """A success is plain text. What is loaded already, or is not there to unload, is as it should be."""
        if status == 200:
            return None
        error = wire.read_error(status, body)
        return None if _ADAPTER_AS_WANTED.search(error.message) else error

    def obstacles(self, spec: LaunchSpec) -> Iterator[str]:
        """Tell what vLLM cannot do."""
        quantization, device = spec.quantization, spec.device
        if quantization is not None and quantization not in _QUANTIZATIONS[device]:
            able = ", ".join(_QUANTIZATIONS[device])
            yield f"vLLM has no {quantization} weights on {device}; there it takes {able}, or full weights"
        if device is Device.CPU and spec.parallel.devices > 1:
            yield "one vLLM on cpu is one process on one machine's memory; run several engines instead"
        if device is Device.CPU and spec.memory_share is not None:
            yield "memory_share is a share of a device's own memory; on cpu set VLLM_CPU_KVCACHE_SPACE (GiB) instead"
        if spec.max_queued is not None and _max_running(spec) is None:
            yield "vLLM bounds running and waiting requests together: with max_queued, say max_running too"

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
            command += ["--enforce-eager"]
        if (running := _max_running(spec)) is not None:
            command += ["--max-num-seqs", str(running)]
        if dtype := spec.dtype or _CPU_DTYPE.get(spec.device):
            command += ["--dtype", dtype]
        if length := spec.max_model_len or _CPU_MAX_MODEL_LEN.get(spec.device):
            command += ["--max-model-len", str(length)]
        return [*command, *_sizes(spec), *_adapters(spec), *spec.extra_args]

    def environment(self, spec: LaunchSpec) -> dict[str, str]:
        """Return vLLM's own variables; the key is one of them since a command line can be read by every user."""
        variables = {
            "DO_NOT_TRACK": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        }
        if spec.api_key is not None:
            variables["VLLM_API_KEY"] = spec.api_key
        if spec.adapters is not None:
            variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
        variables |= common_environment(spec)
        if spec.device is Device.CPU:
            variables |= cpu_environment(usable_processors())
            variables["VLLM_CPU_KVCACHE_SPACE"] = "1"
            # --enforce-eager does not reach a few compiled helpers: the first request for logprobs then holds the whole
            # engine for 16 s, and without a C++ compiler on the machine it kills it.
            variables["TORCHDYNAMO_DISABLE"] = "1"
        return {**variables, **spec.extra_environment}


_GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "cache_used",
}
_ADAPTER_AS_WANTED = re.compile(r"has already been loaded|has been already loaded|cannot be found")


def _max_running(spec: LaunchSpec) -> int | None:
    """Return how many requests one rank runs at a time; None: as many as vLLM chooses for the device."""
    return spec.max_running or _CPU_MAX_RUNNING.get(spec.device)


def _sizes(spec: LaunchSpec) -> list[str]:
    """How many devices, how much of their memory, how many requests, how the weights are stored."""
    parallel = spec.parallel
    words: list[str] = []
    for flag, size in (
        ("--tensor-parallel-size", parallel.tensor),
        ("--pipeline-parallel-size", parallel.pipeline),
        ("--data-parallel-size", parallel.data),
    ):
        words += [flag, str(size)] if size > 1 else []
    if spec.memory_share is not None:
        words += ["--gpu-memory-utilization", f"{spec.memory_share:g}"]
    if spec.max_queued is not None and (running := _max_running(spec)) is not None:
        # Its bound counts the requests that run too, those of all its data parallel ranks.
        words += ["--max-num-queued-reqs", str(spec.max_queued + running * parallel.data)]
    if spec.quantization is not None:
        words += ["--quantization", _QUANTIZATIONS[spec.device][spec.quantization]]
    return words


def _adapters(spec: LaunchSpec) -> list[str]:
    slots = spec.adapters
    if slots is None:
        return []
    words = ["--enable-lora", "--max-loras", str(slots.active), "--max-lora-rank", str(_rank(slots.rank))]
    if slots.at_start:
        words += ["--lora-modules", *(f"{name}={directory}" for name, directory in slots.at_start)]
    return words


def _rank(wanted: int) -> int:
    """vLLM takes only some ranks: the next one up."""
    return next((rank for rank in _RANKS if rank >= wanted), _RANKS[-1])


_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_QUANTIZATIONS_ON_CPU = {
    Quantization.GPTQ: "gptq",
    Quantization.AWQ: "awq",
    Quantization.COMPRESSED_TENSORS: "compressed-tensors",
}
_QUANTIZATIONS = {
    Device.CPU: _QUANTIZATIONS_ON_CPU,
    Device.CUDA: {**_QUANTIZATIONS_ON_CPU, Quantization.FP8: "fp8", Quantization.BNB: "bitsandbytes"},
    # What the plugin vllm-ascend takes: ModelSlim's own files under its own name, and compressed-tensors.
    Device.ASCEND: {
        Quantization.MODELSLIM: "ascend",
        Quantization.COMPRESSED_TENSORS: "compressed-tensors",
    },
}
_CPU_MAX_RUNNING = {Device.CPU: 32}
_CPU_DTYPE = {Device.CPU: "bfloat16"}
# One GiB of KV cache holds 22 requests of this length for SmolLM2-135M; the model's own limit may not fit once.
_CPU_MAX_MODEL_LEN = {Device.CPU: 2048}
