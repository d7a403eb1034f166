"""Stands in for uv: makes directories instead of environments, and fails as uv 0.13 was seen to fail.

It appends its arguments to ``$FAKE_UV_CALLS`` (one JSON list a line) and takes what to do from ``$FAKE_UV_PLAN``: a
JSON object from a word of the command (``venv``, ``install``) to a list of outcomes, one a call: ``""`` succeeds, any
other text is written and the exit code is 1. ``$FAKE_UV_GATE``: a FIFO to wait at before installing.
``$FAKE_UV_CONTENT``: a JSON object of files to put into ``--target``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def earlier_calls(word: str, path: Path) -> int:
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(word in json.loads(line)["arguments"] for line in lines)


def main(arguments: Sequence[str], environment: Mapping[str, str], write: Callable[[str], None]) -> int:
    """Do what uv would; ``write`` gets its lines as they come. Returns the exit code."""
    word = "venv" if arguments[0] == "venv" else "install"
    calls_path = Path(environment["FAKE_UV_CALLS"])
    index = earlier_calls(word, calls_path)
    with calls_path.open("a") as calls:
        variables = {name: value for name, value in environment.items() if name.startswith("UV_")}
        calls.write(json.dumps({"arguments": list(arguments), "environment": variables}) + "\n")
    outcomes = json.loads(environment.get("FAKE_UV_PLAN", "{}")).get(word, [])
    outcome = outcomes[index] if index < len(outcomes) else ""
    if word == "venv":
        directory = Path(arguments[-1])
        (directory / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
        (directory / "bin").mkdir()
        (directory / "bin" / "python").symlink_to(sys.executable)
    elif gate := environment.get("FAKE_UV_GATE"):
        write("Resolved 2 packages in 1ms\nDownloading torch (182.0MiB)")
        Path(gate).read_bytes()
    if outcome:
        write(outcome)
        return 1
    for name, content in json.loads(environment.get("FAKE_UV_CONTENT", "{}")).items():
        path = Path(arguments[arguments.index("--target") + 1]) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    if word == "install":
        write("Resolved 2 packages in 1ms\nPrepared 2 packages in 1ms\nInstalled 2 packages in 1ms")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ, lambda text: print(text, file=sys.stderr, flush=True)))
