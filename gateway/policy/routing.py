"""Which endpoint serves a request.

``least_loaded`` knows nothing of the request. ``Router`` does, and weighs in one unit, the predicted seconds until the
first token: the prompts to be read before this one, what of this one is not cached there, and as seconds what else
speaks against an endpoint (``scorers.Weights``).

Rule 1: only an endpoint that is available, not tried and has room is chosen; one is always found while there is one.
        Whoever holds half of the prompt may be stretched beyond its room, where the shell says how far: under overload
        only the engine that has just become free has room, and prompts would be read where nobody knows them.
Rule 2: one that is not trusted is chosen only when no other is left: a bad engine is better than a sure refusal, so
        ejecting every endpoint ejects none.
Rule 3: at most ``MOST_SCORED`` are looked at closely, however many there are.
Rule 4: what is equal shares the work; a newcomer counts with its share.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from math import inf
from typing import Generic, Protocol, TypeVar

import msgspec

from gateway.policy import scorers
from gateway.policy.prefix import PrefixIndex
from gateway.policy.ring import Ring
from gateway.policy.scorers import Slots, Weights

LEAST_SHARE = 0.1
"""What an endpoint that has just come up gets of a whole share: enough to warm it up."""
MOST_SCORED = 8
HOLDERS = 3
"""Of a prompt's beginning, at most so many are proposed."""
HELD = 0.5
"""The part of a prompt that an endpoint must hold to be stretched for it."""
ADAPTER_HOLDERS = 2
AT_RANDOM = 4
"""So many are proposed whatever they hold, two at least: more than two choices still shorten the tail."""
HOMES = 3
"""Of a session's homes, so many are tried when those before are away."""
TRIES = 8
"""Further random ones before all are looked at."""
SLOW = 8.0
"""One that reads so much slower than the quickest is perhaps no longer so slow as it was seen to be."""
AGAIN = 64
"""In one of so many choices it is taken to be as quick as the others."""
ADAPTERS = 4096
"""Adapters whose last endpoints are remembered."""
SETS = 256
"""Sets of endpoints whose ring and names are kept; models that the same endpoints serve share one."""
_LARGE = 1 << 32


class Candidate(Protocol):
    """What routing looks at."""

    in_flight: int
    ramp_from: float
    """When it came up, in seconds of the clock that ``now`` is of."""
    ramp_until: float
    """When it may be given as much as any other."""

    @property
    def available(self) -> bool:
        """Whether the endpoint can be given work now."""
        ...

    def trusted(self, now: float) -> bool:
        """Whether nothing speaks against giving it work."""
        ...


C = TypeVar("C", bound=Candidate)


def least_loaded(candidates: Sequence[C], tried: Collection[C], start: int, now: float) -> C | None:
    """Return the available endpoint with the fewest requests in flight for its share, None when there is none.

    One that is not trusted is chosen only when no other is left: a bad engine is better than a sure refusal. Ties go
    round robin: the search begins at ``start`` (any integer), so that equal endpoints share the work.
    """
    if len(candidates) == 1:
        only = candidates[0]
        return only if only not in tried and only.available else None
    best: C | None = None
    least = (True, inf)
    count = len(candidates)
    for offset in range(count):
        candidate = candidates[(start + offset) % count]
        if candidate in tried or not candidate.available:
            continue
        load: float = candidate.in_flight
        if candidate.ramp_until > now:
            # The request to come counts too: an empty newcomer must not look better than an empty old hand.
            load = (load + 1) / share(candidate.ramp_from, candidate.ramp_until, now) - 1
        trusted = candidate.trusted(now)
        rank = (not trusted, load)
        if rank < least:
            best, least = candidate, rank
            if trusted and load == 0:
                break
    return best


def share(since: float, until: float, now: float) -> float:
    """Return what part of a whole share an endpoint gets: it grows evenly from ``since`` to ``until``."""
    if now >= until:
        return 1.0
    return max(LEAST_SHARE, (now - since) / (until - since))


class Contender(Candidate, Protocol):
    """What the router looks at beyond that. Tokens are estimates, of prompt and output where not said otherwise."""

    @property
    def name(self) -> str:
        """What it is known by, never that of another."""
        ...

    @property
    def tokens(self) -> int:
        """Of the requests in flight."""
        ...

    @property
    def prefilling(self) -> int:
        """Prompt tokens sent whose first token has not come; best counted as ``Choice.uncached``."""
        ...

    @property
    def most(self) -> int:
        """Requests it serves at once at most, 0: not known."""
        ...

    @property
    def most_tokens(self) -> int:
        """Tokens it serves at once at most, 0: not known."""
        ...

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens it reads in a second, 0: not known."""
        ...

    @property
    def slots(self) -> Slots | None:
        """Its places for adapters; None: adapters make no difference to it."""
        ...

    def room(self, tokens: int) -> bool:
        """Whether it has capacity for one more request of so many tokens."""
        ...


class Job(msgspec.Struct, gc=False):
    """What the router needs to know of a request.

    ``prompt`` and ``output`` in tokens, estimated; ``blocks`` as ``prefix.block_hashes`` gives them: () until
    ``Router.needs_blocks`` asks for them; ``session`` any whole number that processes agree on, 0: none.
    """

    prompt: int
    output: int
    blocks: tuple[int, ...] = ()
    session: int = 0
    adapter: str | None = None


K = TypeVar("K", bound=Contender)


class Scored(msgspec.Struct, Generic[K], gc=False):
    """What was thought of one endpoint, in raw numbers."""

    endpoint: K
    cost: float
    """In seconds; the least is chosen."""
    seconds: float
    """Until the first token."""
    used: float
    """What part of its limits would be used, this request included."""
    matched: int
    """Blocks of the prompt it holds."""
    home: bool
    adapter: float = 1.0
    slots: float = 1.0


class Choice(msgspec.Struct, Generic[K], gc=False):
    """The endpoint that was chosen, and out of whom: ``scored`` is empty where there was no choice."""

    endpoint: K
    uncached: int
    """Tokens of the prompt it has to read: what it should count as prefilling until the first token."""
    matched: int = 0
    """Blocks of the prompt it holds, of ``blocks``."""
    blocks: int = 0
    trusted: bool = True
    """Whether any endpoint that is trusted was left."""
    scored: tuple[Scored[K], ...] = ()

    def explained(self) -> list[dict[str, str | float]]:
        """Return each endpoint that was compared, best first: its name, cost in seconds, and scores from 0 to 1."""
        ranked = sorted(self.scored, key=lambda one: (one.endpoint is not self.endpoint, one.cost))
        least = min((one.seconds for one in ranked), default=0.0)
        return [
            {
                "endpoint": one.endpoint.name,
                "cost": one.cost,
                "ttft": scorers.ttft(one.seconds, least),
                "load": scorers.load(one.used),
                "prefix": scorers.prefix(one.matched, self.blocks),
                "session": scorers.session(one.home),
                "adapter": one.adapter,
                "slots": one.slots,
            }
            for one in ranked
        ]


class Router(Generic[K]):
    """Chooses endpoints, and remembers what each was given. One owner."""

    def __init__(
        self,
        weights: Weights | None = None,
        index: PrefixIndex | None = None,
        stretches: Callable[[K, int], bool] | None = None,
    ) -> None:
        """``stretches`` tells whether an endpoint without room may still be given one more request, of so many tokens,
        whose beginning it holds; None: none may."""
        self.weights = weights or Weights()
        self._stretches = stretches
        self._index = PrefixIndex() if index is None else index
        # Adapter → who was given requests for it, the last one first.
        self._adapters: dict[str, list[str]] = {}
        self._places: dict[int, tuple[tuple[K, ...], _Places[K]]] = {}
        self._alike: dict[tuple[K, ...], _Places[K]] = {}

    def needs_blocks(self, able: Sequence[K]) -> bool:
        """Tell whether a job's blocks make a difference; they need not be worked out where there is no choice."""
        return len(able) > 1

    def choose(
        self,
        job: Job,
        able: tuple[K, ...],
        tried: Container[K],
        draw: Callable[[int], int],
        now: float,
        *,
        near: K | None = None,
    ) -> Choice[K] | None:
        """Return who serves a job, None when no endpoint that is available and not tried has room for it.

        ``able``: who could serve it; the same tuple each time, as long as it is the same endpoints. ``draw`` returns a
        random whole number from 0 to below its argument. ``now`` is of the clock of the endpoints' ramps. ``near``: one
        of them that has room, as far as is known.
        """
        tokens = job.prompt + job.output
        if len(able) == 1:
            only = able[0]
            return Choice(only, job.prompt) if _usable(only, tokens, tried) else None
        if not able:
            return None
        field = _Field(tokens, tried, now)
        home = None
        held: dict[str, int] = {}
        if len(able) <= MOST_SCORED:
            for endpoint in able:
                field.offer(endpoint)
            if job.blocks and self._stretches is not None and len(field.good) < len(able):
                full = [one for one in able if one not in field.good]
                self._stretch(job, self._index.matched((one.name for one in full), job.blocks), full, field)
            if job.session:
                home = next((one for one in self._at(able).homes(job.session) if one in field.good), None)
        else:
            if job.session:
                homes = islice(self._at(able).homes(job.session), HOMES)
                home = next((one for one in homes if field.offer(one)), None)
            if near is not None:
                field.offer(near)
            held = self._propose(job, able, draw, field)
        left = field.good or field.bad
        if not left:
            return None
        if job.blocks:
            held |= self._index.matched((one.name for one in left if one.name not in held), job.blocks)
        best, scored = self._weighed(job, left, held, home, draw, now)
        blocks = len(job.blocks)
        uncached = job.prompt - job.prompt * best.matched // blocks if blocks else job.prompt
        return Choice(best.endpoint, uncached, best.matched, blocks, bool(field.good), tuple(scored))

    def sent(self, job: Job, endpoint: K) -> None:
        """Note that an endpoint was given a job: it holds its blocks and its adapter from now on."""
        if job.blocks:
            self._index.learn(endpoint.name, job.blocks)
        if job.adapter is not None:
            self._remember(job.adapter, endpoint.name)

    def gone(self, endpoint: K) -> None:
        """Note that an endpoint is one no more."""
        self.emptied(endpoint)
        self._places.clear()
        self._alike = {able: places for able, places in self._alike.items() if endpoint not in able}

    def emptied(self, endpoint: K) -> None:
        """Note that an endpoint holds nothing any more: it was started anew."""
        self._index.forget(endpoint.name)
        for names in self._adapters.values():
            if endpoint.name in names:
                names.remove(endpoint.name)

    def _propose(self, job: Job, able: tuple[K, ...], draw: Callable[[int], int], field: _Field[K]) -> dict[str, int]:
        """Fill the field with those that something speaks for, and some at random; with any other if none is left.

        Return the best holders of the prompt, with how many of its blocks each holds.
        """
        by_name = self._at(able).by_name
        held: dict[str, int] = {}
        if job.blocks:
            held = dict(self._index.holders(job.blocks, draw(_LARGE), HOLDERS))
            field.offer_named(held, by_name)
            if self._stretches is not None and len(field.good) < len(held):
                self._stretch(job, held, [by_name[name] for name in held if name in by_name], field)
        if job.adapter is not None:
            field.offer_named(self._adapters.get(job.adapter, ()), by_name)
        count = len(able)
        enough = min(len(field.good) + AT_RANDOM, MOST_SCORED)
        # In steps of a random length from a random one: two draws for all of them.
        start, step = draw(count), 1 + draw(count - 1)
        for at in range(start, start + step * (AT_RANDOM + TRIES), step):
            if field.offer(able[at % count]) and len(field.good) >= enough:
                break
        if not field.good:
            for at in range(start - count, start):
                if field.offer(able[at]) and len(field.good) == AT_RANDOM:
                    break
        return held

    def _stretch(self, job: Job, held: Mapping[str, int], full: Iterable[K], field: _Field[K]) -> None:
        """Add those that hold enough of the prompt to be given it beyond their room."""
        stretches = self._stretches
        assert stretches is not None
        enough = HELD * len(job.blocks)
        for endpoint in full:
            if (
                held.get(endpoint.name, 0) >= enough
                and endpoint not in field.good
                and endpoint.available
                and endpoint not in field.tried
                and endpoint.trusted(field.now)
                and stretches(endpoint, field.tokens)
            ):
                field.good.append(endpoint)

    def _weighed(
        self,
        job: Job,
        left: Sequence[K],
        held: Mapping[str, int],
        home: K | None,
        draw: Callable[[int], int],
        now: float,
    ) -> tuple[Scored[K], list[Scored[K]]]:
        """Return the best of those that are left, and all of them."""
        best: Scored[K] | None = None
        common = 0.0
        equals = 1
        scored = []
        rates = [rate for endpoint in left if (rate := endpoint.prefill_rate) > 0]
        least = 0.0
        if rates and min(rates) * SLOW < max(rates) and not draw(AGAIN):
            least = max(rates) / SLOW
        for endpoint in left:
            rate = endpoint.prefill_rate
            if rate <= least:
                rate = common = common or _common_rate(rates)
            one = self._weigh(job, endpoint, held.get(endpoint.name, 0), endpoint is home, rate, now)
            scored.append(one)
            if best is None or one.cost < best.cost:
                best, equals = one, 1
            elif one.cost == best.cost:
                # Each of those that are equal ends up chosen as often.
                equals += 1
                if not draw(equals):
                    best = one
        assert best is not None
        return best, scored

    def _weigh(self, job: Job, endpoint: K, matched: int, home: bool, rate: float, now: float) -> Scored[K]:
        weights = self.weights
        uncached: float = job.prompt
        if matched:
            uncached *= 1.0 - scorers.prefix(matched, len(job.blocks))
        if home:
            uncached *= 1.0 - weights.session * scorers.session(home)
        seconds = scorers.first_token(endpoint.prefilling, uncached, rate)
        used = scorers.used(
            endpoint.in_flight + 1, endpoint.most, endpoint.tokens + job.prompt + job.output, endpoint.most_tokens
        )
        if endpoint.ramp_until > now:
            part = share(endpoint.ramp_from, endpoint.ramp_until, now)
            seconds /= part
            used /= part
        cost = scorers.cost(weights, seconds, uncached / rate, used)
        one = Scored(endpoint, cost, seconds, used, matched, home)
        if job.adapter is not None and (slots := endpoint.slots) is not None:
            one.adapter, one.slots = scorers.adapter(job.adapter, slots), scorers.slots(slots)
            one.cost += weights.adapter * (1.0 - one.adapter)
            if one.adapter < 1.0:
                one.cost += weights.slots * (1.0 - one.slots)
        return one

    def _remember(self, adapter: str, name: str) -> None:
        names = self._adapters.get(adapter)
        if names is None:
            if len(self._adapters) >= ADAPTERS:
                del self._adapters[next(iter(self._adapters))]
            self._adapters[adapter] = [name]
        elif names[0] != name:
            self._adapters[adapter] = [name, *(other for other in names if other != name)][:ADAPTER_HOLDERS]

    def _at(self, able: tuple[K, ...]) -> _Places[K]:
        """Return what is known of a set of endpoints: by the tuple itself, or else by one like it."""
        known = self._places.get(id(able))
        if known is not None and known[0] is able:
            return known[1]
        places = self._alike.get(able)
        if places is None:
            if len(self._alike) >= SETS:
                del self._alike[next(iter(self._alike))]
            places = self._alike[able] = _Places(able)
        if len(self._places) >= 16 * SETS:
            self._places.clear()
        self._places[id(able)] = able, places
        return places


class _Places(Generic[K]):
    """What is worked out once for a set of endpoints."""

    def __init__(self, able: tuple[K, ...]) -> None:
        self.able = able
        self.by_name = {endpoint.name: endpoint for endpoint in able}
        self._ring: Ring | None = None

    def homes(self, session: int) -> Iterator[K]:
        """Yield where a session is at home, best first."""
        if self._ring is None:
            self._ring = Ring([endpoint.name for endpoint in self.able])
        return map(self.able.__getitem__, self._ring.homes(session))


class _Field(Generic[K]):
    """Those to choose from for one job: at most ``MOST_SCORED`` of either kind."""

    __slots__ = ("bad", "good", "now", "seen", "tokens", "tried")

    def __init__(self, tokens: int, tried: Container[K], now: float) -> None:
        self.tokens = tokens
        self.tried = tried
        self.now = now
        self.good: list[K] = []
        self.bad: list[K] = []
        """Not trusted."""
        self.seen: set[K] = set()

    def offer(self, endpoint: K) -> bool:
        """Take an endpoint that was not seen before, if it can be given the job; tell whether it is a good one."""
        if endpoint in self.seen:
            return False
        self.seen.add(endpoint)
        if not _usable(endpoint, self.tokens, self.tried):
            return False
        if endpoint.trusted(self.now):
            self.good.append(endpoint)
            return True
        if len(self.bad) < MOST_SCORED:
            self.bad.append(endpoint)
        return False

    def offer_named(self, names: Iterable[str], by_name: Mapping[str, K]) -> None:
        """Offer endpoints by name, those that are not able left out."""
        for name in names:
            endpoint = by_name.get(name)
            if endpoint is not None:
                self.offer(endpoint)


def _usable(endpoint: K, tokens: int, tried: Container[K]) -> bool:
    return endpoint.available and endpoint not in tried and endpoint.room(tokens)


def _common_rate(known: Sequence[float]) -> float:
    """Return the rate of an endpoint whose own is not known: the mean of the others."""
    return sum(known) / len(known) if known else scorers.ASSUMED_RATE
