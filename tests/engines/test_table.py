"""What ``docs/engines.md`` says is what the engines declare, and no more than was shown."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pytest

from engines import table
from engines.conformance import CHECKS
from engines.devices import Device, Quantization
from engines.environments import RECIPES
from engines.launch import LaunchSpec
from engines.protocol import Capability
from engines.registry import ENGINES
from engines.shown import EVIDENCE, Evidence, Shown, Start, Subject
from engines.table import BEGIN, CANNOT, END, TOPICS, Cell, Column, Row, cell, columns
from gateway.cli import app
from tests.engines import test_lmdeploy_launch, test_sglang_launch, test_vllm_launch
from tests.support.command import CliRunner
from tests.support.launches import every_spec
from tests.support.table import each

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "engines.md"
ROWS = {row.subject: row for topic in TOPICS for row in topic.rows}
MARKS = {"vllm": "real_engine", "sglang": "all_engines", "lmdeploy": "all_engines", "simulated": None}
"""How the tests are marked that run an engine; those of the simulated one are in every run."""


def at(kind: str, device: Device, subject: Subject) -> Cell:
    return cell(Column(kind, device), ROWS[subject])


# --- the page ----------------------------------------------------------------------------------------------------


def test_the_page_says_what_is_declared() -> None:
    page = PAGE.read_text()
    assert page == table.with_tables(page), "docs/engines.md is out of date: make docs"


def test_the_command_prints_the_tables_and_writes_them_between_the_marks(tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["engines", "table"])
    assert (printed.exit_code, printed.stdout) == (0, table.render() + "\n")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        assert CliRunner().invoke(app, ["engines", "table", "--write", str(page)]).exit_code == 0
        assert page.read_text() == f"before\n{BEGIN}\n\n{table.render()}\n\n{END}\nafter\n"


@pytest.mark.parametrize(("text", "said"), [("no marks", "there are no marks"), (None, "No such file or directory")])
def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path, text: str | None, said: str) -> None:
    page = tmp_path / "page.md"
    if text is not None:
        page.write_text(text)
    refused = CliRunner().invoke(app, ["engines", "table", "--write", str(page)])
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"forebay: {page}: {said}")
    assert refused.stderr.count("\n") == 1


def test_every_table_is_whole_and_its_notes_are_those_it_points_to() -> None:
    sections = table.render().split("## ")[2:-1]
    assert [section.partition("\n")[0] for section in sections] == [topic.title for topic in TOPICS]
    for section, topic in zip(sections, TOPICS, strict=True):
        lines = [line for line in section.splitlines() if line.startswith("|")]
        assert len({len(line) for line in lines}) == 1, "columns stand below each other"
        assert len(lines) == 2 + len(topic.rows)
        assert {line.count("|") for line in lines} == {len(columns()) + 2}
        pointed = {int(number) for marks in re.findall(r"\[([\d, ]+)\]", section) for number in marks.split(", ")}
        noted = [int(number) for number in re.findall(r"^(\d+)\. ", section, re.MULTILINE)]
        assert noted == sorted(pointed) == list(range(1, len(noted) + 1))


def test_every_capability_quantization_path_and_setting_has_a_row() -> None:
    assert set(ROWS) == {
        *Capability,
        *Quantization,
        *Start,
        *(path for engine in ENGINES.values() for path in engine.paths),
    }


def test_every_engine_has_a_column_for_each_device_it_can_be_installed_for() -> None:
    known = {(column.kind, column.device) for column in columns()}
    assert known == {*RECIPES, ("simulated", Device.CPU)}
    assert {kind for kind, _ in known} == set(ENGINES)


# --- one cell ----------------------------------------------------------------------------------------------------


def test_a_dash_always_has_a_reason() -> None:
    for column in columns():
        for row in ROWS.values():
            found = cell(column, row)
            assert found.text in {CANNOT, *Shown}
            assert found.text != CANNOT or found.notes, (column, row)
            assert not any("does not declare it" in note for note in found.notes), "say why in engines/shown.py"


@each(
    ("kind", "device", "subject", "text"),
    [
        ("vllm", Device.CPU, Capability.TOOLS, "run"),
        ("vllm", Device.CUDA, Capability.TOOLS, "read"),
        ("vllm", Device.CUDA, Quantization.FP8, "parser"),
        ("sglang", Device.CPU, Capability.ADAPTERS, "run"),
        ("sglang", Device.ASCEND, Start.TENSOR, "parser"),
        ("lmdeploy", Device.CPU, Capability.ADAPTERS, "run"),
        ("simulated", Device.CPU, Capability.ADAPTERS, "run"),
        ("vllm", Device.CPU, Start.INSTALLED, "run"),
        ("vllm", Device.CUDA, Start.INSTALLED, "read"),
    ],
)
def test_how_far_it_was_shown(kind: str, device: Device, subject: Subject, text: str) -> None:
    assert at(kind, device, subject).text == text


@each(
    ("kind", "device", "subject", "reason"),
    [
        ("lmdeploy", Device.ASCEND, Capability.ADAPTERS, "LMDeploy has no LoRA on ascend"),
        ("vllm", Device.CPU, Quantization.FP8, "vLLM has no such weights on cpu; there it takes gptq"),
        ("vllm", Device.CPU, Start.TENSOR, "run several engines instead"),
        ("sglang", Device.CUDA, Capability.UNIX_SOCKET, "SGLang listens on no Unix socket"),
        ("sglang", Device.CPU, Capability.MODELS_CHECKED, "answers from its base model under any name"),
        ("sglang", Device.ASCEND, Start.INSTALLED, "is in no package index"),
        ("lmdeploy", Device.CUDA, "/v1/embeddings", "answers every request there that it is not supported"),
        ("simulated", Device.CPU, Start.DATA, "devices are its profile's"),
        ("sglang", Device.CPU, Start.CHOSEN_DEVICES, "nothing to choose from"),
    ],
)
def test_what_cannot_work_says_why(kind: str, device: Device, subject: Subject, reason: str) -> None:
    found = at(kind, device, subject)
    assert found.text == CANNOT
    assert reason in found.notes[0]


def test_a_parser_of_another_version_than_is_installed_is_told() -> None:
    """The parsers that are asked are those of the environments for the CPU."""
    [note] = at("vllm", Device.ASCEND, Start.STARTED).notes
    assert note.startswith("taken by the parser of vLLM 0.32.0; that of 0.23.0")
    assert at("vllm", Device.CUDA, Start.STARTED).notes == ()


def test_what_an_engine_does_not_do_on_a_path_is_told_with_it() -> None:
    for path, words in {"/v1/responses": "the base model only", "/v1/messages": "without a salt"}.items():
        found = at("sglang", Device.CPU, path)
        assert found.text == Shown.RUN
        assert found.notes[0].startswith(words)


def test_what_nobody_has_shown_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new engine begins so; and what it does not declare is a dash, whoever forgot to say why."""
    monkeypatch.setattr(table, "EVIDENCE", {})
    assert at("vllm", Device.CPU, Capability.TOOLS) == Cell("read")
    assert at("lmdeploy", Device.CPU, Capability.PRIORITY) == Cell(CANNOT, ("LMDeploy does not declare it",))


# --- what was shown ----------------------------------------------------------------------------------------------


@cache
def marked_tests(file: Path) -> dict[str, set[str]]:
    """Return a file's tests, each with those marks of an engine that it or the file has."""
    tree = ast.parse(file.read_text())

    def marks(nodes: Iterable[ast.AST]) -> set[str]:
        return {mark for node in nodes for mark in MARKS.values() if mark and mark in ast.unparse(node)}

    # Of the whole file; and of the kinds of engines, where its tests are for several.
    shared = [node for node in tree.body if isinstance(node, ast.Assign)]
    whole = marks(node.value for node in shared if ast.unparse(node.targets[0]) in ("pytestmark", "KINDS"))
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {node.name: whole | marks(node.decorator_list) for node in tests}


CLAIMS = [(kind, subject, test) for kind, evidence in EVIDENCE.items() for subject, test in evidence.run.items()]


@each(("kind", "subject", "test"), CLAIMS)
def test_whatever_was_run_is_run_by_a_test_of_that_engine(kind: str, subject: Subject, test: str) -> None:
    file, _, name = test.partition("::")
    name, _, case = name.removesuffix("]").partition("[")
    found = marked_tests(ROOT / "tests" / file)
    mark = MARKS[kind]
    assert (mark in found[name]) if mark else kind in test
    if name == "test_conformance" and isinstance(subject, Capability):
        assert subject in CHECKS[case.rpartition("-")[2]].needs


ASKS: dict[Subject, Callable[[LaunchSpec], object]] = {
    Start.STARTED: lambda spec: True,
    Start.FULL_WEIGHTS: lambda spec: spec.quantization is None,
    Start.CONTEXT: lambda spec: spec.max_model_len,
    Start.LONG_CONTEXT: lambda spec: (spec.max_model_len or 0) >= 32768,
    Start.MEMORY_SHARE: lambda spec: spec.memory_share,
    Start.TENSOR: lambda spec: spec.parallel.tensor > 1,
    Start.PIPELINE: lambda spec: spec.parallel.pipeline > 1,
    Start.DATA: lambda spec: spec.parallel.data > 1,
    Capability.ADAPTERS: lambda spec: spec.adapters is not None and spec.adapters.at_start,
    Capability.BOUNDED_QUEUE: lambda spec: spec.max_queued,
    Capability.UNIX_SOCKET: lambda spec: spec.address.unix,
}
"""What of a launch is asked for on the command line, and so is the parser's to take."""
PARSED = {
    "vllm": (*every_spec("vllm"), *test_vllm_launch.SINGLE),
    "sglang": tuple(test_sglang_launch.ABLE),
    "lmdeploy": tuple(test_lmdeploy_launch.ABLE),
    "simulated": (),
}
"""The launches whose command lines the parser of each engine is given."""


@pytest.mark.parametrize("kind", ENGINES)
def test_a_parser_has_taken_what_is_said_that_it_takes_and_nothing_it_took_is_kept_back(kind: str) -> None:
    stored: dict[Subject, Callable[[LaunchSpec], object]] = {
        one: lambda spec, one=one: spec.quantization is one  # type: ignore[misc]
        for one in Quantization
    }
    taken = {
        subject: frozenset(spec.device for spec in PARSED[kind] if asks(spec))
        for subject, asks in {**ASKS, **stored}.items()
    }
    assert EVIDENCE[kind].parsed == {subject: devices for subject, devices in taken.items() if devices}


def test_a_row_asks_an_engine_for_what_it_is_about() -> None:
    """Else nothing could be in the way of it."""
    for subject, asks in ASKS.items():
        if subject not in (Start.STARTED, Start.FULL_WEIGHTS):
            assert asks(table._spec(Column("vllm", Device.CUDA), ROWS[subject].asks)), subject


def test_nothing_is_told_of_what_an_engine_cannot_do_otherwise_than_as_a_reason() -> None:
    for kind, evidence in EVIDENCE.items():
        shown = {*evidence.run, *evidence.parsed}
        assert not shown & set(evidence.unable)
        for column in columns():
            if column.kind == kind:
                cannot = {subject for subject, row in ROWS.items() if cell(column, row).text == CANNOT}
                parsed = {subject for subject, devices in evidence.parsed.items() if column.device in devices}
                assert not cannot & (parsed | (set(evidence.run) if column.device is Device.CPU else set()))


def test_run_is_said_of_the_cpu_only() -> None:
    evidence = Evidence(run={Capability.TOOLS: "x"}, parsed={Capability.TOOLS: frozenset({Device.CUDA})})
    assert [evidence.of(Capability.TOOLS, device) for device in Device] == ["run", "parser", "read"]


def test_every_row_is_a_row_once() -> None:
    assert len(ROWS) == sum(len(topic.rows) for topic in TOPICS)
    assert all(isinstance(row, Row) and row.label for row in ROWS.values())
