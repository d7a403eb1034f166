"""What is asked of an engine that Forebay starts itself, in terms that every engine understands.

An engine's own file turns it into a command line and an environment; a process that is owned (``engines.minder``) or a
container runs them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from engines.devices import Device
from engines.minder import Address, Phase

_KEPT_FROM_ENGINES = "FOREBAY_"
"""Variables with this prefix configure the gateway and may hold its secrets."""


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """One engine process to start.

    ``model`` is a directory or, unless ``model_is_local``, an id of the model hub. ``max_model_len`` is in tokens; it
    and ``dtype`` are the engine's own choice when None. ``allowed_media_domains`` are the only hosts it may fetch media
    from, none when empty. ``extra_args`` come last on the command line and ``extra_environment`` wins: a person knows
    better.
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
    visible_devices: tuple[str, ...] = ()
    allowed_media_domains: tuple[str, ...] = ()
    extra_args: tuple[str, ...] = ()
    extra_environment: Mapping[str, str] = field(default_factory=dict, repr=False)


class Launchable(Protocol):
    """What an engine's file says about starting it."""

    loading_phases: tuple[Phase, ...]
    """Stages of loading as its log tells them."""

    def command_line(self, spec: LaunchSpec, python: Path) -> list[str]:
        """Return the command; ``python`` is the interpreter of the engine's environment."""
        ...

    def environment(self, spec: LaunchSpec) -> dict[str, str]:
        """Return the variables the engine needs beside those it inherits."""
        ...


def process_environment(
    engine: Launchable, spec: LaunchSpec, inherited: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return the whole environment for the engine's process: what this process has, without the gateway's own
    variables, and what the engine needs."""
    kept = {name: value for name, value in inherited.items() if not name.startswith(_KEPT_FROM_ENGINES)}
    return {**kept, **engine.environment(spec)}
