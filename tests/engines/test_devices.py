"""What a machine has is read from files of the kernel and the drivers; here from a tree of such files."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.devices import Device, Found, cpu_environment, cpu_problem, detect, usable_processors


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with nothing but a processor that has AVX2."""
    write(tmp_path / "proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu sse4_2 avx avx2 bmi2\n")
    (tmp_path / "dev").mkdir()
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_machine_without_accelerators_has_its_processors(root: Path) -> None:
    assert detect(root, "x86_64") == (Found(Device.CPU, usable_processors(), "x86_64"),)


def test_gpus_are_counted_and_named(root: Path) -> None:
    """Control devices beside them are no GPUs."""
    for node in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (root / "dev" / node).touch()
    for index in (0, 1):
        write(root / f"proc/driver/nvidia/gpus/0000:0{index}:00.0/information", "Model: \t\t NVIDIA L4\nIRQ: 1\n")
    assert detect(root, "x86_64")[0] == Found(Device.CUDA, 2, "NVIDIA L4")


def test_npus_are_counted_with_their_driver(root: Path) -> None:
    for node in ("davinci0", "davinci_manager"):
        (root / "dev" / node).touch()
    assert detect(root, "aarch64")[0] == Found(
        Device.ASCEND, 1, "Ascend NPU", "the driver in /usr/local/Ascend/driver is missing"
    )
    write(root / "usr/local/Ascend/driver/version.info", "Package=driver\nVersion=25.0.rc1\n")
    assert detect(root, "aarch64")[0] == Found(Device.ASCEND, 1, "Ascend NPU, driver 25.0.rc1")


def test_a_processor_vllm_was_not_built_for_is_named(root: Path) -> None:
    assert cpu_problem(root, "x86_64") is None
    assert cpu_problem(root, "aarch64") is None
    assert cpu_problem(root, "riscv64") == "vLLM is not built for riscv64; it needs an x86-64 or 64-bit ARM processor"
    write(root / "proc/cpuinfo", "flags\t\t: fpu sse4_2 avx avx512_no_avx2\n")
    assert cpu_problem(root, "x86_64") == "vLLM needs a processor with AVX2 (made since about 2014); this one has none"


def test_a_small_machine_keeps_a_processor_free_for_the_scheduler() -> None:
    assert cpu_environment(1) == {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    assert cpu_environment(4) == {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "3"}
    assert cpu_environment(5) == {"VLLM_CPU_OMP_THREADS_BIND": "auto"}


def test_each_accelerator_has_the_variable_that_limits_a_process_to_some() -> None:
    assert {device: device.visible_variable for device in Device} == {
        Device.CPU: None,
        Device.CUDA: "CUDA_VISIBLE_DEVICES",
        Device.ASCEND: "ASCEND_RT_VISIBLE_DEVICES",
    }
