"""What a gateway asks of the store for its endpoints, without sockets and without a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gateway.policy.token_bucket import SECOND
from gateway.serving.sharing import MOST_CLAIMS, Sharing
from gateway.store.protocol import Claim, Grant, Place
from tests.unit.test_waiting import Crowd


@dataclass
class Shared(Crowd):
    """Requests before engines that may be given eight at once, by this gateway and another one."""

    many: int = 1
    hurried: int = field(default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sharing = Sharing(self.admission, self.metrics, self.clock, self.hurry)
        self.sharing.claims(Place("me", 2, 0))
        self.sharing.granted([])
        self.engines(self.many)

    def engines(self, count: int) -> None:
        spec = replace(self.pool.endpoints[0].spec, max_running=8)
        known = {endpoint.name: endpoint.spec for endpoint in self.pool.endpoints if endpoint.part is not None}
        names = [f"e{number}" for number in range(count)]
        self.pool.configure([known.get(name) or replace(spec, name=name) for name in names], 1)
        self.fake_connections()

    def hurry(self) -> None:
        self.hurried += 1

    def speak(self, *others: int, most: int = 8) -> Sequence[Claim]:
        """Have the store grant what it has of what is asked for; ``others`` want so much."""
        claims = self.sharing.claims(Place("me", 1 + len(others), SECOND))
        named = tuple((f"other{at}", want) for at, want in enumerate(others))
        self.sharing.granted([Grant(min(claim.asked, most), named) for claim in claims])
        self.turns()
        return claims


def test_what_is_new_is_used_when_it_was_granted_and_asked_for_as_soon_as_somebody_waits() -> None:
    shared = Shared()
    first = shared.ask()
    assert (first.waits, shared.hurried) == (True, 1)
    (claim,) = shared.speak(0)
    assert claim == Claim("e0", 8, 0, 0, 2, 1)
    assert (first.waits, shared.in_flight) == (False, 1)
    shared.ask()
    assert (shared.in_flight, shared.hurried) == (2, 1), "it has one more"
    for _ in range(3):
        shared.ask()
    assert (shared.in_flight, shared.hurried) == (2, 4)
    shared.speak(0)
    assert shared.in_flight == 5


def test_whoever_was_just_told_that_there_is_no_more_asks_when_it_is_time() -> None:
    shared = Shared()
    for _ in range(4):
        shared.ask()
    shared.speak(8, most=2)
    hurried = shared.hurried
    shared.ask()
    assert (shared.in_flight, shared.hurried) == (2, hurried)
    shared.speak(8, most=3)
    assert shared.in_flight == 3


def test_what_others_want_is_given_up_as_requests_end() -> None:
    """And told at once where it lies idle."""
    shared = Shared()
    asked = [shared.ask() for _ in range(9)]
    shared.speak(0)
    shared.speak(0)
    assert shared.in_flight == 7
    claims = shared.sharing.claims(Place("me", 2, SECOND))
    assert not shared.sharing.granted([Grant(claims[0].asked, (("other0", 8),))]), "nothing lies idle"
    (claim,) = shared.speak(8)
    assert (claim.asked, shared.in_flight) == (7, 7)
    for one in asked[:4]:
        shared.finish(one)
    assert shared.in_flight == 4, "it went on with what the other is to have"
    (claim,) = shared.speak(8)
    assert claim.asked == 4
    for one in asked[4:]:
        shared.finish(one)
    claims = shared.sharing.claims(Place("me", 2, SECOND))
    assert shared.sharing.granted([Grant(4, (("other0", 8), ("other1", 8)))])


def test_an_engine_that_is_no_more_is_given_up() -> None:
    """As its requests end; one with the same name that comes instead is another's affair no longer."""
    shared = Shared(many=2)
    shared.speak(0)
    busy = shared.ask()
    gone = shared.attempt_of(busy)
    assert gone is not None
    shared.engines(1 if gone.endpoint == "e1" else 2)
    if gone.endpoint == "e0":
        kept = [endpoint.spec for endpoint in shared.pool.endpoints if endpoint.name == "e1"]
        shared.pool.configure(kept, 1)
    assert Claim(gone.endpoint, 8, 0, 1, 1, 0) in shared.speak(0)
    shared.finish(busy)
    assert Claim(gone.endpoint, 8, 0, 0, 0, 0) in shared.speak(0)
    assert gone.endpoint not in [claim.endpoint for claim in shared.speak(0)]


def test_of_many_engines_all_are_asked_for_in_turn_and_first_those_it_is_short_of() -> None:
    shared = Shared(many=MOST_CLAIMS + 10)
    names = [{claim.endpoint for claim in shared.speak(0)} for _ in range(2)]
    assert [len(asked) for asked in names] == [MOST_CLAIMS] * 2
    assert len(names[0] | names[1]) == MOST_CLAIMS + 10
    for endpoint in shared.pool.endpoints:
        endpoint.holds.add("the test")
    last = shared.pool.endpoints[-1]
    last.holds.clear()
    for _ in range(last.share + 1):
        shared.ask()
    assert shared.speak(0)[0].endpoint == last.name


def test_alone_it_uses_an_equal_part() -> None:
    """At once, also of what is new; and what the store says when it is back."""
    shared = Shared(many=1)
    for _ in range(9):
        shared.ask()
    assert shared.in_flight == 0
    shared.sharing.alone(3)
    shared.turns()
    assert (shared.in_flight, shared.endpoint.share) == (2, 2)
    shared.engines(2)
    assert [endpoint.share for endpoint in shared.pool.endpoints] == [2, 2]
    shared.speak(0, most=4)
    assert [endpoint.share for endpoint in shared.pool.endpoints] == [4, 4]
