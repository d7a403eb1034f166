"""The router: whom it may choose, whom it prefers, and that no one endpoint gets it all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.prefix import block_hashes
from gateway.policy.routing import MOST_SCORED, Choice, Job, Router, Scored
from gateway.policy.scorers import Slots

NOW = 100.0
_NUMBERS = count()


@dataclass(eq=False)
class Place:
    name: str = ""
    in_flight: int = 0
    tokens: int = 0
    prefilling: int = 0
    most: int = 100
    most_tokens: int = 400_000
    prefill_rate: float = 10_000.0
    available: bool = True
    good: bool = True
    ramp_from: float = 0.0
    ramp_until: float = 0.0
    slots: Slots | None = None

    def __post_init__(self) -> None:
        self.name = self.name or f"place-{next(_NUMBERS)}"

    def trusted(self, now: float) -> bool:
        return self.good

    def room(self, tokens: int) -> bool:
        return self.in_flight < self.most and self.tokens + tokens <= self.most_tokens

    def take(self, job: Job, choice: Choice[Place] | None) -> None:
        assert choice is not None and choice.endpoint is self
        self.in_flight += 1
        self.tokens += job.prompt + job.output


def places(number: int) -> tuple[Place, ...]:
    return tuple(Place(f"p{at}") for at in range(number))


def prompt(text: str, blocks: int = 8) -> tuple[int, ...]:
    return block_hashes(1, (text * 4096).encode()[: blocks * 16], 16)


ANY = st.builds(
    Place,
    in_flight=st.integers(0, 3),
    tokens=st.integers(0, 3000),
    prefilling=st.integers(0, 3000),
    most=st.integers(1, 4),
    most_tokens=st.sampled_from([0, 2000, 4000]),
    prefill_rate=st.sampled_from([0.0, 5000.0, 30_000.0]),
    available=st.booleans(),
    good=st.booleans(),
    ramp_until=st.sampled_from([0.0, 2 * NOW]),
    slots=st.sampled_from([None, Slots(("a",), (), 2), Slots(("b", "c"), (), 2)]),
)
JOBS = st.builds(
    Job,
    prompt=st.integers(0, 2000),
    output=st.integers(0, 500),
    blocks=st.sampled_from([(), prompt("a"), prompt("b")]),
    session=st.integers(0, 3),
    adapter=st.sampled_from([None, "a", "b"]),
)


def usable(able: Sequence[Place], tried: Sequence[Place], job: Job) -> list[Place]:
    return [one for one in able if one.available and one not in tried and one.room(job.prompt + job.output)]


def scored(choice: Choice[Place] | None, place: Place) -> Scored[Place]:
    assert choice is not None
    return next(one for one in choice.scored if one.endpoint is place)


@given(able=st.lists(ANY, max_size=24).map(tuple), job=JOBS, past=st.lists(JOBS, max_size=4), data=st.data())
def test_one_that_can_serve_is_found_exactly_when_there_is_one(
    able: tuple[Place, ...], job: Job, past: list[Job], data: st.DataObject
) -> None:
    """Never one that was tried, is away or has no room; one that failed before only when no other is left."""
    tried = data.draw(st.lists(st.sampled_from(able), unique_by=id)) if able else []
    seed = data.draw(st.integers(0, 99))
    chosen = []
    for _ in range(2):
        router: Router[Place] = Router()
        for at, before in enumerate(past):
            if able:
                router.sent(before, able[at % len(able)])
        choice = router.choose(job, able, tried, Random(seed).randrange, NOW)
        chosen.append(choice and (choice.endpoint, choice.uncached, [one.endpoint for one in choice.scored]))
        possible = usable(able, tried, job)
        assert (choice is not None) == bool(possible)
        if choice is None:
            continue
        assert choice.endpoint in possible
        assert choice.endpoint.good or not any(one.good for one in possible)
        assert choice.trusted == choice.endpoint.good or len(able) == 1
        assert len(choice.scored) <= MOST_SCORED
        assert {one.endpoint for one in choice.scored} <= set(possible)
        assert 0 <= choice.uncached <= job.prompt
        if choice.scored:
            assert min(one.cost for one in choice.scored) == scored(choice, choice.endpoint).cost
    assert chosen[0] == chosen[1], "the same draws give the same choice"


@given(number=st.integers(9, 300), data=st.data())
def test_the_only_one_with_room_is_found_among_many(number: int, data: st.DataObject) -> None:
    able = places(number)
    one = data.draw(st.sampled_from(able))
    for place in able:
        place.available = place is one
    choice = Router[Place]().choose(Job(10, 10), able, (), Random(1).randrange, NOW)
    assert choice is not None and choice.endpoint is one


def test_where_there_is_no_choice_nothing_is_weighed_nor_hashed() -> None:
    router: Router[Place] = Router()
    able = places(1)
    assert not router.needs_blocks(able)
    assert router.needs_blocks(places(2))
    choice = router.choose(Job(10, 10), able, (), Random(1).randrange, NOW)
    assert choice is not None and choice.endpoint is able[0] and choice.scored == () and choice.uncached == 10
    assert router.choose(Job(10, 10), able, able, Random(1).randrange, NOW) is None
    assert router.choose(Job(10, 10, prompt("x"), 7, "a"), (), (), Random(1).randrange, NOW) is None


def test_equal_endpoints_share_the_work() -> None:
    """Fixed draws: without any feedback the busiest of eight, and of a hundred, gets little more than the others."""
    random = Random(1)
    for number, rounds in ((2, 1000), (8, 4000), (100, 20_000)):
        able, router = places(number), Router[Place]()
        turns = Counter(
            choice.endpoint.name
            for _ in range(rounds)
            if (choice := router.choose(Job(100, 100), able, (), random.randrange, NOW))
        )
        mean = rounds / number
        assert len(turns) == number
        assert 0.6 * mean < min(turns.values()) and max(turns.values()) < 1.4 * mean


def test_prompts_nobody_holds_do_not_go_to_one_endpoint() -> None:
    random = Random(1)
    for number in (8, 40):
        able, router = places(number), Router[Place]()
        turns: Counter[str] = Counter()
        for at in range(100 * number):
            job = Job(1000, 100, prompt(f"{at} new "))
            choice = router.choose(job, able, (), random.randrange, NOW)
            assert choice is not None and choice.matched == 0
            router.sent(job, choice.endpoint)
            turns[choice.endpoint.name] += 1
        assert max(turns.values()) < 150 and min(turns.values()) > 60


def test_work_that_stays_is_spread_over_many() -> None:
    random, able, router = Random(1), places(200), Router[Place]()
    for _ in range(4000):
        job = Job(random.randrange(1, 2000), 200)
        choice = router.choose(job, able, (), random.randrange, NOW)
        assert choice is not None
        choice.endpoint.take(job, choice)
    tokens = [place.tokens for place in able]
    assert max(tokens) < 1.3 * sum(tokens) / len(tokens)


def test_who_holds_the_prompt_is_preferred_among_a_thousand() -> None:
    able, router = places(1000), Router[Place]()
    job = Job(1000, 100, prompt("long "))
    router.sent(Job(1000, 100, prompt("long ")[:4]), able[7])
    router.sent(job, able[700])
    for seed in range(20):
        choice = router.choose(job, able, (), Random(seed).randrange, NOW)
        assert choice is not None and choice.endpoint is able[700]
        assert choice.matched == choice.blocks == 8 and choice.uncached == 0
        assert scored(choice, able[7]).matched == 4
    again = router.choose(job, able, (able[700],), Random(1).randrange, NOW)
    assert again is not None and again.endpoint is able[7] and again.uncached == 500


def test_a_busy_holder_is_left_for_an_idle_endpoint() -> None:
    """What is cached saves a tenth of a second here; waiting for others' prompts, or a full batch, costs more."""
    job = Job(1000, 100, prompt("x"))
    for busy in ({"prefilling": 3000}, {"in_flight": 95}, {"tokens": 390_000}):
        able, router = places(4), Router[Place]()
        router.sent(job, able[0])
        for name, value in busy.items():
            setattr(able[0], name, value)
        choice = router.choose(job, able, (), Random(1).randrange, NOW)
        assert choice is not None and choice.endpoint is not able[0]


def test_a_prompt_that_everybody_sends_makes_no_hot_spot() -> None:
    """One endpoint holds it at first; nearly all serve it in the end, none much more than its share."""
    for number in (8, 64):
        random, able, router = Random(1), places(number), Router[Place]()
        job = Job(4000, 200, prompt("everybody's ", 60))
        for _ in range(40 * number):
            choice = router.choose(job, able, (), random.randrange, NOW)
            assert choice is not None
            choice.endpoint.take(job, choice)
            router.sent(job, choice.endpoint)
        loads = [place.in_flight for place in able]
        assert max(loads) <= 1.5 * 40
        assert sum(load > 20 for load in loads) > 0.8 * number


def test_a_system_prompt_that_all_hold_is_shared_out_among_them() -> None:
    random, able, router = Random(1), places(100), Router[Place]()
    job = Job(1000, 100, prompt("system "))
    for place in able:
        router.sent(job, place)
    turns = Counter(
        choice.endpoint.name
        for _ in range(10_000)
        if (choice := router.choose(job, able, (), random.randrange, NOW)) and choice.matched == 8
    )
    assert sum(turns.values()) == 10_000
    assert max(turns.values()) < 200 and len(turns) == 100


def test_a_session_stays_at_home_and_comes_back_to_it() -> None:
    job, random = Job(2000, 100, session=77), Random(1)

    def chosen(router: Router[Place], able: tuple[Place, ...]) -> Place:
        choice = router.choose(job, able, (), random.randrange, NOW)
        assert choice is not None and scored(choice, choice.endpoint).home
        return choice.endpoint

    for number in (6, 50):
        able, router = places(number), Router[Place]()

        home = chosen(router, able)
        assert {chosen(router, able) for _ in range(20)} == {home}
        home.available = False
        second = chosen(router, able)
        assert second is not home and chosen(router, able) is second
        home.available = True
        assert chosen(router, able) is home
        assert chosen(Router(), able[::-1]) is home, "another gateway finds the same home"


def test_home_is_left_when_it_is_busy() -> None:
    able, router = places(6), Router[Place]()
    job = Job(2000, 100, session=5)
    first = router.choose(job, able, (), Random(1).randrange, NOW)
    assert first is not None
    first.endpoint.in_flight = 90
    choice = router.choose(job, able, (), Random(1).randrange, NOW)
    assert choice is not None and choice.endpoint is not first.endpoint


def test_an_adapter_goes_where_it_is_loaded_then_where_there_is_room() -> None:
    able, router = places(3), Router[Place]()
    able[0].slots, able[1].slots, able[2].slots = (
        Slots(("x", "y"), (), 2),
        Slots(("x",), (), 2),
        Slots(("mine",), (), 2),
    )
    job = Job(100, 100, adapter="mine")
    order = []
    tried: list[Place] = []
    while choice := router.choose(job, able, tried, Random(1).randrange, NOW):
        order.append(choice.endpoint)
        tried.append(choice.endpoint)
    assert order == [able[2], able[1], able[0]]


def test_free_slots_are_preferred_for_an_adapter_that_is_nowhere() -> None:
    able, router = places(2), Router[Place]()
    able[0].slots, able[1].slots = Slots(("x", "y"), (), 4), Slots(("x",), (), 4)
    choice = router.choose(Job(100, 100, adapter="mine"), able, (), Random(1).randrange, NOW)
    assert choice is not None and choice.endpoint is able[1]


def test_who_served_an_adapter_before_is_found_among_many() -> None:
    able, router = places(500), Router[Place]()
    for place in able:
        place.slots = Slots(("x", "y"), (), 2)
    job = Job(100, 100, adapter="mine")
    router.sent(job, able[123])
    able[123].slots = Slots(("mine", "x"), (), 2)
    choice = router.choose(job, able, (), Random(1).randrange, NOW)
    assert choice is not None and choice.endpoint is able[123]


def test_a_newcomer_counts_with_its_share() -> None:
    new, old = Place(ramp_from=NOW - 1, ramp_until=NOW + 9), Place()
    router, able, random = Router[Place](), (new, old), Random(1)
    for load, expected in ((0, old), (5, old), (15, new)):
        old.in_flight = load
        choice = router.choose(Job(0, 100), able, (), random.randrange, NOW)
        assert choice is not None and choice.endpoint is expected
    new.in_flight, old.in_flight = 5, 6
    choice = router.choose(Job(0, 100), able, (), random.randrange, NOW + 9)
    assert choice is not None and choice.endpoint is new


def test_the_faster_engine_gets_more() -> None:
    able, router, random = places(2), Router[Place](), Random(1)
    able[1].prefill_rate = 40_000
    for _ in range(50):
        choice = router.choose(Job(1000, 1), able, (), random.randrange, NOW)
        assert choice is not None
        choice.endpoint.prefilling += choice.uncached
    assert able[1].prefilling > 3 * able[0].prefilling > 0


def test_a_rate_that_is_not_known_is_taken_to_be_like_the_others() -> None:
    able, router = places(3), Router[Place]()
    able[0].prefill_rate = 0.0
    choice = router.choose(Job(1000, 100), able, (), Random(1).randrange, NOW)
    assert len({scored(choice, place).cost for place in able}) == 1
    for place in able:
        place.prefill_rate = 0.0
    choice = router.choose(Job(1000, 100), able, (), Random(1).randrange, NOW)
    assert len({scored(choice, place).seconds for place in able}) == 1


def test_one_that_is_gone_or_was_emptied_holds_nothing() -> None:
    for forget in ("gone", "emptied"):
        for number in (3, 20):
            able, router = places(number), Router[Place]()
            job = Job(1000, 100, prompt("x"), session=3, adapter="a")
            router.choose(job, able, (), Random(1).randrange, NOW)
            router.sent(job, able[1])
            getattr(router, forget)(able[1])
            choice = router.choose(job, able, (), Random(1).randrange, NOW)
            assert choice is not None and choice.matched == 0
            assert all(one.matched == 0 for one in choice.scored)


def test_a_choice_can_be_explained() -> None:
    able, router = places(3), Router[Place]()
    job = Job(1000, 100, prompt("x"), session=3)
    router.sent(job, able[1])
    able[2].in_flight = 50
    choice = router.choose(job, able, (), Random(1).randrange, NOW)
    assert choice is not None
    rows = choice.explained()
    assert rows[0]["endpoint"] == choice.endpoint.name == "p1"
    assert {row["endpoint"] for row in rows} == {"p0", "p1", "p2"}
    assert rows[0]["prefix"] == 1.0 and rows[0]["ttft"] == 1.0 and rows[1]["prefix"] == 0.0
    assert [row["cost"] for row in rows] == sorted(float(row["cost"]) for row in rows)
    assert all(0 <= float(row[part]) <= 1 for row in rows for part in ("ttft", "load", "prefix", "session", "adapter"))


def test_models_on_the_same_endpoints_share_what_is_worked_out_for_them() -> None:
    """Tuples made anew for each model, or after a reload, cost no second ring and do not pile up."""
    able, router = places(20), Router[Place]()
    for _ in range(5000):
        router.choose(Job(1, 1, session=1), (*able,), (), Random(1).randrange, NOW)
    assert len(router._alike) == 1
    assert len(router._places) < 5000


def test_one_that_was_slow_once_is_tried_again() -> None:
    """Nobody knows that an engine is quick again who sends it nothing."""
    able = places(4)
    able[0].prefill_rate = 16.0
    for place in able[1:]:
        place.in_flight = 50
    random = Random(1)
    chosen = Counter(
        choice.endpoint.name
        for _ in range(2000)
        if (choice := Router[Place]().choose(Job(1000, 100), able, (), random.randrange, NOW)) is not None
    )
    assert 10 < chosen["p0"] < 60


def test_the_only_one_with_room_is_not_looked_for_when_it_is_known() -> None:
    """Whose turn it is has it from an endpoint: under overload all others of a thousand are full."""
    looked = []

    class Looked(Place):
        def room(self, tokens: int) -> bool:
            looked.append(self)
            return super().room(tokens)

    able = tuple(Looked(f"p{at}", in_flight=100) for at in range(1000))
    able[500].in_flight = 99
    choice = Router[Place]().choose(Job(100, 100), able, (), Random(1).randrange, NOW, near=able[500])
    assert choice is not None and choice.endpoint is able[500]
    assert len(looked) < 20


@given(number=st.sampled_from([2, 8, 30]), depth=st.integers(0, 4), seed=st.integers(0, 9), data=st.data())
def test_one_without_room_is_stretched_only_for_who_finds_half_of_his_prompt_there(
    number: int, depth: int, seed: int, data: st.DataObject
) -> None:
    """As far as the shell says; never one that is away, not trusted or tried."""
    router: Router[Place] = Router(stretches=lambda place, tokens: place.in_flight < 5 and tokens == 110)
    able = places(number)
    blocks = prompt("a")[:4]
    holder = data.draw(st.sampled_from(able))
    router.sent(Job(100, 10, blocks[:depth]), holder)
    holder.most, holder.in_flight = 4, data.draw(st.integers(4, 6))
    holder.good = data.draw(st.booleans())
    tried = data.draw(st.sampled_from([(), (holder,)]))
    others_full = data.draw(st.booleans())
    for place in able:
        if others_full and place is not holder:
            place.available = False
    choice = router.choose(Job(100, 10, blocks), able, tried, Random(seed).randrange, NOW)
    may = depth >= 2 and holder.in_flight < 5 and holder.good and not tried
    if others_full:
        assert (choice is not None and choice.endpoint is holder) == may
    else:
        assert choice is not None
        assert choice.endpoint is not holder or may
    if choice is not None and choice.endpoint is holder:
        assert choice.matched == depth
