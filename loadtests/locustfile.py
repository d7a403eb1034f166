"""Scenarios under locust: `locust -f loadtests/locustfile.py --host http://... --scenario chat`.

Locust's users wait for their answers before they ask again. Here one user plays the whole scenario, whose requests come
at their own times. Each is a row of locust's tables by its class, and beside it rows of its own: TTFT (from the moment
it should have begun), ITL (the mean of a stream) and SLO, where a failure is an answer outside of its class's SLO.

This is the only file that knows locust and gevent: importing it patches sockets, threads and time of the process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import gevent
from gevent.pool import Pool
from locust import LoadTestShape, User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import LocalRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its file's name, it is in no package

from loadtests.scenarios.answers import Outcome, Row, as_json
from loadtests.scenarios.client import Client
from loadtests.scenarios.goodput import missed
from loadtests.scenarios.options import add
from loadtests.scenarios.play import Player
from loadtests.scenarios.schedule import Planned, plan, share
from loadtests.scenarios.schema import BadScenarioError, Scenario, find, load


class _Greenlets:
    """``Hands`` of gevent."""

    def __init__(self, most: int) -> None:
        self._pool = Pool(most)

    def wait_free(self, timeout: float) -> bool:
        if timeout <= 0 and self._pool.full():
            return False
        self._pool.wait_available(timeout=max(0.0, timeout))
        return not self._pool.full()

    def spawn(self, work: Callable[[Planned], None], one: Planned) -> None:
        self._pool.spawn(work, one)

    def join(self, timeout: float) -> None:
        self._pool.join(timeout=timeout)

    def kill(self) -> None:
        self._pool.kill()


class _Run:
    """What this process plays, and where its rows go."""

    def __init__(self, environment: Environment, scenario: Scenario, planned: list[Planned], out: Path | None) -> None:
        self.environment = environment
        self.scenario = scenario
        self.planned = planned
        self.out = out
        self.over = False
        self._rows: IO[bytes] | None = None
        self._began = datetime.now(UTC)
        self._cpu = self._wall = 0.0

    def begin(self) -> None:
        self.over = False
        self._began = datetime.now(UTC)
        self._cpu, self._wall = time.process_time(), time.monotonic()
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            self._rows = (self.out / "rows.jsonl").open("wb", buffering=0)

    def play(self, host: str) -> None:
        client = Client(host, time.monotonic)
        hands = _Greenlets(self.scenario.at_once)
        player = Player(self.scenario, self.planned, client, hands, time.monotonic, gevent.sleep, self._ended)
        try:
            player.play()
        finally:
            client.close()
            self.over = True

    def stop(self) -> None:
        """End it as if it were over."""
        self.over = True

    def finish(self) -> None:
        if self.out is None or self._rows is None:
            return
        self._rows.close()
        self._rows = None
        wall = time.monotonic() - self._wall
        told = {
            "host": self.environment.host,
            "began": self._began.isoformat(timespec="seconds"),
            "wall": wall,
            "client_cpu": (time.process_time() - self._cpu) / wall,
            "scenario": self.scenario.model_dump(mode="json", exclude_defaults=True),
        }
        (self.out / "run.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")

    def _ended(self, row: Row) -> None:
        if self._rows is not None:
            self._rows.write(as_json(row))
        well = row.outcome is Outcome.COMPLETE
        self._fire("whole", row, row.total, None if well else f"{row.outcome}: {row.status}")
        if row.ttft is not None:
            self._fire("TTFT", row, row.ttft)
        if row.gaps:
            self._fire("ITL", row, sum(row.gaps) / len(row.gaps) / 1e6)
        self._fire("SLO", row, row.total, missed(row, self.scenario.classes[row.klass].slo))

    def _fire(self, kind: str, row: Row, seconds: float | None, error: str | None = None) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=row.klass,
            response_time=(seconds or 0.0) * 1000,
            response_length=row.events,
            exception=None if error is None else _Told(error),
            context={"tenant": row.tenant},
        )


class _Told(Exception):  # noqa: N818 - locust shows its text as why something failed
    """Why."""


_run: _Run | None = None


def _playing() -> _Run:
    assert _run is not None, "locust has begun without its events"
    return _run


@events.init_command_line_parser.add_listener
def _arguments(parser: LocustArgumentParser) -> None:
    add(parser.add_argument_group("Scenarios"))


@events.init.add_listener
def _initialise(environment: Environment, **_: Any) -> None:
    global _run  # noqa: PLW0603 - locust finds its listeners by module
    options = environment.parsed_options
    assert options is not None
    if not isinstance(environment.runner, LocalRunner):
        raise SystemExit("a scenario is played by one process; start several with --share 1/2 and --share 2/2")
    try:
        scenario = load(find(options.scenario), options.seconds, options.seed)
        planned = share(plan(scenario), *options.share)
    except BadScenarioError as error:
        raise SystemExit(f"{error}") from None
    _run = _Run(environment, scenario, planned, options.out)
    if options.headless:  # locust has no handler of its own while a shape runs, and what came would be lost
        for number in (signal.SIGTERM, signal.SIGINT):
            gevent.signal_handler(number, _run.stop)


@events.test_start.add_listener
def _begin(**_: Any) -> None:
    _playing().begin()


@events.test_stop.add_listener
def _finish(environment: Environment, **_: Any) -> None:
    run = _playing()
    run.finish()
    options = environment.parsed_options
    if run.out is None or options is None or options.no_report:
        return
    command = [sys.executable, "-m", "loadtests.scenarios.report", str(run.out)]
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    gevent.subprocess.run(command, env=where, check=False)


class Scenarios(User):
    """Plays the scenario once."""

    @task
    def play(self) -> None:
        """All of it."""
        assert self.host is not None
        _playing().play(self.host)
        raise StopUser


class Once(LoadTestShape):
    """One user, until the scenario is over."""

    def tick(self) -> tuple[int, float] | None:
        """Say how many users there are to be."""
        return None if _playing().over else (1, 1.0)
