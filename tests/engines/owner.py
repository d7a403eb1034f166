"""A process that owns an engine, to be killed: ``python -m tests.engines.owner LOG COMMAND...``.

It prints the engine's lines and, once the engine runs, the process ids of the supervisor and the engine.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from engines.minder import Address, Minder


async def own(log_path: Path, command: list[str]) -> None:
    def tell(line: str) -> None:
        print(line, flush=True)
        if line == "waiting at the gate":
            assert minder._supervisor is not None
            print(f"supervisor {minder._supervisor.pid} engine {minder.engine_pid}", flush=True)

    minder = Minder("fake", command, environment=os.environ, address=Address(), log_path=log_path, on_line=tell)
    await minder.start()
    await minder.wait()


if __name__ == "__main__":
    asyncio.run(own(Path(sys.argv[1]), sys.argv[2:]))
