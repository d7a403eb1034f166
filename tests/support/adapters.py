"""Makes LoRA adapters in PEFT's form without PyTorch: real files whose effect on the packaged model can be seen.

The weights are random, so an adapter of a large scale turns every answer into its own nonsense: two adapters differ
from each other and from the base, and the same arguments make the same bytes.
"""

from __future__ import annotations

import array
import json
import random
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

VISIBLE = 0.3
"""A scale at which no answer stays what the base model would say."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model decides how large an adapter's matrices are."""

    layers: int = 30
    hidden: int = 576
    key_value: int = 192
    intermediate: int = 1536

    def sizes(self) -> Mapping[str, tuple[str, int, int]]:
        """Return of each module where it sits, how many values go in and how many come out."""
        return {
            "q_proj": ("self_attn", self.hidden, self.hidden),
            "k_proj": ("self_attn", self.hidden, self.key_value),
            "v_proj": ("self_attn", self.hidden, self.key_value),
            "o_proj": ("self_attn", self.hidden, self.hidden),
            "gate_proj": ("mlp", self.hidden, self.intermediate),
            "up_proj": ("mlp", self.hidden, self.intermediate),
            "down_proj": ("mlp", self.intermediate, self.hidden),
        }


SMOLLM2 = Shape()
"""SmolLM2-135M, the packaged model."""


def make_adapter(
    directory: Path,
    rank: int = 8,
    seed: int = 1,
    scale: float = VISIBLE,
    *,
    dtype: Literal["F32", "BF16"] = "F32",
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    shape: Shape = SMOLLM2,
) -> Path:
    """Write an adapter into ``directory`` and return it; ``scale`` 0 makes one that changes nothing."""
    directory.mkdir(parents=True, exist_ok=True)
    source = random.Random(seed)
    tensors: dict[str, tuple[list[int], bytes]] = {}
    for layer in range(shape.layers):
        for module in targets:
            part, values_in, values_out = shape.sizes()[module]
            name = f"base_model.model.model.layers.{layer}.{part}.{module}"
            for letter, rows, columns in (("A", rank, values_in), ("B", values_out, rank)):
                numbers = array.array("f", (source.gauss(0, scale) for _ in range(rows * columns)))
                tensors[f"{name}.lora_{letter}.weight"] = ([rows, columns], _bytes(numbers, dtype))
    (directory / "adapter_model.safetensors").write_bytes(_safetensors(tensors, dtype))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "smollm2-135m-instruct",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return directory


def _bytes(numbers: array.array[float], dtype: str) -> bytes:
    """Little-endian; a bf16 is the upper half of a float."""
    if sys.byteorder == "big":
        numbers.byteswap()
    whole = numbers.tobytes()
    if dtype == "F32":
        return whole
    halves = bytearray(len(whole) // 2)
    halves[0::2], halves[1::2] = whole[2::4], whole[3::4]
    return bytes(halves)


def _safetensors(tensors: Mapping[str, tuple[list[int], bytes]], dtype: str) -> bytes:
    """Return the file's bytes: a header's length, the header, and the tensors one after the other."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    return b"".join((struct.pack("<Q", len(told)), told, *(data for _, data in tensors.values())))
