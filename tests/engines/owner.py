"""A process that owns an engine, to be killed: ``[KEEP=1] python -m tests.engines.owner LOG SOCKET COMMAND...``.

It prints the engine's lines and, once the engine runs, the process ids of the agent and the engine.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from engines.minder import Address
from engines.minding import Minder


async def own(log_path: Path, engine_socket: Path, command: list[str], keep: bool) -> None:
    minder = Minder(
        "fake",
        command,
        environment=os.environ,
        address=Address(unix=engine_socket),
        log_path=log_path,
        keep=keep,
        settle=0.1,
        on_line=lambda line: print(line, flush=True),
    )
    await minder.start()
    print(f"agent {minder.agent_pid} engine {minder.engine_pid}", flush=True)
    await minder.wait()


if __name__ == "__main__":
    asyncio.run(own(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:], keep="KEEP" in os.environ))
