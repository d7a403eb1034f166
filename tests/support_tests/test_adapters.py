"""Adapters of the tests are files that any reader of safetensors understands, and the same each time."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Literal

import pytest

from tests.support.adapters import Shape, make_adapter

SMALL = Shape(layers=2, hidden=4, key_value=2, intermediate=8)


def read(file: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    return header, whole[8 + length :]


@pytest.mark.parametrize(("dtype", "size"), [("F32", 4), ("BF16", 2)])
def test_what_is_in_an_adapter(tmp_path: Path, dtype: Literal["F32", "BF16"], size: int) -> None:
    made = make_adapter(tmp_path / "a", 3, 1, 0.5, dtype=dtype, targets=("v_proj", "down_proj"), shape=SMALL)
    header, data = read(made / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1."
    shapes = {name.removeprefix(prefix): tensor["shape"] for name, tensor in header.items() if name.startswith(prefix)}
    assert shapes == {
        "self_attn.v_proj.lora_A.weight": [3, 4],
        "self_attn.v_proj.lora_B.weight": [2, 3],
        "mlp.down_proj.lora_A.weight": [3, 8],
        "mlp.down_proj.lora_B.weight": [4, 3],
    }
    assert len(data) == size * 2 * (3 * 4 + 2 * 3 + 3 * 8 + 4 * 3)
    assert [tensor["dtype"] for tensor in header.values()] == [dtype] * 8
    config = json.loads((made / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 6, ["v_proj", "down_proj"])


def test_the_halves_of_a_float_are_its_upper_ones(tmp_path: Path) -> None:
    whole, halves = (
        read(make_adapter(tmp_path / dtype, 2, 7, 1.0, dtype=dtype, shape=SMALL) / "adapter_model.safetensors")[1]
        for dtype in ("F32", "BF16")
    )
    numbers = struct.unpack(f"<{len(whole) // 4}f", whole)
    short = struct.unpack(f"<{len(halves) // 2}H", halves)
    assert [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in short] == pytest.approx(numbers, rel=0.01)


def test_the_same_arguments_make_the_same_bytes(tmp_path: Path) -> None:
    bytes_of = {
        name: (make_adapter(tmp_path / name, 2, seed, scale, shape=SMALL) / "adapter_model.safetensors").read_bytes()
        for name, seed, scale in (("one", 1, 1.0), ("again", 1, 1.0), ("other", 2, 1.0), ("none", 1, 0.0))
    }
    assert bytes_of["one"] == bytes_of["again"]
    assert len(set(bytes_of.values())) == 3
