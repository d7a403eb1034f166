"""Every way an engine may be started: by device, quantization, parallelism and adapters, less what it cannot do."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from engines.devices import Device, Quantization
from engines.launch import AdapterSlots, LaunchSpec, Parallel
from engines.minder import Address
from engines.protocol import Capability
from engines.registry import ENGINES

PARALLEL = (Parallel(), Parallel(tensor=2), Parallel(tensor=4, pipeline=2), Parallel(data=2), Parallel(2, 2, 2))
ADAPTERS = (None, AdapterSlots(), AdapterSlots(active=8, rank=24, at_start=(("support", "/adapters/support"),)))


def every_spec(kind: str) -> list[LaunchSpec]:
    """Return every launch that a kind of engine says it can do."""
    engine = ENGINES[kind]
    specs = []
    for device, quantization, parallel, adapters in product(Device, (None, *Quantization), PARALLEL, ADAPTERS):
        on_cpu = device is Device.CPU
        spec = LaunchSpec(
            name="one",
            kind=kind,
            device=device,
            model="/models/m",
            served_name="m",
            address=Address(port=8100),
            api_key="engine-key",
            max_model_len=32768,
            quantization=quantization,
            parallel=parallel,
            memory_share=None if on_cpu else 0.85,
            max_running=64,
            max_queued=256 if Capability.BOUNDED_QUEUE in engine.capabilities else None,
            adapters=adapters,
            visible_devices=() if on_cpu else tuple(str(number) for number in range(parallel.devices)),
        )
        if not list(engine.obstacles(spec)):
            specs.append(spec)
    return specs


def every_command_line(kind: str) -> list[list[str]]:
    """Return the command lines of all of them, without the program's own words."""
    engine, python = ENGINES[kind], Path("/env/bin/python")
    return [engine.command_line(spec, python) for spec in every_spec(kind)]
