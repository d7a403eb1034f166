"""Every engine Forebay knows: a new one is one file and one line here."""

from __future__ import annotations

from engines.protocol import Engine
from engines.vllm import Vllm

ENGINES: dict[str, Engine] = {"vllm": Vllm()}
