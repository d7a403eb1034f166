"""What LMDeploy is started with, and that LMDeploy's own parser takes it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.devices import Device, Quantization
from engines.launch import AdapterSlots, LaunchSpec, Parallel, process_environment
from engines.lmdeploy import LmDeploy
from engines.minder import Address
from tests.support.real_engine import prepared
from tests.support.table import each

PYTHON = Path("/env/bin/python")
PARSE = """
import json, sys
from lmdeploy.cli.cli import CLI
from lmdeploy.cli.serve import SubCliServe
CLI.add_parsers()
SubCliServe.add_parsers()
read = [vars(CLI.parser.parse_args(line)) for line in json.load(sys.stdin)]
print(json.dumps(read, default=repr))
"""
LMDEPLOY = LmDeploy()
AT_START = AdapterSlots(at_start=(("a", "/adapters/a"), ("b", "/adapters/b")))


def spec(device: Device = Device.CUDA, **changes: Any) -> LaunchSpec:
    plain = LaunchSpec("lmdeploy", "lmdeploy", device, "/models/m", "m", Address(port=8001))
    return replace(plain, **changes)


def command_line(device: Device = Device.CUDA, **changes: Any) -> list[str]:
    return LMDEPLOY.command_line(spec(device, **changes), PYTHON)


def flag(command: list[str], name: str) -> str:
    """Return the value of a flag's last occurrence: the one that an argument parser takes."""
    return command[len(command) - command[::-1].index(name)]


# --- the command line --------------------------------------------------------------------------------------------


def test_on_an_accelerator_it_is_lmdeploy_s_own_command() -> None:
    command = command_line()
    assert command[:5] == ["/env/bin/python", "/env/bin/lmdeploy", "serve", "api_server", "/models/m"]
    assert (flag(command, "--server-name"), flag(command, "--server-port")) == ("127.0.0.1", "8001")
    assert flag(command, "--model-name") == "m"
    assert (flag(command, "--backend"), flag(command, "--device")) == ("pytorch", "cuda")
    assert flag(command_line(Device.ASCEND), "--device") == "ascend"
    assert not {"--session-len", "--dtype", "--eager-mode", "--tp", "--cache-max-entry-count"} & set(command)


def test_on_a_cpu_it_is_the_shim() -> None:
    """A file of ours, named by its place: what the engine spawns must find it too."""
    command = command_line(Device.CPU)
    shim = Path(command[1])
    assert (shim.name, shim.is_file()) == ("on_cpu.py", True)
    assert command[2:5] == ["serve", "api_server", "/models/m"]
    assert "--eager-mode" in command
    assert (flag(command, "--device"), flag(command, "--session-len")) == ("cuda", "2048")


@pytest.mark.parametrize("device", list(Device))
def test_the_batch_always_has_a_size_and_the_server_no_limit(device: Device) -> None:
    """Without the first it asks a CUDA device that may not be there; the second keeps its health check waiting."""
    assert int(flag(command_line(device), "--max-batch-size")) > 0
    assert flag(command_line(device, max_running=7), "--max-batch-size") == "7"
    assert "--max-concurrent-requests" not in command_line(device, max_running=7)


def test_sizes_are_said_in_its_words() -> None:
    command = command_line(
        parallel=Parallel(tensor=4), memory_share=0.5, quantization=Quantization.AWQ, max_model_len=512, dtype="float16"
    )
    assert (flag(command, "--tp"), flag(command, "--cache-max-entry-count")) == ("4", "0.5")
    assert (flag(command, "--model-format"), flag(command, "--session-len")) == ("awq", "512")
    assert flag(command, "--dtype") == "float16"
    # Of the KV cache, not of the weights.
    assert "--quant-policy" not in command


def test_media_is_fetched_from_named_hosts_only() -> None:
    """Without a list it takes every host's."""
    command = command_line(allowed_media_domains=("a.example", "b.example"))
    index = command.index("--allowed-media-domains")
    assert command[index + 1 : index + 3] == ["a.example", "b.example"]
    assert flag(command_line(), "--allowed-media-domains") == "none.invalid"


def test_adapters_are_named_at_the_start() -> None:
    command = command_line(adapters=AT_START)
    index = command.index("--adapters")
    assert command[index + 1 : index + 3] == ["a=/adapters/a", "b=/adapters/b"]
    assert "--adapters" not in command_line(adapters=AdapterSlots())


def test_what_the_person_says_comes_last_and_wins() -> None:
    command = command_line(max_model_len=512, extra_args=("--session-len", "1024"))
    assert command[-2:] == ["--session-len", "1024"]
    assert flag(command, "--session-len") == "1024"
    variables = LMDEPLOY.environment(spec(Device.CPU, extra_environment={"LMDEPLOY_CPU_CACHE_BYTES": "7"}))
    assert variables["LMDEPLOY_CPU_CACHE_BYTES"] == "7"


@pytest.mark.parametrize("device", list(Device))
def test_the_key_is_not_on_the_command_line(device: Device) -> None:
    """Every user of a machine can read every command line on it, and LMDeploy takes keys as arguments only."""
    asked = spec(device, api_key="secret")
    assert "secret" not in " ".join(LMDEPLOY.command_line(asked, PYTHON))
    assert LMDEPLOY.environment(asked)["LMDEPLOY_API_KEY"] == "secret"
    assert "LMDEPLOY_API_KEY" not in LMDEPLOY.environment(spec(device))


# --- the environment ---------------------------------------------------------------------------------------------


def test_a_model_that_is_here_needs_no_hub() -> None:
    variables = LMDEPLOY.environment(spec())
    assert (variables["HF_HUB_OFFLINE"], variables["TRANSFORMERS_OFFLINE"]) == ("1", "1")
    assert "HF_HUB_OFFLINE" not in LMDEPLOY.environment(spec(model="Qwen/Qwen3-8B", model_is_local=False))


@pytest.mark.parametrize(
    ("device", "variable"),
    [(Device.CUDA, "CUDA_VISIBLE_DEVICES"), (Device.ASCEND, "ASCEND_RT_VISIBLE_DEVICES")],
)
def test_an_engine_sees_only_the_devices_it_was_given(device: Device, variable: str) -> None:
    assert LMDEPLOY.environment(spec(device, visible_devices=("2", "3")))[variable] == "2,3"
    assert variable not in LMDEPLOY.environment(spec(device))


def test_the_cpu_alone_gets_the_cpu_s_variables() -> None:
    assert "LMDEPLOY_CPU_CACHE_BYTES" in LMDEPLOY.environment(spec(Device.CPU))
    for device in (Device.CUDA, Device.ASCEND):
        variables = LMDEPLOY.environment(spec(device))
        assert not any(name.startswith(("LMDEPLOY_CPU", "TORCHDYNAMO", "OMP")) for name in variables)


def test_the_gateway_s_own_variables_stay_with_the_gateway() -> None:
    variables = process_environment(LMDEPLOY, spec(), {"PATH": "/bin", "FOREBAY_KEYS": "fb-secret"})
    assert variables["PATH"] == "/bin"
    assert "FOREBAY_KEYS" not in variables


# --- what it cannot do -------------------------------------------------------------------------------------------


def test_what_it_can_do_is_not_in_the_way() -> None:
    for able in (
        spec(Device.CPU),
        spec(Device.CPU, adapters=AT_START),
        spec(Device.CUDA, adapters=AT_START, parallel=Parallel(tensor=8), memory_share=0.9, max_running=64),
        spec(Device.CUDA, quantization=Quantization.FP8),
        spec(Device.CUDA, quantization=Quantization.GPTQ, extra_args=("--backend", "turbomind")),
        spec(Device.CUDA, adapters=AT_START, extra_args=("--backend", "turbomind", "--backend", "pytorch")),
        spec(Device.ASCEND, parallel=Parallel(tensor=8), extra_args=("--eager-mode",)),
    ):
        assert list(LMDEPLOY.obstacles(able)) == []


@each(
    ("unable", "reason"),
    [
        (spec(Device.ASCEND, adapters=AT_START), "LMDeploy has no LoRA on ascend"),
        (spec(adapters=AT_START, extra_args=("--backend", "turbomind")), "TurboMind drops adapters without a word"),
        (spec(adapters=AT_START, extra_args=("--backend=turbomind",)), "TurboMind drops adapters without a word"),
        (spec(adapters=AT_START, extra_args=("--back", "turbomind")), "TurboMind drops adapters without a word"),
        (spec(Device.ASCEND, extra_args=("--backend", "turbomind")), "runs on cuda only"),
        (spec(Device.CPU, extra_args=("--backend", "turbomind")), "runs on cuda only"),
        (spec(quantization=Quantization.BNB), "there it takes awq, compressed-tensors, fp8, full weights"),
        (spec(quantization=Quantization.GPTQ), "LMDeploy has no gptq weights on cuda"),
        (spec(Device.ASCEND, quantization=Quantization.FP8), "LMDeploy has no fp8 weights on ascend"),
        (spec(Device.ASCEND, quantization=Quantization.MODELSLIM), "LMDeploy has no modelslim weights on ascend"),
        (spec(Device.CPU, quantization=Quantization.AWQ), "there it takes full weights"),
        (spec(parallel=Parallel(pipeline=2)), "use tensor"),
        (spec(parallel=Parallel(data=2)), "run several engines instead"),
        (spec(Device.CPU, parallel=Parallel(tensor=2)), "run several engines instead"),
        (spec(Device.CPU, memory_share=0.5), "on cpu set LMDEPLOY_CPU_CACHE_BYTES"),
        (spec(max_queued=10), "LMDeploy cannot bound its queue"),
        (spec(address=Address(unix=Path("/run/e.sock"))), "give it a port"),
        (spec(extra_args=("--max-concurrent-requests", "8")), "use max_running"),
        (spec(extra_args=("--max-concurrent=8",)), "use max_running"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(unable: LaunchSpec, reason: str) -> None:
    [told] = LMDEPLOY.obstacles(unable)
    assert reason in told
    assert "\n" not in told


# --- LMDeploy's own parser ---------------------------------------------------------------------------------------

COMBINED = [
    spec(device, quantization=quantization, parallel=Parallel(tensor, pipeline, data), adapters=adapters)
    for device, quantization, tensor, pipeline, data, adapters in itertools.product(
        Device, (None, *Quantization), (1, 4), (1, 2), (1, 2), (None, AT_START)
    )
]
MORE = [
    *(spec(device, max_model_len=131072) for device in Device),
    spec(Device.CPU, max_model_len=512, dtype="bfloat16", api_key="secret"),
    spec(max_model_len=512, dtype="float16", memory_share=0.5, max_running=7, api_key="secret"),
    spec(Device.ASCEND, memory_share=0.9, extra_args=("--eager-mode", "--max-batch-size", "4")),
]
ABLE = [one for one in (*COMBINED, *MORE) if not any(LMDEPLOY.obstacles(one))]


@pytest.mark.all_engines
def test_lmdeploy_s_own_parser_takes_every_command_line() -> None:
    """It refuses flags it does not know and formats it does not have; what it read is what was meant."""
    environment, _ = prepared("lmdeploy")
    # Full weights, and each format of its device, on one device and on four, with adapters where it has them.
    assert len(ABLE) == 2 + 4 * 2 * 2 + 2 * 2 + len(MORE)
    lines = [LMDEPLOY.command_line(one, PYTHON) for one in ABLE]
    result = subprocess.run(
        [str(environment.python), "-c", PARSE],
        input=json.dumps([line[line.index("serve") :] for line in lines]),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for one, read in zip(ABLE, json.loads(result.stdout.splitlines()[-1]), strict=True):
        assert (read["model_path"], read["model_name"], read["backend"]) == ("/models/m", "m", "pytorch")
        assert (read["server_name"], read["server_port"]) == ("127.0.0.1", 8001)
        assert read["device"] == ("ascend" if one.device is Device.ASCEND else "cuda")
        assert (read["tp"], read["dp"]) == (one.parallel.tensor, 1)
        assert read["model_format"] == (one.quantization and one.quantization.value)
        assert read["adapters"] == (None if one.adapters is None else ["a=/adapters/a", "b=/adapters/b"])
        assert read["session_len"] == (one.max_model_len or (2048 if one.device is Device.CPU else None))
        assert read["dtype"] == (one.dtype or "auto")
        assert read["cache_max_entry_count"] == (one.memory_share or 0.8)
        assert read["eager_mode"] is (one.device is Device.CPU or "--eager-mode" in one.extra_args)
        assert (read["logprobs_mode"], read["tool_call_parser"]) == ("raw_logprobs", "qwen")
        assert read["allowed_media_domains"] == ["none.invalid"]
        assert read["max_concurrent_requests"] is None
    assert [one["max_batch_size"] for one in json.loads(result.stdout.splitlines()[-1])[-3:]] == [32, 7, 4]
