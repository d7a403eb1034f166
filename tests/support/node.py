"""Runs calls through the official openai client for Node; the program is ``tests/clients/node/run.mjs``."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).resolve().parent.parent / "clients" / "node"

# What run.mjs needs of the platform (fetch, web streams, stream/consumers). The openai package declares 22, and runs
# on 20.
OLDEST_NODE = 20

# A machine without Node has the one of the locked Python packages, beside the interpreter.
SEARCH = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])

INSTALL_TIMEOUT = 300.0
"""Seconds for ``npm ci``: one package of 35 MB over a slow index."""

RUN_TIMEOUT = 120.0
"""Seconds for all calls of one run; real engines on a busy CPU are slow."""


class NodeError(Exception):
    """Node, npm or the client program cannot do their part; the message says what to do."""


def install() -> None:
    """Install the locked packages into ``node_modules`` unless they are there already. Raises ``NodeError``.

    A digest of the lock file beside them says which ones are there; a file lock keeps parallel test runs apart.
    """
    _check_programs()
    lock = (PROGRAM / "package-lock.json").read_bytes()
    digest = hashlib.sha256(lock).hexdigest()
    stamp = PROGRAM / "node_modules" / ".lock-digest"
    with (PROGRAM / "package.json").open() as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == digest:
            return
        done = subprocess.run(
            [_path_of("npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
            cwd=PROGRAM,
            env={**os.environ, "PATH": SEARCH},
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT,
            check=False,
        )
        if done.returncode != 0:
            raise NodeError(f"'npm ci' in {PROGRAM} failed; is a package index reachable?\n{done.stderr[-2000:]}")
        stamp.write_text(digest)


def _path_of(program: str) -> str:
    return shutil.which(program, path=SEARCH) or program


def _check_programs() -> None:
    missing = [program for program in ("node", "npm") if shutil.which(program, path=SEARCH) is None]
    advice = (
        f"Install Node.js {OLDEST_NODE} or newer with npm, "
        "or leave these tests out: pytest --ignore=tests/clients/test_openai_node.py"
    )
    if missing:
        raise NodeError(f"{' and '.join(missing)} not found on the PATH. {advice}")
    version = subprocess.run([_path_of("node"), "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < OLDEST_NODE:
        raise NodeError(f"node {version} is too old. {advice}")


async def run(base_url: str, api_key: str, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Run calls one after the other and return name → result, as described in ``run.mjs``.

    ``base_url`` ends with ``/v1``. Raises ``NodeError`` with what the program wrote to standard error.
    """
    program = await asyncio.create_subprocess_exec(
        _path_of("node"),
        "run.mjs",
        cwd=PROGRAM,
        env={"PATH": SEARCH, "BASE_URL": base_url, "API_KEY": api_key},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(RUN_TIMEOUT):
            output, complaints = await program.communicate(json.dumps(list(calls)).encode())
    except TimeoutError:
        program.kill()
        await program.wait()
        raise NodeError(f"the client program was not through after {RUN_TIMEOUT:.0f} s") from None
    if program.returncode != 0:
        raise NodeError(f"the client program ended with code {program.returncode}:\n{complaints.decode()[-2000:]}")
    results: dict[str, Any] = json.loads(output)
    return results
