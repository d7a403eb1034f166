"""LoRA adapters as vLLM takes them: read from a directory, refused with its words."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec

from engines.simulation.bodies import Refused

_READ = 1 << 20
_MOST_HEADER = 100_000_000


class Adapter(msgspec.Struct, frozen=True):
    """An adapter that is known by its name. ``version`` is a digest of its files as they were when it was loaded."""

    name: str
    directory: str
    version: str


def read_adapter(name: str, directory: str, max_rank: int) -> Adapter:
    """Read and check an adapter's files. Blocks. Refused with what vLLM says."""
    folder = Path(directory)
    config = _config(name, folder)
    if (rank := config.get("r", 0)) > max_rank:
        raise _failed(f"LoRA rank {rank} is greater than max_lora_rank {max_rank}.")
    if config.get("use_dora"):
        raise _failed("vLLM does not yet support DoRA.")
    if (modules := config.get("modules_to_save")) is not None:
        only = (
            'vLLM only supports modules_to_save being either None or ["classifier", "score"] for classification models'
        )
        raise _failed(f"{only}. Unsupported modules_to_save: {modules}")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise _failed(f"{directory} doesn't contain tensors")
    _check_header(weights)
    return Adapter(name, directory, _digest(folder))


def _config(name: str, folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        message = f"Loading lora {name} failed: No adapter found for {folder}"
        raise Refused(404, message, "NotFoundError")
    return config


def _failed(why: str) -> Refused:
    message = f"Call to add_lora method failed: Worker failed with error '{why}', please check the stack trace above"
    return Refused(500, f"{message} for the root cause", "InternalServerError")


def _check_header(weights: Path) -> None:
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = weights.stat().st_size
        if length > min(size - 8, _MOST_HEADER):
            raise _failed("Error while deserializing header: invalid header length")
        try:
            json.loads(file.read(length))
        except ValueError:
            raise _failed("Error while deserializing header: invalid JSON in header") from None


def _digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_READ):
                whole.update(chunk)
    return whole.hexdigest()[:12]
