"""Asks what is planned, each request at its time, whatever became of those before. No gevent here: who sleeps, what the
time is and who does the asking are arguments.

A request begins late when its client process is busy or has ``at_once`` of them under way. How late is measured, and
all its times count from the moment it should have begun: load that a slow server keeps from being asked is not
forgotten (coordinated omission).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from loadtests.scenarios.answers import (
    Attempt,
    Outcome,
    Row,
    Stream,
    comes_back,
    read_whole,
    told_to_wait,
)
from loadtests.scenarios.client import Answer
from loadtests.scenarios.schedule import Conversation, Planned
from loadtests.scenarios.schema import Klass, Scenario


class Asks(Protocol):
    """What a ``Client`` does."""

    def ask(self, path: str, headers: dict[str, str], body: bytes, stream: Stream | None, timeout: float) -> Answer: ...


class Hands(Protocol):
    """Does several things at once, up to a number."""

    def wait_free(self, timeout: float) -> bool:
        """Wait until one more can be begun; False when that took too long."""

    def spawn(self, work: Callable[[Planned], None], one: Planned) -> None:
        """Begin."""

    def join(self, timeout: float) -> None:
        """Wait until all have ended, or for so many seconds."""

    def kill(self) -> None:
        """End all that have not ended."""


class Player:
    """One run. ``emit`` gets the row of each request when it has ended."""

    def __init__(
        self,
        scenario: Scenario,
        planned: Sequence[Planned],
        client: Asks,
        hands: Hands,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        emit: Callable[[Row], None],
    ) -> None:
        self._scenario = scenario
        self._planned = planned
        self._client = client
        self._hands = hands
        self._clock = clock
        self._sleep = sleep
        self._emit = emit
        self._began = 0.0
        self.asked = 0
        """Requests and sessions begun so far."""
        self.done = False
        """Whether nothing more comes."""

    def play(self) -> None:
        """Begin everything at its time; return when all has ended or ``patience`` is over."""
        self._began = self._clock()
        over = self._began + self._scenario.seconds + self._scenario.patience
        try:
            for number, one in enumerate(self._planned):
                self._until(self._began + one.at)
                if not self._hands.wait_free(over - self._clock()):
                    self._not_started(self._planned[number:])
                    break
                self.asked += 1
                self._hands.spawn(self._session, one)
            self._hands.join(max(0.0, over - self._clock()))
        finally:
            self._hands.kill()
            self.done = True

    def _until(self, moment: float) -> None:
        wait = moment - self._clock()
        if wait > 0:
            self._sleep(wait)

    def _not_started(self, rest: Sequence[Planned]) -> None:
        for one in rest:
            late = self._clock() - self._began - one.at
            row = _row(one, 0, one.at)
            row.outcome, row.late = Outcome.NOT_STARTED, max(0.0, late)
            self._emit(row)

    def _session(self, one: Planned) -> None:
        klass = self._scenario.classes[one.klass]
        talk = Conversation(one, klass, self._scenario.model)
        at = one.at
        while True:
            row = _row(one, talk.turn, at)
            text = self._request(row, talk, klass, one)
            if row.outcome is not Outcome.COMPLETE:
                return
            pause = talk.answered(text)
            if pause is None:
                return
            at = self._clock() - self._began + pause
            if at > self._scenario.seconds:
                return
            self._until(self._began + at)

    def _request(self, row: Row, talk: Conversation, klass: Klass, one: Planned) -> str:
        """Ask, come back as often as the class says, and emit the row; returns what was said in a session."""
        intended = self._began + row.at
        row.late = self._clock() - intended
        try:
            body = msgspec.json.encode(talk.ask())
            while True:
                stream = Stream(keep_text=klass.session is not None) if klass.stream else None
                headers = {"authorization": f"Bearer {one.key}"}
                if row.attempts:
                    headers["x-stainless-retry-count"] = str(len(row.attempts))
                answer = self._client.ask(klass.path, headers, body, stream, klass.timeout)
                text = _note(row, answer, stream)
                tries = len(row.attempts)
                again = None
                if answer.status != 200:
                    again = comes_back(answer.status, answer.headers, tries, klass.retries, talk.chance.random())
                if again is None:
                    break
                row.attempts.append(Attempt(answer.status, row.retry_after))
                self._sleep(again)
            return self._measured(row, stream, intended, text)
        except BaseException:  # the run is over, and whoever asks is ended
            row.outcome, row.error = Outcome.CUT, "the run was over"
            row.total = self._clock() - intended
            with contextlib.suppress(Exception):
                self._emit(row)
            raise

    def _measured(self, row: Row, stream: Stream | None, intended: float, text: str) -> str:
        row.total = self._clock() - intended
        if stream is not None:
            row.gaps, row.events = stream.gaps, stream.events
            row.ttft = None if stream.first is None else stream.first - intended
        self._emit(row)
        return text


def _row(one: Planned, turn: int, at: float) -> Row:
    return Row(one.klass, one.tenant, one.phase, one.number, turn, at)


def _note(row: Row, answer: Answer, stream: Stream | None) -> str:
    """Write into the row what an answer was; returns what it said."""
    row.status, row.error = answer.status, answer.error
    row.id = answer.headers.get("x-request-id", "")
    row.retry_after = None
    if answer.status != 200:
        row.outcome = Outcome.REFUSED if answer.status in (429, 503) else Outcome.FAILED
        row.retry_after = told_to_wait(answer.headers)
        row.error = answer.error or answer.body[:300].decode(errors="replace")
        if answer.timed_out:
            row.outcome = Outcome.TIMED_OUT
        return ""
    if stream is not None:
        row.outcome = stream.outcome()
        row.error = stream.error or answer.error
        if stream.usage is not None:
            row.prompt_tokens, row.output_tokens = stream.usage
        text = stream.text
    else:
        whole = read_whole(answer.body) if answer.whole else None
        row.outcome = Outcome.COMPLETE if whole is not None and whole.choices else Outcome.BROKEN
        if whole is not None and whole.tokens is not None:
            row.prompt_tokens, row.output_tokens = whole.tokens
        text = whole.text if whole is not None else ""
    if answer.timed_out and row.outcome is Outcome.BROKEN:
        row.outcome = Outcome.TIMED_OUT
    return text
