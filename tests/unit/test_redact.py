"""An engine's words reach the client without the engine's own paths."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.serving.redact import MAX_MESSAGE, redact
from tests.support.recordings import all_recordings
from tests.support.table import each

TOLD = [
    ("No adapter found for /data/adapters/banana", "No adapter found for [path]"),
    ("[Errno 2] No such file: '/opt/model/config.json'", "[Errno 2] No such file: '[path]'"),
    ("cannot open (/a/b.bin), tried /c/d/", "cannot open ([path]), tried [path]"),
    ("boom\\n", "boom\\n"),
    ('boom\n  File "/usr/lib/x.py", line 1, in f\n    raise', "boom"),
    ('boom\n\n\tFile "/x/y.py", line 2', "boom"),
]


@each(("message", "told"), TOLD)
def test_paths_and_traces_are_taken_out(message: str, told: str) -> None:
    assert redact(message) == told


KEPT = [
    "temperature must be at least 0, got -1",
    "use /v1/chat/completions or /v1/completions",
    "see https://docs.example.com/a/b for more",
    "either/or, and/or, 1/2",
    "model org/name does not exist",
    "a date 2026/01/02",
    "",
]


@each("message", KEPT)
def test_what_only_has_slashes_stays(message: str) -> None:
    assert redact(message) == message


@given(message=st.text() | st.text(alphabet='/a.\n File"', max_size=200))
def test_it_is_bounded_and_does_it_all_at_once(message: str) -> None:
    told = redact(message)
    assert len(told) <= MAX_MESSAGE
    assert redact(told) == told


@each("message", ["/" * 10**6, "/a" * 10**6, "\n" * 10**6 + "/", "\n File" * 10**5 + "/", "a/" * 10**6])
def test_a_huge_message_is_cut_before_it_is_searched(message: str) -> None:
    """A client's own text comes back in it."""
    assert len(redact(message)) <= MAX_MESSAGE


def test_no_recorded_error_loses_its_sense() -> None:
    for recording in all_recordings(streams=False):
        if recording.status == 400:
            text = recording.body.decode()[:MAX_MESSAGE]
            assert redact(text)[:20] == text[:20]
