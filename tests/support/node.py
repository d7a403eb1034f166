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
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

PROGRAM = Path(__file__).resolve().parent.parent / "clients" / "node"

# What run.mjs needs of the platform (fetch, web streams). The openai package declares 22, and runs
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


class Client:
    """A Node process that runs calls for one test after the other: starting one takes longer than all it is asked."""

    def __init__(self) -> None:
        self._complaints = TemporaryFile("w+")  # noqa: SIM115 - closed by close
        self._process = subprocess.Popen(
            [_path_of("node"), "run.mjs"],
            cwd=PROGRAM,
            env={"PATH": SEARCH},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
        )

    async def run(
        self, base_url: str, api_key: str, calls: Sequence[dict[str, Any]], *, together: bool = False
    ) -> dict[str, Any]:
        """Run calls one after the other, or at once, and return name → result, as described in ``run.mjs``.

        ``base_url`` ends with ``/v1``. Raises ``NodeError`` with what the program wrote to standard error.
        """
        line = json.dumps({"baseURL": base_url, "apiKey": api_key, "calls": list(calls), "together": together})
        giving_up = asyncio.get_running_loop().call_later(RUN_TIMEOUT, self._process.kill)
        # On a thread: what it calls is served by this loop.
        answer = await asyncio.to_thread(self._ask, line)
        giving_up.cancel()
        if not answer:
            code = self._process.wait()
            self._complaints.seek(0)
            raise NodeError(
                f"the client program was not through after {RUN_TIMEOUT:.0f} s, or failed; it ended with code {code}:\n"
                f"{self._complaints.read()[-2000:]}"
            )
        results: dict[str, Any] = json.loads(answer)
        return results

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            print(line, file=self._process.stdin, flush=True)
        return self._process.stdout.readline()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._complaints.close()
