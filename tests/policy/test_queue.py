"""Who waits, who is next and who is refused: what holds whatever comes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.policy.queue import LONGEST_RETRY, MOST_TOLD, TURNS, Queue, QueueRules, Rejected, Waiting, Why
from tests.support.examples import examples

ROOMY = QueueRules(requests=100_000)


def item(tenant: str = "a", now: float = 0.0, patience: float = 1e6, **more: float) -> Waiting:
    return Waiting(tenant, now, now + patience, **more)  # type: ignore[arg-type]


def entered(queue: Queue, one: Waiting, now: float = 0.0, key: str = "line") -> Waiting:
    assert queue.enter(key, one, now) is None
    return one


def take(queue: Queue, now: float = 0.0, key: str = "line") -> Waiting:
    taken = queue.next([key], lambda one: True, now)
    assert taken is not None
    return taken


class Waits(RuleBasedStateMachine):
    """Anybody comes, leaves and has his turn at any time, beside a list that says who must be there."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue(QueueRules(requests=12, tokens=400, bytes=400, aged=3.0))
        self.there: list[Waiting] = []
        self.held: list[Waiting] = []
        """Those of them who had their turn and did not fit."""
        self.ended: Counter[str] = Counter()
        self.came = 0
        self.now = 0.0

    @rule(
        tenant=st.sampled_from("abc"),
        key=st.sampled_from(["x", "y"]),
        rank=st.integers(0, 2),
        cost=st.integers(1, 50),
        patience=st.sampled_from([0.5, 3.0, 1000.0]),
        size=st.integers(0, 120),
    )
    def come(self, tenant: str, key: str, rank: int, cost: int, patience: float, size: int) -> None:
        one = Waiting(tenant, self.now, self.now + patience, rank=rank, cost=cost, tokens=cost, size=size, weight=1.0)
        self.came += 1
        before = self.queue.look(key, one, self.now)
        result = self.queue.enter(key, one, self.now)
        if isinstance(result, Rejected):
            assert before is not None
            assert before.why is result.why
            assert 0 < result.retry_after <= LONGEST_RETRY
            assert (result.why is Why.LATE) == (result.wait > patience)
            self.ended["refused"] += 1
            return
        assert before is None
        for displaced in result or ():
            assert displaced in self.there, "one made room who was not there"
            assert displaced.rank > rank or (displaced.rank == rank and displaced.tenant != tenant)
            assert self.queue.displaced(displaced, self.now).retry_after > 0
            self.there.remove(displaced)
            self.ended["displaced"] += 1
            if displaced.rank == rank:
                # Who made room has no less left than who came, or had more than he would.
                mine = sum(other.cost for other in self.there if (other.rank, other.tenant) == (rank, tenant)) + cost
                his = sum(other.cost for other in self.there if (other.rank, other.tenant) == (rank, displaced.tenant))
                assert his + displaced.cost > mine
        self.there.append(one)

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.there))
        self.queue.leave(one)
        self.there.remove(one)
        self.ended["left"] += 1

    @rule(keys=st.sampled_from([["x"], ["y"], ["x", "y"]]), most=st.integers(1, 60))
    def turn(self, keys: list[str], most: int) -> None:
        lines = [one for one in self.there if one.line is not None and one.line.key in keys]
        seen: list[Waiting] = []

        def fits(one: Waiting) -> bool:
            seen.append(one)
            return one.tokens <= most

        taken = self.queue.next(keys, fits, self.now)
        assert bool(seen) <= bool(lines), "somebody is asked who does not wait here"
        assert all(one in lines for one in seen)
        assert seen or not lines or self.held
        if taken is None:
            assert all(one.tokens > most for one in seen)
            self.held += [one for one in seen if one not in self.held]
            return
        assert seen[-1] is taken
        assert all(one in self.held for one in seen[:-1])
        if taken in self.held:
            self.held.remove(taken)
        else:
            rivals = [
                one
                for one in self.there
                if (one.line, one.rank, one.tenant) == (taken.line, taken.rank, taken.tenant)
                and one is not taken
                and one not in self.held
            ]
            assert all(taken.deadline <= one.deadline for one in rivals), "inside a tenant the earliest deadline first"
            assert all(taken.arrived <= one.arrived for one in rivals if one.deadline == taken.deadline)
        self.there.remove(taken)
        self.ended["taken"] += 1
        self.queue.settle(taken, 1.0)

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 10.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def nothing_is_lost(self) -> None:
        self.held = [one for one in self.held if one in self.there]
        assert self.came == sum(self.ended.values()) + len(self.there)
        assert self.queue.count == len(self.there)
        assert self.queue.tokens == sum(one.tokens for one in self.there)
        assert self.queue.bytes == sum(one.size for one in self.there)
        assert self.queue.count <= 12
        assert self.queue.count <= 1 or (self.queue.tokens <= 400 and self.queue.bytes <= 400)
        for key in "xy":
            assert self.queue.waiting(key) == sum(one.line is not None and one.line.key == key for one in self.there)

    def teardown(self) -> None:
        # Whoever is left can be drained, each once.
        left = {id(one) for one in self.there}
        while (taken := self.queue.next(["x", "y"], lambda one: True, self.now)) is not None:
            left.remove(id(taken))
        assert not left
        assert (self.queue.count, self.queue.tokens, self.queue.bytes) == (0, 0, 0)


TestWaits = Waits.TestCase
TestWaits.settings = settings(max_examples=examples(25), stateful_step_count=40)


@dataclass
class Service:
    """What two tenants that always wait were given."""

    had: dict[str, float] = field(default_factory=lambda: {"a": 0.0, "b": 0.0})


@settings(max_examples=examples(25))
@given(
    weights=st.tuples(st.sampled_from([0.5, 1.0, 4.0]), st.sampled_from([1.0, 2.0])),
    costs=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=30, max_size=60),
    third=st.lists(st.integers(0, 3), min_size=30, max_size=60),
)
def test_two_that_always_wait_get_their_shares(
    weights: tuple[float, float], costs: list[tuple[int, int]], third: list[int]
) -> None:
    """At no moment differ two tenants' services, each by its weight, by more than one largest request of each."""
    queue = Queue(ROOMY)
    weight = dict(zip("ab", weights, strict=True))
    for a, b in costs:
        entered(queue, item("a", cost=a, weight=weight["a"]))
        entered(queue, item("b", cost=b, weight=weight["b"]))
    most = {tenant: max(pair[at] for pair in costs) / weight[tenant] for at, tenant in enumerate("ab")}
    left = Counter({"a": len(costs), "b": len(costs)})
    service = Service().had
    for now, others in enumerate(third):
        for _ in range(others):
            entered(queue, item("c", cost=7))
        taken = take(queue, float(now))
        if taken.tenant == "c":
            continue
        left[taken.tenant] -= 1
        if not left[taken.tenant]:
            break
        service[taken.tenant] += taken.cost / taken.weight
        assert abs(service["a"] - service["b"]) <= most["a"] + most["b"]


def test_who_comes_late_has_saved_nothing_up_and_owes_nothing() -> None:
    """One that was away while another used the line begins where that one is: neither before nor behind it."""
    queue = Queue(ROOMY)
    for _ in range(50):
        entered(queue, item("busy"))
        take(queue)
    for _ in range(10):
        entered(queue, item("busy"))
        entered(queue, item("new"))
    assert Counter(take(queue).tenant for _ in range(10)) == {"busy": 5, "new": 5}


def test_what_was_used_beyond_the_estimate_counts() -> None:
    """A tenant whose requests cost more than they were estimated at waits for the others to have as much."""
    queue = Queue(ROOMY)
    for _ in range(20):
        entered(queue, item("long"))
        entered(queue, item("short"))
    order = []
    for _ in range(20):
        taken = take(queue)
        order.append(taken.tenant)
        queue.settle(taken, 3.0 if taken.tenant == "long" else 0.0)
    assert Counter(order) == {"long": 4, "short": 16}


def test_a_better_class_goes_first_and_a_worse_one_has_one_turn_in_ten_once_it_waited_long() -> None:
    """Nothing starves, and what does not wait long costs the better class nothing."""
    queue = Queue(ROOMY)
    for _ in range(3 * TURNS):
        entered(queue, item("vip", rank=0))
        entered(queue, item("low", rank=2))
        entered(queue, item("mid", 50.0, rank=1))
    soon = [take(queue, 1.0).rank for _ in range(TURNS)]
    assert soon == [0] * TURNS
    late = [take(queue, 100.0).rank for _ in range(TURNS)]
    assert Counter(late) == {0: TURNS - 1, 2: 1}


def turns(queue: Queue, keys: list[str], count: int, now: float, place: str = "here") -> list[Waiting]:
    """Give so many turns of one place to those who wait in several lines."""
    taken = [queue.next(keys, lambda one: True, now, place) for _ in range(count)]
    return [one for one in taken if one is not None]


def test_of_lines_that_share_an_engine_each_tenant_has_its_turn() -> None:
    """A flood that came before does not make a tenant of another line wait until it is over."""
    queue = Queue(ROOMY)
    for _ in range(100):
        entered(queue, item("flood"), key="x")
    for _ in range(20):
        entered(queue, item("quiet"), key="y")
        entered(queue, item("third"), key="y")
    assert Counter(one.tenant for one in turns(queue, ["x", "y"], 30, 1.0)) == {"flood": 10, "quiet": 10, "third": 10}


def test_a_class_that_was_passed_over_has_its_turn_in_whatever_line_it_waits() -> None:
    """One turn in ten of each place, for the one that has waited longest; the better class has all others."""
    queue = Queue(QueueRules(requests=1000, aged=5.0))
    for _ in range(100):
        entered(queue, item("vip", rank=0), key="x")
        entered(queue, item("mid", 1.0, rank=1), key="y")
        entered(queue, item("low", 2.0, rank=2), key="x")
    assert Counter(one.tenant for one in turns(queue, ["x", "y"], 10, 3.0)) == {"vip": 10}
    late = turns(queue, ["x", "y"], 40, 100.0)
    assert Counter(one.tenant for one in late) == {"vip": 36, "mid": 4}
    # However turns of several places come one after the other, each gives its own.
    places = [turns(queue, ["x", "y"] if at % 2 else ["x"], 1, 100.0, f"place {at % 2}")[0] for at in range(40)]
    assert Counter(one.tenant for one in places[::2]) == {"vip": 18, "low": 2}
    assert Counter(one.tenant for one in places[1::2]) == {"vip": 18, "mid": 2}


def test_whoever_does_not_fit_is_waited_for() -> None:
    """Nobody smaller slips past the one whose turn it is."""
    queue = Queue(ROOMY)
    large = entered(queue, item("a", tokens=100))
    small = entered(queue, item("a", tokens=1))
    assert queue.next(["line"], lambda one: one.tokens < 50, 0.0) is None
    assert take(queue) is large
    assert take(queue) is small


def test_one_place_is_held_for_whoever_does_not_fit_and_others_go_on() -> None:
    """Or all engines would empty for one large request; whichever he fits first is his."""
    queue = Queue(ROOMY)
    large = entered(queue, item("a", rank=1, tokens=100))
    small = [entered(queue, item("b", rank=1, tokens=1)) for _ in range(3)]

    def turn(place: str, room: int) -> Waiting | None:
        return queue.next(["line"], lambda one: one.tokens <= room, 0.0, place)

    assert turn("here", 50) is None
    assert queue.holds("here")
    assert turn("there", 50) is small[0]
    assert turn("here", 50) is None, "somebody smaller slips past"
    better = entered(queue, item("c", rank=0))
    assert turn("here", 50) is better
    assert turn("there", 100) is large
    assert not queue.holds("here")
    assert turn("here", 50) is small[1]
    # Who leaves a place that is held for him leaves it to others, and is charged nothing.
    gone = entered(queue, item("d", rank=1, tokens=100, cost=500))
    assert turn("here", 50) is None
    queue.leave(gone)
    assert not queue.holds("here")
    entered(queue, item("d", rank=1, tokens=1))
    assert {one.tenant for _ in range(2) if (one := turn("here", 50)) is not None} == {"b", "d"}
    assert queue.count == 0


def drained(queue: Queue, pace: float, count: int = 10, now: float = 0.0) -> float:
    """Let a line empty at a pace, one of cost 1 each; return when it is."""
    for _ in range(count + 1):
        entered(queue, item("past"), now)
    for _ in range(count):
        now += 1 / pace
        take(queue, now)
    return now


def test_who_would_wait_too_long_is_refused_at_once_and_told_when_it_would_do() -> None:
    """The forecast is the pace at which the line empties and what is before one: own requests, and others' shares."""
    queue = Queue(ROOMY)
    now = drained(queue, pace=10)
    for _ in range(99):
        entered(queue, item("past"), now)
    impatient = item("past", now, patience=4.0)
    refused = queue.enter("line", impatient, now)
    assert isinstance(refused, Rejected)
    assert refused.why is Why.LATE
    # The pace says nothing to one who waits for engines that are not there yet.
    patient = item("past", now, patience=4.0)
    patient.patient = True
    assert queue.look("line", patient, now) is None
    assert round(refused.wait, 3) == 10.0
    assert round(refused.retry_after, 3) == 6.1
    # Another tenant shares with it and waits no longer than both need for one request.
    assert queue.enter("line", item("other", now, patience=0.5), now) is None


def test_each_that_is_refused_is_told_a_later_moment() -> None:
    """Those who are refused come back one after the other, at the pace at which the line empties."""
    queue = Queue(QueueRules(requests=5))
    now = drained(queue, pace=10, count=4)
    for _ in range(4):
        entered(queue, item("past"), now)
    told = []
    for _ in range(5):
        refused = queue.enter("line", item("past", now), now)
        assert isinstance(refused, Rejected)
        assert refused.why is Why.FULL
        told.append(round(refused.retry_after, 3))
    assert told == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_nobody_is_told_to_come_back_at_once_while_nothing_is_known() -> None:
    """A queue that is full before anybody has left it would be asked ten times a second by each who is refused."""
    queue = Queue(QueueRules(requests=1))
    entered(queue, item("a"))
    told = []
    for _ in range(3):
        refused = queue.enter("line", item("a"), 0.0)
        assert isinstance(refused, Rejected)
        told.append(round(refused.retry_after, 3))
    assert told == [1.1, 1.2, 1.3]


def test_a_line_that_stood_still_is_soon_known_to_move() -> None:
    """Two minutes of an engine's trouble do not keep everybody away for minutes after."""
    queue = Queue(ROOMY)
    now = drained(queue, pace=10, count=50) + 120
    for _ in range(200):
        entered(queue, item("past", now), now)
    for _ in range(150):
        now += 0.1
        take(queue, now)
    rate = queue.line("line").drain.rate(now)
    assert rate is not None
    assert 4 < rate < 10


def test_many_that_are_refused_are_told_without_a_look_at_all_others() -> None:
    """Of more tenants than are remembered each is told the next moment there is, and those remembered stay so."""
    queue = Queue(QueueRules(requests=5))
    now = drained(queue, pace=1, count=4)
    for at in range(4):
        entered(queue, item(f"t{at}", now), now)
    for at in range(MOST_TOLD + 10):
        assert isinstance(queue.enter("line", item(f"t{at}", now), now), Rejected)
    line = queue.line("line")
    remembered = line._told
    assert isinstance(queue.enter("line", item("t0", now), now), Rejected)
    assert isinstance(queue.enter("line", item("more", now), now + 0.5), Rejected)
    assert line._told is remembered
    assert (len(remembered), round(remembered[0, "t0"] - now, 3)) == (MOST_TOLD, 2.0)
    assert isinstance(queue.enter("line", item("more", now), now + 1.8), Rejected)
    assert len(line._told) == 2


def test_a_full_queue_makes_room_at_the_cost_of_whoever_has_most_waiting() -> None:
    """One tenant that fills the queue does not keep the others out; it loses its latest request."""
    queue = Queue(QueueRules(requests=8))
    mine = [entered(queue, item("flood", patience=100 + at)) for at in range(8)]
    assert queue.enter("line", item("quiet"), 0.0) == [mine[-1]]
    assert isinstance(queue.enter("line", item("flood"), 0.0), Rejected)
    # Equal shares: nobody has to make room any more.
    for _ in range(3):
        assert queue.enter("line", item("quiet"), 0.0) is not None
    assert isinstance(queue.enter("line", item("quiet"), 0.0), Rejected)


def test_a_worse_class_makes_room_for_a_better_one() -> None:
    """Whoever may wait longest loses his place first, never the other way round."""
    queue = Queue(QueueRules(requests=2))
    low = entered(queue, item("a", rank=2))
    entered(queue, item("a", rank=1))
    assert queue.enter("line", item("a", rank=0), 0.0) == [low]
    assert isinstance(queue.enter("line", item("b", rank=2), 0.0), Rejected)


def test_one_that_needs_more_room_than_one_leaves_is_made_it_by_several() -> None:
    """Or a flood of small requests would keep every larger one out."""
    queue = Queue(QueueRules(tokens=1000))
    for _ in range(100):
        entered(queue, item("flood", tokens=10, cost=10))
    made = queue.enter("line", item("quiet", tokens=25, cost=25), 0.0)
    assert isinstance(made, list)
    assert [one.tenant for one in made] == ["flood"] * 3
    # Not beyond its share: it would have as much as the flood then.
    assert isinstance(queue.enter("line", item("quiet", tokens=500, cost=500), 0.0), Rejected)
    assert queue.count == 98


def test_one_of_a_worse_class_that_is_too_small_does_not_protect_a_flood() -> None:
    """It makes room, and those of the flood the rest."""
    queue = Queue(QueueRules(tokens=1000))
    for _ in range(90):
        entered(queue, item("flood", tokens=11, cost=11))
    small = entered(queue, item("other", rank=2, tokens=10, cost=10))
    made = queue.enter("line", item("quiet", tokens=11, cost=11), 0.0)
    assert isinstance(made, list)
    assert (made[0], made[1].tenant) == (small, "flood")


def test_a_flood_over_many_lines_is_one_flood() -> None:
    """What a tenant has waiting counts wherever it waits."""
    queue = Queue(QueueRules(requests=100))
    for at in range(80):
        entered(queue, item("flood"), key=f"model {at % 20}")
    for _ in range(10):
        entered(queue, item("quiet"), key="model 0")
        entered(queue, item("other"), key="model 0")
    made = queue.enter("model 0", item("quiet"), 0.0)
    assert isinstance(made, list)
    assert made[0].tenant == "flood"


def test_a_full_queue_is_full_for_lines_that_are_new_too() -> None:
    """However many there are."""
    queue = Queue(QueueRules(requests=2))
    entered(queue, item("a"))
    entered(queue, item("a"))
    for at in range(5):
        refused = queue.enter(f"model {at}", item("a"), 0.0)
        assert isinstance(refused, Rejected)
        assert refused.why is Why.FULL
    assert queue.count == 2


def test_one_request_larger_than_the_whole_queue_may_wait_alone() -> None:
    """It would otherwise never be served."""
    queue = Queue(QueueRules(tokens=100))
    entered(queue, item("a", tokens=500))
    assert isinstance(queue.enter("line", item("b", tokens=1), 0.0), Rejected)


def test_many_that_leave_leave_nothing_behind() -> None:
    """Memory is bounded by those who wait, not by those who have waited."""
    queue = Queue(ROOMY)
    stays = entered(queue, item("a", patience=1.0))
    for number in range(5000):
        queue.leave(entered(queue, item("a" if number % 2 else f"t{number}", patience=5.0)))
    line = queue.line("line")
    one = line.classes[0]
    assert list(one.flows) == ["a"]
    assert max(len(one.flows["a"].heap), len(one._heap), len(one._arrivals)) < 100
    assert take(queue) is stays


def test_a_line_that_is_dropped_gives_back_who_waited() -> None:
    """When engines change, those who waited for the old ones are queued anew, in the order they came."""
    queue = Queue(ROOMY)
    first = entered(queue, item("b", 1.0), 1.0)
    second = entered(queue, item("a", 2.0), 2.0)
    assert queue.forget("line") == [first, second]
    assert queue.forget("line") == []
    assert len(queue) == 0
