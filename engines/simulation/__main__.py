"""The simulated engine as a process: ``python -m engines.simulation --profile h100-8b --port 8100``.

Its options have vLLM's names where vLLM has them. SIGTERM does what it does to vLLM: the listener closes and open
answers hang until their clients leave; with ``--shutdown-timeout`` they are finished first, new requests get a 500
meanwhile and ``/health`` stays 200. A second signal ends it at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from engines.simulation.batching import EngineModel
from engines.simulation.driver import Driver
from engines.simulation.faults import Faults
from engines.simulation.http import Connection
from engines.simulation.profiles import PROFILES, Profile
from engines.simulation.service import Options, Service

_CHECK = 0.05


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="engines.simulation", description="An engine without a model.")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="h100-8b")
    parser.add_argument("--speed", type=float, default=1.0, help="how many times as fast as the real engine")
    parser.add_argument("--seed", type=int, default=0, help="of the chance with which faults are met")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--port", type=int, default=8000)
    where.add_argument("--uds", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--served-model-name", nargs="+", help="the profile's model when left out")
    parser.add_argument("--model", help="what /v1/models tells as its root")
    parser.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"))
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--max-num-queued-reqs", type=int, help="refuse with 503 what waits beyond so many")
    parser.add_argument("--num-gpu-blocks-override", type=int, help="KV blocks")
    parser.add_argument("--scheduling-policy", choices=("fcfs", "priority"), default="fcfs")
    parser.add_argument("--max-loras", type=int)
    parser.add_argument("--max-cpu-loras", type=int)
    parser.add_argument("--max-lora-rank", type=int)
    parser.add_argument("--lora-modules", nargs="+", default=[], metavar="NAME=DIRECTORY")
    parser.add_argument("--no-lora", action="store_true", help="serve no adapters")
    parser.add_argument("--runner", choices=("generate", "pooling"), default="generate")
    parser.add_argument("--enable-prompt-tokens-details", action="store_true")
    parser.add_argument("--enable-request-id-headers", action="store_true")
    parser.add_argument("--shutdown-timeout", type=float, default=0.0, help="seconds to finish what runs on SIGTERM")
    parser.add_argument(
        "--dev", action="store_true", help="serve /abort_requests, as vLLM does in its developers' mode"
    )
    parser.add_argument("--faults", action="store_true", help="serve /faults, which makes requests fail on demand")
    return parser


def profile_of(given: argparse.Namespace) -> Profile:
    """Return the profile with what was said beyond it. ValueError when that does not fit together."""
    said = {
        "max_model_len": given.max_model_len,
        "max_num_seqs": given.max_num_seqs,
        "max_num_batched_tokens": given.max_num_batched_tokens,
        "max_unfinished": given.max_num_queued_reqs,
        "kv_blocks": given.num_gpu_blocks_override,
        "max_loras": 0 if given.no_lora else given.max_loras,
        "max_cpu_loras": given.max_cpu_loras,
        "max_lora_rank": given.max_lora_rank,
    }
    profile = PROFILES[given.profile]
    if given.max_loras is not None and given.max_cpu_loras is None:
        said["max_cpu_loras"] = max(profile.max_cpu_loras, given.max_loras)
    fields = {name: value for name, value in said.items() if value is not None}
    return profile.changed(**fields, by_priority=given.scheduling_policy == "priority")


class Server:
    """A service on a socket."""

    def __init__(self, given: argparse.Namespace) -> None:
        profile = profile_of(given)
        self.given = given
        self.driver = Driver(EngineModel(profile), given.speed)
        options = Options(
            names=tuple(given.served_model_name or (profile.model,)),
            root=given.model or profile.model,
            api_key=given.api_key,
            prompt_details=given.enable_prompt_tokens_details,
            request_id_headers=given.enable_request_id_headers,
            pooling=given.runner == "pooling",
            developer=given.dev,
            faults=given.faults,
            adapter_loading=not given.no_lora,
        )
        self.service = Service(options, self.driver, Faults(random.Random(given.seed)))  # noqa: S311 - faults, no secrets
        self.connections: set[Connection] = set()
        self._signals = 0
        self._stop = asyncio.Event()

    async def start(self) -> asyncio.Server:
        """Load the adapters and listen. OSError, Refused."""
        for module in self.given.lora_modules:
            name, _, directory = module.partition("=")
            await self.service.load_at_start(name, directory)
        loop = asyncio.get_running_loop()

        def connection() -> Connection:
            return Connection(self.service.handle, self.connections)

        if self.given.uds is not None:
            self.given.uds.unlink(missing_ok=True)
            return await loop.create_unix_server(connection, str(self.given.uds), backlog=2048)
        return await loop.create_server(connection, self.given.host, self.given.port, backlog=2048)

    def on_signal(self) -> None:
        """SIGTERM or SIGINT."""
        self._signals += 1
        if self._signals > 1:
            os._exit(1)
        self.service.ending = True
        self._stop.set()

    async def serve(self) -> None:
        """Serve until a signal comes and all is ended."""
        server = await self.start()
        where = self.given.uds or f"http://{self.given.host}:{self.given.port}"
        print(f"Starting simulated engine ({self.given.profile}) on {where}", file=sys.stderr, flush=True)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.on_signal)
        await self._stop.wait()
        if self.given.shutdown_timeout:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.given.shutdown_timeout):
                    await self._until(lambda: not self.service.under_way)
        server.close()
        self.driver.freeze()
        for connection in list(self.connections):
            if self.given.shutdown_timeout:
                connection.close()
            else:
                connection.close_when_idle()
        await self._until(lambda: not self.connections)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 - nothing tells of it, and only a process that ends waits here
            await asyncio.sleep(_CHECK)


def main() -> None:
    """Run the engine."""
    parser = arguments()
    given = parser.parse_args()
    try:
        profile_of(given)
    except ValueError as error:
        parser.error(str(error))

    async def run() -> None:
        await Server(given).serve()

    try:
        import uvloop
    except ImportError:
        asyncio.run(run())
    else:
        uvloop.run(run())


if __name__ == "__main__":
    main()
