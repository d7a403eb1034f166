"""How far what an engine declares was shown: by a run, by its own parser, or by reading alone.

One place for all engines, so that it can be read through in one go. What is not named here was only read; a test holds
each run to a test that is there, and each parser to the command lines that are really parsed.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from engines.devices import Device, Quantization
from engines.protocol import Capability


class Shown(enum.StrEnum):
    """How far something was shown."""

    RUN = "run"
    """A test of this project does it with that engine."""
    PARSER = "parser"
    """The engine's own parser takes the command line in a test; nothing was computed."""
    READ = "read"
    """Read in the engine's source or documentation."""


class Start(enum.Enum):
    """What starting an engine takes, beyond its capabilities. The value is the setting, where there is one."""

    INSTALLED = "forebay engines install"
    STARTED = "engines"
    CHOSEN_DEVICES = "devices"
    MEMORY_SHARE = "memory_share"
    CONTEXT = "max_model_len"
    LONG_CONTEXT = "long contexts"
    FULL_WEIGHTS = "full weights"
    TENSOR = "tensor_parallel"
    PIPELINE = "pipeline_parallel"
    DATA = "data_parallel"


Subject = Capability | Quantization | Start | str
"""What is shown; a string is a path of the gateway."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was shown of one engine.

    ``run`` names, for what is run on the CPU, the test that does it (below ``tests/``), ``parsed`` the devices for
    which its parser takes a command line that asks for it. ``unable`` tells why it cannot, where neither the engine's
    file (``obstacles``) nor a recipe says so; ``remarks`` what else to know.
    """

    run: Mapping[Subject, str] = field(default_factory=dict)
    parsed: Mapping[Subject, frozenset[Device]] = field(default_factory=dict)
    unable: Mapping[Subject, str] = field(default_factory=dict)
    remarks: Mapping[tuple[Subject, Device], str] = field(default_factory=dict)

    def of(self, subject: Subject, device: Device) -> Shown:
        """Return how far something that the engine can do was shown."""
        if device is Device.CPU and subject in self.run:
            return Shown.RUN
        return Shown.PARSER if device in self.parsed.get(subject, ()) else Shown.READ


_ALL = frozenset(Device)
_ACCELERATORS = frozenset({Device.CUDA, Device.ASCEND})
_CUDA, _ASCEND = frozenset({Device.CUDA}), frozenset({Device.ASCEND})


def _each(subjects: Iterable[Subject], test: str) -> dict[Subject, str]:
    return dict.fromkeys(subjects, test)


def _checks(kind: str, **checks: Capability) -> dict[Subject, str]:
    """Return what checks of ``engines.conformance`` show on a kind of engine, each under its name."""
    test = "engines/test_conformance.py::test_conformance"
    return {capability: f"{test}[{kind}-{name}]" for name, capability in checks.items()}


_CHATS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
_ANSWERS = {
    "tools": Capability.TOOLS,
    "forced_tool": Capability.FORCED_TOOLS,
    "json_schema": Capability.JSON_SCHEMA,
    "logprobs": Capability.LOGPROBS,
    "stop": Capability.STOP_WORDS,
    "several_answers": Capability.SEVERAL_ANSWERS,
    "too_many_tokens": Capability.LENGTH_CHECKED,
    "adapter": Capability.ADAPTERS,
}
# Not run on SGLang.
_SEAMS = {"continue": Capability.CONTINUE, "token_chunks": Capability.TOKEN_CHUNKS}
_PAST_THE_GATEWAY = {
    Capability.BOUNDED_QUEUE: "test_overload",
    Capability.CACHE_SALT: "test_a_salt_keeps_prefix_caches_apart",
    Capability.ADAPTER_LOADING: "test_adapters_come_and_go_while_it_runs",
    Capability.MODELS_CHECKED: "test_a_model_that_it_does_not_know",
}


def _past_the_gateway(kind: str, *capabilities: Capability) -> dict[Subject, str]:
    """Return what the other tests of that file show on a kind of engine."""
    return {one: f"engines/test_conformance.py::{_PAST_THE_GATEWAY[one]}[{kind}]" for one in capabilities}


_NO_PRIORITY_SENT = "the gateway itself sends no priority yet"
_RECORDED = "recorded from a real one that serves a pooling model; tests replay that"

_VLLM = Evidence(
    run={
        **_checks("vllm", **_ANSWERS, **_SEAMS),
        **_each((*_CHATS, "/tokenize"), "e2e/test_real_gateway.py::test_every_relayed_path"),
        **_past_the_gateway("vllm", *_PAST_THE_GATEWAY),
        Capability.UNIX_SOCKET: "e2e/test_serve_command.py::test_ctrl_c_stops_everything_and_leaves_nothing",
        Start.STARTED: "engines/test_real_vllm.py::test_the_packaged_model_answers",
        Start.FULL_WEIGHTS: "engines/test_real_vllm.py::test_the_packaged_model_answers",
        Start.CONTEXT: "engines/test_real_vllm.py::test_the_context_is_as_long_as_asked",
    },
    parsed={
        **dict.fromkeys((Start.STARTED, Start.FULL_WEIGHTS, Start.CONTEXT, Start.LONG_CONTEXT), _ALL),
        **dict.fromkeys((Capability.ADAPTERS, Capability.BOUNDED_QUEUE, Quantization.COMPRESSED_TENSORS), _ALL),
        **dict.fromkeys((Start.MEMORY_SHARE, Start.TENSOR, Start.PIPELINE, Start.DATA), _ACCELERATORS),
        **dict.fromkeys((Quantization.GPTQ, Quantization.AWQ), frozenset({Device.CPU, Device.CUDA})),
        **dict.fromkeys((Quantization.FP8, Quantization.BNB, Capability.UNIX_SOCKET), _CUDA),
        Quantization.MODELSLIM: _ASCEND,
    },
    remarks={
        **{(path, device): _RECORDED for path in ("/v1/embeddings", "/v1/rerank", "/v1/score") for device in Device},
        **{
            (Capability.PRIORITY, device): f"with `--scheduling-policy priority` in `args`; {_NO_PRIORITY_SENT}"
            for device in Device
        },
    },
)
_SGLANG = Evidence(
    run={
        **_checks("sglang", **_ANSWERS),
        **_each((*_CHATS, "/tokenize"), "engines/test_real_sglang.py::test_every_path_that_it_serves"),
        **_past_the_gateway("sglang", Capability.BOUNDED_QUEUE, Capability.CACHE_SALT, Capability.ADAPTER_LOADING),
        Start.STARTED: "engines/test_real_sglang.py::test_a_stream_is_the_answer_and_its_usage",
        Start.FULL_WEIGHTS: "engines/test_real_sglang.py::test_a_stream_is_the_answer_and_its_usage",
        Start.CONTEXT: "engines/test_real_sglang.py::test_what_the_engine_refuses",
    },
    parsed={
        **dict.fromkeys((Start.STARTED, Start.FULL_WEIGHTS, Start.CONTEXT, Start.LONG_CONTEXT), _ALL),
        **dict.fromkeys((Start.MEMORY_SHARE, Capability.ADAPTERS, Capability.BOUNDED_QUEUE), _ALL),
        **dict.fromkeys((Start.TENSOR, Start.PIPELINE, Start.DATA), _ACCELERATORS),
        **dict.fromkeys((one for one in Quantization if one is not Quantization.MODELSLIM), _CUDA),
        Quantization.MODELSLIM: _ASCEND,
    },
    unable={
        Capability.MODELS_CHECKED: (
            "SGLang answers from its base model under any name; the gateway asks it only for names that it lists"
        ),
        "/v1/rerank": "SGLang has it, Forebay does not relay it there",
        "/v1/score": "SGLang has it, Forebay does not relay it there",
    },
    remarks={
        (Capability.PRIORITY, device): f"with `--enable-priority-scheduling` in `args`; {_NO_PRIORITY_SENT}"
        for device in Device
    },
)
_LMDEPLOY = Evidence(
    run={
        **_each(_CHATS, "engines/test_real_lmdeploy.py::test_every_path_that_it_serves"),
        **_each(
            (Capability.TOOLS, Capability.JSON_SCHEMA, Capability.LOGPROBS),
            "engines/test_real_lmdeploy.py::test_probabilities_schemas_and_tools",
        ),
        **_each(
            (Capability.MODELS_CHECKED, Capability.ADAPTERS),
            "engines/test_real_lmdeploy.py::test_a_name_means_one_thing",
        ),
        Capability.SEVERAL_ANSWERS: "engines/test_real_lmdeploy.py::test_several_answers",
        Start.STARTED: "engines/test_real_lmdeploy.py::test_a_stream_is_the_answer_and_its_usage",
        Start.FULL_WEIGHTS: "engines/test_real_lmdeploy.py::test_a_stream_is_the_answer_and_its_usage",
        Start.CONTEXT: "engines/test_real_lmdeploy.py::test_more_output_than_fits_is_cut_without_a_word",
    },
    parsed={
        **dict.fromkeys((Start.STARTED, Start.FULL_WEIGHTS, Start.CONTEXT, Start.LONG_CONTEXT), _ALL),
        **dict.fromkeys((Start.MEMORY_SHARE, Start.TENSOR, Quantization.AWQ), _ACCELERATORS),
        **dict.fromkeys((Quantization.COMPRESSED_TENSORS, Quantization.FP8), _CUDA),
        Capability.ADAPTERS: frozenset({Device.CPU, Device.CUDA}),
    },
    unable={
        Capability.STOP_WORDS: "LMDeploy stops only before text that is one token, with the space before it",
        Capability.FORCED_TOOLS: "a required tool is called, a named one only if the model would have anyway",
        Capability.LENGTH_CHECKED: "LMDeploy gives less than was asked for, without a word",
        Capability.CACHE_SALT: "LMDeploy caches prefixes only where its operator asks for it, and then for all alike",
        Capability.PRIORITY: "LMDeploy has no priorities",
        Capability.ADAPTER_LOADING: "LMDeploy's adapters are named at its start; another one means a restart",
        Capability.UNIX_SOCKET: "LMDeploy listens on a port only",
        Capability.CONTINUE: "LMDeploy has no field for it; a completion goes on, its prompt being text",
        Capability.TOKEN_CHUNKS: "not relied on: nobody has looked whether it holds while it is busy",
        "/v1/embeddings": "LMDeploy answers every request there that it is not supported",
        "/v1/rerank": "LMDeploy has no such path",
        "/v1/score": "LMDeploy has no such path",
        "/tokenize": "LMDeploy has no such path",
    },
    remarks={
        **{
            (Capability.LOGPROBS, device): "the token that was drawn is not among its own candidates"
            for device in Device
        },
        (Quantization.GPTQ, Device.CUDA): (
            "TurboMind, LMDeploy's other engine, takes GPTQ (read): `args: [--backend, turbomind]`, without adapters"
        ),
    },
)
_SIMULATED = Evidence(
    run={
        **_checks("simulated", **_ANSWERS, **_SEAMS),
        **_each(
            (*_CHATS, "/tokenize"),
            "engines/simulated/test_wire.py::test_answers_have_the_recorded_form",
        ),
        **_each(
            (Start.INSTALLED, Start.STARTED, Capability.UNIX_SOCKET),
            "engines/simulated/test_through_gateway.py::test_the_configuration_starts_one",
        ),
        "/v1/embeddings": "engines/simulated/test_server.py::test_embeddings_where_it_is_a_pooling_engine",
        **_past_the_gateway("simulated", *_PAST_THE_GATEWAY),
        Start.CONTEXT: "engines/test_conformance.py::test_conformance[simulated-too_long]",
        Start.LONG_CONTEXT: "engines/simulated/test_server.py::test_a_slow_reader_gets_it_all",
    },
    unable={
        Start.FULL_WEIGHTS: "a simulated engine has no weights",
        Start.MEMORY_SHARE: "a simulated engine's memory is its profile's",
        "/v1/rerank": "a simulated engine has no such path",
        "/v1/score": "a simulated engine has no such path",
    },
    remarks={
        (Start.INSTALLED, Device.CPU): "nothing is installed: it runs in the gateway's own environment",
        ("/v1/embeddings", Device.CPU): "with `--runner pooling` in `args`",
        (Capability.PRIORITY, Device.CPU): f"with `--scheduling-policy priority` in `args`; {_NO_PRIORITY_SENT}",
    },
)

EVIDENCE: Mapping[str, Evidence] = {
    "vllm": _VLLM,
    "sglang": _SGLANG,
    "lmdeploy": _LMDEPLOY,
    "simulated": _SIMULATED,
}
"""By kind of engine. A kind that is not here was only read about."""
