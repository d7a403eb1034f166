"""Every engine Forebay knows: a new one is one file and one line here."""

from __future__ import annotations

from typing import Protocol

from engines.launch import Launchable
from engines.lmdeploy import LmDeploy
from engines.protocol import Engine
from engines.sglang import Sglang
from engines.simulated import Simulated
from engines.vllm import Vllm


class KnownEngine(Engine, Launchable, Protocol):
    """An engine that can be spoken to and started."""


ENGINES: dict[str, KnownEngine] = {
    "vllm": Vllm(),
    "sglang": Sglang(),
    "lmdeploy": LmDeploy(),
    "simulated": Simulated(),
}
