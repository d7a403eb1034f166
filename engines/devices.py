"""What an engine computes on, and what of that this machine has.

Shown: ``cpu`` by running it; ``cuda`` and ``ascend`` were read from the drivers' and engines' documentation, not run.
"""

from __future__ import annotations

import enum
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PINNED_BY_ENGINE_FROM = 5
"""Processors from which vLLM's own binding of threads to cores is used; see ``cpu_environment``."""


class Device(enum.StrEnum):
    """A kind of device."""

    CPU = "cpu"
    CUDA = "cuda"
    ASCEND = "ascend"

    @property
    def visible_variable(self) -> str | None:
        """The environment variable that says which devices a process may use; None for the CPU."""
        return {Device.CUDA: "CUDA_VISIBLE_DEVICES", Device.ASCEND: "ASCEND_RT_VISIBLE_DEVICES"}.get(self)


class Quantization(enum.StrEnum):
    """How weights are stored in fewer bits, by the name the field gives it."""

    GPTQ = "gptq"
    AWQ = "awq"
    COMPRESSED_TENSORS = "compressed-tensors"
    FP8 = "fp8"
    BNB = "bnb"
    """bitsandbytes."""
    MODELSLIM = "modelslim"
    """Huawei's, for Ascend."""


def usable_processors() -> int:
    """Return how many logical processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def arithmetic_threads(processors: int) -> int:
    """Return how many threads compute on so many processors: one is left to the scheduler and the gateway."""
    return max(1, processors - 1)


def cpu_environment(processors: int) -> Mapping[str, str]:
    """Return how vLLM's arithmetic threads are laid out on ``processors`` logical processors.

    On a small machine one processor is left to vLLM's scheduler and the gateway, and nothing is pinned: with
    SmolLM2-135M on two cores one stream then gets 34 tokens/s (8 together 212), while two pinned threads, which vLLM's
    busy scheduler keeps stopping, give it 9 (82). On a larger one vLLM's own layout knows cores and memory nodes.
    """
    if processors >= PINNED_BY_ENGINE_FROM:
        return {"VLLM_CPU_OMP_THREADS_BIND": "auto"}
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(arithmetic_threads(processors))}


@dataclass(frozen=True, slots=True)
class Found:
    """One kind of device on this machine: how many, what they are, and what stands in the way of using them."""

    device: Device
    count: int
    description: str
    problem: str | None = None


def detect(root: Path = Path("/"), machine: str | None = None) -> tuple[Found, ...]:
    """Return the devices of this machine, the CPU last. ``root`` stands for ``/``."""
    return (*_cuda(root), *_ascend(root), _cpu(root, machine or platform.machine()))


def _cpu(root: Path, machine: str) -> Found:
    return Found(Device.CPU, usable_processors(), machine, cpu_problem(root, machine))


def cpu_problem(root: Path = Path("/"), machine: str | None = None) -> str | None:
    """Return why vLLM cannot run on this processor, or None. It is built for AVX2 and AVX-512, and for 64-bit ARM."""
    machine = machine or platform.machine()
    if machine == "aarch64":
        return None
    if machine != "x86_64":
        return f"vLLM is not built for {machine}; it needs an x86-64 or 64-bit ARM processor"
    flags = _read(root / "proc/cpuinfo")
    if flags and not re.search(r"^flags\s*:.*\bavx2\b", flags, re.MULTILINE):
        return "vLLM needs a processor with AVX2 (made since about 2014); this one has none"
    return None


def _cuda(root: Path) -> list[Found]:
    nodes = [node for node in _nodes(root, "nvidia*") if re.fullmatch(r"nvidia\d+", node.name)]
    if not nodes:
        return []
    texts = [_read(path) for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))]
    models = {found.group(1).strip() for text in texts if (found := re.search(r"^Model:(.*)$", text, re.MULTILINE))}
    return [Found(Device.CUDA, len(nodes), ", ".join(sorted(models)) or "NVIDIA GPU")]


def _ascend(root: Path) -> list[Found]:
    nodes = [node for node in _nodes(root, "davinci*") if re.fullmatch(r"davinci\d+", node.name)]
    if not nodes:
        return []
    driver = re.search(r"^Version=(.*)$", _read(root / "usr/local/Ascend/driver/version.info"), re.MULTILINE)
    if driver is None:
        return [Found(Device.ASCEND, len(nodes), "Ascend NPU", "the driver in /usr/local/Ascend/driver is missing")]
    return [Found(Device.ASCEND, len(nodes), f"Ascend NPU, driver {driver.group(1).strip()}")]


def _nodes(root: Path, pattern: str) -> list[Path]:
    return sorted((root / "dev").glob(pattern))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
