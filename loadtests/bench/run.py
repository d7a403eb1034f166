"""Runs the bench: this gateway beside nginx and others, in front of a mock engine that costs next to nothing.

One core belongs to the gateway under test, another to the mock engine and the load generator. The gateway's cost is
the user and system time of its whole process tree, from /proc, over a window that the generator marks; divided by what
the generator received and checked. Every row takes turns between the gateways, run by run, so that a busy moment of
the machine does not hit one of them alone; the median of the runs counts, and only ratios to nginx travel to another
machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console

from loadtests.bench import checks_row, operator_row, replicas_row, report, soak_row
from loadtests.bench.native import ENGINE_MODEL, BenchError, Tools, build
from loadtests.bench.processes import Server, free_port
from loadtests.bench.rows import ROWS, Bench, Row, Sample, Target
from loadtests.bench.subjects import PEERS, ROOT, SUBJECTS, Launch, Place, Subject, attached, install_peers, limited
from tests.store.servers import Server as RedisServer

_EXAMPLES = """\
rows: {rows}, operator, checks, replicas; soak only with --soak
gateways: {subjects}

examples:
  python -m loadtests.bench.run                                   everything, about 25 minutes
  python -m loadtests.bench.run --rows requests-2k,paced --runs 1 --seconds 2
                                                                  a first look, half a minute
  python -m loadtests.bench.run --peers sglang-router,smg         with other routers, installed first
  python -m loadtests.bench.run --only nginx --attach mine=8080,4711
                                                                  a gateway you have started (port, process id)
  python -m loadtests.bench.run --docs                            and write docs/benchmarks.md
  python -m loadtests.bench.profile --row requests-2k             where the time goes
"""
_DEFAULT = ("nginx", "naive", "forebay-protocol", "forebay-asgi")
_TENANTS = 1000
_NOISE = 0.05
"""Share of a core that may go to other processes before a run is worth repeating."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m loadtests.bench.run",
        description=__doc__,
        epilog=_EXAMPLES.format(rows=", ".join(ROWS), subjects=", ".join(SUBJECTS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--rows", metavar="NAMES", help="comma-separated; all but the soak when left out")
    made.add_argument("--only", metavar="NAMES", help=f"gateways, comma-separated (default {','.join(_DEFAULT)})")
    made.add_argument("--peers", metavar="NAMES", default="", help=f"install and measure too: {','.join(PEERS)}")
    made.add_argument(
        "--attach", metavar="NAME=PORT,PID[,MODEL]", action="append", default=[], help="measure a running gateway"
    )
    made.add_argument("--runs", type=int, default=3, help="runs of each row; the median counts (default 3)")
    made.add_argument("--seconds", type=float, default=5, help="length of a measured window (default 5)")
    made.add_argument("--retries", type=int, default=2, help="repeat a run that others disturb (default 2 times)")
    made.add_argument("--cores", metavar="GATEWAY,LOAD", help="the two cores (default: the first two this process has)")
    made.add_argument(
        "--realtime",
        action="store_true",
        help="precedence over all other processes (root), for a machine that is not quiet; it hardly answers then",
    )
    made.add_argument("--seed", type=int, default=1, help="of bodies, arrivals and their mix (default 1)")
    made.add_argument(
        "--soak", type=int, metavar="REQUESTS", default=0, help="also: memory over so many requests, such as 1000000"
    )
    made.add_argument(
        "--out", type=Path, default=Path(".cache/bench/results.jsonl"), help="raw rows (default %(default)s)"
    )
    made.add_argument("--docs", action="store_true", help="write the tables into docs/benchmarks.md")
    return made


def names(text: str | None, known: Sequence[str], default: Sequence[str]) -> list[str]:
    """A comma-separated list checked against what there is; BenchError names what is not."""
    chosen = [name for name in (text or "").split(",") if name] or list(default)
    for name in chosen:
        if name not in known:
            raise BenchError(f"there is no {name!r}; there are {', '.join(known)}")
    return chosen


def two_cores(text: str | None) -> tuple[int, int]:
    """The gateway's core and the load's; BenchError when the machine has only one."""
    mine = sorted(os.sched_getaffinity(0))
    chosen = [int(core) for core in text.split(",")] if text else mine[:2]
    if len(chosen) != 2 or chosen[0] == chosen[1] or not set(chosen) <= set(mine):
        raise BenchError(f"the bench needs two cores of its own, GATEWAY,LOAD; this process may use {mine}")
    return chosen[0], chosen[1]


def prepare_machine(core: int, realtime: bool = False) -> None:
    """Put this process on the load's core, and let it and its children hold many sockets.

    `realtime` gives them precedence over every ordinary process; BenchError when this user may not.
    """
    if shutil.which("taskset") is None:
        raise BenchError("taskset is not installed (Debian: apt-get install util-linux)")
    os.sched_setaffinity(0, {core})
    if realtime:
        try:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        except PermissionError:
            raise BenchError("--realtime needs root (or CAP_SYS_NICE)") from None
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def mock_engine(tools: Tools, core: int, directory: Path) -> Iterator[tuple[int, int]]:
    """A running mock engine: its port and process id."""
    port = free_port()
    server = Server("mock engine", [str(tools.mock), str(port)], core, directory / "mock.log")
    try:
        server.wait_ready(port, "/health", timeout=10)
        yield port, server.pid
    finally:
        server.stop()


class Running:
    """A subject that has been started, with what the rows need of it."""

    def __init__(self, subject: Subject, place: Place, cores: tuple[int, int], path: Sequence[str] = ()) -> None:
        place.directory.mkdir(parents=True, exist_ok=True)
        keys = place.directory / "client-keys.txt"
        keys.write_text("\n".join(place.keys), encoding="utf-8")
        self.launch: Launch = subject.prepare(place)
        self.server = Server(
            subject.name,
            self.launch.command,
            cores[0],
            place.directory / "output.log",
            {"PYTHONPATH": os.pathsep.join([*path, str(ROOT)])},
        )
        self.target = Target(
            subject.name,
            self.launch.port,
            self.server.pid,
            subject.model,
            place.engine_port,
            cores,
            keys,
            place.directory,
        )

    def __enter__(self) -> Running:
        try:
            self.server.wait_ready(self.launch.port, self.launch.ready)
        except BaseException:
            self.server.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()

    def reload(self) -> None:
        """Make it read its configuration again, where it can."""
        if self.launch.reload is not None:
            self.launch.reload(self.server)


class Session:
    """One invocation: what is measured, where it runs, where the raw rows go."""

    def __init__(self, options: argparse.Namespace, cores: tuple[int, int], directory: Path, engine: tuple[int, int]):
        self.options = options
        self.cores = cores
        self.directory = directory
        self.engine_port, self.engine_pid = engine
        self.console = Console(highlight=False, soft_wrap=True)
        self.bench = Bench(build(), options.seed, lambda text: self.console.print(f"[red]wrong answers[/]: {text}"))
        self.peers = names(options.peers, list(PEERS), [])
        self.subjects = [SUBJECTS[name] for name in self._subject_names()]
        self.keys = [f"sk-bench-{options.seed}-{number:04}" for number in range(_TENANTS)]
        self.bad = False
        self._started = 0

    def _subject_names(self) -> list[str]:
        chosen = names(self.options.only, list(SUBJECTS), _DEFAULT)
        with_nginx = chosen if "nginx" in chosen else ["nginx", *chosen]
        return [*with_nginx, *(peer for peer in self.peers if peer not in with_nginx)]

    def start(self, subject: Subject) -> Running:
        """Start a subject in a directory of its own."""
        self._started += 1
        place = Place(self.directory / f"{self._started}-{subject.name}", self.engine_port, self.keys)
        return Running(subject, place, self.cores)

    def bystanders(self, direct: bool) -> list[Target]:
        """What is measured without being started: the mock engine itself, if so asked, and what --attach names."""
        directory = self.directory / "attached"
        directory.mkdir(exist_ok=True)
        keys = directory / "client-keys.txt"
        keys.write_text("\n".join(self.keys), encoding="utf-8")
        wanted = [("direct", self.engine_port, self.engine_pid, ENGINE_MODEL)] if direct else []
        wanted += [attached(text) for text in self.options.attach]
        return [
            Target(name, port, pid, model, self.engine_port, self.cores, keys, directory)
            for name, port, pid, model in wanted
        ]

    def keep(self, sample: Sample) -> None:
        """Write a raw row and say what it shows."""
        with self.options.out.open("a", encoding="utf-8") as out:
            out.write(json.dumps(dataclasses.asdict(sample)) + "\n")
        ours = sample.subject.startswith("forebay") or sample.row == replicas_row.NAME
        self.bad |= bool(sample.generator["faults"]) and ours
        raw = dataclasses.asdict(sample)
        shown = [] if sample.row not in (checks_row.NAME, replicas_row.NAME) else [report.limits_line(raw)]
        shown += [
            f"{metric.title.removeprefix('… ')} {value:.4g}"
            for metric in report.METRICS
            if metric.row == sample.row and (value := metric.value(raw)) is not None
        ]
        if not self.options.realtime and (sample.foreign > _NOISE or sample.load_core_foreign > _NOISE):
            shown.append(f"[yellow]others took {sample.foreign:.0%} and {sample.load_core_foreign:.0%} of the cores[/]")
        if sample.load_core_busy > 0.97:
            shown.append("[yellow]load core full[/]")
        self.console.print(f"  {sample.row:16} {sample.subject:17} run {sample.run + 1}: " + ", ".join(shown))

    def quietest(self, measure: Callable[[], Sample]) -> Sample:
        """A run, again while other processes disturb it; of several noisy ones the quietest."""
        best = measure()
        for _ in range(0 if self.options.realtime else self.options.retries):
            if max(best.foreign, best.load_core_foreign) <= _NOISE:
                break
            other = measure()
            best = min(best, other, key=lambda sample: max(sample.foreign, sample.load_core_foreign))
        return best

    def row(self, row: Row) -> None:
        """All runs of a row, the gateways taking turns."""
        self.console.print(f"[bold]{row.title}[/]")
        with ExitStack() as started:
            targets = self.bystanders(row.direct)
            if not row.fresh:
                targets += [started.enter_context(self.start(subject)).target for subject in self.subjects]
                for target in targets:
                    self.bench.touch(target)
            for run in range(self.options.runs):
                for target in targets:
                    self.keep(self.quietest(partial(self.measure, row, target, run)))
                for subject in self.subjects if row.fresh else ():
                    self.keep(self.quietest(partial(self.measure_fresh, row, subject, run)))

    def measure(self, row: Row, target: Target, run: int) -> Sample:
        """One run against a gateway that is up."""
        return self.bench.measure(row.name, target, row.load, self.options.seconds, run)

    def measure_fresh(self, row: Row, subject: Subject, run: int) -> Sample:
        """One run against a gateway started for it."""
        with self.start(subject) as running:
            self.bench.touch(running.target)
            return self.measure(row, running.target, run)

    def operator(self) -> None:
        """The operator's row: find the load one core carries, then run it with everything going on."""
        self.console.print("[bold]As an operator sees it: streams at 40 tokens/s, 1 MB bodies, a reload[/]")
        for subject in self.subjects:
            with self.start(subject) as running:
                self.bench.touch(running.target)
                streams = operator_row.find_capacity(self.bench, running.target, max(1.0, self.options.seconds * 0.6))
                for run in range(self.options.runs):
                    sample, streams = operator_row.measure_down(
                        self.bench,
                        running.target,
                        streams,
                        self.options.seconds * 4,
                        run,
                        running.launch.metrics,
                        running.reload if running.launch.reload else None,
                    )
                    self.keep(sample)

    def checks(self) -> None:
        """What a check of limits costs, by where its buckets are."""
        self.console.print("[bold]A check of limits: in memory, leased, exact[/]")
        for run in range(self.options.runs):
            for sample in checks_row.measure(self.options.seconds * 0.4, run, self.cores[1]):
                self.keep(sample)

    def replicas(self) -> None:
        """Three replicas, limits each for itself, leased and exact; they take turns run by run."""
        self.console.print("[bold]Three replicas: limits each for itself, leased, exact[/]")
        with ExitStack() as started:
            server = RedisServer()
            started.callback(server.close)
            server.start()
            few = self.directory / "few-keys.txt"
            few.write_text("\n".join(self.keys[: replicas_row.FEW]), encoding="utf-8")
            fleets = {}
            for mode in replicas_row.MODES:
                subject = limited(mode, server.url)
                fleets[mode] = [started.enter_context(self.start(subject)).target for _ in range(replicas_row.REPLICAS)]
                for target in fleets[mode]:
                    self.bench.touch(target)
            for run in range(self.options.runs):
                for mode, targets in fleets.items():
                    pid = None if mode == "memory" else server.pid
                    for name, keys in ((mode, None), (f"{mode}, {replicas_row.FEW} keys", few)):
                        measure = partial(
                            replicas_row.measure,
                            self.bench,
                            name,
                            targets,
                            pid,
                            self.options.seconds,
                            run,
                            keys=keys,
                        )
                        self.keep(self.quietest(measure))

    def soak(self) -> None:
        """The soak: memory over a great many requests, nginx and this gateway only."""
        self.console.print(f"[bold]{self.options.soak:,} requests: memory[/]")
        for subject in self.subjects:
            if subject.name == "nginx" or subject.name.startswith("forebay"):
                with self.start(subject) as running:
                    self.bench.touch(running.target)
                    self.keep(soak_row.measure(self.bench, running.target, self.options.soak))

    def machine(self) -> dict[str, object]:
        """The header of the raw file: what the figures were measured on and with."""
        cpu = next(
            (
                line.partition(":")[2].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if "model name" in line
            ),
            platform.machine(),
        )
        return {
            "kind": "machine",
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "command": shlex.join(["python", "-m", "loadtests.bench.run", *_without_files(sys.argv[1:])]),
            "seed": self.options.seed,
            "runs": self.options.runs,
            "seconds": self.options.seconds,
            "cpu": cpu,
            "cores": os.cpu_count(),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "versions": {subject.name: subject.version() for subject in self.subjects},
        }


def _without_files(arguments: Sequence[str]) -> list[str]:
    """The arguments that change what is measured, without those that say where it is written."""
    kept = [argument for argument in arguments if argument != "--docs" and not argument.startswith("--out=")]
    if "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return kept


def bench(options: argparse.Namespace) -> bool:
    """Everything the options ask for; True when this gateway answered rightly throughout."""
    every = [*ROWS, operator_row.NAME, checks_row.NAME, replicas_row.NAME]
    rows = names(options.rows, every, every)
    cores = two_cores(options.cores)
    install_peers(names(options.peers, list(PEERS), []))
    tools = build()
    prepare_machine(cores[1], options.realtime)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as name, mock_engine(tools, cores[1], Path(name)) as engine:
        session = Session(options, cores, Path(name), engine)
        options.out.write_text(json.dumps(session.machine()) + "\n", encoding="utf-8")
        for row in rows:
            if row in ROWS:
                session.row(ROWS[row])
            elif row == checks_row.NAME:
                session.checks()
            elif row == replicas_row.NAME:
                session.replicas()
            else:
                session.operator()
        if options.soak:
            session.soak()
    text = report.render(report.read_raw(options.out))
    session.console.print(f"\n{text}\n\nraw rows: {options.out}", markup=False)
    if options.docs:
        report.write_page(text)
    return not session.bad


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run; 1 when the bench could not run or this gateway gave a wrong answer."""
    options = parser().parse_args()
    signal.signal(signal.SIGTERM, _interrupt)  # ended from outside, too, it ends what it started
    try:
        return 0 if bench(options) else 1
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("bench: stopped; everything it started has been ended", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
