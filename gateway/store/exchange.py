"""What the replicas that share a store tell each other, and how they share endpoints, a few times a second.

Rule 1: one call at a time: it brings what this replica has to tell, and takes away what the others told since the last.
Rule 2: a message is known by its number until its answer is here: sent again it is told once. One that the answer was
        lost of is heard once, because only an answer moves on what was heard.
Rule 3: nobody waits for it. What was told while this replica was away for longer than the store keeps it is lost.
Rule 4: of an endpoint this replica uses no more than the store has recorded for it, while others count it among those
        that live; whatever answer is lost, it uses less.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from gateway.store.protocol import Claim, Grant, Member, Place
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
        self._asking = self._soon = self._again = False
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
        if self._session.now() > self._session.alive_until:
            self.alone()
        self.speak()

    def alone(self) -> None:
        """Take that the store is lost, or that others take this replica for dead and count nothing of what it holds."""
        if self._member is not None:
            self._member.alone(max(1, self._session.live))

    def hurry(self) -> None:
        """Ask for what is wanted now; once, however often that is said."""
        if self._asking:
            self._again = True
        elif not self._soon:
            self._soon = True
            asyncio.get_running_loop().call_soon(self._hurry)

    def _hurry(self) -> None:
        self._soon = False
        self.speak(news=False)

    def speak(self, *, news: bool = True) -> None:
        """Tell and hear what there is, unless a call is on its way. ``news``: there may be something to tell."""
        session = self._session
        if self._member is None or self._asking or not session.serving:
            return
        if news and not self._message:
            self._message = self._member.tell()
            self._number += 1
        place = Place(session.name.rpartition("-")[2], session.live, session.now())
        claims = self._member.claims(place)
        words = [f"{one.most} {one.held} {one.in_flight} {one.asked} {one.wanted}" for one in claims]
        self._asking = True
        self._watch()
        session.speak(
            EXCHANGE,
            ("told", "told:last", *[f"endpoint:{claim.endpoint}" for claim in claims]),
            (str(self._number), self._message, self._heard, *words),
            partial(self._done, claims, news),
        )

    def _done(self, claims: Sequence[Claim], news: bool, told: Told | None) -> None:
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
        messages = 1 + len(claims)
        if self._member.granted([_grant(line) for line in told.lines[1:messages]]) and news:
            self._again = True
        self._member.told(told.lines[messages:])
        # Of a generation that was forgotten this gives up the connection.
        session, again = self._session, self._again
        self._again = False
        session.note(told)
        if again:
            self.speak(news=False)


def _grant(line: bytes) -> Grant:
    held, *others = line.decode(errors="surrogatepass").split()
    return Grant(int(held), tuple(zip(others[::2], map(int, others[1::2]), strict=True)))
