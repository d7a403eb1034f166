"""Turns a GGUF file into a directory that every engine reads: bf16 safetensors, tokenizer and chat template.

A script, run by ``engines.models`` with the Python of an engine's environment, since it needs torch, transformers and
gguf, which the gateway does not have: ``python convert_gguf.py FILE.gguf OUTPUT_DIRECTORY``.
"""

from __future__ import annotations

import functools
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def convert(source: Path, target: Path) -> None:
    """Write the model of ``source`` into the directory ``target``; each line printed is a sign of life."""
    print("loading PyTorch and transformers", flush=True)
    # By name: the gateway's type checker does not have these.
    torch = import_module("torch")
    transformers = import_module("transformers")
    gguf: Any = import_module("gguf")
    # transformers parses the file three times, 3 s each for the vocabulary alone; once is enough.
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    transformers.utils.logging.disable_progress_bar()
    place, name = str(source.parent), source.name
    print("reading the tokenizer", flush=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=name)
    print("reading the weights", flush=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        place,
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    print("writing bf16 weights", flush=True)
    model.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))
    _forget_the_source(target / "config.json")


def _forget_the_source(path: Path) -> None:
    """Take out what described the quantized file: an engine would look for that quantization in the weights."""
    config = json.loads(path.read_text())
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
