"""What SGLang is started with, and that SGLang's own parser takes it."""

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
from engines.launch import AdapterSlots, LaunchSpec, Parallel
from engines.minder import Address
from engines.sglang import Sglang
from tests.support.real_engine import prepared
from tests.support.table import each

PYTHON = Path("/env/bin/python")
PARSE = """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser(exit_on_error=False)
ServerArgs.add_cli_args(parser)
read = [vars(parser.parse_args(line)) for line in json.load(sys.stdin)]
print(json.dumps(read, default=repr))
"""
SGLANG = Sglang()
ON_ASCEND = (Quantization.MODELSLIM,)


def spec(device: Device = Device.CPU, **changes: Any) -> LaunchSpec:
    plain = LaunchSpec("sglang", "sglang", device, "/models/m", "m", Address(port=8001))
    return replace(plain, **changes)


def flag(command: list[str], name: str) -> str:
    """Return the value of a flag's last occurrence: the one that an argument parser takes."""
    return command[len(command) - command[::-1].index(name)]


def test_the_command_line_on_a_cpu() -> None:
    command = SGLANG.command_line(spec(), PYTHON)
    assert command[:5] == ["/env/bin/python", "-m", "sglang.launch_server", "--model-path", "/models/m"]
    assert (flag(command, "--host"), flag(command, "--port")) == ("127.0.0.1", "8001")
    assert flag(command, "--served-model-name") == "m"
    assert (flag(command, "--dtype"), flag(command, "--context-length")) == ("bfloat16", "2048")
    assert (flag(command, "--device"), flag(command, "--max-running-requests")) == ("cpu", "32")
    for backend in ("--attention-backend", "--lora-backend"):
        assert flag(command, backend) == "torch_native"
    assert {"--skip-server-warmup", "--enable-metrics", "--enable-cache-report"} <= set(command)
    variables = SGLANG.environment(spec())
    assert variables["SGLANG_USE_CPU_ENGINE"] == "1"
    assert (Path(variables["PYTHONPATH"]) / "sitecustomize.py").is_file()


@pytest.mark.parametrize(("device", "named"), [(Device.CUDA, "cuda"), (Device.ASCEND, "npu")])
def test_on_an_accelerator_the_sizes_are_the_engine_s_own_choice(device: Device, named: str) -> None:
    command = SGLANG.command_line(spec(device), PYTHON)
    assert flag(command, "--device") == named
    assert not {"--dtype", "--context-length", "--max-running-requests", "--skip-server-warmup"} & set(command)
    assert not {"PYTHONPATH", "SGLANG_USE_CPU_ENGINE", "OMP_NUM_THREADS"} & set(SGLANG.environment(spec(device)))


def test_on_ascend_its_own_kernels_are_asked_for() -> None:
    command = SGLANG.command_line(spec(Device.ASCEND), PYTHON)
    assert flag(command, "--attention-backend") == flag(command, "--lora-backend") == "ascend"


def test_sizes_in_its_own_words() -> None:
    asked = spec(
        Device.CUDA,
        parallel=Parallel(tensor=4, pipeline=2, data=3),
        memory_share=0.85,
        max_running=64,
        max_queued=128,
        max_model_len=131072,
        quantization=Quantization.BNB,
    )
    command = SGLANG.command_line(asked, PYTHON)
    assert [flag(command, f"--{name}-size") for name in ("tp", "pp", "dp")] == ["4", "2", "3"]
    assert flag(command, "--mem-fraction-static") == "0.85"
    assert (flag(command, "--max-running-requests"), flag(command, "--max-queued-requests")) == ("64", "128")
    assert (flag(command, "--context-length"), flag(command, "--quantization")) == ("131072", "bitsandbytes")
    assert not any(word.endswith("-size") for word in SGLANG.command_line(spec(Device.CUDA), PYTHON))


def test_adapters_and_what_they_may_change_are_known_at_the_start() -> None:
    slots = AdapterSlots(active=3, rank=24, targets=("q_proj", "v_proj"), at_start=(("a", "/a"), ("b", "/b")))
    command = SGLANG.command_line(spec(adapters=slots), PYTHON)
    assert "--enable-lora" in command
    assert (flag(command, "--max-loras-per-batch"), flag(command, "--max-lora-rank")) == ("4", "24")
    at = command.index("--lora-target-modules")
    assert command[at : at + 6] == ["--lora-target-modules", "q_proj", "v_proj", "--lora-paths", "a=/a", "b=/b"]
    assert "--lora-paths" not in SGLANG.command_line(spec(adapters=AdapterSlots()), PYTHON)
    assert "--enable-lora" not in SGLANG.command_line(spec(), PYTHON)


def test_what_the_person_says_comes_last_and_wins() -> None:
    asked = spec(max_model_len=512, dtype="float32", extra_args=("--max-running-requests", "4"))
    command = SGLANG.command_line(asked, PYTHON)
    assert command[-2:] == ["--max-running-requests", "4"]
    assert (flag(command, "--context-length"), flag(command, "--dtype")) == ("512", "float32")
    asked = spec(extra_environment={"OMP_NUM_THREADS": "7"})
    assert SGLANG.environment(asked)["OMP_NUM_THREADS"] == "7"


def test_media_is_fetched_from_named_hosts_only() -> None:
    """SGLang takes an empty list for "every host"."""
    command = SGLANG.command_line(spec(allowed_media_domains=("a.example", "b.example")), PYTHON)
    at = command.index("--allowed-media-domains")
    assert command[at + 1 : at + 3] == ["a.example", "b.example"]
    assert flag(SGLANG.command_line(spec(), PYTHON), "--allowed-media-domains") == "none.invalid"


def test_a_key_is_in_no_command_line() -> None:
    """Every user of a machine can read those. The program started puts it there for SGLang's own parser only."""
    asked = spec(api_key="fb-secret")
    command = SGLANG.command_line(asked, PYTHON)
    assert not any("fb-secret" in word for word in command)
    assert command[1] == "-c"
    assert "fb-secret" in SGLANG.environment(asked).values()
    assert "fb-secret" not in SGLANG.environment(spec()).values()


def test_a_model_that_is_here_needs_no_hub() -> None:
    variables = SGLANG.environment(spec())
    assert (variables["HF_HUB_OFFLINE"], variables["TRANSFORMERS_OFFLINE"]) == ("1", "1")
    assert "HF_HUB_OFFLINE" not in SGLANG.environment(spec(model="Qwen/Qwen3-8B", model_is_local=False))


@pytest.mark.parametrize(
    ("device", "variable"),
    [(Device.CUDA, "CUDA_VISIBLE_DEVICES"), (Device.ASCEND, "ASCEND_RT_VISIBLE_DEVICES")],
)
def test_an_engine_sees_only_the_devices_it_was_given(device: Device, variable: str) -> None:
    assert SGLANG.environment(spec(device, visible_devices=("2", "3")))[variable] == "2,3"
    assert variable not in SGLANG.environment(spec(device))


@each(
    ("asked", "told"),
    [
        (spec(address=Address(unix=Path("/run/e.sock"))), "listens on no Unix socket"),
        (spec(served_name="qwen:7b"), "serves no model named 'qwen:7b'"),
        (spec(quantization=Quantization.FP8), "has no fp8 weights on cpu"),
        (spec(Device.CUDA, quantization=Quantization.MODELSLIM), "has no modelslim weights on cuda; there it takes"),
        (spec(Device.ASCEND, quantization=Quantization.BNB), "has no bnb weights on ascend"),
        (spec(parallel=Parallel(tensor=2)), "one process on one machine's memory"),
    ],
)
def test_what_it_cannot_do_is_said_before_it_is_started(asked: LaunchSpec, told: str) -> None:
    [obstacle] = SGLANG.obstacles(asked)
    assert told in obstacle


def test_nothing_stands_in_the_way_of_what_it_can_do() -> None:
    for device in Device:
        assert list(SGLANG.obstacles(spec(device, adapters=AdapterSlots()))) == []


SIZES = (Parallel(), Parallel(tensor=2), Parallel(pipeline=2), Parallel(data=2), Parallel(4, 2, 2))
SLOTS = AdapterSlots(active=3, at_start=(("a@1", "/a"),))
LENGTH = 131072
FULL: dict[str, Any] = {
    "adapters": SLOTS,
    "allowed_media_domains": ("a.example",),
    "max_model_len": LENGTH,
    "max_queued": 16,
    "max_running": 8,
    "memory_share": 0.8,
}
COMBINED = [
    spec(device, quantization=quantization, parallel=parallel, **FULL)
    for device, quantization, parallel in itertools.product(Device, [None, *Quantization], SIZES)
]
ABLE = [spec(), *(one for one in COMBINED if not list(SGLANG.obstacles(one)))]


@pytest.mark.all_engines
def test_sglang_s_own_parser_takes_every_command_line() -> None:
    """Each device, each way to store weights, each way to spread them: SGLang refuses flags and values that it does not
    know, and what it read is what was meant."""
    environment, _ = prepared("sglang")
    assert len(ABLE) == 1 + 1 + 6 * len(SIZES) + (1 + len(ON_ASCEND)) * len(SIZES)
    lines = [SGLANG.command_line(one, environment.python)[3:] for one in ABLE]
    result = subprocess.run(
        [str(environment.python), "-c", PARSE],
        input=json.dumps(lines),
        env={**os.environ, **SGLANG.environment(spec())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    read = json.loads(result.stdout.splitlines()[-1])
    assert (read[0]["model_path"], read[0]["served_model_name"]) == ("/models/m", "m")
    assert (read[0]["host"], read[0]["port"], read[0]["allowed_media_domains"]) == ("127.0.0.1", 8001, ["none.invalid"])
    assert (read[0]["device"], read[0]["context_length"], read[0]["dtype"]) == ("cpu", 2048, "bfloat16")
    for asked, found in zip(ABLE[1:], read[1:], strict=True):
        assert found["device"] == {Device.ASCEND: "npu"}.get(asked.device, asked.device)
        assert (found["tp_size"], found["pp_size"], found["dp_size"]) == (
            asked.parallel.tensor,
            asked.parallel.pipeline,
            asked.parallel.data,
        )
        assert (found["quantization"] is None) is (asked.quantization is None)
        assert (found["max_running_requests"], found["max_queued_requests"]) == (8, 16)
        assert (found["mem_fraction_static"], found["allowed_media_domains"]) == (0.8, ["a.example"])
        assert (found["enable_lora"], found["max_loras_per_batch"], found["max_lora_rank"]) == (True, 4, 16)
        assert len(found["lora_target_modules"]) == len(SLOTS.targets)
        assert found["context_length"] == LENGTH
