"""SGLang: its paths, the fields it must not take from a client, how an adapter is named, and how its errors look.

Shown on SGLang 0.5.23. Three of its ways decide how this file looks:

- It serves the base model under any name that it does not know, an adapter's own name included. So an adapter always
  goes by ``lora_path``, and whoever asks by a name must have seen that name in the list of models
  (``Capability.MODELS_CHECKED`` is not declared).
- A failure of a stream, a full queue too, is an event of an answer with status 200.
- Its validator repeats what was sent and where in the engine's files it was refused; a client is told neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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
_decode_name = msgspec.json.Decoder(str).decode

_LORA_FIELD = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings"})
_OPENAI_STREAMS = frozenset({"/v1/chat/completions", "/v1/completions"})
_SALTED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})
_SHIM = Path(__file__).parent / "shims" / "sglang"


class Sglang:
    """SGLang's OpenAI-compatible server."""

    name = "sglang"
    control_fields = frozenset(
        {
            # Who is served, in which order, with whose cache, adapter or conversation: the gateway's decisions.
            "cache_salt",
            "data_parallel_rank",
            "extra_key",
            "lora_path",
            "priority",
            "request_id",
            "rid",
            "routed_dp_rank",
            "session_id",
            "session_params",
            # Between engines, never from a client.
            "bootstrap_host",
            "bootstrap_port",
            "bootstrap_room",
            "disagg_prefill_dp_rank",
            # Code and tensors: a processor is unpickled and run in the engine, a template runs there too.
            "chat_template",
            "custom_logit_processor",
            "custom_params",
            "embed_override_token_id",
            "embed_overrides",
            "item_embed_overrides",
            "query_embed_overrides",
            # A prompt beside the one that the gateway has read and counted.
            "input_ids",
            # The engine's inside, and the operator's own figures and marks.
            "custom_labels",
            "return_hidden_states",
            "return_pooled_hidden_states",
            "return_routed_experts",
            "routed_experts_start_len",
            "watermark",
        }
    )
    paths: Mapping[str, str] = {
        "/v1/chat/completions": "/v1/chat/completions",
        "/v1/completions": "/v1/completions",
        "/v1/responses": "/v1/responses",
        "/v1/messages": "/v1/messages",
        "/v1/embeddings": "/v1/embeddings",
        "/tokenize": "/tokenize",
    }
    # Its Responses API takes an adapter's name and answers from the base model; Anthropic's dialect has no field for a
    # salt, and drops fields that it does not have.
    base_only_paths = frozenset({"/v1/responses"})
    unsalted_paths = frozenset({"/v1/messages"})
    # Not /health: that one generates a token, which takes seconds on a busy engine.
    ready_path = "/ready"
    models_path = "/v1/models"
    metrics_path = "/metrics"
    capabilities = (
        Capability.TOOLS
        | Capability.FORCED_TOOLS
        | Capability.JSON_SCHEMA
        | Capability.LOGPROBS
        | Capability.STOP_WORDS
        | Capability.SEVERAL_ANSWERS
        | Capability.LENGTH_CHECKED
        | Capability.CACHE_SALT
        | Capability.PRIORITY
        | Capability.BOUNDED_QUEUE
        | Capability.ADAPTERS
        | Capability.ADAPTER_LOADING
        | Capability.CONTINUE
        | Capability.TOKEN_CHUNKS
    )
    loading_phases: tuple[Phase, ...] = (
        Phase(re.compile(r"server_args="), "starting the engine process"),
        Phase(re.compile(r"\.safetensors:\s+\d+%"), "downloading weights"),
        Phase(re.compile(r"Loading safetensors .*\| (?P<done>\d+)/(?P<total>\d+) "), "loading weights"),
        Phase(re.compile(r"Load weight begin"), "loading weights"),
        Phase(re.compile(r"KV Cache is allocated"), "warming up"),
        Phase(re.compile(r"Capturing batches.*\| (?P<done>\d+)/(?P<total>\d+) "), "capturing CUDA graphs"),
        Phase(re.compile(r"Started server process"), "opening its port"),
    )

    def prepare(self, path: str, fields: Fields, dispatch: Dispatch) -> bytes:
        """Name model and adapter as SGLang wants them, and ask for usage where the client did not."""
        target = dispatch.target
        # The edge refuses it from clients; whatever comes here, the adapter is the one that was chosen.
        fields.pop("lora_path", None)
        fields["model"] = target.model
        if target.adapter is not None:
            if path in _LORA_FIELD:
                fields["lora_path"] = target.adapter
            else:
                fields["model"] = _joined(target.model, target.adapter)
        if dispatch.begun:
            wire.continue_answer(path, fields, dispatch.begun)
        if dispatch.ask_usage and path in _OPENAI_STREAMS:
            fields["stream_options"] = wire.with_usage(fields.get("stream_options"))
        if dispatch.cache_salt is not None and path in _SALTED:
            fields["cache_salt"] = msgspec.Raw(_encode(dispatch.cache_salt))
        return _encode(fields)

    def read_error(self, status: int, body: bytes) -> EngineError:
        """Read an answer whose status was not 200. Of a full queue its Responses API tells with a 400."""
        return _told(wire.read_error(status, body))

    def read_stream_error(self, payload: bytes) -> EngineError | None:
        """Read an event's JSON: ``{"error": {...}}`` with the status as ``code``, or the flat form.

        A full queue is a response that failed, in the Responses dialect; other failures there are the client's to read.
        """
        error = wire.read_stream_error(payload) or _failed_response(payload)
        return None if error is None else _told(error)

    def target(self, name: str, base: str | None = None) -> Target:
        """An adapter is named beside its base model; in the configuration it is written ``BASE:ADAPTER``."""
        if base is None:
            first, colon, rest = name.partition(":")
            if not colon:
                return plain_target(name)
            base, name = first, rest
        return Target(msgspec.Raw(_encode(base)), msgspec.Raw(_encode(name)))

    def read_models(self, body: bytes) -> tuple[ServedModel, ...]:
        """Read the list of models; adapters name their base as ``parent``."""
        return wire.read_models(body)

    def read_load(self, body: bytes) -> EngineLoad | None:
        """Read SGLang's gauges, without those that tell the same requests once more by their priority.

        They are of its last report: every 40 steps while it works; that its queue has emptied it may tell 30 s late.
        """
        lines = (line for line in body.splitlines() if b'priority="' not in line or b'priority=""' in line)
        return wire.load_from(wire.read_gauges(b"\n".join(lines), _GAUGES))

    def load_adapter(self, name: str, directory: str) -> Call:
        """Load an adapter; SGLang remembers its directory and reads that again after it was pushed out."""
        return Call("POST", "/load_lora_adapter", _encode({"lora_name": name, "lora_path": directory}))

    def unload_adapter(self, name: str) -> Call:
        """Unload an adapter; the answer comes when the last request that uses it has ended."""
        return Call("POST", "/unload_lora_adapter", _encode({"lora_name": name}))

    def read_adapter_answer(self, status: int, body: bytes) -> EngineError | None:
        """A failure tells itself in ``error_message``. What is loaded already, or was not there, is as it should be."""
        if status == 200:
            return None
        message = wire.parse(body).get("error_message")
        if not isinstance(message, str) or not message:
            return self.read_error(status, body)
        if _ADAPTER_AS_WANTED.search(message):
            return None
        return EngineError(wire.fault_of(status, message, bare_detail=False), message)

    def obstacles(self, spec: LaunchSpec) -> Iterator[str]:
        """Tell what SGLang cannot do."""
        quantization, device = spec.quantization, spec.device
        if spec.address.unix is not None:
            yield "SGLang listens on no Unix socket; give it a port"
        if ":" in spec.served_name:
            yield f"SGLang serves no model named {spec.served_name!r}: what follows a colon is an adapter's name there"
        if quantization is not None and quantization not in _QUANTIZATIONS[device]:
            able = ", ".join(_QUANTIZATIONS[device])
            there = f"there it takes {able}, or full weights" if able else "there it takes full weights"
            yield f"SGLang has no {quantization} weights on {device}; {there}"
        if device is Device.CPU and spec.parallel.devices > 1:
            yield "one SGLang on cpu is one process on one machine's memory; run several engines instead"

    def command_line(self, spec: LaunchSpec, python: Path) -> list[str]:
        """Return the command; what the person added comes last, so that it wins.

        SGLang takes its key on the command line or in a file only, and every user of a machine can read a command
        line. So with a key the program that is started is one line that moves it there from the environment, which
        only this user can read.
        """
        command = [str(python), *(("-m", _PROGRAM) if spec.api_key is None else ("-c", _WITH_KEY))]
        command += ["--model-path", spec.model, "--served-model-name", spec.served_name]
        command += ["--host", spec.address.host, "--port", str(spec.address.port)]
        # An empty list would allow every host; ".invalid" is no host's name (RFC 2606).
        command += ["--allowed-media-domains", *(spec.allowed_media_domains or ("none.invalid",))]
        command += ["--enable-metrics", "--enable-cache-report", "--tool-call-parser", "hermes"]
        command += ["--log-level-http", "warning", *_DEVICES[spec.device]]
        if running := spec.max_running or _CPU_MAX_RUNNING.get(spec.device):
            command += ["--max-running-requests", str(running)]
        if dtype := spec.dtype or _CPU_DTYPE.get(spec.device):
            command += ["--dtype", dtype]
        if length := spec.max_model_len or _CPU_MAX_MODEL_LEN.get(spec.device):
            command += ["--context-length", str(length)]
        return [*command, *_sizes(spec), *_adapters(spec), *spec.extra_args]

    def environment(self, spec: LaunchSpec) -> dict[str, str]:
        """Return SGLang's own variables, the key among them."""
        variables = {"DO_NOT_TRACK": "1"}
        if spec.api_key is not None:
            variables[_KEY_VARIABLE] = spec.api_key
        variables |= common_environment(spec)
        if spec.device is Device.CPU:
            variables |= {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(_SHIM)}
            # One processor is left to SGLang's scheduler, which never rests, and the gateway.
            variables["OMP_NUM_THREADS"] = str(arithmetic_threads(usable_processors()))
        return {**variables, **spec.extra_environment}


_PROGRAM = "sglang.launch_server"
_KEY_VARIABLE = "SGLANG_API_KEY"
# SGLang writes its arguments into its log, the key among them.
_WITH_KEY = f"""
import logging, os, runpy, sys
key = os.environ.pop("{_KEY_VARIABLE}")
make = logging.getLogRecordFactory()
def without_key(*arguments, **more):
    record = make(*arguments, **more)
    record.msg = str(record.msg).replace(key, "***")
    return record
logging.setLogRecordFactory(without_key)
sys.argv[1:1] = ["--api-key", key]
runpy.run_module("{_PROGRAM}", run_name="__main__", alter_sys=True)
"""

_GAUGES = {
    "sglang:num_running_reqs": "running",
    "sglang:num_queue_reqs": "waiting",
    "sglang:token_usage": "cache_used",
}
_ADAPTER_AS_WANTED = re.compile(r"already loaded|does not exist\. Loaded LoRAs")
_UNKNOWN_ADAPTER = re.compile(r"LoRA adapter that has never been loaded")
_OTHER_KIND = re.compile(r"does not appear to be an embedding model")
_REFUSED = re.compile(r"\{'type': '\w+', 'loc': \('body', ?(?P<loc>[^()]*)\), 'msg': (?P<msg>'[^']*'|\"[^\"]*\")")
_LOC = re.compile(r"'([^']*)'|(\d+)")
_MOST_REFUSED = 5
_NAMED_FIRST = re.compile(r"([a-z_]+) (?:must|is too large)")
_TOO_MANY = re.compile(r"supports at most \d+ completion tokens")


def _failed_response(payload: bytes) -> EngineError | None:
    response = wire.parse(payload).get("response")
    told = response.get("error") if isinstance(response, dict) else None
    message = told.get("message") if isinstance(told, dict) else None
    if not isinstance(message, str):
        return None
    fault = wire.fault_of(500, message, bare_detail=False)
    return EngineError(fault, message) if fault is Fault.OVERLOADED else None


def _told(error: EngineError) -> EngineError:
    """Make an error what other engines say: which field, and what is wrong with it, without what was sent."""
    if _UNKNOWN_ADAPTER.search(error.message):
        # The rest of the message lists everybody's adapters.
        return EngineError(Fault.UNKNOWN_MODEL, "the adapter is not loaded")
    if error.fault is Fault.OVERLOADED:
        return EngineError(error.fault, error.message.removeprefix("503: "))
    if error.fault is not Fault.REQUEST:
        return error
    if _OTHER_KIND.search(error.message):
        return EngineError(Fault.UNSUPPORTED, error.message)
    if refused := _refused(error.message):
        field = refused[0][0].partition(".")[0]
        told = "; ".join(f"{where}: {what}" for where, what in refused)
        return EngineError(error.fault, told, field if field.isidentifier() else None, error.code)
    message = error.message.partition("\n\n  File ")[0].rstrip()
    named = _NAMED_FIRST.match(message)
    code = "context_length_exceeded" if _TOO_MANY.search(message) else error.code
    return EngineError(error.fault, message, error.param or (named[1] if named else None), code)


def _refused(message: str) -> list[tuple[str, str]]:
    """Return what a validator refused: the place in the body, as far as it names fields, and what is wrong there.

    Of each line only what stands before the value that was sent is read.
    """
    found: dict[tuple[str, str], None] = {}
    for line in message.partition("\n\n  File ")[0].splitlines()[1:]:
        if refused := _REFUSED.match(line.strip()):
            parts = [name or number for name, number in _LOC.findall(refused["loc"])]
            where = ".".join(parts)
            found["the body" if where.isdigit() or not where else where, refused["msg"][1:-1]] = None
    return list(found)[:_MOST_REFUSED]


def _joined(model: msgspec.Raw, adapter: msgspec.Raw) -> msgspec.Raw:
    return msgspec.Raw(_encode(f"{_decode_name(model)}:{_decode_name(adapter)}"))


def _sizes(spec: LaunchSpec) -> list[str]:
    """How many devices, how much of their memory, how many requests, how the weights are stored."""
    parallel = spec.parallel
    words: list[str] = []
    for flag, size in (("--tp-size", parallel.tensor), ("--pp-size", parallel.pipeline), ("--dp-size", parallel.data)):
        words += [flag, str(size)] if size > 1 else []
    if spec.memory_share is not None:
        words += ["--mem-fraction-static", f"{spec.memory_share:g}"]
    if spec.max_queued is not None:
        words += ["--max-queued-requests", str(spec.max_queued)]
    if spec.quantization is not None:
        words += ["--quantization", _QUANTIZATIONS[spec.device][spec.quantization]]
    return words


def _adapters(spec: LaunchSpec) -> list[str]:
    slots = spec.adapters
    if slots is None:
        return []
    # The base model takes a place among them.
    words = ["--enable-lora", "--max-loras-per-batch", str(slots.active + 1), "--max-lora-rank", str(slots.rank)]
    words += ["--lora-target-modules", *slots.targets]
    if slots.at_start:
        words += ["--lora-paths", *(f"{name}={directory}" for name, directory in slots.at_start)]
    return words


_DEVICES = {
    # Kernels in plain PyTorch; see the shim. The warm-up would ask for a token of a model that takes seconds for it.
    Device.CPU: (
        *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
        *("--lora-backend", "torch_native", "--skip-server-warmup"),
    ),
    Device.CUDA: ("--device", "cuda"),
    Device.ASCEND: ("--device", "npu", "--attention-backend", "ascend", "--lora-backend", "ascend"),
}
_QUANTIZATIONS: Mapping[Device, Mapping[Quantization, str]] = {
    Device.CPU: {},
    Device.CUDA: {
        Quantization.GPTQ: "gptq",
        Quantization.AWQ: "awq",
        Quantization.COMPRESSED_TENSORS: "compressed-tensors",
        Quantization.FP8: "fp8",
        Quantization.BNB: "bitsandbytes",
    },
    Device.ASCEND: {
        Quantization.MODELSLIM: "modelslim",
    },
}
_CPU_MAX_RUNNING = {Device.CPU: 32}
_CPU_DTYPE = {Device.CPU: "bfloat16"}
_CPU_MAX_MODEL_LEN = {Device.CPU: 2048}
