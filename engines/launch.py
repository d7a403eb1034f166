"""What is asked of an engine that Forebay starts itself, in terms that every engine understands.

An engine's own file turns it into a command line and an environment; a process that is owned (``engines.minder``) or a
container runs them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from engines.devices import Device, Quantization
from engines.minder import Address, Phase

_KEPT_FROM_ENGINES = "FOREBAY_"
"""Variables with this prefix configure the gateway and may hold its secrets."""


@dataclass(frozen=True, slots=True)
class Parallel:
    """Over how many devices one engine is spread: ``tensor`` within a layer, ``pipeline`` by layers, ``data`` by
    copies."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def devices(self) -> int:
        """How many devices that takes."""
        return self.tensor * self.pipeline * self.data


@dataclass(frozen=True, slots=True)
class AdapterSlots:
    """Room for LoRA adapters: at most ``active`` in one batch, of at most ``rank``.

    ``targets`` are the modules an adapter may change, for engines that must know at their start; ``at_start`` are
    (name, directory) pairs that are there from the beginning.
    """

    active: int = 4
    rank: int = 16
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    at_start: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """One engine process to start.

    ``model`` is a directory or, unless ``model_is_local``, an id of the model hub. ``max_model_len`` is in tokens,
    ``memory_share`` the part of a device's memory (0 to 1) it may take, ``max_running`` and ``max_queued`` count
    requests; each is the engine's own choice when None, as ``dtype`` is. ``quantization`` says how the weights are
    stored; None: as the model's files say, if they do. ``adapters`` None: it serves none. ``allowed_media_domains`` are
    the only hosts it may fetch media from, none when empty. ``extra_args`` come last on the command line and
    ``extra_environment`` wins: a person knows better.
    """

    name: str
    kind: str
    device: Device
    model: str
    served_name: str
    address: Address
    model_is_local: bool = True
    api_key: str | None = field(default=None, repr=False)
    max_model_len: int | None = None
    dtype: str | None = None
    quantization: Quantization | None = None
    parallel: Parallel = Parallel()
    memory_share: float | None = None
    max_running: int | None = None
    max_queued: int | None = None
    adapters: AdapterSlots | None = None
    visible_devices: tuple[str, ...] = ()
    allowed_media_domains: tuple[str, ...] = ()
    extra_args: tuple[str, ...] = ()
    extra_environment: Mapping[str, str] = field(default_factory=dict, repr=False)


class Launchable(Protocol):
    """What an engine's file says about starting it."""

    loading_phases: tuple[Phase, ...]
    """Stages of loading as its log tells them."""

    def obstacles(self, spec: LaunchSpec) -> Iterator[str]:
        """Tell what of a spec this engine cannot do, each in one line with the reason; nothing when all is well."""
        ...

    def command_line(self, spec: LaunchSpec, python: Path) -> list[str]:
        """Return the command; ``python`` is the interpreter of the engine's environment."""
        ...

    def environment(self, spec: LaunchSpec) -> dict[str, str]:
        """Return the variables the engine needs beside those it inherits."""
        ...


def common_environment(spec: LaunchSpec) -> dict[str, str]:
    """Return the variables that mean the same to every engine: no hub for a local model, and which devices it sees."""
    variables = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} if spec.model_is_local else {}
    if spec.device.visible_variable and spec.visible_devices:
        variables[spec.device.visible_variable] = ",".join(spec.visible_devices)
    return variables


def process_environment(
    engine: Launchable, spec: LaunchSpec, inherited: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return the whole environment for the engine's process: what this process has, without the gateway's own
    variables, and what the engine needs."""
    kept = {name: value for name, value in inherited.items() if not name.startswith(_KEPT_FROM_ENGINES)}
    return {**kept, **engine.environment(spec)}
