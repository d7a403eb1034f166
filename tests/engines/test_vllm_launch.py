"""What vLLM is started with, and that vLLM's own parser takes it."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.devices import Device, Quantization
from engines.launch import AdapterSlots, LaunchSpec, Parallel, process_environment
from engines.minder import Address
from engines.simulated import Simulated
from engines.vllm import Vllm
from tests.support.launches import every_command_line, every_spec
from tests.support.real_engine import prepared
from tests.support.table import each

PYTHON = Path("/env/bin/python")
PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
read = []
for line in json.load(sys.stdin):
    options = parser.parse_args(line)
    validate_parsed_serve_args(options)
    read.append({name: value for name, value in vars(options).items() if isinstance(value, str | int | list | None)})
print(json.dumps(read, default=repr))
"""


def spec(device: Device = Device.CPU, **changes: Any) -> LaunchSpec:
    plain = LaunchSpec("vllm", "vllm", device, "/models/m", "m", Address(port=8001))
    return replace(plain, **changes)


def flag(command: list[str], name: str) -> str:
    """Return the value of a flag's last occurrence: the one that an argument parser takes."""
    return command[len(command) - command[::-1].index(name)]


def test_the_command_line_on_a_cpu() -> None:
    command = Vllm().command_line(spec(), PYTHON)
    assert command[:4] == ["/env/bin/python", "/env/bin/vllm", "serve", "/models/m"]
    assert (flag(command, "--host"), flag(command, "--port")) == ("127.0.0.1", "8001")
    assert flag(command, "--served-model-name") == "m"
    assert (flag(command, "--dtype"), flag(command, "--max-model-len")) == ("bfloat16", "2048")
    assert flag(command, "--max-num-seqs") == "32"
    assert {"--enforce-eager", "--enable-auto-tool-choice"} <= set(command)
    assert flag(command, "--tool-call-parser") == "hermes"


@pytest.mark.parametrize("device", [Device.CUDA, Device.ASCEND])
def test_on_an_accelerator_the_sizes_are_the_engine_s_own_choice(device: Device) -> None:
    command = Vllm().command_line(spec(device), PYTHON)
    assert not {"--dtype", "--max-model-len", "--max-num-seqs", "--enforce-eager"} & set(command)


def test_what_the_person_says_comes_last_and_wins() -> None:
    asked = spec(
        max_model_len=512, dtype="float32", extra_args=("--max-num-seqs", "4", "--tool-call-parser", "llama3_json")
    )
    command = Vllm().command_line(asked, PYTHON)
    assert command[-4:] == ["--max-num-seqs", "4", "--tool-call-parser", "llama3_json"]
    assert (flag(command, "--max-model-len"), flag(command, "--dtype")) == ("512", "float32")
    asked = spec(extra_environment={"VLLM_CPU_KVCACHE_SPACE": "8"})
    assert Vllm().environment(asked)["VLLM_CPU_KVCACHE_SPACE"] == "8"


def test_a_unix_socket_takes_the_place_of_host_and_port() -> None:
    command = Vllm().command_line(spec(address=Address(unix=Path("/run/e.sock"))), PYTHON)
    assert flag(command, "--uds") == "/run/e.sock"
    assert not {"--host", "--port"} & set(command)


def test_media_is_fetched_from_named_hosts_only_and_never_through_a_redirect() -> None:
    """vLLM takes an empty list for "every host"."""
    command = Vllm().command_line(spec(allowed_media_domains=("a.example", "b.example")), PYTHON)
    index = command.index("--allowed-media-domains")
    assert command[index + 1 : index + 3] == ["a.example", "b.example"]
    assert flag(Vllm().command_line(spec(), PYTHON), "--allowed-media-domains") == "none.invalid"
    assert Vllm().environment(spec())["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"


def test_the_key_is_not_on_the_command_line() -> None:
    """Every user of a machine can read every command line on it."""
    asked = spec(api_key="secret")
    assert "secret" not in " ".join(Vllm().command_line(asked, PYTHON))
    assert Vllm().environment(asked)["VLLM_API_KEY"] == "secret"
    assert "secret" not in repr(asked)
    assert "VLLM_API_KEY" not in Vllm().environment(spec())


def test_a_model_that_is_here_needs_no_hub_and_nobody_is_told() -> None:
    variables = Vllm().environment(spec())
    assert (variables["HF_HUB_OFFLINE"], variables["TRANSFORMERS_OFFLINE"]) == ("1", "1")
    assert (variables["VLLM_NO_USAGE_STATS"], variables["DO_NOT_TRACK"]) == ("1", "1")
    assert "HF_HUB_OFFLINE" not in Vllm().environment(spec(model="Qwen/Qwen3-8B", model_is_local=False))


@pytest.mark.parametrize(
    ("device", "variable"),
    [(Device.CUDA, "CUDA_VISIBLE_DEVICES"), (Device.ASCEND, "ASCEND_RT_VISIBLE_DEVICES")],
)
def test_an_engine_sees_only_the_devices_it_was_given(device: Device, variable: str) -> None:
    assert Vllm().environment(spec(device, visible_devices=("2", "3")))[variable] == "2,3"
    assert variable not in Vllm().environment(spec(device))


def test_the_cpu_alone_gets_the_cpu_s_variables() -> None:
    """Nothing is compiled on the CPU: it would hold up every request for seconds, and needs a compiler."""
    variables = Vllm().environment(spec())
    assert (variables["TORCHDYNAMO_DISABLE"], variables["VLLM_CPU_KVCACHE_SPACE"]) == ("1", "1")
    assert "VLLM_CPU_OMP_THREADS_BIND" in variables
    for device in (Device.CUDA, Device.ASCEND):
        assert not any(name.startswith(("VLLM_CPU", "TORCHDYNAMO")) for name in Vllm().environment(spec(device)))


def test_the_gateway_s_own_variables_stay_with_the_gateway() -> None:
    inherited = {"PATH": "/bin", "FOREBAY_KEYS": "fb-secret", "DO_NOT_TRACK": "0"}
    variables = process_environment(Vllm(), spec(), inherited)
    assert variables["PATH"] == "/bin"
    assert "FOREBAY_KEYS" not in variables
    assert variables["DO_NOT_TRACK"] == "1"


def parsed(lines: list[list[str]], python: Path) -> list[dict[str, Any]]:
    """Return what vLLM's own parser reads in command lines, by the engine's own Python."""
    result = subprocess.run(
        [str(python), "-c", PARSE],
        input=json.dumps(lines),
        env={**os.environ, **Vllm().environment(spec())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    read: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return read


@pytest.mark.real_engine
def test_every_device_quantization_parallelism_and_adapter_is_taken() -> None:
    environment, _ = prepared()
    specs = every_spec("vllm")
    assert {(one.device, one.quantization) for one in specs} >= {
        (Device.CPU, Quantization.COMPRESSED_TENSORS),
        (Device.CUDA, Quantization.FP8),
        (Device.CUDA, Quantization.BNB),
        (Device.ASCEND, Quantization.MODELSLIM),
    }
    for one, read in zip(
        specs, parsed([line[3:] for line in every_command_line("vllm")], environment.python), strict=True
    ):
        sizes = (read["tensor_parallel_size"], read["pipeline_parallel_size"], read["data_parallel_size"])
        assert sizes == (one.parallel.tensor, one.parallel.pipeline, one.parallel.data)
        assert (read["quantization"] is None) == (one.quantization is None)
        assert bool(read["enable_lora"]) == (one.adapters is not None)
        assert (read["max_num_seqs"], read["max_num_queued_reqs"]) == (64, 256 + 64 * one.parallel.data)


def test_a_bound_on_waiting_is_one_on_all_that_are_there() -> None:
    """vLLM refuses when what runs and what waits reach the bound together."""
    for kind in (Vllm(), Simulated()):
        given = spec(max_running=4, max_queued=8, model="instant" if kind.name == "simulated" else "/models/m")
        assert flag(kind.command_line(given, PYTHON), "--max-num-queued-reqs") == "12"
    assert flag(Vllm().command_line(spec(max_queued=8), PYTHON), "--max-num-queued-reqs") == "40"


def test_the_next_rank_that_vllm_takes_is_asked_for() -> None:
    command = Vllm().command_line(spec(adapters=AdapterSlots(active=2, rank=24)), PYTHON)
    assert (flag(command, "--max-loras"), flag(command, "--max-lora-rank")) == ("2", "32")
    assert Vllm().environment(spec(adapters=AdapterSlots()))["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in Vllm().environment(spec())


@each(
    ("changes", "reason"),
    [
        ({"quantization": Quantization.FP8}, "no fp8 weights on cpu"),
        ({"device": Device.CUDA, "quantization": Quantization.MODELSLIM}, "no modelslim weights on cuda"),
        ({"device": Device.ASCEND, "quantization": Quantization.BNB}, "no bnb weights on ascend"),
        ({"parallel": Parallel(tensor=2)}, "run several engines instead"),
        ({"memory_share": 0.5}, "VLLM_CPU_KVCACHE_SPACE"),
        ({"device": Device.CUDA, "max_queued": 8}, "say max_running too"),
    ],
)
def test_what_cannot_work_is_told_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    [told] = Vllm().obstacles(spec(**changes))
    assert reason in told


SINGLE = [
    spec(),
    spec(Device.CUDA, address=Address(unix=Path("/run/e.sock")), allowed_media_domains=("a.example", "b.example")),
    spec(Device.ASCEND, max_model_len=512, extra_args=("--max-num-seqs", "4")),
]


@pytest.mark.real_engine
def test_vllm_s_own_parser_takes_every_command_line() -> None:
    """vLLM refuses flags it does not know; what it read is what was meant."""
    environment, _ = prepared()
    lines = [Vllm().command_line(one, environment.python)[3:] for one in SINGLE]
    cpu, cuda, ascend = parsed(lines, environment.python)
    assert (cpu["model_tag"], cpu["served_model_name"], cpu["host"], cpu["port"]) == (
        "/models/m",
        ["m"],
        "127.0.0.1",
        8001,
    )
    assert (cpu["dtype"], cpu["max_model_len"], cpu["max_num_seqs"], cpu["enforce_eager"]) == (
        "bfloat16",
        2048,
        32,
        True,
    )
    assert (cpu["enable_auto_tool_choice"], cpu["tool_call_parser"]) == (True, "hermes")
    assert (cpu["enable_prompt_tokens_details"], cpu["disable_uvicorn_access_log"]) == (True, True)
    assert (cuda["uds"], cuda["allowed_media_domains"]) == ("/run/e.sock", ["a.example", "b.example"])
    assert (ascend["max_model_len"], ascend["max_num_seqs"]) == (512, 4)
