"""What the replicas that share a store tell each other, a few times a second.

Rule 1: one call at a time: it brings what this replica has to tell, and takes away what the others told since the last.
Rule 2: a message is known by its number until its answer is here: sent again it is told once. One that the answer was
        lost of is heard once, because only an answer moves on what was heard.
Rule 3: nobody waits for it. What was told while this replica was away for longer than the store keeps it is lost.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.store.protocol import Member
from gateway.store.scripts import EXCHANGE, Told
from gateway.store.session import Session
from gateway.store.timing import Timer

EVERY = 0.25
"""Seconds between two calls."""


class Exchange:
    """The conversation of one replica with the others. ``first`` is greater than any number it used in a former life;
    ``watch`` is told when the server is asked, ``fenced`` that the server takes nothing on this connection any more."""

    def __init__(self, session: Session, watch: Callable[[], None], fenced: Callable[[], None], first: int) -> None:
        self._session = session
        self._watch = watch
        self._fenced = fenced
        self._number = first
        self._message = b""
        self._heard = ""
        self._asking = False
        self._member: Member | None = None
        self._timer = Timer(self._ring)

    def join(self, member: Member) -> None:
        """Speak for this member from now on."""
        self._member = member

    def start(self) -> None:
        """Begin, as soon as the store serves."""
        self._timer.set(EVERY)

    def stop(self) -> None:
        """Say nothing by itself any more."""
        self._timer.cancel()

    def _ring(self) -> None:
        self._timer.set(EVERY)
        self.speak()

    def speak(self) -> None:
        """Tell and hear what there is, unless a call is on its way."""
        if self._member is None or self._asking or not self._session.serving:
            return
        if not self._message:
            self._message = self._member.tell()
            self._number += 1
        self._asking = True
        self._watch()
        self._session.speak(
            EXCHANGE, ("told", "told:last"), (str(self._number), self._message, self._heard), self._done
        )

    def _done(self, told: Told | None) -> None:
        self._asking = False
        if told is None:
            return
        if told.status == "void":
            self._fenced()
            return
        assert self._member is not None
        if told.status == "kept":
            self._message = b""
        heard, away = told.lines[0].split()
        self._heard = heard.decode()
        if away == b"1":
            self._member.missed()
        self._member.told(told.lines[1:])
        # Last: of a generation that was forgotten it gives up the connection.
        self._session.note(told)
