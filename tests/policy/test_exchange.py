"""Tenants share fairly over several gateways: counters that exchange what they charged, and four queues behind a
balancer that leaves everything to chance."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.policy.fairness import Charge, Deltas, Shares
from gateway.policy.queue import WAITS, Queue, QueueRules, Waiting, line_name
from tests.support.examples import examples

ROOMY = QueueRules(requests=100_000)
EVERY = 0.25
LAG = 2 * EVERY
"""Told at the end of one interval, read at the end of another."""


def queue() -> Queue:
    made = Queue(ROOMY)
    made.deltas = Deltas()
    return made


def enter(one: Queue, tenant: str, cost: float = 1.0, now: float = 0.0, key: str = "line", rank: int = 0) -> Waiting:
    item = Waiting(tenant, now, now + 1e6, cost=cost, rank=rank)
    assert one.enter(key, item, now) is None
    return item


def serve(one: Queue, now: float = 0.0, key: str = "line") -> Waiting:
    taken = one.next([key], lambda item: True, now)
    assert taken is not None
    return taken


# --- four gateways ----------------------------------------------------------------------------------------------------


@dataclass
class Tenant:
    """One that has so many requests waiting, all the time: as soon as one is begun another comes. ``draw`` returns what
    a request is estimated at, and what it really costs."""

    name: str
    waiting: int
    draw: Callable[[random.Random], tuple[float, float]]


@dataclass
class Fleet:
    """Gateways before one set of engines, each with a queue and its own slots, and a balancer that sends each request
    anywhere. A request takes its slot for a hundredth of a second a token."""

    tenants: list[Tenant]
    chance: random.Random
    exchange: bool = True
    count: int = 4
    slots: int = 4
    now: float = 0.0
    charges: list[tuple[float, int, str, float]] = field(default_factory=list)
    largest: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    off: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By how much the estimates of requests under way are wrong."""
    most_off: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self) -> None:
        self.queues = [queue() for _ in range(self.count)]
        self.free = [self.slots] * self.count
        self.log: list[tuple[int, object]] = []
        self.seen = [0] * self.count
        self.order = itertools.count()
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        for tenant in self.tenants:
            for _ in range(tenant.waiting):
                self.send(tenant)
        for at in range(self.count):
            self.later(EVERY * (at + 1) / self.count, partial(self.speak, at))

    def later(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.order), event))

    def run(self, seconds: float) -> None:
        for at in range(self.count):
            self.turns(at)
        while self.events[0][0] < seconds:
            self.now, _, event = heapq.heappop(self.events)
            event()

    def send(self, tenant: Tenant) -> None:
        at = self.chance.randrange(self.count)
        estimate, real = tenant.draw(self.chance)
        item = Waiting(tenant.name, self.now, self.now + 1e6, cost=estimate, waiter=(tenant, real))
        assert self.queues[at].enter("line", item, self.now) is None
        self.turns(at)

    def turns(self, at: int) -> None:
        while self.free[at] and self.queues[at].count:
            self.free[at] -= 1
            item = serve(self.queues[at], self.now)
            tenant, real = item.waiter
            self.charge(at, tenant.name, item.cost)
            self.largest[tenant.name] = max(self.largest[tenant.name], item.cost)
            self.off[tenant.name] += abs(real - item.cost)
            self.most_off[tenant.name] = max(self.most_off[tenant.name], self.off[tenant.name])
            self.later(real / 100, partial(self.end, at, item))
            self.send(tenant)

    def end(self, at: int, item: Waiting) -> None:
        tenant, real = item.waiter
        self.queues[at].settle(item, real - item.cost)
        self.charge(at, tenant.name, real - item.cost)
        self.off[tenant.name] -= abs(real - item.cost)
        self.free[at] += 1
        self.turns(at)

    def charge(self, at: int, tenant: str, amount: float) -> None:
        if amount:
            self.charges.append((self.now, at, tenant, amount))

    def speak(self, at: int) -> None:
        """Tell the others, and read what they told since."""
        self.later(EVERY, partial(self.speak, at))
        if not self.exchange:
            return
        told = self.queues[at].tell(100)
        for who, charges in self.log[self.seen[at] :]:
            if who != at:
                self.queues[at].told(charges, self.now)  # type: ignore[arg-type]
        self.log.append((at, told))
        self.seen[at] = len(self.log)

    # --- what came of it

    def served(self, tenant: str) -> float:
        return sum(amount for _, _, name, amount in self.charges if name == tenant)

    def gap(self, one: str, other: str) -> float:
        """By how much two tenants' services, in any time, differed at the most."""
        ahead = most = least = 0.0
        for _, _, tenant, amount in self.charges:
            ahead += amount * ((tenant == one) - (tenant == other))
            most, least = max(most, ahead), min(least, ahead)
        return most - least

    def elsewhere(self, tenant: str) -> float:
        """The most that a tenant was charged by all but one of the gateways within a lag."""
        worst = 0.0
        for at in range(self.count):
            window: list[tuple[float, float]] = []
            total, begin = 0.0, 0
            for time, who, name, amount in self.charges:
                if name != tenant or who == at:
                    continue
                window.append((time, abs(amount)))
                total += abs(amount)
                while window[begin][0] < time - LAG:
                    total -= window[begin][1]
                    begin += 1
                worst = max(worst, total)
        return worst

    def bound(self, one: str, other: str) -> float:
        return sum(self.largest[name] + self.elsewhere(name) + self.most_off[name] for name in (one, other))


def exact(least: int, most: int) -> Callable[[random.Random], tuple[float, float]]:
    def draw(chance: random.Random) -> tuple[float, float]:
        size = float(chance.randint(least, most))
        return size, size

    return draw


def wrong(draw: random.Random) -> tuple[float, float]:
    """Estimated at most, as the real estimates are: what is not used comes back."""
    real = float(draw.randint(5, 100))
    return 100.0, real


@settings(max_examples=examples(8))
@given(seed=st.integers(0, 2**32), large=st.integers(20, 300), some_wrong=st.booleans())
def test_two_that_wait_at_every_gateway_differ_by_no_more_than_the_bound(
    seed: int, large: int, some_wrong: bool
) -> None:
    """Whatever the sizes, and with estimates that are settled: what is not known yet of the others is all that is added
    to what one queue allows."""
    chance = random.Random(seed)
    small, flood = Tenant("small", 60, exact(1, 20)), Tenant("flood", 600, exact(1, 60))
    big = Tenant("large", 60, wrong if some_wrong else exact(1, large))
    fleet = Fleet([small, big, flood], chance)
    fleet.run(20.0)
    assert len(fleet.charges) > 300
    for pair in itertools.combinations(("small", "large", "flood"), 2):
        assert fleet.gap(*pair) <= fleet.bound(*pair)


@pytest.mark.parametrize("seed", range(2))
def test_tenants_share_fairly_whatever_the_balancer_does(seed: int) -> None:
    """Two tenants with a few requests waiting, of different sizes, and one that floods: at many gateways it alone waits
    at many times. Over all of them each has its share as in one queue; without the exchange the flood has far more."""
    worst, spread = {}, {}
    for exchange in (True, False):
        tenants = [
            Tenant("small", 8, exact(1, 20)),
            Tenant("large", 4, exact(10, 40)),
            Tenant("flood", 100, exact(1, 30)),
        ]
        fleet = Fleet(tenants, random.Random(seed), exchange)
        fleet.run(50.0)
        pairs = (("small", "large"), ("small", "flood"), ("large", "flood"))
        worst[exchange] = max(fleet.gap(*pair) / fleet.bound(*pair) for pair in pairs)
        served = [fleet.served(tenant.name) for tenant in tenants]
        spread[exchange] = max(served) / min(served)
    assert worst[True] <= 1
    assert worst[False] > 2
    assert spread[True] < 1.05
    assert spread[False] > 1.2


# --- what is told -----------------------------------------------------------------------------------------------------


@settings(max_examples=examples(25))
@given(
    steps=st.lists(st.tuples(st.integers(0, 1), st.sampled_from("abc"), st.integers(1, 50)), max_size=40),
    weights=st.tuples(*[st.sampled_from([0.5, 1.0, 4.0])] * 3),
)
def test_counters_that_tell_each_other_are_one(
    steps: list[tuple[int, str, int]], weights: tuple[float, float, float]
) -> None:
    """What is charged at either of two, told at once, leaves both with the counters of one that served all of it; and
    virtual time never goes back."""
    weight = dict(zip("abc", weights, strict=True))
    alone, both = Shares(), (Shares(), Shares())
    for shares in (alone, *both):
        for flow in "abc":
            shares.enter(flow)
    for at, flow, cost in steps:
        alone.serve(flow, cost, weight[flow])
        before = [shares.time for shares in both]
        both[at].serve(flow, cost, weight[flow])
        both[1 - at].served_elsewhere(flow, cost / weight[flow], lifted=False)
        assert all(shares.time >= time for shares, time in zip(both, before, strict=True))
        for shares in both:
            assert [shares.counter(one) for one in "abc"] == pytest.approx([alone.counter(one) for one in "abc"])


def test_who_waits_at_another_gateway_does_not_begin_anew_here() -> None:
    """It goes on where it is: what it has had less than others is not forgotten because its next request came here."""
    one = queue()
    for _ in range(20):
        enter(one, "busy", 10.0)
    charges = {("line", 0): {"moves": Charge(served=1.0, waits=True)}}
    one.told(charges, 0.0)
    for _ in range(5):
        serve(one, 0.1)
    one.told({("line", 0): {"moves": Charge(waits=True)}}, 0.2)
    for _ in range(6):
        enter(one, "moves", 10.0, 0.2)
    assert [serve(one, 0.3).tenant for _ in range(5)] == ["moves"] * 5


def test_who_waited_nowhere_begins_with_the_others() -> None:
    """Nor does one that another gateway is the first to hear of, nor one that was not heard of for a while."""
    one = queue()
    for _ in range(40):
        enter(one, "busy", 10.0)
    for _ in range(20):
        serve(one)
    one.told({("line", 0): {"new": Charge(served=10.0, waits=True), "gone": Charge(served=10.0, waits=True)}}, 0.0)
    for _ in range(5):
        serve(one, 1.0)
    for tenant in ("new", "gone"):
        for _ in range(5):
            enter(one, tenant, 10.0, WAITS + 0.1)
    assert {serve(one, WAITS + 0.1).tenant for _ in range(3)} == {"busy", "new", "gone"}


def test_time_goes_on_with_what_is_served_elsewhere() -> None:
    """Who begins to wait here is no further behind those who were served elsewhere than there."""
    one = queue()
    enter(one, "a")
    serve(one)
    for _ in range(100):
        one.told({("line", 0): {"a": Charge(served=10.0, waits=True), "b": Charge(served=10.0, waits=True)}}, 0.0)
    for tenant in ("a", "b", "new"):
        for _ in range(6):
            enter(one, tenant, 10.0, 0.1)
    assert sorted(serve(one, 0.1).tenant for _ in range(9)).count("new") <= 4


def test_time_does_not_pass_by_who_waits_here_and_has_had_less() -> None:
    """A newcomer begins with him, not with those who were given more elsewhere."""
    one = queue()
    for _ in range(12):
        enter(one, "waits", 10.0)
    for _ in range(10):
        one.told({("line", 0): {"rich": Charge(served=100.0, waits=True)}}, 0.0)
    for _ in range(6):
        enter(one, "new", 10.0, 0.1)
        enter(one, "rich", 10.0, 0.1)
    assert sorted(serve(one, 0.1).tenant for _ in range(10)) == ["new"] * 5 + ["waits"] * 5


def test_what_is_told_names_each_charge_once_and_all_who_wait() -> None:
    """At most so many tenants at a time, the others the next time; settlements are told too."""
    one = queue()
    items = [enter(one, tenant, 4.0, rank=rank) for rank, tenant in enumerate("abb")]
    serve(one)
    serve(one)
    one.settle(items[0], -3.0)
    assert one.tell(2) == {("line", 0): {"a": Charge(4.0, -3.0)}, ("line", 1): {"b": Charge(4.0)}}
    assert one.tell(2) == {("line", 2): {"b": Charge(waits=True)}}
    for tenant in "cdef":
        enter(one, tenant)
    told = [one.tell(2) for _ in range(3)]
    names = [(line, rank, tenant) for charges in told for (line, rank), who in charges.items() for tenant in who]
    assert set(names) == {("line", 2, "b"), *(("line", 0, tenant) for tenant in "cdef")}
    assert all(charge == Charge(waits=True) for charges in told for who in charges.values() for charge in who.values())


def test_who_has_nobody_to_tell_notes_nothing_and_other_lines_are_not_touched() -> None:
    one = Queue(ROOMY)
    enter(one, "a", 5.0)
    serve(one)
    assert one.tell(10) == {}
    one.told({("other", 0): {"a": Charge(served=50.0)}, ("line", 2): {"a": Charge(served=50.0)}}, 0.0)
    assert one.line("line").classes[0].shares.counter("a") == 5.0
    assert one.line("line").classes[2].shares.counter("a") == 50.0


def test_what_nobody_asks_for_is_bounded() -> None:
    """Of more flows nothing is noted; what is known of them is only how much that was."""
    deltas: Deltas[int] = Deltas(3)
    for flow in (1, 2, 3, 1, 4, 5):
        deltas.note(flow, Charge(1.0))
    assert (len(deltas), deltas.lost) == (3, 2)
    assert deltas.take(2) == {1: Charge(2.0), 2: Charge(1.0)}
    assert deltas.take(9) == {3: Charge(1.0)}


def test_a_line_has_the_same_name_everywhere() -> None:
    """Whichever order its engines are named in; and no other line has it."""
    assert line_name(["a", "b"]) == line_name(["b", "a"]) == "0a92ced257d201eee9f67ea6"
    assert len({line_name(names) for names in (["a", "b"], ["ab"], ["a"], ["b"], [], ["a", "b", "c"])}) == 6
