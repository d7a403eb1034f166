"""Requests that wait for the store's word, and the calls by which they get it.

Rule 1: an ask is answered once: by the store, or by the policy when that is lost. Nobody else's answer is.
Rule 2: whatever was taken is known by its number until its answer is here, so that what is lost can be undone.
Rule 3: while one asks for a bucket's lease the others wait for it, once; then each asks for itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

from gateway.policy.token_bucket import SECOND
from gateway.store.holdings import Holdings
from gateway.store.outbox import Outbox
from gateway.store.protocol import Draw, Granted, Known, Refused, Verdict
from gateway.store.scripts import TAKE, UNDO, Told, need_words
from gateway.store.session import Session

MOST_TOLD = 10_000
"""Refusals remembered, so that who comes back too early costs no call."""
NEARLY = SECOND // 10
"""So near to the time somebody was told the store is asked: its clock is not known better here."""


class Ask:
    """A request waiting for its verdict."""

    __slots__ = ("began", "draws", "first", "future", "waited", "who")

    def __init__(self, draws: Sequence[Draw], who: int, *, first: bool) -> None:
        loop = asyncio.get_running_loop()
        self.draws = draws
        self.who = who
        self.first = first
        self.future: asyncio.Future[Verdict] = loop.create_future()
        self.began = loop.time()
        self.waited = False


class _Taking:
    """A call on its way: what it gave back first, whose answers it acknowledges, which buckets wait for it."""

    __slots__ = ("arrived", "ask", "backs", "generation", "number", "owns")

    def __init__(self, ask: Ask, number: int, arrived: list[int], generation: str) -> None:
        self.ask = ask
        self.number = number
        self.arrived = arrived
        self.generation = generation
        self.backs: list[int] = []
        self.owns: list[str] = []


class Asks:
    """All that wait; it is as long as they are many."""

    def __init__(self, session: Session, leases: Holdings, outbox: Outbox) -> None:
        self._session = session
        self._leases = leases
        self._outbox = outbox
        self._waiting: dict[Ask, None] = {}
        self._parked: list[Ask] = []
        """For a connection."""
        self.busy: dict[str, list[Ask]] = {}
        """For somebody else's call, by the bucket."""
        self._number = 0
        self._arrived: list[int] = []
        self._unanswered: list[_Taking] = []
        self._told: dict[int, tuple[int, tuple[Draw, ...], Refused]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def oldest(self) -> float | None:
        """Since when, by the loop's time, the first has been waiting."""
        while self._waiting:
            ask = next(iter(self._waiting))
            if not ask.future.done():
                return ask.began
            del self._waiting[ask]
        return None

    # --- refusals that are remembered -------------------------------------------------------------------------------

    @property
    def has_told(self) -> bool:
        """Whether there is anybody for whom the store may keep something."""
        return bool(self._told)

    def is_promised(self, who: int, *, first: bool) -> bool:
        """Return whether this is somebody for whom the store keeps what they need, until they have taken it there."""
        return not first and who in self._told

    def too_early(self, draws: Sequence[Draw], who: int, now: int) -> Refused | None:
        """Return what somebody who was promised a time is told before it."""
        due, promised, refused = self._told[who]
        if now < due - NEARLY and promised == tuple(draws):
            return Refused(refused.buckets, refused.index, due - now, early=True)
        return None

    def _remember(self, ask: Ask, due: int, refused: Refused, now: int) -> None:
        """Keep what was promised; of the same request the first."""
        known, draws = self._told.get(ask.who), tuple(ask.draws)
        if known is not None and known[0] > now and known[1] == draws:
            return
        if len(self._told) >= MOST_TOLD:
            for who in list(islice(self._told, MOST_TOLD // 10)):
                del self._told[who]
        self._told[ask.who] = (due, draws, refused)

    # --- the call ---------------------------------------------------------------------------------------------------

    def ask(self, ask: Ask) -> asyncio.Future[Verdict]:
        """Have the store decide."""
        self._waiting[ask] = None
        self._submit(ask)
        return ask.future

    def _submit(self, ask: Ask) -> None:
        if not self._session.serving:
            self._parked.append(ask)
            return
        if not ask.waited:
            for draw in ask.draws:
                waiters = self.busy.get(draw.bucket)
                if waiters is not None:
                    ask.waited = True
                    waiters.append(ask)
                    return
        self._take(ask)

    def _take(self, ask: Ask) -> None:
        self._number += 1
        taking = _Taking(ask, self._number, self._arrived, self._session.generation)
        self._arrived = []
        now = self._session.now()
        needs = [self._need(taking, draw, now) for draw in ask.draws]
        arrived = " ".join(map(str, taking.arrived))
        words = (str(self._number), arrived, str(ask.who), "1" if ask.first else "0", "", "", *needs)
        self._session.call(TAKE, [draw.bucket for draw in ask.draws], words, partial(self._taken, taking))

    def _need(self, taking: _Taking, draw: Draw, now: int) -> str:
        lease = self._leases.of(draw.bucket, draw.shape, now)
        back = more = 0
        if self._leases.leased:
            # What fits goes back as well, so that the store sees the whole request.
            back = min(lease.held, draw.amount)
            if lease.held < draw.amount and draw.bucket not in self.busy:
                # By what was used before: who comes once in a while would only have it carried there and back.
                more = lease.asks(draw.amount, now, self._session.live)
            if more:
                # One call at a time asks for a lease: several would together hold far more than their part.
                self.busy[draw.bucket] = []
                taking.owns.append(draw.bucket)
            lease.note(draw.amount, now)
            lease.held -= back
        # What is on its way back comes first, or a client that asks in turn is refused because of itself.
        back += self._outbox.take_along(draw.bucket)
        taking.backs.append(back)
        return need_words(draw.shape, draw.amount, more, back)

    # --- its answer -------------------------------------------------------------------------------------------------

    def _taken(self, taking: _Taking, told: Told | None) -> None:
        ask = taking.ask
        waiters = [waiter for bucket in taking.owns for waiter in self.busy.pop(bucket, ())]
        if told is None or told.status == "void":
            self._arrived.extend(taking.arrived)
            self._unanswered.append(taking)
            self._parked.append(ask)
            self._parked.extend(waiters)
            return
        self._arrived.append(taking.number)
        self._session.note(told)
        now = self._session.now()
        if told.status == "taken":
            self._grant(ask, told, now)
        else:
            self._refuse(ask, told, now)
        for waiter in waiters:
            if waiter.future.done():
                self._waiting.pop(waiter, None)
                continue
            is_promised = self.is_promised(waiter.who, first=waiter.first)
            granted = None if is_promised else self._spend(waiter.draws, now)
            if granted is None:
                self._submit(waiter)
            else:
                self._answer(waiter, granted)

    def _spend(self, draws: Sequence[Draw], now: int) -> Granted | None:
        buckets, amounts = [draw.bucket for draw in draws], [draw.amount for draw in draws]
        return self._leases.take(buckets, amounts, now, self._session.alive_until)

    def _grant(self, ask: Ask, told: Told, now: int) -> None:
        if not ask.first:
            self._told.pop(ask.who, None)
        gone = ask.future.done()
        buckets = []
        for draw, amount, bucket in zip(ask.draws, told.amounts, told.buckets, strict=True):
            lease = self._leases.of(draw.bucket, draw.shape, now)
            lease.learn(bucket)
            rest = amount if gone else amount - draw.amount
            if draw.shape.slots:
                lease.used += amount - rest
            if rest and self._leases.leased:
                self._leases.add(draw.bucket, rest)
            elif rest:
                self._outbox.post(draw.bucket, draw.shape, rest)
            buckets.append(lease.seen(now))
        self._answer(ask, Granted(Known([draw.shape for draw in ask.draws], buckets)))

    def _refuse(self, ask: Ask, told: Told, now: int) -> None:
        buckets = []
        for draw, bucket in zip(ask.draws, told.buckets, strict=True):
            lease = self._leases.of(draw.bucket, draw.shape, now)
            lease.learn(bucket)
            buckets.append(lease.seen(now))
        refused = Refused(tuple(buckets), told.index, told.wait, told.status == "early")
        if told.promised:
            self._remember(ask, told.now + told.wait, refused, now)
        self._answer(ask, refused)

    def _answer(self, ask: Ask, verdict: Verdict) -> None:
        self._waiting.pop(ask, None)
        if not ask.future.done():
            ask.future.set_result(verdict)

    # --- the connection lost and found ------------------------------------------------------------------------------

    def park(self) -> None:
        """Nobody's call is on its way any more: who waits for one waits for a connection."""
        for waiters in self.busy.values():
            self._parked.extend(waiters)
        self.busy.clear()

    def answer_alone(self, decide: Callable[[Ask], Verdict]) -> None:
        """Answer all that wait without the store."""
        self._parked.clear()
        for ask in list(self._waiting):
            if not ask.future.done():
                self._answer(ask, decide(ask))
        self._waiting.clear()

    def undo(self) -> None:
        """Have undone what was taken by calls whose answers were lost."""
        for taking in self._unanswered:
            needs = [need_words(draw.shape) for draw in taking.ask.draws]
            buckets = [draw.bucket for draw in taking.ask.draws]
            self._session.call(UNDO, buckets, (str(taking.number), *needs), partial(self._undone, taking))

    def _undone(self, taking: _Taking, told: Told | None) -> None:
        if told is None:
            return
        self._unanswered.remove(taking)
        if told.status == "unknown" and told.generation == taking.generation:
            # It was never run, so what it gave back is still ours.
            for draw, back in zip(taking.ask.draws, taking.backs, strict=True):
                if back:
                    self._leases.of(draw.bucket, draw.shape, self._session.now())
                    self._outbox.post(draw.bucket, draw.shape, back)

    def slots_undone(self) -> list[str]:
        """Return whose slots were given back by calls whose answers were lost."""
        return [
            draw.bucket
            for taking in self._unanswered
            for draw, back in zip(taking.ask.draws, taking.backs, strict=True)
            if back and draw.shape.slots
        ]

    def resume(self) -> None:
        """Ask for all that waited for a connection."""
        parked, self._parked = self._parked, []
        for ask in parked:
            if not ask.future.done():
                self._submit(ask)
            else:
                self._waiting.pop(ask, None)
