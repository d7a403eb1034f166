"""Plays a scenario and writes its report: starts simulated engines and a gateway, or asks the deployment at --host."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from loadtests.children import Child, FleetError, start, wait_ended
from loadtests.scenarios import report
from loadtests.scenarios.answers import Outcome, from_json
from loadtests.scenarios.fleet import Fleet, start_fleet
from loadtests.scenarios.schema import BadScenarioError, Scenario, find, gateway_part, load, names
from tests.support.sockets import free_port

_LOCUSTFILE = Path(__file__).parents[1] / "locustfile.py"
_OUT = Path(".cache") / "load"
_EXAMPLES = """\
scenarios:
{scenarios}

examples:
  python -m loadtests.scenarios.run chat                        two simulated engines, a gateway, a report
  python -m loadtests.scenarios.run overload --seconds 120 --out /tmp/overload
  python -m loadtests.scenarios.run abuser --web                the same, watched on locust's web page
  python -m loadtests.scenarios.run chat --print-config         keys and tenants for your forebay.yaml
  python -m loadtests.scenarios.run my.yaml --host https://gateway.example --out /tmp/mine

loadtests/scenarios/README.md says what a scenario's file may hold, docs/load.md how to read a report.
"""

Say = Callable[[str], None]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    known = "\n".join(f"  {name:10} {load(find(name)).about.strip().splitlines()[0]}" for name in names())
    made = argparse.ArgumentParser(
        prog="python -m loadtests.scenarios.run",
        description=__doc__,
        epilog=_EXAMPLES.format(scenarios=known),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("scenario", help="one of those below, or a file")
    made.add_argument("--out", type=Path, help=f"folder of the report (default {_OUT}/SCENARIO)")
    made.add_argument("--seconds", type=float, help="how long requests come, instead of what the scenario says")
    made.add_argument("--seed", type=int, help="of all that is drawn, instead of the scenario's")
    made.add_argument("--host", help="a deployment of yours, instead of engines and a gateway started for the run")
    made.add_argument("--web", action="store_true", help="with locust's web page, which stays until Ctrl-C")
    made.add_argument("--print-config", action="store_true", help="print keys and tenants for forebay.yaml, and end")
    return made


class _Progress:
    """Reads rows as they are written, and says how far it is."""

    def __init__(self, rows: Path, scenario: Scenario, say: Say) -> None:
        self._rows = rows
        self._scenario = scenario
        self._say = say
        self._read = 0
        self._outcomes: Counter[Outcome] = Counter()
        self._next = 0.0
        self.began = 0.0
        """When the first row's file was seen."""

    def look(self, now: float) -> None:
        """Say something, at most every two seconds."""
        if not self.began:
            if not self._rows.exists():
                return
            self.began = now
            self._next = now + 2
        if now < self._next:
            return
        self._next = now + 2
        self._take()
        told = ", ".join(f"{count:,} {outcome}" for outcome, count in self._outcomes.most_common())
        seconds = min(now - self.began, self._scenario.seconds)
        end = "" if now - self.began < self._scenario.seconds else "; waiting for the last ones"
        self._say(f"{seconds:.0f} of {self._scenario.seconds:g} s: {told or 'nothing has ended yet'}{end}")

    def _take(self) -> None:
        with self._rows.open("rb") as rows:
            rows.seek(self._read)
            for line in rows:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                self._outcomes[from_json(line).outcome] += 1


def _locust(scenario_file: Path, options: argparse.Namespace, host: str, out: Path, web_port: int) -> Child:
    command = [sys.executable, "-m", "locust", "-f", str(_LOCUSTFILE), "--host", host, "--no-report"]
    command += ["--scenario", str(scenario_file.resolve()), "--out", str(out), "--loglevel", "WARNING"]
    command += ["--csv", str(out / "locust"), "--exit-code-on-error", "0"]
    for name in ("seconds", "seed"):
        if getattr(options, name) is not None:
            command += [f"--{name}", str(getattr(options, name))]
    if web_port:
        command += ["--autostart", "--web-host", "127.0.0.1", "--web-port", str(web_port)]
    else:
        command += ["--headless", "--only-summary", "--html", str(out / "locust.html")]
    return start("locust", command, out, web_port, environment=dict(os.environ))


def play(scenario: Scenario, options: argparse.Namespace, out: Path, fleet: Fleet | None, say: Say) -> report.Run:
    """Play it against a fleet, or against ``options.host``; returns what the report was made of. FleetError."""
    for name in ("rows.jsonl", "run.json", "engines.json", "locust.log"):
        (out / name).unlink(missing_ok=True)
    web_port = free_port() if options.web else 0
    locust = _locust(find(options.scenario), options, fleet.url if fleet else options.host, out, web_port)
    try:
        if web_port:
            say(f"locust's web page: http://127.0.0.1:{web_port}")
        _until_over(scenario, out, locust, fleet, say)
        if fleet is not None and (out / "run.json").exists():
            told = {"figures": fleet.figures(), "deaths": fleet.deaths}
            (out / "engines.json").write_text(json.dumps(told) + "\n", encoding="utf-8")
        run = _report(out, locust)
        say(f"the report is {out / 'report.md'}")
        if web_port:
            say("the web page stays until Ctrl-C")
            locust.process.wait()
        return run
    finally:
        if locust.alive():
            locust.kill()


def _until_over(scenario: Scenario, out: Path, locust: Child, fleet: Fleet | None, say: Say) -> None:
    """Return when the run is over, or somebody has ended it and what came until then is written."""
    progress = _Progress(out / "rows.jsonl", scenario, say)
    try:
        while locust.alive() and not (locust.port and (out / "run.json").exists()):
            now = time.monotonic()
            progress.look(now)
            if fleet is not None and progress.began:
                fleet.hurt(progress.began, now)
            time.sleep(0.1)
    except KeyboardInterrupt:
        say("stopped: the report will be of what came until now")
        locust.process.terminate()
        wait_ended(locust)
    else:
        if not locust.port:
            wait_ended(locust)


def _report(out: Path, locust: Child) -> report.Run:
    try:
        return report.write([out])
    except report.NoRunError as error:
        raise FleetError(f"{error}; locust said:\n{locust.said()}") from None


def run(argv: Sequence[str], say: Say) -> report.Run | None:
    """Do what the command line says. BadScenarioError, FleetError."""
    options = parser().parse_args(argv)
    file = find(options.scenario)
    scenario = load(file, options.seconds, options.seed)
    if options.print_config:
        print(yaml.safe_dump(gateway_part(scenario, plain_keys=False), sort_keys=False), end="")
        return None
    out = (options.out or _OUT / file.stem).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.host:
        return play(scenario, options, out, None, say)
    say(f"starting {scenario.fleet.engines} simulated engines and a gateway")
    with start_fleet(scenario) as fleet:
        return play(scenario, options, out, fleet, say)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 1 when something does not start or a scenario is none."""
    signal.signal(signal.SIGTERM, _interrupt)  # ended from outside, too, it ends what it started
    try:
        run(sys.argv[1:] if argv is None else argv, lambda text: print(text, file=sys.stderr, flush=True))
    except (BadScenarioError, FleetError) as error:
        print(f"load: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("load: stopped; everything it started has been ended", file=sys.stderr)
        return 1
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
