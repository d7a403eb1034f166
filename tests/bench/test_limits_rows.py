"""The bench's rows about limits, once and in small."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from gateway.settings import load
from loadtests.bench import checks_row, replicas_row, report, subjects
from loadtests.bench.native import ENGINE_MODEL, Tools
from loadtests.bench.rows import Bench, Sample, Target


def test_a_check_is_measured_in_every_way() -> None:
    core = min(os.sched_getaffinity(0))
    samples = list(checks_row.measure(0.02, 0, core))
    assert min(sample.generator["completed"] for sample in samples) > 0
    assert min(sample.cpu_user for sample in samples) > 0
    table = report.render([dataclasses.asdict(sample) for sample in samples])
    assert "| memory | leased | exact, 1 at once | exact, 32 at once |" in table
    assert [line[:10] for line in table.splitlines()[2:]] == ["| 1 bucket", "| 5 bucket"]


def test_three_are_loaded_at_once_and_added_up(tools: Tools, engine: int, tmp_path: Path) -> None:
    """Three times the mock engine stands in for three replicas."""
    keys = tmp_path / "keys.txt"
    keys.write_text("one\ntwo")
    cores = (min(os.sched_getaffinity(0)),) * 2
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    targets = [Target("mock", engine, os.getpid(), ENGINE_MODEL, engine, cores, keys, folder) for folder in folders]
    load = dataclasses.replace(replicas_row.LOAD, warmup=0.05, drain=0.2)
    bench = Bench(tools, 1, lambda text: pytest.fail(text))
    samples = [replicas_row.measure(bench, mode, targets, None, 0.2, 0, load) for mode in ("memory", "exact")]
    assert all(sample.generator["requests_per_second"] > 100 for sample in samples)
    assert [sample.generator["faults"] for sample in samples] == [{}, {}]
    assert "| three replicas on one core, five limits | memory | exact |" in report.render(
        [dataclasses.asdict(sample) for sample in samples]
    )


def test_what_the_limits_rows_measure_stays_out_of_the_table_of_gateways() -> None:
    sample = Sample("checks", "leased", 0, 1.0, generator={"completed": 1, "faults": {}}, notes={})
    assert report.Figures([dataclasses.asdict(sample)]).subjects == []


@pytest.mark.parametrize("mode", replicas_row.MODES)
def test_the_replicas_configuration_is_one_they_accept(mode: str, tmp_path: Path) -> None:
    place = subjects.Place(tmp_path, 17100, ["one"])
    subjects.limited(mode, "redis://127.0.0.1:6379").prepare(place)
    settings = load(tmp_path / "forebay.yaml")
    assert (settings.limits.store.url is None) == (mode == "memory")
    assert mode in ("memory", settings.limits.store.mode)
