"""LMDeploy: its paths, the fields it must not take from a client, and how its errors look.

Shown on LMDeploy 0.18.0 with its PyTorch engine, the only one of its two that serves adapters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec

from engines import wire
from engines.devices import Device, Quantization, arithmetic_threads, usable_processors
from engines.launch import LaunchSpec, common_environment
from engines.minder import Phase
from engines.protocol import (
    Call,
    Capability,
    Dispatch,
    EngineError,
    EngineLoad,
    Fault,
    Fields,
    ServedModel,
    Target,
    plain_target,
)

_encode = msgspec.json.encode
_OPENAI_STREAMS = frozenset({"/v1/chat/completions", "/v1/completions"})
_ON_CPU = Path(__file__).with_name("shims") / "lmdeploy" / "on_cpu.py"
"""Started in place of LMDeploy's own command where there is no accelerator."""


class LmDeploy:
    """LMDeploy's OpenAI-compatible server."""

    name = "lmdeploy"
    control_fields = frozenset(
        {
            # Whose session, and which adapter: the gateway's decisions. A session that is busy is a bare 500.
            "adapter_name",
            "request_id",
            "session_id",
            # Between engines that share a prefill: a wrong value ends the engine's loop for everybody.
            "migration_request",
            "preserve_cache",
            "with_cache",
            # Past the chat template, and past everything that looks at messages: their length, their URLs.
            "do_preprocess",
            "image_data",
            "input_ids",
        }
    )
    # /v1/embeddings is there too, and answers every request that it is not supported.
    paths: Mapping[str, str] = {
        path: path
        for path in (
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/responses",
            "/v1/messages",
        )
    }
    base_only_paths: frozenset[str] = frozenset()
    # Prefixes are cached only where an operator asks for it, and then for all alike.
    unsalted_paths: frozenset[str] = frozenset()
    ready_path = "/health"
    models_path = "/v1/models"
    metrics_path = "/metrics"
    # No FORCED_TOOLS: a required tool is called, a named one only if the model would have anyway. No STOP_WORDS: "stop"
    # is looked for as a token, and "capital" is not the token " capital". LOGPROBS with a peculiarity: the token that
    # was drawn is not among its own candidates.
    capabilities = (
        Capability.TOOLS
        | Capability.JSON_SCHEMA
        | Capability.LOGPROBS
        | Capability.SEVERAL_ANSWERS
        | Capability.MODELS_CHECKED
        | Capability.ADAPTERS
    )
    loading_phases: tuple[Phase, ...] = (
        Phase(re.compile(r"Loading weights from safetensors: .* (?P<done>\d+)/(?P<total>\d+) "), "loading weights"),
        Phase(re.compile(r"in a browser for detailed api usage"), "opening its port"),
    )

    def prepare(self, path: str, fields: Fields, dispatch: Dispatch) -> bytes:
        """Name the model as the engine knows it, and ask for usage where the client did not."""
        fields["model"] = dispatch.target.model
        if dispatch.begun:
            wire.continue_answer(path, fields, dispatch.begun)
        if dispatch.ask_usage and path in _OPENAI_STREAMS:
            fields["stream_options"] = wire.with_usage(fields.get("stream_options"))
        return _encode(fields)

    def read_error(self, status: int, body: bytes) -> EngineError:
        """Read an answer whose status was not 200; the field at fault stands in the message only."""
        return _told(wire.read_error(status, body))

    def read_stream_error(self, payload: bytes) -> EngineError | None:
        """Read an event's JSON; a failure in a stream is an event ``{"error": {...}}``, and ``[DONE]`` after it."""
        error = wire.read_stream_error(payload)
        return None if error is None else _told(error)

    def target(self, name: str, base: str | None = None) -> Target:
        """An adapter is named like a model."""
        return plain_target(name)

    def read_models(self, body: bytes) -> tuple[ServedModel, ...]:
        """Read the list of models; nothing in it tells an adapter from its base, or how long a context may be."""
        return wire.read_models(body)

    def read_load(self, body: bytes) -> EngineLoad | None:
        """Read LMDeploy's gauges, which are up to ten seconds old."""
        return wire.load_from(wire.read_gauges(body, _GAUGES))

    def load_adapter(self, name: str, directory: str) -> Call | None:
        """None: adapters are named at its start."""
        return None

    def unload_adapter(self, name: str) -> Call | None:
        """None: adapters stay until its end."""
        return None

    def read_adapter_answer(self, status: int, body: bytes) -> EngineError | None:
        """Read what no call of this engine asks for: anything but a 200 is an error."""
        return None if status == 200 else wire.read_error(status, body)

    def obstacles(self, spec: LaunchSpec) -> Iterator[str]:
        """Tell what LMDeploy cannot do."""
        yield from _cannot_compute(spec)
        if spec.address.unix is not None:
            yield "LMDeploy cannot listen on a Unix socket; give it a port"
        if spec.max_queued is not None:
            yield "LMDeploy cannot bound its queue, requests wait without end; leave max_queued out, the gateway bounds"
        if any(_means(argument, "--max-concurrent-requests") for argument in spec.extra_args):
            yield (
                "--max-concurrent-requests makes LMDeploy's health check and its stopping of requests wait behind the"
                " requests; use max_running, and the gateway's own bounds"
            )

    def command_line(self, spec: LaunchSpec, python: Path) -> list[str]:
        """Return the command for ``lmdeploy serve api_server``; what the person added comes last, so that it wins."""
        command = [str(python), *_program(spec, python), "serve", "api_server", spec.model]
        command += ["--server-name", spec.address.host, "--server-port", str(spec.address.port)]
        command += ["--model-name", spec.served_name, "--backend", "pytorch"]
        # Without a list every host is allowed; ".invalid" is no host's name (RFC 2606).
        command += ["--allowed-media-domains", *(spec.allowed_media_domains or ("none.invalid",))]
        # Of its devices ours is the one whose operations on_cpu.py replaces.
        command += ["--device", "cuda" if spec.device is Device.CPU else spec.device.value]
        # Without a number it asks the device, in words that only a CUDA device understands.
        command += ["--max-batch-size", str(spec.max_running or _MAX_RUNNING[spec.device])]
        command += ["--tool-call-parser", "qwen", "--logprobs-mode", "raw_logprobs"]
        if spec.device is Device.CPU:
            command += ["--eager-mode"]
        if spec.dtype is not None:
            command += ["--dtype", spec.dtype]
        if length := spec.max_model_len or _CPU_MAX_MODEL_LEN.get(spec.device):
            command += ["--session-len", str(length)]
        return [*command, *_sizes(spec), *_adapters(spec), *spec.extra_args]

    def environment(self, spec: LaunchSpec) -> dict[str, str]:
        """Return LMDeploy's own variables; the key is one of them, see ``_KEYED``."""
        # Its server would write a line for each request, every look at its health included.
        variables = {"DO_NOT_TRACK": "1", "UVICORN_LOG_LEVEL": "warning"}
        if spec.api_key is not None:
            variables[_KEY_VARIABLE] = spec.api_key
        variables |= common_environment(spec)
        if spec.device is Device.CPU:
            variables |= _CPU_ENVIRONMENT
            # With a thread on each processor every step waits for the one that its server took: 45 s instead of 1.
            variables["OMP_NUM_THREADS"] = str(arithmetic_threads(usable_processors()))
        return {**variables, **spec.extra_environment}


_FIELD = re.compile(r"(?:The )?([a-z][a-z_]*)(?:\.[\w.]+)?(?:: | \S+ (?:must|exceeds|cannot) )")


def _told(error: EngineError) -> EngineError:
    """Name the field at fault, where the message begins with it."""
    named = _FIELD.match(error.message) if error.fault is Fault.REQUEST and error.param is None else None
    return error if named is None else replace(error, param=named[1])


_GAUGES = {
    "lmdeploy:num_requests_running": "running",
    # Not those that wait in its server, which are most: that gauge keeps every request whose client left it there.
    "lmdeploy:num_requests_waiting": "waiting",
    "lmdeploy:gpu_cache_usage_perc": "cache_used",
}
_KEY_VARIABLE = "LMDEPLOY_API_KEY"
# LMDeploy takes keys as arguments only, and a command line can be read by every user of a machine. So a key comes in
# the environment, which only the same user can read, and becomes an argument inside the process.
_KEYED = (
    "import os, sys; from lmdeploy.cli.entrypoint import run;"
    f" sys.argv[0] = 'lmdeploy'; sys.argv += ['--api-keys', os.environ.pop('{_KEY_VARIABLE}')]; run()"
)


def _program(spec: LaunchSpec, python: Path) -> list[str]:
    if spec.device is Device.CPU:
        return [str(_ON_CPU)]
    return ["-c", _KEYED] if spec.api_key is not None else [str(python.with_name("lmdeploy"))]


def _cannot_compute(spec: LaunchSpec) -> Iterator[str]:
    """What stands in the way of computing as wanted."""
    quantization, device, parallel = spec.quantization, spec.device, spec.parallel
    if quantization is not None and quantization not in _formats(spec):
        able = ", ".join([*_formats(spec), "full weights"])
        yield f"LMDeploy has no {quantization} weights on {device}; there it takes {able}"
    if spec.adapters is not None and device is Device.ASCEND:
        yield "LMDeploy has no LoRA on ascend; merge the adapter into the weights, or serve it with another engine"
    if parallel.pipeline > 1:
        yield "LMDeploy does not spread a model's layers over devices (pipeline); use tensor"
    if parallel.data > 1:
        yield "LMDeploy's copies (data) are servers of their own behind a proxy of theirs; run several engines instead"
    if device is Device.CPU and parallel.tensor > 1:
        yield "one LMDeploy on cpu is one process on one machine's memory; run several engines instead"
    if device is Device.CPU and spec.memory_share is not None:
        yield f"memory_share is a share of a device's own memory; on cpu set {_CACHE_VARIABLE} (bytes) instead"
    if _backend(spec.extra_args) == "turbomind":
        if device is not Device.CUDA:
            yield f"TurboMind, LMDeploy's other engine, runs on cuda only; leave --backend out on {device}"
        elif spec.adapters is not None:
            yield "TurboMind drops adapters without a word; leave --backend turbomind out, or the adapters"


def _backend(arguments: tuple[str, ...]) -> str | None:
    """Return the engine a person chose by argument."""
    chosen = None
    for argument, following in pairwise([*arguments, ""]):
        if _means(argument, "--backend"):
            chosen = argument.partition("=")[2] or following
    return chosen


def _means(argument: str, flag: str) -> bool:
    """Tell whether an argument parser takes ``argument`` for ``flag``: it takes beginnings of a flag too."""
    name = argument.partition("=")[0]
    return len(name) > 3 and flag.startswith(name)


def _sizes(spec: LaunchSpec) -> list[str]:
    """How many devices, how much of their memory, how the weights are stored."""
    words: list[str] = []
    if spec.parallel.tensor > 1:
        words += ["--tp", str(spec.parallel.tensor)]
    if spec.memory_share is not None:
        words += ["--cache-max-entry-count", f"{spec.memory_share:g}"]
    if spec.quantization is not None:
        words += ["--model-format", _formats(spec)[spec.quantization]]
    return words


def _adapters(spec: LaunchSpec) -> list[str]:
    slots = spec.adapters
    if slots is None or not slots.at_start:
        return []
    return ["--adapters", *(f"{name}={directory}" for name, directory in slots.at_start)]


_CACHE_VARIABLE = "LMDEPLOY_CPU_CACHE_BYTES"
_CPU_ENVIRONMENT = {
    _CACHE_VARIABLE: str(1 << 30),
    # Nothing is compiled, and no device is looked for or warmed up.
    "TORCHDYNAMO_DISABLE": "1",
    "LMDEPLOY_ENABLE_CHECK_ENV": "0",
    "LMDEPLOY_SKIP_WARMUP": "1",
}
_CPU_MAX_MODEL_LEN = {Device.CPU: 2048}
_MAX_RUNNING = {Device.CPU: 32, Device.CUDA: 256, Device.ASCEND: 256}
_QUANTIZATIONS: dict[Device, dict[Quantization, str]] = {
    # The operations in plain torch are those of full weights.
    Device.CPU: {},
    Device.CUDA: {
        Quantization.AWQ: "awq",
        Quantization.COMPRESSED_TENSORS: "compressed-tensors",
        Quantization.FP8: "fp8",
    },
    Device.ASCEND: {Quantization.AWQ: "awq"},
}
_TURBOMIND = {**_QUANTIZATIONS[Device.CUDA], Quantization.GPTQ: "gptq"}


def _formats(spec: LaunchSpec) -> dict[Quantization, str]:
    """How weights may be stored; its parser takes more than the PyTorch engine can read."""
    return _TURBOMIND if _backend(spec.extra_args) == "turbomind" else _QUANTIZATIONS[spec.device]
