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
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

from gateway.policy.reservation import Need, Short, take
from gateway.policy.token_bucket import SECOND, Bucket, Shape
from gateway.redis_url import read_url
from gateway.store.lease import Lease, Share
from gateway.store.link import Link
from gateway.store.protocol import Draw, Granted, Refused, Standing, Turn, Verdict
from gateway.store.scripts import BEAT, GIVE, LOOK, TAKE, UNDO, Script, Told, need_words

BEAT_EVERY = 1.0
LIFETIME = 3 * SECOND
"""A replica not heard of for so long is dead: its slots are free."""
TICK = 0.1
FLUSH = (0.02, 0.05)
"""Seconds between something given back and its way to the store."""
LEAVING = 1.0
"""Seconds a replica takes to say farewell, at the most."""
MOST_IN_BATCH = 500
MOST_LEASES = 100_000
"""Beyond so many, those are forgotten of which nothing is held; past twice as many, also what was spent alone."""
MOST_TOLD = 10_000
"""Refusals remembered, so that who comes back too early costs no call."""
NEARLY = SECOND // 10
"""So near to the time somebody was told the store is asked: its clock is not known better here."""
_LOOKED_AT = 8
_TURNS = 3
"""Of the event loop, within which what has arrived is read and handed on."""


def steady() -> int:
    """Return microseconds by a clock that nobody sets."""
    return time.monotonic_ns() // 1000


class Mode(enum.StrEnum):
    """How a replica comes by what it gives out."""

    LEASED = "leased"
    EXACT = "exact"
    """The store is asked each time."""


class _Ask:
    """A request waiting for its verdict."""

    __slots__ = ("began", "draws", "first", "future", "waited", "who")

    def __init__(
        self, draws: Sequence[Draw], who: int, first: bool, future: asyncio.Future[Verdict], began: float
    ) -> None:
        self.draws = draws
        self.who = who
        self.first = first
        self.future = future
        self.began = began
        self.waited = False


class _Taking:
    """A call on its way: what it gave back first, whose answers it acknowledges, which buckets wait for it."""

    __slots__ = ("arrived", "ask", "backs", "generation", "number", "owns")

    def __init__(self, ask: _Ask, number: int, arrived: list[int], generation: str) -> None:
        self.ask = ask
        self.number = number
        self.arrived = arrived
        self.generation = generation
        self.backs: list[int] = []
        self.owns: list[str] = []


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
        self._server_clock = server_clock
        self._leased = mode is Mode.LEASED
        self._when_lost = when_lost
        self._timeout = timeout
        self._heard = heard
        self._chance = chance or random.Random()  # noqa: S311
        # A life of its own: what a former one with the same name held is not this one's.
        self._name = f"{replica_id}-{clock():x}-{self._chance.getrandbits(32):x}"
        # One hash tag: on a Cluster all of it is in one slot.
        self._prefix = f"{{{namespace}}}:b:"
        self._head = tuple(f"{{{namespace}}}:{what}" for what in ("generation", "replicas", f"r:{self._name}"))
        self._link = Link(read_url(url, ca), self._up, self._down, self._chance)
        self._leases: dict[str, Lease] = {}
        self._holding: set[str] = set()
        self._shares: dict[str, Share] = {}
        self._asks: dict[_Ask, None] = {}
        self._parked: list[_Ask] = []
        self._busy: dict[str, list[_Ask]] = {}
        self._arrived: list[int] = []
        self._unanswered: list[_Taking] = []
        self._told: dict[int, tuple[int, tuple[Draw, ...], Refused]] = {}
        self._outbox: dict[str, tuple[Shape, int]] = {}
        self._batch: dict[str, tuple[Shape, int]] = {}
        self._batch_number = self._fence = clock()
        self._number = 0
        self._generation = ""
        self._live = max(1, replicas)
        self._ahead = clock() - steady()
        self._alive_until = 0
        self._serving = False
        self._lost = True
        self._beaten = 0.0
        self._slots_said: dict[str, int] = {}
        self._forgone: set[str] = set()
        self._healed = asyncio.Event()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._sweep_at = 0.0
        self._turns_left: int | None = None

    @property
    def standing(self) -> Standing:
        """By whose word it answers now."""
        return self._when_lost if self._lost else Standing.STORE

    @property
    def trouble(self) -> str:
        """Why there is no connection, empty where there is one; without passwords."""
        return self._link.trouble

    # --- reserving --------------------------------------------------------------------------------------------------

    def reserve(self, draws: Sequence[Draw], who: int, *, first: bool = False) -> Verdict | asyncio.Future[Verdict]:
        """Take every draw, or none: at once out of what is leased, else by the store's word."""
        now = self._now()
        told = None if first else self._told.get(who)
        granted = self._out_of_leases(draws, now) if told is None or self._lost else None
        if granted is not None:
            return granted
        if self._lost:
            return self._alone(draws, who, first, now)
        if told is not None and now < told[0] - NEARLY and told[1] == tuple(draws):
            return Refused(told[2].buckets, told[2].index, told[0] - now, early=True)
        loop = asyncio.get_running_loop()
        ask = _Ask(draws, who, first, loop.create_future(), loop.time())
        self._asks[ask] = None
        self._watch()
        self._submit(ask)
        return ask.future

    def _out_of_leases(self, draws: Sequence[Draw], now: int) -> Granted | None:
        if not self._leased:
            return None
        leases = self._leases
        found = []
        for draw in draws:
            lease = leases.get(draw.bucket)
            if lease is None or lease.held < draw.amount:
                return None
            # Slots that are held by somebody not heard of are others' by now.
            if lease.shape.slots and now >= self._alive_until:
                return None
            found.append(lease)
        buckets = []
        for draw, lease in zip(draws, found, strict=True):
            lease.held -= draw.amount
            if lease.shape.slots:
                lease.used += draw.amount
            lease.note(draw.amount, now)
            buckets.append(lease.seen(now))
        return Granted(tuple(buckets))

    def _submit(self, ask: _Ask) -> None:
        if not self._serving:
            self._parked.append(ask)
            return
        if not ask.waited:
            for draw in ask.draws:
                waiters = self._busy.get(draw.bucket)
                if waiters is not None:
                    ask.waited = True
                    waiters.append(ask)
                    return
        self._take(ask)

    def _take(self, ask: _Ask) -> None:
        now = self._now()
        self._number += 1
        taking = _Taking(ask, self._number, self._arrived, self._generation)
        self._arrived = []
        needs = []
        for draw in ask.draws:
            lease = self._lease(draw, now)
            back = more = 0
            if self._leased:
                # What fits goes back as well, so that the store sees the whole request.
                back = min(lease.held, draw.amount)
                if lease.held < draw.amount and draw.bucket not in self._busy:
                    # By what was used before: who comes once in a while would only have it carried there and back.
                    more = lease.asks(draw.amount, now, self._live)
                if more:
                    # One call at a time asks for a lease: several would together hold far more than their part.
                    self._busy[draw.bucket] = []
                    taking.owns.append(draw.bucket)
                lease.note(draw.amount, now)
                lease.held -= back
            # What is on its way back comes first, or a client that asks in turn is refused because of itself.
            noted = self._outbox.pop(draw.bucket, None)
            if noted is not None:
                back += noted[1]
            taking.backs.append(back)
            needs.append(need_words(draw.shape, draw.amount, more, back))
        arrived = " ".join(map(str, taking.arrived))
        words = (str(self._number), arrived, str(ask.who), "1" if ask.first else "0", "", "", *needs)
        self._call(TAKE, [draw.bucket for draw in ask.draws], words, partial(self._taken, taking))

    def _taken(self, taking: _Taking, told: Told | None) -> None:
        ask = taking.ask
        waiters = [waiter for bucket in taking.owns for waiter in self._busy.pop(bucket, ())]
        if told is None or told.status == "void":
            self._arrived.extend(taking.arrived)
            self._unanswered.append(taking)
            self._parked.append(ask)
            self._parked.extend(waiters)
            return
        self._arrived.append(taking.number)
        self._note(told)
        now = self._now()
        if told.status == "taken":
            self._grant(ask, told, now)
        else:
            self._refuse(ask, told, now)
        for waiter in waiters:
            if waiter.future.done():
                self._asks.pop(waiter, None)
                continue
            # What was promised to somebody the store keeps until they have taken it there.
            is_promised = not waiter.first and waiter.who in self._told
            granted = None if is_promised else self._out_of_leases(waiter.draws, now)
            if granted is None:
                self._submit(waiter)
            else:
                self._answer(waiter, granted)

    def _grant(self, ask: _Ask, told: Told, now: int) -> None:
        if not ask.first:
            self._told.pop(ask.who, None)
        gone = ask.future.done()
        buckets = []
        for draw, amount, bucket in zip(ask.draws, told.amounts, told.buckets, strict=True):
            lease = self._lease(draw, now)
            lease.learn(bucket)
            rest = amount if gone else amount - draw.amount
            if draw.shape.slots:
                lease.used += amount - rest
            if rest and self._leased:
                lease.held += rest
                self._holding.add(draw.bucket)
            elif rest:
                self._post(draw.bucket, draw.shape, rest)
            buckets.append(lease.seen(now))
        self._answer(ask, Granted(tuple(buckets)))

    def _refuse(self, ask: _Ask, told: Told, now: int) -> None:
        buckets = []
        for draw, bucket in zip(ask.draws, told.buckets, strict=True):
            lease = self._lease(draw, now)
            lease.learn(bucket)
            buckets.append(lease.seen(now))
        refused = Refused(tuple(buckets), told.index, told.wait, told.status == "early")
        if told.promised:
            self._remember(ask, told.now + told.wait, refused, now)
        self._answer(ask, refused)

    def _remember(self, ask: _Ask, due: int, refused: Refused, now: int) -> None:
        """Keep what was promised, so that who comes back too early costs no call; of the same request the first."""
        known, draws = self._told.get(ask.who), tuple(ask.draws)
        if known is not None and known[0] > now and known[1] == draws:
            return
        if len(self._told) >= MOST_TOLD:
            for who in list(islice(self._told, MOST_TOLD // 10)):
                del self._told[who]
        self._told[ask.who] = (due, draws, refused)

    def _answer(self, ask: _Ask, verdict: Verdict) -> None:
        self._asks.pop(ask, None)
        if not ask.future.done():
            ask.future.set_result(verdict)

    # --- while the store is lost ------------------------------------------------------------------------------------

    def _alone(self, draws: Sequence[Draw], who: int, first: bool, now: int) -> Verdict:
        """Decide without the store, by the policy."""
        standing = self._when_lost
        leases = [self._lease(draw, now) for draw in draws]
        if standing is Standing.CLOSED:
            return Refused(tuple(lease.seen(now) for lease in leases), 0, SECOND, standing=standing)
        shares = [self._share(draw, now) for draw in draws]
        before = [
            Bucket(-lease.used, now) if share.shape.slots else share.bucket
            for lease, share in zip(leases, shares, strict=True)
        ]
        if standing is Standing.OPEN:
            for draw, lease, share in zip(draws, leases, shares, strict=True):
                share.let_in(draw.amount, now)
                lease.used += draw.amount if draw.shape.slots else 0
            return Granted(tuple(lease.seen(now) for lease in leases), standing)
        needs = [Need(share.shape, share.amount(draw.amount)) for draw, share in zip(draws, shares, strict=True)]
        taken = take(needs, before, now, who, first=first)
        if isinstance(taken, Short):
            for share, bucket in zip(shares, taken.buckets, strict=True):
                share.bucket = bucket
            return Refused(taken.buckets, taken.index, taken.wait, taken.early, standing)
        for draw, lease, share, bucket in zip(draws, leases, shares, taken.buckets, strict=True):
            share.spend(draw.amount, bucket)
            lease.used += draw.amount if draw.shape.slots else 0
        return Granted(taken.buckets, standing)

    def _share(self, draw: Draw, now: int) -> Share:
        share = self._shares.get(draw.bucket)
        if share is None:
            share = self._shares[draw.bucket] = Share(draw.shape, self._lease(draw, now), self._live, now)
        return share

    # --- giving back ------------------------------------------------------------------------------------------------

    def settle(self, draws: Sequence[Draw]) -> None:
        """Note what comes back, or is owed; part of it may be spent here again."""
        now = self._now()
        for draw in draws:
            lease = self._lease(draw, now)
            amount = draw.amount
            if draw.shape.slots:
                lease.used = max(0, lease.used - amount)
            elif self._lost and draw.bucket in self._shares:
                amount = self._shares[draw.bucket].back(amount, now)
            if self._leased and amount:
                amount -= lease.keep(amount, now, self._live)
                if lease.held:
                    self._holding.add(draw.bucket)
            if amount:
                self._post(draw.bucket, draw.shape, amount)

    def _post(self, bucket: str, shape: Shape, amount: int) -> None:
        noted = self._outbox.get(bucket)
        self._outbox[bucket] = (shape, amount if noted is None else noted[1] + amount)
        self._leases[bucket].given(amount)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if self._serving and not self._batch and "flush" not in self._timers:
            self._later("flush", self._chance.uniform(*FLUSH), self._flush)

    def _flush(self) -> None:
        if not self._serving or self._batch or not self._outbox:
            return
        for bucket in list(islice(self._outbox, MOST_IN_BATCH)):
            self._batch[bucket] = self._outbox.pop(bucket)
        self._batch_number += 1
        self._send_batch()

    def _send_batch(self) -> None:
        needs = [need_words(shape, back=amount) for shape, amount in self._batch.values()]
        self._watch()
        self._call(GIVE, list(self._batch), (str(self._batch_number), *needs), self._given)

    def _given(self, told: Told | None) -> None:
        if told is None:
            return  # Sent again, with its number, when there is a connection.
        self._note(told)
        self._batch.clear()
        if self._outbox:
            self._flush_soon()

    # --- the connection lost and found ------------------------------------------------------------------------------

    def _up(self) -> None:
        """Settle with the store what the former connection left open: calls without an answer are fenced off and
        undone, the batch is sent again, the slots in use are said."""
        self._fence += 1
        self._watch()
        self._call(BEAT, (), (str(LIFETIME),), self._note_healing)
        for taking in self._unanswered:
            needs = [need_words(draw.shape) for draw in taking.ask.draws]
            buckets = [draw.bucket for draw in taking.ask.draws]
            self._call(UNDO, buckets, (str(taking.number), *needs), partial(self._undone, taking))
        if self._batch:
            self._send_batch()
        self._forgo_slots()
        self._slots_said = self._slots_held()
        needs = [need_words(self._leases[name].shape, amount) for name, amount in self._slots_said.items()]
        self._call(BEAT, list(self._slots_said), (str(LIFETIME), *needs), self._heal)

    def _note_healing(self, told: Told | None) -> None:
        if told is not None and told.status != "void":
            self._generation = told.generation

    def _undone(self, taking: _Taking, told: Told | None) -> None:
        if told is None:
            return
        self._unanswered.remove(taking)
        if told.status == "unknown" and told.generation == taking.generation:
            # It was never run, so what it gave back is still ours.
            for draw, back in zip(taking.ask.draws, taking.backs, strict=True):
                if back:
                    self._lease(draw, self._now())
                    self._post(draw.bucket, draw.shape, back)

    def _forgo_slots(self) -> None:
        """Only what is in use is still this replica's: of what it held for later others may have been given by now,
        and what was on its way back is there when what is in use has been said."""
        held = [name for name in self._holding if self._leases[name].shape.slots]
        for name in held:
            self._leases[name].held = 0
            self._holding.discard(name)
        owed = [name for name, (shape, _) in self._outbox.items() if shape.slots]
        for name in owed:
            del self._outbox[name]
        asked = [
            draw.bucket
            for taking in self._unanswered
            for draw, back in zip(taking.ask.draws, taking.backs, strict=True)
            if back and draw.shape.slots
        ]
        self._forgone.update(held, owed, asked)

    def _slots_held(self) -> dict[str, int]:
        """Return what the store should hold of this replica's slots, what is still to be given back included."""
        held = {}
        for name, lease in self._leases.items():
            if lease.shape.slots:
                amount = lease.used + lease.held + self._outbox.get(name, (lease.shape, 0))[1]
                if amount > 0 or name in self._forgone:
                    held[name] = amount
        return held

    def _heal(self, told: Told | None) -> None:
        if told is None:
            return
        if told.status == "void":
            self._link.drop()
            return
        now = self._now()
        self._beaten = asyncio.get_running_loop().time()
        self._ahead, self._live, self._generation = told.now - steady(), told.live, told.generation
        self._alive_until = told.now + LIFETIME
        # What was let in by this replica's own word since the slots were counted.
        for name, amount in self._slots_held().items():
            if amount > self._slots_said.get(name, 0):
                self._post(name, self._leases[name].shape, self._slots_said.get(name, 0) - amount)
        for name, share in self._shares.items():
            charge = share.charge(now)
            if charge:
                self._post(name, self._leases[name].shape, -charge)
        self._shares.clear()
        self._forgone.clear()
        found = self._lost
        self._cancel("lost")
        self._lost, self._serving = False, True
        self._link.healthy()
        self._healed.set()
        if found:
            self._heard(Turn.FOUND)
        parked, self._parked = self._parked, []
        for ask in parked:
            if not ask.future.done():
                self._submit(ask)
            else:
                self._asks.pop(ask, None)
        if self._outbox:
            self._flush_soon()

    def _down(self) -> None:
        self._serving = False
        for waiters in self._busy.values():
            self._parked.extend(waiters)
        self._busy.clear()
        if not self._lost and "lost" not in self._timers:
            self._later("lost", self._timeout, self._lose)

    def _lose(self) -> None:
        """Nobody waits any more; the policy decides."""
        if self._lost or self._serving:
            return
        self._lost = True
        self._heard(Turn.LOST)
        self._answer_alone()

    def _answer_alone(self) -> None:
        self._parked.clear()
        now = self._now()
        for ask in list(self._asks):
            if not ask.future.done():
                self._answer(ask, self._alone(ask.draws, ask.who, ask.first, now))
        self._asks.clear()

    # --- time -------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        if "sweep" not in self._timers:
            self._later("sweep", self._timeout / 5, self._sweep)

    def _sweep(self) -> None:
        """Whether an answer is overdue. A loop that was itself held up lets the server answer, and reads what has
        arrived, first."""
        now = asyncio.get_running_loop().time()
        oldest = self._link.oldest
        while self._asks:
            ask = next(iter(self._asks))
            if not ask.future.done():
                oldest = ask.began if oldest is None else min(oldest, ask.began)
                break
            del self._asks[ask]
        if oldest is None or now - oldest < self._timeout * 0.8:
            self._turns_left = None
            if oldest is not None:
                self._watch()
        elif self._turns_left is None and now - self._sweep_at > self._timeout / 5:
            self._turns_left = _TURNS
            self._watch()
        elif self._turns_left:
            self._turns_left -= 1
            asyncio.get_running_loop().call_soon(self._sweep)
        else:
            self._turns_left = None
            self._link.drop()
            self._lose()

    def _tick(self) -> None:
        """Say that this replica lives; return what lies idle."""
        self._later("tick", TICK, self._tick)
        now = self._now()
        for name in list(self._holding):
            lease = self._leases[name]
            over = lease.surplus(now, self._live)
            if over:
                self._post(name, lease.shape, over)
            if not lease.held:
                self._holding.discard(name)
        moment = asyncio.get_running_loop().time()
        if self._serving and moment - self._beaten >= BEAT_EVERY:
            self._beaten = moment
            self._watch()
            self._call(BEAT, (), (str(LIFETIME),), self._beat)

    def _beat(self, told: Told | None) -> None:
        if told is None:
            return
        if told.status != "void":
            self._note(told)
        if told.status != "known":
            # Others took this replica for dead and its slots for free.
            self._link.drop()
            return
        self._alive_until = told.now + LIFETIME

    def _later(self, name: str, seconds: float, run: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()

        def due() -> None:
            del self._timers[name]
            run()

        if name == "sweep":
            self._sweep_at = loop.time() + seconds
        self._timers[name] = loop.call_later(seconds, due)

    def _cancel(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    # --- what all use -----------------------------------------------------------------------------------------------

    def _now(self) -> int:
        """Return the server's time, as far as it is known here."""
        return steady() + self._ahead if self._server_clock is None else self._server_clock()

    def _lease(self, draw: Draw, now: int) -> Lease:
        lease = self._leases.get(draw.bucket)
        if lease is None:
            if len(self._leases) >= MOST_LEASES:
                self._forget(now)
            lease = self._leases[draw.bucket] = Lease(draw.shape, now)
        lease.shape = draw.shape
        return lease

    def _forget(self, now: int) -> None:
        for name in list(islice(self._leases, _LOOKED_AT)):
            lease, share = self._leases.pop(name), self._shares.get(name)
            needed = lease.held or lease.used or name in self._holding or name in self._outbox or name in self._forgone
            if not needed and share is not None:
                needed = not share.is_whole(now) and len(self._leases) < 2 * MOST_LEASES
            if needed:
                self._leases[name] = lease
            else:
                self._shares.pop(name, None)

    def _call(
        self, script: Script, buckets: Sequence[str], words: Sequence[str], done: Callable[[Told | None], None]
    ) -> None:
        keys = (*self._head, *[self._prefix + bucket for bucket in buckets])
        now = "" if self._server_clock is None else str(self._server_clock())
        self._link.call(script, keys, (now, self._generation, self._name, str(self._fence), *words), done)

    def _note(self, told: Told) -> None:
        """Learn the time, the replicas, and whether the store has forgotten everything."""
        self._ahead = told.now - steady()
        self._live = told.live
        if self._serving and told.generation != self._generation:
            self._heard(Turn.EMPTIED)
            self._generation = told.generation
            self._link.drop()

    # --- for the serving side ---------------------------------------------------------------------------------------

    async def look(self, draws: Sequence[Draw]) -> tuple[Bucket, ...]:
        """Return what the buckets hold, by the store's word where it gives it in time."""
        now = self._now()
        if self._serving:
            answer: asyncio.Future[Told | None] = asyncio.get_running_loop().create_future()
            needs = [need_words(draw.shape) for draw in draws]
            self._watch()
            self._call(
                LOOK,
                [draw.bucket for draw in draws],
                ("", *needs),
                lambda told: None if answer.done() else answer.set_result(told),
            )
            told = await answer
            if told is not None:
                self._note(told)
                held = [self._leases[d.bucket].held if d.bucket in self._leases else 0 for d in draws]
                return tuple(
                    Bucket(b.level + more, b.at, b.part, b.epoch, b.promises)
                    for b, more in zip(told.buckets, held, strict=True)
                )
        return tuple(self._lease(draw, now).seen(now) for draw in draws)

    async def start(self) -> None:
        """Begin; a store that does not answer for a while is lost until it does."""
        self._link.start()
        self._later("tick", TICK, self._tick)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._healed.wait(), max(0.5, self._timeout))

    async def stop(self) -> None:
        """Carry on what is noted, return what is leased, leave; for a second at the most."""
        if "tick" not in self._timers:
            return
        self._cancel("tick")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVING):
                await self._leave()
        for name in list(self._timers):
            self._cancel(name)
        self._serving = False
        await self._link.close()
        for name in list(self._timers):
            self._cancel(name)
        self._lost = True
        self._answer_alone()

    async def _leave(self) -> None:
        while not self._lost:
            for name in self._holding:
                lease = self._leases[name]
                held, lease.held = lease.held, 0
                if held:
                    self._post(name, lease.shape, held)
            self._flush()
            if self._serving and not (self._asks or self._outbox) and self._link.oldest is None:
                break
            await asyncio.sleep(0.002)
        if self._serving:
            answer: asyncio.Future[Told | None] = asyncio.get_running_loop().create_future()
            self._call(BEAT, (), ("0",), answer.set_result)
            await answer
