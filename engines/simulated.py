"""The simulated engine: it speaks as vLLM does, and answers at the pace of a device that is not there.

What it is made of is in ``engines.simulation``; it needs no environment and no model, only this interpreter.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from engines.environments import EngineEnvironment
from engines.launch import LaunchSpec
from engines.minder import Phase
from engines.models import ModelFiles
from engines.simulation.profiles import PROFILES
from engines.vllm import Vllm

DEFAULT_PROFILE = "h100-8b"


def own_environment() -> EngineEnvironment:
    """Return the environment it runs in: the one of this process."""
    return EngineEnvironment(Path(sys.prefix))


def pretended_model(profile: str | None) -> ModelFiles:
    """Return what stands for the model's files: the profile, and the name of the model it pretends to serve."""
    known = PROFILES[profile or DEFAULT_PROFILE]
    return ModelFiles(known.name, known.model)


class Simulated(Vllm):
    """A model of vLLM behind vLLM's dialect; ``LaunchSpec.model`` is the name of its profile."""

    name = "simulated"
    paths: Mapping[str, str] = {
        path: own for path, own in Vllm.paths.items() if path not in ("/v1/rerank", "/v1/score")
    }
    loading_phases: tuple[Phase, ...] = (Phase(re.compile(r"Starting simulated engine"), "opening its port"),)

    def obstacles(self, spec: LaunchSpec) -> Iterator[str]:
        """Tell what it cannot pretend."""
        if spec.quantization is not None:
            yield "a simulated engine has no weights; choose a profile, or change its figures by args"
        if spec.parallel.devices > 1:
            yield "a simulated engine's devices are its profile's; choose another profile"

    def command_line(self, spec: LaunchSpec, python: Path) -> list[str]:
        """Return the command of ``engines.simulation``; what the person added comes last, so that it wins."""
        address = spec.address
        where = ("--uds", str(address.unix)) if address.unix else ("--host", address.host, "--port", str(address.port))
        command = [str(python), "-m", "engines.simulation", "--profile", spec.model, *where]
        command += ["--served-model-name", spec.served_name, "--enable-prompt-tokens-details"]
        for flag, size in (
            ("--max-model-len", spec.max_model_len),
            ("--max-num-seqs", spec.max_running),
            ("--max-num-queued-reqs", _unfinished(spec)),
        ):
            command += [flag, str(size)] if size is not None else []
        if spec.adapters is not None:
            command += ["--max-loras", str(spec.adapters.active), "--max-lora-rank", str(spec.adapters.rank)]
            if spec.adapters.at_start:
                command += ["--lora-modules", *(f"{name}={place}" for name, place in spec.adapters.at_start)]
        return [*command, *spec.extra_args]

    def environment(self, spec: LaunchSpec) -> dict[str, str]:
        """Return its own variables; the key is one of them since a command line can be read by every user."""
        variables = {} if spec.api_key is None else {"VLLM_API_KEY": spec.api_key}
        return {**variables, **spec.extra_environment}


def _unfinished(spec: LaunchSpec) -> int | None:
    """Return what bounds its queue: as vLLM's own, the bound counts the requests that run too."""
    if spec.max_queued is None:
        return None
    return spec.max_queued + (spec.max_running or PROFILES[spec.model].max_num_seqs)
