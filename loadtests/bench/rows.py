"""The rows of the bench: what load each is, and how one run of it is measured.

A run: start nothing new, let the generator warm the gateway up, read the gateway's CPU when the generator says that
its window begins and again when it says that it ends. What the generator counted divides what was read.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loadtests.bench.bodies import chat_body
from loadtests.bench.native import ENGINE_MODEL, BenchError, Tools
from loadtests.bench.processes import Cost, core_busy, cost_of, http_get, tree

KIB = 1024


@dataclass(frozen=True, slots=True)
class Body:
    """One kind of request of a load, and how often it comes."""

    size: int
    weight: float = 1.0
    stream: bool = False
    chunks: int = 64
    interval_ms: int = 0
    include_usage: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """What the generator is told. `rate` (requests a second) makes the loop open; times are seconds."""

    bodies: Sequence[Body]
    connections: int
    warmup: float = 1.0
    stagger: float = 0.0
    rate: float = 0.0
    drain: float = 3.0
    requests: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One row: a name for the command line, a title for people, a load."""

    name: str
    title: str
    load: Load
    fresh: bool = False
    """Start the gateway anew for every run, so that its memory tells what this load needs."""
    direct: bool = False
    """Run it without a gateway too: what is left is what the mock and the generator add to a delay."""


@dataclass(frozen=True, slots=True)
class Target:
    """A gateway that answers, and what is needed to load and measure it."""

    name: str
    port: int
    pid: int
    model: str
    engine_port: int
    cores: tuple[int, int]
    """The gateway's core, and that of the mock engine and the generator."""
    keys: Path
    directory: Path


@dataclass(slots=True)
class Sample:
    """One measured run; written to the raw file as it is."""

    row: str
    subject: str
    run: int
    seconds: float
    cpu_user: float = 0.0
    cpu_system: float = 0.0
    rss_before: int = 0
    rss_peak: int = 0
    foreign: float = 0.0
    """Share of the gateway's core that went to other processes, the host included."""
    load_core_busy: float = 0.0
    """Share of the other core that was busy: near 1, the mock and the generator are the limit, not the gateway."""
    load_core_foreign: float = 0.0
    """Share of the other core that went to others than the bench."""
    engine_accepts: int = 0
    """Connections the gateway opened to the engine: many mean that it does not keep them."""
    generator: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def _streams(chunks: int = 64, interval_ms: int = 0) -> list[Body]:
    """Nine of ten clients do not ask for usage: what a gateway asks for on their behalf it must hide again."""
    asked = Body(2 * KIB, 0.1, stream=True, chunks=chunks, interval_ms=interval_ms, include_usage=True)
    return [replace(asked, weight=0.9, include_usage=False), asked]


ROWS = {
    row.name: row
    for row in (
        Row("requests-2k", "2 KB requests, 32 connections", Load([Body(2 * KIB)], 32)),
        Row("requests-32k", "32 KB requests, 32 connections", Load([Body(32 * KIB)], 32)),
        Row("requests-2k-256", "2 KB requests, 256 connections", Load([Body(2 * KIB)], 256)),
        Row("streams", "streams of 64 chunks at full speed, 32 connections", Load(_streams(), 32)),
        Row("streams-256", "streams of 64 chunks at full speed, 256 connections", Load(_streams(), 256)),
        Row(
            "paced", "32 streams, a chunk every 5 ms", Load(_streams(200, 5), 32, stagger=1.0, warmup=1.5), direct=True
        ),
        Row("first-event", "streams one after the other", Load(_streams(8), 1, warmup=0.5), direct=True),
        Row(
            "slow",
            "512 streams, a chunk every 50 ms",
            # Longer than any window: the generator hangs up at the end, and the engine must see that.
            Load(_streams(100_000, 50), 512, stagger=1.0, warmup=2.0, drain=0.0),
            fresh=True,
            direct=True,
        ),
        Row(
            "idle",
            "2,000 streams, a chunk every 4 s",
            Load(_streams(100_000, 4000), 2000, stagger=4.0, warmup=9.0, drain=0.0),
            fresh=True,
        ),
    )
}


class Bench:
    """Runs loads with the built tools and measures the gateways they go to."""

    def __init__(self, tools: Tools, seed: int, alarm: Callable[[str], None]) -> None:
        self._tools = tools
        self._seed = seed
        self._alarm = alarm

    def command(self, target: Target, load: Load, seconds: float, keys: Path | None = None) -> list[str]:
        """The generator's command line for a load; bodies are written beside the gateway's files."""
        command = [str(self._tools.gen), "--port", str(target.port), "--seed", str(self._seed)]
        command += ["--keys", str(keys or target.keys), "--expect-model", target.model]
        if target.model != ENGINE_MODEL:
            command += ["--forbid-model", ENGINE_MODEL]
        for number, body in enumerate(load.bodies):
            file = target.directory / f"body-{number}.json"
            file.write_bytes(
                chat_body(
                    target.model,
                    body.size,
                    stream=body.stream,
                    chunks=body.chunks,
                    interval_ms=body.interval_ms,
                    include_usage=body.include_usage,
                    seed=self._seed,
                )
            )
            command += ["--body", f"{file}={body.weight}"]
        command += ["--connections", str(load.connections), "--warmup", str(load.warmup), "--drain", str(load.drain)]
        command += ["--stagger", str(load.stagger), "--rate", str(load.rate)]
        return [*command, "--requests", str(load.requests)] if load.requests else [*command, "--seconds", str(seconds)]

    def touch(self, target: Target) -> None:
        """A few requests of each kind, so that what is built once is not charged to the first measurement."""
        load = Load([Body(2 * KIB), Body(2 * KIB, stream=True, chunks=4)], connections=1, requests=50, warmup=0.0)
        command = self.command(target, load, 0)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        if result["faults"]:
            raise BenchError(f"{target.name} answers wrongly: {result['faults']}, the first: {result['example']}")

    def measure(
        self,
        row: str,
        target: Target,
        load: Load,
        seconds: float,
        run: int = 0,
        actions: Sequence[tuple[float, Callable[[], None]]] = (),
        watch: Callable[[float, Cost], None] | None = None,
    ) -> Sample:
        """One run. `actions` are done at their second of the window, off this thread; `watch` sees every reading."""
        sample = Sample(row, target.name, run, seconds, rss_before=cost_of(target.pid).rss)
        before = engine_stats(target.engine_port)
        generator = subprocess.Popen(self.command(target, load, seconds), stdout=subprocess.PIPE, bufsize=0)
        try:
            self._follow(generator, sample, target, actions, watch, load.warmup + load.drain + 60)
        finally:
            generator.kill()
            generator.wait()
        if (left := sample.generator["left_open"]) and not load.drain:
            closed = _seconds_until_closed(target.engine_port, before["aborts"] + left)
            sample.notes["seconds_to_close_at_engine"] = closed
        # One of them is this question.
        sample.engine_accepts = engine_stats(target.engine_port)["accepted"] - before["accepted"] - 1
        if faults := sample.generator["faults"]:
            self._alarm(f"{target.name}, {row}: {faults}; the first: {sample.generator['example']}")
        return sample

    def _follow(
        self,
        generator: subprocess.Popen[bytes],
        sample: Sample,
        target: Target,
        actions: Sequence[tuple[float, Callable[[], None]]],
        watch: Callable[[float, Cost], None] | None,
        patience: float,
    ) -> None:
        """Read the generator's lines to its result, taking the gateway's clocks at the ends of the window."""
        window: _Window | None = None
        limit = time.monotonic() + patience + (sample.seconds or 3600)
        due = sorted(actions, key=lambda action: action[0])
        for line in _lines(generator, limit, interval=0.25):
            event = json.loads(line) if line is not None else {"event": "tick"}
            if event["event"] == "start":
                window = _Window(target)
            elif event["event"] == "result":
                sample.generator = event
                return
            elif window is not None:
                now = cost_of(target.pid)
                sample.rss_peak = max(sample.rss_peak, now.rss)
                if watch:
                    watch(window.age(), now)
                while due and window.age() >= due[0][0]:
                    threading.Thread(target=due.pop(0)[1], daemon=True).start()
                if event["event"] == "end":
                    window.close(sample, target, now)
                    window = None
        raise BenchError(f"the load generator ended without a result (exit code {generator.wait()})")


def _bench_cost(target: Target) -> Cost:
    """What this process and all it started has used, the gateway under test included."""
    own = cost_of(os.getpid())
    if any(pid == target.pid for pid, _ in tree(os.getpid())):
        return own
    other = cost_of(target.pid)
    return Cost(own.user + other.user, own.system + other.system)


class _Window:
    """The clocks at the start of a measured window, and what has passed on them at its end."""

    def __init__(self, target: Target) -> None:
        self._cores = target.cores
        self._began = cost_of(target.pid)
        self._all_began = _bench_cost(target)
        self._busy = [core_busy(core) for core in target.cores]
        self._started = time.monotonic()

    def age(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._started

    def close(self, sample: Sample, target: Target, now: Cost) -> None:
        """Write into the sample what the window has cost."""
        wall, used = self.age(), now.since(self._began)
        gateway_core, load_core = (core_busy(core) - busy for core, busy in zip(self._cores, self._busy, strict=True))
        sample.cpu_user, sample.cpu_system = used.user, used.system
        # Without a gateway in between the process that is measured is the mock engine, on the other core.
        on_gateway_core = 0.0 if target.port == target.engine_port else used.cpu
        on_load_core = _bench_cost(target).cpu - self._all_began.cpu - on_gateway_core
        sample.foreign = max(0.0, (gateway_core - on_gateway_core) / wall)
        sample.load_core_busy = load_core / wall
        sample.load_core_foreign = max(0.0, (load_core - on_load_core) / wall)


def _lines(process: subprocess.Popen[bytes], limit: float, interval: float) -> Iterator[bytes | None]:
    """Lines of a process as they come, and None every `interval` seconds; BenchError after `limit`."""
    assert process.stdout is not None
    descriptor, held = process.stdout.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if time.monotonic() > limit:
                raise BenchError("the load generator does not end: the gateway holds its answers back")
            if not selector.select(interval):
                yield None
                continue
            read = os.read(descriptor, 65536)
            if not read:
                return
            held += read
            *whole, held = held.split(b"\n")
            yield from whole


def engine_stats(port: int) -> dict[str, int]:
    """The mock engine's own counters: requests, streams, aborts, chunks, accepted, open."""
    status, body = http_get(port, "/__stats")
    if status != 200:
        raise BenchError(f"the mock engine answers {status}")
    stats: dict[str, int] = json.loads(body)
    return stats


def _seconds_until_closed(port: int, aborts: int, patience: float = 5.0) -> float | None:
    """Seconds until the engine has seen `aborts` streams hung up in all, or None when it has not after `patience`."""
    started = time.monotonic()
    while time.monotonic() - started < patience:
        if engine_stats(port)["aborts"] >= aborts:
            return time.monotonic() - started
        time.sleep(0.02)
    return None
