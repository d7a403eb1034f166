"""What a process tree costs is read rightly, and what the samples say is what the page shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtests.bench import operator_row, report, rows, run, subjects
from loadtests.bench.bodies import chat_body
from loadtests.bench.native import BenchError
from loadtests.bench.processes import Server, cost_of
from loadtests.bench.report import Figures
from tests.support.table import each

_BURN = "import time\nwhile time.process_time() < 0.2: pass\n"


def test_cost_counts_descendants_that_have_ended() -> None:
    """A reload replaces worker processes: what the old ones used is not forgotten."""
    script = (
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {_BURN!r}])\nprint('x', flush=True)\ninput()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        cost = cost_of(parent.pid)
        parent.communicate(b"\n")
    assert cost.cpu >= 0.19
    assert cost.rss > 1_000_000


def test_cost_counts_grandchildren_that_live(tmp_path: Path) -> None:
    script = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        both = cost_of(parent.pid).rss
        parent.communicate(b"\n")
    alone = subprocess.run(
        [sys.executable, "-c", "from loadtests.bench.processes import *; print(cost_of(os.getpid()).rss)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert both > int(alone.stdout) * 0.8


def test_a_server_that_ends_at_once_is_explained(tmp_path: Path) -> None:
    server = Server("mine", [sys.executable, "-c", "print('no config'); raise SystemExit(3)"], 0, tmp_path / "log")
    with pytest.raises(BenchError, match=r"(?s)mine ended with exit code 3.*no config"):
        server.wait_ready(1, "/health")
    server.stop()


@each("size", [600, 2048, 32 * 1024, 1000 * 1024])
@each("stream", [True, False])
def test_bodies_have_the_size_asked_for_and_are_the_same_again(size: int, stream: bool) -> None:
    body = chat_body("m", size, stream=stream, seed=3)
    assert abs(len(body) - size) < 0.02 * size + 32
    assert body == chat_body("m", size, stream=stream, seed=3)
    assert body != chat_body("m", size, stream=stream, seed=4)
    assert json.loads(body)["messages"][-1]["role"] == "user"


# --- figures -----------------------------------------------------------------------------------------------------


def sample(subject: str, row: str, cpu: float, run: int = 0, **generator: Any) -> dict[str, Any]:
    """A raw row with what the table reads of it."""
    times = {"p50": 1.0, "p99": 2.0, "p999": 3.0, "max": 4.0, "count": 1}
    said = {
        "completed": 1000,
        "chunks": 6400,
        "requests_per_second": 100.0,
        "chunks_per_second": 6400.0,
        "mean_inflight": 32.0,
        "first_event": times,
        "delay": times,
        "added_gap": times,
        "faults": {},
        **generator,
    }
    return {
        "row": row, "subject": subject, "run": run, "seconds": 5.0, "cpu_user": cpu, "cpu_system": 0.0,
        "rss_before": 0, "rss_peak": 32 * 1024 * 10, "foreign": 0.01, "generator": said, "notes": {},
    }  # fmt: skip


def test_a_cell_is_the_median_of_its_runs_and_the_ratio_of_the_medians() -> None:
    raw = [sample("nginx", "requests-2k", cpu, run) for run, cpu in enumerate((0.02, 0.02, 0.9))]
    raw += [sample("forebay-protocol", "requests-2k", cpu, run) for run, cpu in enumerate((0.01, 0.06, 0.07))]
    assert "| CPU per request, 2 KB, ms | 0.020 | 0.060 (3.00\u00d7) |" in report.table(Figures(raw))


def test_an_aim_is_met_or_missed_by_what_was_measured() -> None:
    raw = [sample("nginx", "requests-2k", 0.02), sample("forebay-protocol", "requests-2k", 0.081)]
    raw += [sample("nginx", "paced", 0.1), sample("forebay-protocol", "paced", 0.12)]
    text = report.aims(Figures(raw))
    assert "| CPU per request, times nginx: ≤ 4 | 4.05 **missed** |" in text
    assert "| CPU per paced chunk, times nginx: ≤ 1.3 | 1.20 met |" in text
    assert "naive" not in text


def test_where_another_gateway_does_better_is_said() -> None:
    raw = [sample("nginx", "requests-2k", 0.02, requests_per_second=300.0)]
    raw += [
        sample("smg", "requests-2k", 0.09, requests_per_second=120.0),
        sample("forebay-protocol", "requests-2k", 0.06),
    ]
    raw += [sample(subject, "slow", 0.1, faults={"status": 1}) for subject in ("smg", "nginx")]
    raw += [sample("forebay-protocol", "slow", 0.5)]
    assert report.losses(Figures(raw)).splitlines()[2:] == [
        "- CPU per request, 2 KB, ms: nginx by 3.00\u00d7",
        "- requests/s, 32 connections: nginx by 3.00\u00d7, smg by 1.20\u00d7",
    ]


def test_wrong_answers_and_a_pace_not_kept_are_marked() -> None:
    raw = [
        sample("nginx", "paced", 0.1),
        sample("naive", "paced", 0.1, chunks_per_second=5000.0, faults={"cut_short": 1}),
    ]
    text = report.render(raw)
    assert "†‡" in text
    assert "‡ the gateway did not keep up" in text


def test_the_page_is_written_between_its_markers_only(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_page("new", page)
    assert page.read_text() == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="no markers"):
        report.write_page("new", page)


@each("capacity", [10, 64, 70, 333, 900])
def test_the_search_for_a_capacity_comes_within_a_fifth_of_it_in_six_probes(capacity: int) -> None:
    search, streams = operator_row.Search(), 64.0
    for _ in range(6):
        if streams <= capacity:
            search.good = streams
        else:
            search.bad = streams
        following = search.next(at_full_core=capacity * 1.2)
        if following is None:
            break
        streams = following
    assert capacity * 0.8 <= search.good <= capacity


# --- the command line --------------------------------------------------------------------------------------------


def test_unknown_rows_and_gateways_are_named_with_what_there_is() -> None:
    with pytest.raises(BenchError, match=r"there is no 'requests'; there are requests-2k, paced"):
        run.names("requests", ["requests-2k", "paced"], [])
    with pytest.raises(BenchError, match=r"no peer named 'traefik'"):
        subjects.install_peers(["traefik"])


def test_a_running_gateway_is_described_by_port_and_process() -> None:
    assert subjects.attached("mine=8080,4711") == ("mine", 8080, 4711, subjects.PUBLIC_MODEL)
    assert subjects.attached("mine=8080,4711,llama") == ("mine", 8080, 4711, "llama")
    with pytest.raises(BenchError, match="NAME=PORT,PID"):
        subjects.attached("mine=8080")


def test_the_help_names_every_row_and_gateway() -> None:
    text = run.parser().format_help()
    for name in (*rows.ROWS, *subjects.SUBJECTS, "operator", "soak"):
        assert name in text


def test_the_gateways_configuration_is_one_it_accepts(tmp_path: Path) -> None:
    from gateway.settings import load

    place = subjects.Place(tmp_path, 17100, ["one", "two"])
    file = tmp_path / "forebay.yaml"
    file.write_text(subjects.forebay_config(place, "asgi", 18080, 18081, extra_keys=1))
    settings = load(file)
    assert [key.name for key in settings.keys] == ["tenant-0", "tenant-1", "tenant-2"]
    assert settings.listen.face == "asgi"
