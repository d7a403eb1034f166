"""Buckets in a Redis server, shared by all replicas.

Rule 1: an admission may be local, out of what is leased; a refusal is always the store's answer, or a share's when the
        store is lost.
Rule 2: whatever was taken is known by its number until its answer is here, so that what is lost can be undone; what
        goes back travels in numbered batches. Each counts once.
Rule 3: nobody waits longer than ``timeout``: then the store counts as lost and the policy decides, until a new
        connection has settled what the old one left open.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
from collections.abc import Callable, Sequence

from gateway.policy.token_bucket import SECOND, Bucket, Shape
from gateway.redis_url import read_url
from gateway.store.alone import Shares
from gateway.store.asking import Ask, Asks
from gateway.store.exchange import Exchange
from gateway.store.holdings import Holdings
from gateway.store.lease import Lease
from gateway.store.link import Link
from gateway.store.outbox import Outbox
from gateway.store.protocol import Buckets, Member, Standing, Turn, Verdict
from gateway.store.scripts import BEAT, LOOK, Told, need_words
from gateway.store.session import Session
from gateway.store.timing import Overdue, Timer

BEAT_EVERY = 1.0
LIFETIME = 3 * SECOND
"""A replica not heard of for so long is dead: its slots are free."""
TICK = 0.1
LEAVING = 1.0
"""Seconds a replica takes to say farewell, at the most."""
MOST_LEASES = 100_000
"""Beyond so many, those are forgotten of which nothing is held; past twice as many, also what was spent alone."""


class Mode(enum.StrEnum):
    """How a replica comes by what it gives out."""

    LEASED = "leased"
    EXACT = "exact"
    """The store is asked each time."""


class RedisStore:
    """The store of one replica. ``clock`` returns microseconds since 1970, used until the server has told its time;
    ``server_clock`` stands in for the server's in tests. ``replicas`` are assumed until the store has told. ``heard``
    is told when it is lost, found (at the start, too) or emptied."""

    def __init__(
        self,
        *,
        url: str,
        replica_id: str,
        clock: Callable[[], int],
        mode: Mode = Mode.LEASED,
        when_lost: Standing = Standing.DEGRADED,
        timeout: float = 0.05,
        namespace: str = "forebay",
        ca: str | None = None,
        replicas: int = 1,
        heard: Callable[[Turn], None] = lambda turn: None,
        server_clock: Callable[[], int] | None = None,
        chance: random.Random | None = None,
    ) -> None:
        if not namespace or set(namespace) & set("{}"):
            raise ValueError("the namespace of a store of limits is a name without braces")
        chance = chance or random.Random()  # noqa: S311
        now = clock()
        # A life of its own: what a former one with the same name held is not this one's.
        name = f"{replica_id}-{now:x}-{chance.getrandbits(32):x}"
        self._timeout = timeout
        self._heard = heard
        self._link = Link(read_url(url, ca), self._up, self._down, chance)
        self._session = Session(self._link, name, namespace, now, max(1, replicas), heard, server_clock)
        self._overdue = Overdue(timeout, self._oldest, self._late)
        self._leases = Holdings(MOST_LEASES, self._needed, leased=mode is Mode.LEASED)
        self._shares = Shares(when_lost, self._leases)
        self._outbox = Outbox(self._session, self._leases, self._overdue.watch, now, chance)
        self._asks = Asks(self._session, self._leases, self._outbox)
        self._exchange = Exchange(self._session, self._overdue.watch, self._link.drop, now)
        self._lost = True
        self._beaten = 0.0
        self._slots_said: dict[str, int] = {}
        self._healed = asyncio.Event()
        self._timers = {"tick": Timer(self._tick), "lost": Timer(self._lose)}

    @property
    def standing(self) -> Standing:
        """By whose word it answers now."""
        return self._shares.policy if self._lost else Standing.STORE

    @property
    def trouble(self) -> str:
        """Why there is no connection, empty where there is one; without passwords."""
        return self._link.trouble

    @property
    def _serving(self) -> bool:
        return self._session.serving

    # --- for the serving side ---------------------------------------------------------------------------------------

    def reserve(
        self, buckets: Buckets, amounts: Sequence[int], who: Callable[[], int], *, first: bool = False
    ) -> Verdict | asyncio.Future[Verdict]:
        """Take every amount, or none: at once out of what is leased, else by the store's word."""
        session, asks = self._session, self._asks
        now = session.now()
        is_promised = asks.has_told and asks.is_promised(who(), first=first)
        if self._lost or not is_promised:
            granted = self._leases.take(buckets.names, amounts, now, session.alive_until)
            if granted is not None:
                return granted
        draws = buckets.draws(amounts)
        if self._lost:
            return self._shares.decide(draws, who(), now, session.live, first=first)
        early = asks.too_early(draws, who(), now) if is_promised else None
        if early is not None:
            return early
        self._overdue.watch()
        return asks.ask(Ask(draws, who(), first=first))

    def settle(self, buckets: Buckets, amounts: Sequence[int]) -> None:
        """Note what comes back, or is owed; part of it may be spent here again."""
        now = self._session.now()
        for name, shape, amount in zip(buckets.names, buckets.shapes, amounts, strict=True):
            if amount:
                self._settle(name, shape, amount, now)

    def _settle(self, name: str, shape: Shape, amount: int, now: int) -> None:
        lease = self._leases.of(name, shape, now)
        if shape.slots:
            lease.used = max(0, lease.used - amount)
        else:
            amount = self._shares.back(name, amount, now)
        rest = self._leases.keep(name, amount, now, self._session.live)
        if rest:
            self._outbox.post(name, shape, rest)

    async def look(self, buckets: Buckets) -> tuple[Bucket, ...]:
        """Return what the buckets hold, by the store's word where it gives it in time."""
        now = self._session.now()
        if self._serving:
            answer: asyncio.Future[Told | None] = asyncio.get_running_loop().create_future()
            needs = [need_words(shape) for shape in buckets.shapes]
            self._overdue.watch()
            self._session.call(
                LOOK,
                buckets.names,
                ("", *needs),
                lambda told: None if answer.done() else answer.set_result(told),
            )
            told = await answer
            if told is not None:
                self._session.note(told)
                leases = self._leases_of(buckets, now)
                return tuple(lease.beside(bucket) for lease, bucket in zip(leases, told.buckets, strict=True))
        return tuple(lease.seen(now) for lease in self._leases_of(buckets, now))

    def _leases_of(self, buckets: Buckets, now: int) -> list[Lease]:
        return [self._leases.of(name, shape, now) for name, shape in zip(buckets.names, buckets.shapes, strict=True)]

    def join(self, member: Member) -> None:
        """Carry what a member tells the other replicas, and what they tell."""
        self._exchange.join(member)

    def hurry(self) -> None:
        """Ask now for what the member wants of endpoints."""
        self._exchange.hurry()

    async def start(self) -> None:
        """Begin; a store that does not answer for a while is lost until it does."""
        self._link.start()
        self._timers["tick"].set(TICK)
        self._exchange.start()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._healed.wait(), max(0.5, self._timeout))
        if self._lost:
            self._exchange.alone()

    async def stop(self) -> None:
        """Carry on what is noted, return what is leased, leave; for a second at the most."""
        if not self._timers["tick"].is_set:
            return
        self._cancel("tick")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVING):
                await self._leave()
        self._do_nothing_later()
        self._session.serving = False
        await self._link.close()
        self._do_nothing_later()
        self._lost = True
        self._answer_alone()

    async def _leave(self) -> None:
        while not self._lost:
            for name, lease, held in self._leases.empty():
                self._outbox.post(name, lease.shape, held)
            self._outbox.flush()
            if self._serving and not (self._asks or self._outbox) and self._link.oldest is None:
                break
            await asyncio.sleep(0.002)
        if self._serving:
            self._exchange.speak()
            answer: asyncio.Future[Told | None] = asyncio.get_running_loop().create_future()
            self._session.call(BEAT, (), ("0",), answer.set_result)
            await answer

    def _needed(self, bucket: str, now: int, room: bool) -> bool:
        return bucket in self._outbox or self._shares.needs(bucket, now, room)

    # --- the connection found ---------------------------------------------------------------------------------------

    def _up(self) -> None:
        """Settle with the store what the former connection left open: calls without an answer are fenced off and
        undone, the batch is sent again, the slots in use are said."""
        self._session.fence += 1
        self._overdue.watch()
        self._session.call(BEAT, (), (str(LIFETIME),), self._note_healing)
        self._asks.undo()
        self._outbox.send_again()
        # Those on their way back are there when those in use have been said.
        self._leases.forgo_slots([*self._outbox.forgo_slots(), *self._asks.slots_undone()])
        self._slots_said = self._leases.slots(self._outbox.owed)
        needs = [need_words(self._leases[name].shape, amount) for name, amount in self._slots_said.items()]
        self._session.call(BEAT, list(self._slots_said), (str(LIFETIME), *needs), self._heal)

    def _note_healing(self, told: Told | None) -> None:
        if told is not None and told.status != "void":
            self._session.generation = told.generation

    def _heal(self, told: Told | None) -> None:
        if told is None:
            return
        if told.status == "void":
            self._link.drop()
            return
        self._beaten = asyncio.get_running_loop().time()
        now = self._session.now()
        self._session.begin(told, LIFETIME)
        self._charge(now)
        found = self._lost
        self._cancel("lost")
        self._lost, self._session.serving = False, True
        self._link.healthy()
        self._healed.set()
        if found:
            self._heard(Turn.FOUND)
        self._asks.resume()
        self._outbox.flush_soon()
        self._exchange.speak()

    def _charge(self, now: int) -> None:
        """Owe the store what was let in by this replica's own word: slots since they were counted, shares spent."""
        for name, amount in self._leases.slots(self._outbox.owed).items():
            said = self._slots_said.get(name, 0)
            if amount > said:
                self._outbox.post(name, self._leases[name].shape, said - amount)
        for name, shape, charge in self._shares.charges(now):
            if charge:
                self._outbox.post(name, shape, -charge)
        self._leases.slots_said()

    # --- and lost ---------------------------------------------------------------------------------------------------

    def _down(self) -> None:
        self._session.serving = False
        self._asks.park()
        if not self._lost and not self._timers["lost"].is_set:
            self._timers["lost"].set(self._timeout)

    def _lose(self) -> None:
        """Nobody waits any more; the policy decides."""
        if self._lost or self._serving:
            return
        self._lost = True
        self._heard(Turn.LOST)
        self._exchange.alone()
        self._answer_alone()

    def _answer_alone(self) -> None:
        now, live = self._session.now(), self._session.live
        self._asks.answer_alone(lambda ask: self._shares.decide(ask.draws, ask.who, now, live, first=ask.first))

    # --- time -------------------------------------------------------------------------------------------------------

    def _oldest(self) -> float | None:
        """Return since when the first of all has been waiting, for a verdict or for the server."""
        waiting = [since for since in (self._link.oldest, self._asks.oldest) if since is not None]
        return min(waiting, default=None)

    def _late(self) -> None:
        self._link.drop()
        self._lose()

    def _tick(self) -> None:
        """Say that this replica lives; return what lies idle."""
        self._timers["tick"].set(TICK)
        for name, lease, over in self._leases.surplus(self._session.now(), self._session.live):
            self._outbox.post(name, lease.shape, over)
        moment = asyncio.get_running_loop().time()
        if self._serving and moment - self._beaten >= BEAT_EVERY:
            self._beaten = moment
            self._overdue.watch()
            self._session.call(BEAT, (), (str(LIFETIME),), self._beat)

    def _beat(self, told: Told | None) -> None:
        if told is None:
            return
        if told.status != "void":
            self._session.note(told)
        if told.status != "known":
            # Others took this replica for dead and its slots for free.
            self._link.drop()
            return
        self._session.alive_until = told.now + LIFETIME

    def _do_nothing_later(self) -> None:
        for name in self._timers:
            self._cancel(name)
        self._outbox.stop()
        self._exchange.stop()
        self._overdue.stop()

    def _cancel(self, name: str) -> None:
        self._timers[name].cancel()
