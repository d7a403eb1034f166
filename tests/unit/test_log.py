"""Lines as machines and people read them, gathered, and never the reason a request fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.log import FLUSH_BYTES, Log
from gateway.metrics import Metrics
from gateway.serving.meter import Usage
from gateway.serving.ticket import Outcome, Ticket

NEW_YEAR = 1767225600.0


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def test_a_line_is_one_json_object(path: Path) -> None:
    log = Log("json", path, wall=lambda: NEW_YEAR + 0.25)
    log.say("info", "started", port=8000, why='a "quote"\nand a line')
    log.close()
    assert lines_of(path) == [
        {
            "time": "2026-01-01T00:00:00.250Z",
            "level": "info",
            "event": "started",
            "port": 8000,
            "why": 'a "quote"\nand a line',
        }
    ]
    assert path.read_text().count("\n") == 1


def test_the_wall_clock_is_shown_to_the_millisecond(path: Path) -> None:
    moments = iter([NEW_YEAR, NEW_YEAR + 0.0009, NEW_YEAR + 0.999, NEW_YEAR + 1, NEW_YEAR + 86399.5, NEW_YEAR - 0.5])
    log = Log("json", path, wall=lambda: next(moments))
    assert [log.now()[11:] for _ in range(5)] == [
        "00:00:00.000Z",
        "00:00:00.000Z",
        "00:00:00.999Z",
        "00:00:01.000Z",
        "23:59:59.500Z",
    ]
    assert log.now() == "2025-12-31T23:59:59.500Z"
    log.close()


@pytest.mark.parametrize(("level", "kept"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_only_lines_of_the_level_and_above_are_kept(path: Path, level: str, kept: int) -> None:
    log = Log("json", path, level)
    for each in ("debug", "info", "warning", "error"):
        log.say(each, "event")
    log.close()
    assert len(lines_of(path)) == kept


def test_lines_wait_for_a_flush_unless_there_are_many(path: Path) -> None:
    log = Log("json", path)
    log.say("info", "one")
    assert path.read_text() == ""
    log.flush()
    log.flush()
    assert len(lines_of(path)) == 1
    while path.stat().st_size < 100_000:
        log.say("info", "much", text="x" * 1000)
    assert FLUSH_BYTES <= path.stat().st_size < FLUSH_BYTES + 5000
    log.close()


def test_a_rotated_file_is_opened_anew(path: Path) -> None:
    log = Log("json", path)
    log.say("info", "before")
    path.rename(path.with_suffix(".1"))
    log.reopen()
    log.say("info", "after")
    log.close()
    assert [line["event"] for line in lines_of(path.with_suffix(".1"))] == ["before"]
    assert [line["event"] for line in lines_of(path)] == ["after"]


def test_lines_are_added_to_a_file_that_exists(path: Path) -> None:
    for event in ("first", "second"):
        log = Log("json", path)
        log.say("info", event)
        log.close()
    assert [line["event"] for line in lines_of(path)] == ["first", "second"]


class FullDisk:
    """A file that takes nothing."""

    def write(self, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        """Nothing is open."""


def test_a_full_disk_costs_lines_and_nothing_else(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = Log("json", path)
    log._stream.close()
    log._stream = FullDisk()  # type: ignore[assignment]
    log.say("info", "lost")
    log.flush()
    assert "No space left" in capfd.readouterr().err
    log.reopen()
    log.say("info", "kept")
    log.close()
    assert [line["event"] for line in lines_of(path)] == ["kept"]


def test_a_fault_of_ours_has_its_traceback(path: Path) -> None:
    log = Log("json", path)
    try:
        raise KeyError("x")
    except KeyError as error:
        log.failed("internal_error", error, request_id="req_1")
    log.close()
    (line,) = lines_of(path)
    assert (line["level"], line["error"], line["request_id"]) == ("error", "KeyError('x')", "req_1")
    assert "test_log.py" in line["trace"]


def test_people_get_one_line_too(path: Path) -> None:
    log = Log("console", path, wall=lambda: NEW_YEAR + 1.5)
    log.say("warning", "endpoint_down", endpoint="e", reason="no answer")
    log.close()
    assert path.read_text() == "00:00:01.500 warning endpoint_down  endpoint=e reason=no answer\n"


def test_on_a_console_a_traceback_follows_its_line(path: Path) -> None:
    log = Log("console", path)
    log.failed("internal_error", ValueError("x"))
    log.close()
    assert path.read_text().splitlines()[1:] == ["ValueError: x", ""]


# --- the line of a request ---------------------------------------------------------------------------------------


def ticket() -> Ticket:
    found = Ticket(Metrics(10), lambda *_: None, "req_1", "/v1/chat/completions", 50.0)
    found.tenant, found.key, found.client = "team", "alice", "1.2.3.4"
    return found


def line(found: Ticket, outcome: Outcome, status: int, path: Path) -> dict[str, Any]:
    log = Log("json", path, wall=lambda: NEW_YEAR)
    entry = found.line(outcome, status, 51.23456, log.now())
    log.write(entry, entry.level)
    log.close()
    (written,) = lines_of(path)
    assert isinstance(written, dict)
    return written


def test_a_requests_line_says_all_that_happened(path: Path) -> None:
    found = ticket()
    found.serve("m", stream=True)
    found.mark(50.5, 1)
    found.mark(51, 2)
    found.usage = Usage(10, 3, 0)
    found.attempts, found.endpoint, found.bytes_in = 1, "e", 99
    assert line(found, Outcome.OK, 200, path) == {
        "time": "2026-01-01T00:00:00.000Z",
        "level": "info",
        "event": "request",
        "request_id": "req_1",
        "path": "/v1/chat/completions",
        "outcome": "ok",
        "status": 200,
        "duration_ms": 1234.56,
        "model": "m",
        "tenant": "team",
        "key": "alice",
        "client": "1.2.3.4",
        "endpoint": "e",
        "stream": True,
        "attempts": 1,
        "ttft_ms": 500.0,
        "events": 3,
        "tokens_in": 10,
        "tokens_out": 3,
        "tokens_cached": 0,
        "bytes_in": 99,
    }


def test_what_is_not_known_is_left_out(path: Path) -> None:
    found = ticket()
    found.error = "The model 'x' does not exist."
    assert set(line(found, Outcome.REFUSED, 404, path)) == {
        *("time", "level", "event", "request_id", "path", "outcome", "status", "duration_ms"),
        *("tenant", "key", "client", "error"),
    }


@pytest.mark.parametrize("outcome", list(Outcome))
def test_what_the_operator_should_see_is_a_warning(outcome: Outcome, path: Path) -> None:
    expected = outcome in (Outcome.OK, Outcome.REFUSED, Outcome.CLIENT_GONE)
    assert line(ticket(), outcome, 200, path)["level"] == ("info" if expected else "warning")


def test_a_ticket_settles_once() -> None:
    """The second time is a bug, and is not accounted for."""
    settled = []
    metrics = Metrics(10)
    found = Ticket(metrics, lambda *told: settled.append(told), "req_1", "/x", 0)
    found.serve("m", stream=False)
    found.settle(Outcome.OK, 200, 1)
    with pytest.raises(RuntimeError, match="settled twice"):
        found.settle(Outcome.OK, 200, 1)
    assert len(settled) == 1
    assert found.series.in_flight == 0
    assert metrics.tenant("m", "").outcomes == {"ok": 1}
