"""Who waits for an engine, who is next, and who is refused.

Law of this file: time is an argument; nobody is woken here. ``enter`` and ``next`` say what is to be done, the shell
does it.

    line   those who wait for the same engines; of lines that share an engine each tenant in turn
    class  a better class goes first, but of an engine's ten turns one is for whoever has waited too long
    flow   inside a class: a tenant's requests; flows share by virtual counters of service (``fairness``)
    turn   inside a flow: the earliest deadline first, equal ones in the order they came

Whoever is next and does not fit yet is waited for, or a large request would starve: the place that he does not fit is
held for him, and nobody smaller of his class slips past him there. Other places go on; he has the first that he fits.

Of several gateways each has a queue. Each tells the others what it charged and who waits (``Queue.tell``,
``Queue.told``); a line is known to all of them by its name.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from gateway.policy.displacement import Holders
from gateway.policy.fairness import NOTHING, Charge, Deltas, Shares

TURNS = 10
"""Of so many turns one is for a class that has waited too long."""
LONGEST_RETRY = 60.0
"""Seconds after which a refused request is told to come back at most: SDKs take no longer time by its word."""
SHORTEST_RETRY = 0.1
UNKNOWN_RETRY = 1.0
"""The same where nobody knows yet at what pace a line empties."""
HORIZON = 20.0
"""Seconds by which the past of a drain counts: what was drained so long ago weighs a third."""
KNOWN_AFTER = 4
"""Requests that must have left a line before its pace is believed."""
MOST_TOLD = 4096
MOST_DISPLACED = 64
"""Requests that make room for one."""
WAITS = 1.0
"""Seconds for which somebody counts as waiting at another gateway after that was told."""

Charges = dict[tuple[str, int], dict[str, Charge]]
"""What tenants were charged: by the name of the line and the class, by tenant."""


@dataclass(frozen=True, slots=True)
class QueueRules:
    """``requests``, ``tokens`` and ``bytes`` that may wait at once; ``aged``: seconds after which a class that was
    passed over has waited too long."""

    requests: int = 2048
    tokens: int = 16_000_000
    bytes: int = 256 * 1024 * 1024
    aged: float = 5.0


class Why(Enum):
    """Why a request may not wait; a metric label."""

    FULL = "full"
    """As much waits as may."""
    LATE = "late"
    """It would still be waiting when its time is over."""
    DISPLACED = "displaced"
    """It waited, and had to make room: its tenant had more waiting than others, or somebody better came."""
    EXPIRED = "expired"
    """Its time was over before its turn came."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """``retry_after``: seconds after which there is probably room. ``wait``: seconds it would have to wait."""

    why: Why
    retry_after: float
    wait: float


class Waiting:
    """One request that waits. ``rank``: its class, 0 the best; ``cost``: its service as shares count it; ``size``:
    bytes it holds meanwhile; ``waiter``: whoever is told when it is its turn."""

    __slots__ = (
        "arrived",
        "cost",
        "deadline",
        "flow",
        "gone",
        "line",
        "order",
        "patient",
        "rank",
        "size",
        "tenant",
        "tokens",
        "waiter",
        "weight",
    )

    def __init__(
        self,
        tenant: str,
        arrived: float,
        deadline: float,
        *,
        rank: int = 0,
        weight: float = 1.0,
        cost: float = 1.0,
        tokens: int = 0,
        size: int = 0,
        waiter: Any = None,
    ) -> None:
        self.tenant = tenant
        self.arrived = arrived
        self.deadline = deadline
        self.rank = rank
        self.weight = weight
        self.cost = cost
        self.tokens = tokens
        self.size = size
        self.waiter = waiter
        self.patient = False
        """Whether it may wait whatever the line's pace says: those it waits for are not there yet."""
        self.line: Line | None = None
        self.flow: _Flow | None = None
        self.order = 0
        """Of all that happened in its queue, when it came."""
        self.gone = False

    @property
    def since(self) -> int:
        """When it came, or its flow had a turn after that."""
        flow = self.flow
        return self.order if flow is None or flow.served < self.order else flow.served


class Drain:
    """At what pace a line empties while somebody waits in it, in cost a second; the past fades."""

    __slots__ = ("_cost", "_left", "_since", "_time")

    def __init__(self) -> None:
        self._cost = self._time = 0.0
        self._left = 0
        self._since: float | None = None

    def begin(self, now: float) -> None:
        """Take that somebody waits from now on."""
        self._since = now

    def took(self, cost: float, now: float) -> None:
        """Take that somebody had his turn."""
        since = now if self._since is None else self._since
        gone = max(0.0, now - since)
        fade = math.exp(-gone / HORIZON)
        self._cost = self._cost * fade + cost
        # Whatever was before so long a time without a turn is forgotten, and no more of that time counts.
        self._time = self._time * fade + min(gone, HORIZON)
        self._left += 1
        self._since = now

    def end(self) -> None:
        """Take that nobody waits any more."""
        self._since = None

    def rate(self, now: float) -> float | None:
        """Return the pace, None while it is not known."""
        if self._left < KNOWN_AFTER:
            return None
        time = self._time + (max(0.0, now - self._since) if self._since is not None else 0.0)
        return self._cost / time if time > 0 else None


class _Flow:
    """One tenant's requests in one class of one line."""

    __slots__ = ("cost", "count", "entry", "heap", "served", "tenant", "weight")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.weight = 1.0
        self.heap: list[tuple[float, int, Waiting]] = []
        self.count = 0
        self.cost = 0.0
        self.entry = 0
        """Which entry among the flows is its present one."""
        self.served = 0
        """When it had a turn, as ``Waiting.order`` counts."""

    def first(self) -> Waiting:
        heap = self.heap
        while heap[0][2].flow is None:
            heapq.heappop(heap)
        return heap[0][2]

    def tidy(self) -> None:
        """Let go of those who left, before they outnumber those who wait."""
        if len(self.heap) > 2 * self.count + 16:
            self.heap = [entry for entry in self.heap if entry[2].flow is not None]
            heapq.heapify(self.heap)


class _Class:
    """All flows of one class of one line."""

    __slots__ = ("_arrivals", "_elsewhere", "_entries", "_heap", "cost", "count", "flows", "shares", "weight")

    def __init__(self) -> None:
        self.shares = Shares()
        self.flows: dict[str, _Flow] = {}
        self.count = 0
        self.cost = 0.0
        self.weight = 0.0
        """Of all who wait, together."""
        self._heap: list[tuple[float, int, _Flow]] = []
        self._entries = 0
        self._arrivals: deque[Waiting] = deque()
        self._elsewhere: dict[str, float] = {}
        """Until when a tenant counts as waiting at another gateway."""

    def add(self, item: Waiting) -> None:
        flow = self.flows.get(item.tenant)
        if flow is None:
            flow = self.flows[item.tenant] = _Flow(item.tenant)
            flow.weight = item.weight
            self.weight += item.weight
            # Whoever waits at another gateway does not begin to wait here.
            waits = self._elsewhere and self._elsewhere.get(item.tenant, 0.0) > item.arrived
            self._queue(flow, self.shares.counter(item.tenant) if waits else self.shares.enter(item.tenant))
        item.flow = flow
        heapq.heappush(flow.heap, (item.deadline, item.order, item))
        flow.count += 1
        flow.cost += item.cost
        self.count += 1
        self.cost += item.cost
        self._arrivals.append(item)

    def drop(self, item: Waiting) -> None:
        """Take somebody out, whether he leaves or has his turn."""
        flow = item.flow
        assert flow is not None
        item.flow = None
        flow.count -= 1
        flow.cost -= item.cost
        self.count -= 1
        self.cost -= item.cost
        if flow.count:
            flow.tidy()
        else:
            flow.entry = 0
            self.weight -= flow.weight
            del self.flows[flow.tenant]
        if not self.count:
            # Sums of fractions: with nobody there they are nothing again.
            self.cost = self.weight = 0.0
            self._heap.clear()
            self._arrivals.clear()
        elif len(self._arrivals) > 2 * self.count + 16:
            self._arrivals = deque(one for one in self._arrivals if one.flow is not None)

    def first(self) -> Waiting:
        """Return whose turn it is."""
        heap = self._heap
        while heap[0][2].entry != heap[0][1]:
            heapq.heappop(heap)
        return heap[0][2].first()

    def oldest(self) -> float:
        """Return when the one came that has waited longest."""
        arrivals = self._arrivals
        while arrivals[0].flow is None:
            arrivals.popleft()
        return arrivals[0].arrived

    def charge(self, item: Waiting) -> None:
        """Charge the flow of somebody whose turn it is, and see him out."""
        flow = item.flow
        assert flow is not None
        counter = self.shares.serve(item.tenant, item.cost, item.weight)
        self.drop(item)
        if flow.count:
            self._queue(flow, counter)

    def settle(self, tenant: str, more: float, weight: float) -> bool:
        """Correct a charge, unless nothing is known of it any more."""
        counter = self.shares.settle(tenant, more, weight)
        flow = self.flows.get(tenant)
        if flow is not None and counter is not None:
            self._queue(flow, counter)
        return counter is not None

    def told(self, charges: Mapping[str, Charge], now: float) -> None:
        """Charge tenants for what they were given at other gateways, and note who waits there.

        The virtual time goes on as it did there, where those who were served had the smallest counters; but whoever
        waits here and has had less is not passed by, or newcomers would have to wait for him to catch up.
        """
        shares, elsewhere = self.shares, self._elsewhere
        reached = max((shares.counter(tenant) for tenant, charge in charges.items() if charge.served), default=0.0)
        others = []
        for tenant, charge in charges.items():
            flow = self.flows.get(tenant)
            if flow is None:
                others.append((tenant, charge))
            else:
                self._queue(flow, shares.served_elsewhere(tenant, charge.served + charge.settled, lifted=False))
        if self.count:
            self.first()
            reached = min(reached, self._heap[0][0])
        shares.pass_to(reached)
        for tenant, charge in others:
            begins = (charge.waits or bool(charge.served)) and elsewhere.get(tenant, 0.0) <= now
            shares.served_elsewhere(tenant, charge.served + charge.settled, lifted=begins)
        for tenant in [tenant for tenant, until in elsewhere.items() if until <= now]:
            del elsewhere[tenant]
        elsewhere.update((tenant, now + WAITS) for tenant, charge in charges.items() if charge.waits)

    def _queue(self, flow: _Flow, counter: float) -> None:
        self._entries += 1
        flow.entry = self._entries
        heapq.heappush(self._heap, (counter, self._entries, flow))
        if len(self._heap) > 2 * len(self.flows) + 64:
            self._heap = [entry for entry in self._heap if entry[2].entry == entry[1]]
            heapq.heapify(self._heap)


class Line:
    """Those who wait for the same engines."""

    def __init__(self, key: Hashable, name: str, classes: int) -> None:
        self.key = key
        self.name = name
        """By which other gateways know it."""
        self.classes = [_Class() for _ in range(classes)]
        self.drain = Drain()
        self.count = 0
        self._told: dict[tuple[int, str], float] = {}
        self._tidy_at = 0.0

    def first(self) -> Waiting | None:
        """Return whose turn it is in the best class of those that wait; None: nobody waits who has not had it."""
        return next((one.first() for one in self.classes if one.count), None)

    def left(self, cost: float, now: float) -> None:
        """Take that somebody goes who had his turn."""
        self.count -= 1
        self.drain.took(cost, now)
        if not self.count:
            self.drain.end()

    def wait(self, rank: int, tenant: str, weight: float, cost: float, now: float) -> float:
        """Return the seconds somebody would wait who came now, 0 while the line's pace is not known.

        All of better classes goes before, and all of his own; of each other tenant as much as is his share until then.
        """
        rate = self.drain.rate(now)
        if not self.count or not rate:
            return 0.0
        ahead = sum(one.cost for one in self.classes[:rank])
        own = self.classes[rank]
        flow = own.flows.get(tenant)
        mine = flow.cost if flow is not None else 0.0
        others = own.weight - (flow.weight if flow is not None else 0.0)
        return (ahead + mine + min(own.cost - mine, (mine + cost) * others / weight)) / rate

    def promise(self, rank: int, tenant: str, cost: float, at: float, now: float) -> float:
        """Return when somebody who is refused should come back, not before ``at``: each of a tenant's later than the
        one before, at the pace at which the line empties, so that they do not all come at once."""
        rate = self.drain.rate(now)
        if len(self._told) >= MOST_TOLD and now >= self._tidy_at:
            self._tidy_at = now + 1.0
            self._told = {who: until for who, until in self._told.items() if until > now}
        whose = rank, tenant
        if rate:
            share = cost / rate
        else:
            at, share = max(at, now + UNKNOWN_RETRY), SHORTEST_RETRY
        until = min(max(at, self._told.get(whose, 0.0)) + share, now + LONGEST_RETRY)
        if whose in self._told or len(self._told) < MOST_TOLD:
            self._told[whose] = until
        return until


def line_name(engines: Iterable[str]) -> str:
    """Return what every gateway calls the line of those who wait for these engines, named in any order."""
    digest = hashlib.blake2b(digest_size=12)
    for name in sorted(engines):
        digest.update(name.encode(errors="surrogatepass") + b"\0")
    return digest.hexdigest()


class Queue:
    """All who wait at one gateway. ``classes``: how many there are; ``name`` returns the name of a key's line."""

    def __init__(self, rules: QueueRules, classes: int = 3, name: Callable[[Any], str] = str) -> None:
        self.rules = rules
        self.classes = classes
        self.deltas: Deltas[tuple[str, int, str]] | None = None
        """What other gateways are to be told of it, by line, class and tenant; None: there are none."""
        self._told_to = 0
        self.count = 0
        self.tokens = 0
        self.bytes = 0
        self._name = name
        self._lines: dict[Hashable, Line] = {}
        self._holders = [Holders[Waiting]() for _ in range(classes)]
        self._order = 0
        self._held: dict[Waiting, tuple[Hashable, int]] = {}
        """Those who had their turn and did not fit: the place that is held for each, and before which classes."""
        self._turns: dict[Hashable, int] = {}
        """How many turns each place has given since it gave one to a class that had waited too long."""

    def __len__(self) -> int:
        return self.count

    def by_class(self) -> list[int]:
        """Return how many wait in each class."""
        return [sum(line.classes[rank].count for line in self._lines.values()) for rank in range(self.classes)]

    def waiting(self, key: Hashable) -> int:
        """Return how many wait in a line."""
        line = self._lines.get(key)
        return line.count if line is not None else 0

    def lines(self) -> list[tuple[Hashable, int]]:
        """Return every line, and how many wait in it."""
        return [(key, line.count) for key, line in list(self._lines.items())]

    def in_line(self, key: Hashable) -> bool:
        """Tell whether anybody in a line has not had his turn yet."""
        line = self._lines.get(key)
        return line is not None and any(one.count for one in line.classes)

    def holds(self, place: Hashable) -> bool:
        """Tell whether a place is held for somebody who does not fit it yet."""
        return any(at == place for at, _ in self._held.values())

    def line(self, key: Hashable) -> Line:
        """Return the line of those who wait for the same engines, a new one where there is none."""
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = Line(key, self._name(key), self.classes)
        return line

    def look(self, key: Hashable, item: Waiting, now: float) -> Rejected | None:
        """Tell whether somebody would be refused who came now. Nothing changes but when the next one is told to come
        back."""
        line = self._lines.get(key)
        if line is not None:
            wait = line.wait(item.rank, item.tenant, item.weight, item.cost, now)
            patience = item.deadline - now
            if wait > patience and not item.patient:
                return self._refused(line, item, Why.LATE, now + wait - patience, now)
        if self._full(item) and not self._victims(item):
            return self._refused(line or self.line(key), item, Why.FULL, now, now)
        return None

    def enter(self, key: Hashable, item: Waiting, now: float) -> Rejected | list[Waiting] | None:
        """Let somebody wait; return who have to make room for him, None: nobody; or why he may not."""
        refused = self.look(key, item, now)
        if refused is not None:
            return refused
        displaced = self._victims(item) if self._full(item) else None
        for one in displaced or ():
            self.leave(one)
        line = self.line(key)
        item.line = line
        self._order += 1
        item.order = self._order
        line.classes[item.rank].add(item)
        if not line.count:
            line.drain.begin(now)
        line.count += 1
        self._hold(item, 1)
        return displaced

    def displaced(self, item: Waiting, now: float, why: Why = Why.DISPLACED) -> Rejected:
        """Return what somebody is told who waited and is refused after all."""
        line = item.line
        assert line is not None
        return self._refused(line, item, why, now, now)

    def leave(self, item: Waiting) -> None:
        """Let go of somebody who waits no longer: he left, or his time is over."""
        line = item.line
        assert line is not None
        assert not item.gone
        if self._held.pop(item, None) is None:
            line.classes[item.rank].drop(item)
        else:
            # Its turn came to nothing.
            self.settle(item, -item.cost)
        item.gone = True
        line.count -= 1
        if not line.count:
            line.drain.end()
        self._hold(item, -1)

    def next(
        self, keys: Iterable[Hashable], fits: Callable[[Waiting], bool], now: float, place: Hashable = None
    ) -> Waiting | None:
        """Return whose turn it is in any of the lines and see him out; None: nobody waits, or he does not fit yet and
        the place is held for him. ``place``: whose turns they are, one of those that all in these lines wait for, and
        one that has room for somebody."""
        lines = [line for key in keys if (line := self._lines.get(key)) is not None and line.count]
        if not lines:
            return None
        best, rank = self._first(lines, now, place)
        if self._held:
            before = self.classes
            for item, (at, held) in self._held.items():
                if item.line not in lines or held >= before:
                    continue
                if (best is None or held <= rank) and fits(item):
                    del self._held[item]
                    return self._out(item, now)
                if at == place:
                    # Held for him before all of his class, those who had their turn after him too.
                    before = held
            if before <= rank:
                return None
        if best is None:
            return None
        self._turn(best, place, aged=rank < 0)
        if fits(best):
            return self._out(best, now)
        self._held[best] = place, rank
        return None

    def _first(self, lines: Sequence[Line], now: float, place: Hashable) -> tuple[Waiting | None, int]:
        """Return whose turn it is and before which classes: his own, or before all if that has waited too long."""
        firsts = [first for line in lines if (first := line.first()) is not None]
        if not firsts:
            return None, self.classes
        best = min(firsts, key=lambda one: (one.rank, one.since))
        if self._turns.get(place, 0) >= TURNS - 1:
            aged = self._aged(lines, best.rank, now)
            if aged is not None:
                return aged, -1
        return best, best.rank

    def _turn(self, item: Waiting, place: Hashable, *, aged: bool) -> None:
        """Give somebody his turn: he is charged, and out of his flow."""
        line, flow = item.line, item.flow
        assert line is not None
        assert flow is not None
        self._turns[place] = 0 if aged else self._turns.get(place, 0) + 1
        self._order += 1
        flow.served = self._order
        line.classes[item.rank].charge(item)
        if self.deltas is not None and item.cost:
            self.deltas.note((line.name, item.rank, item.tenant), Charge(served=item.cost / item.weight))

    def _out(self, item: Waiting, now: float) -> Waiting:
        """See somebody out who had his turn and fits."""
        assert item.line is not None
        item.gone = True
        item.line.left(item.cost, now)
        self._hold(item, -1)
        return item

    def _aged(self, lines: Iterable[Line], better: int, now: float) -> Waiting | None:
        """Return whose turn it is in the class that has waited longest of those passed over for a better one, if it has
        waited too long."""
        oldest, found = now - self.rules.aged, None
        for line in lines:
            for one in line.classes[better + 1 :]:
                if one.count and one.oldest() <= oldest:
                    oldest, found = one.oldest(), one
        return found.first() if found is not None else None

    def settle(self, item: Waiting, more: float) -> None:
        """Correct what somebody who had his turn was charged by what he used beyond it."""
        line = item.line
        if line is None or not more or not line.classes[item.rank].settle(item.tenant, more, item.weight):
            return
        if self.deltas is not None:
            self.deltas.note((line.name, item.rank, item.tenant), Charge(settled=more / item.weight))

    # --- several gateways ---------------------------------------------------------------------------------------------

    def tell(self, most: int) -> Charges:
        """Return what other gateways are to be told now, of so many tenants at most: what they were charged and was not
        told yet, and who waits. Those beyond it are told the next time."""
        if self.deltas is None:
            return {}
        told = self.deltas.take(most)
        waiting = [
            (line.name, rank, tenant)
            for line in self._lines.values()
            for rank, one in enumerate(line.classes)
            for tenant in one.flows
        ]
        for flow in told.keys() & waiting:
            told[flow] = told[flow]._replace(waits=True)
        begin = self._told_to % len(waiting) if waiting else 0
        room = most - len(told)
        for flow in [*waiting[begin:], *waiting[:begin]][:room]:
            told[flow] = told.get(flow, NOTHING)._replace(waits=True)
        self._told_to = begin + room
        charges: Charges = {}
        for (line, rank, tenant), charge in told.items():
            charges.setdefault((line, rank), {})[tenant] = charge
        return charges

    def told(self, charges: Mapping[tuple[str, int], Mapping[str, Charge]], now: float) -> None:
        """Take what other gateways tell. Where nobody has waited here yet all begin together."""
        for line in self._lines.values():
            for rank, one in enumerate(line.classes):
                charged = charges.get((line.name, rank))
                if charged:
                    one.told(charged, now)

    def forget(self, key: Hashable) -> list[Waiting]:
        """Drop a line; return who waited in it, in the order they came."""
        line = self._lines.pop(key, None)
        self._turns.clear()
        if line is None:
            return []
        left = [item for one in line.classes for flow in one.flows.values() for _, _, item in flow.heap if item.flow]
        left += [item for item in self._held if item.line is line]
        left.sort(key=lambda item: item.arrived)
        for item in left:
            self._held.pop(item, None)
            item.gone = True
            self._hold(item, -1)
        return left

    def drop(self, key: Hashable) -> None:
        """Forget a line in which nobody waits."""
        line = self._lines.pop(key, None)
        assert line is None or not line.count

    def _hold(self, item: Waiting, sign: int) -> None:
        self.count += sign
        self.tokens += sign * item.tokens
        self.bytes += sign * item.size
        holders = self._holders[item.rank]
        if sign > 0:
            holders.add(item, item.order)
        else:
            holders.drop(item)

    def _full(self, item: Waiting) -> bool:
        return self._lacks(item, self.count, self.tokens, self.bytes)

    def _lacks(self, item: Waiting, count: int, tokens: int, held: int) -> bool:
        """Tell whether there is no room where so much waits."""
        rules = self.rules
        if count >= rules.requests:
            return True
        # One alone may be larger than all of it: it would never be served otherwise.
        return bool(count) and (tokens + item.tokens > rules.tokens or held + item.size > rules.bytes)

    def _victims(self, item: Waiting) -> list[Waiting] | None:
        """Return who make room: of the worse classes, the worst first, whoever have most waiting for their weight, then
        of his own those that have more than he with this request. None: they would not be enough."""
        victims: list[Waiting] = []
        count, tokens, held = self.count, self.tokens, self.bytes

        def take(victim: Waiting) -> bool:
            nonlocal count, tokens, held
            victims.append(victim)
            count, tokens, held = count - 1, tokens - victim.tokens, held - victim.size
            return len(victims) >= MOST_DISPLACED or not self._lacks(item, count, tokens, held)

        for rank in range(self.classes - 1, item.rank - 1, -1):
            holders = self._holders[rank]
            own = (holders.share(item.tenant) + item.cost) / item.weight if rank == item.rank else -1.0
            if holders.offer(own, take):
                break
        return None if self._lacks(item, count, tokens, held) else victims

    def _refused(self, line: Line, item: Waiting, why: Why, at: float, now: float) -> Rejected:
        until = line.promise(item.rank, item.tenant, item.cost, at, now)
        retry_after = min(LONGEST_RETRY, max(SHORTEST_RETRY, until - now))
        return Rejected(why, retry_after, line.wait(item.rank, item.tenant, item.weight, item.cost, now))
