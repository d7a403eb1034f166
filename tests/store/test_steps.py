"""The scripts' steps around the arithmetic: undone, fenced, replayed, forgotten, emptied; slots of several replicas."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest
import redis

from gateway.policy.token_bucket import LARGEST, NEVER, SECOND, STEP, Shape, rate_shape
from gateway.store.scripts import BEAT, GIVE, LOOK, TAKE, UNDO, Script, Told, need_words, parse
from tests.store.servers import Server

NOW = 1_790_000_000 * SECOND
RATE, SLOTS, FIXED = rate_shape(60, 60), Shape(5000, slots=True), Shape(10**6)
LIFETIME = 3 * SECOND
names = itertools.count()


class Replica:
    """What one replica sends, each call of its own accord."""

    def __init__(self, client: redis.Redis, space: str, name: str) -> None:
        self.client = client
        self.space = space
        self.name = name
        self.now: int | None = NOW
        self.known = ""
        self.fence = 1

    def call(self, script: Script, words: list[str], needs: dict[str, str]) -> Told:
        keys = [f"{self.space}:{key}" for key in ("generation", "replicas", f"r:{self.name}", *needs)]
        now = "" if self.now is None else str(self.now)
        head = [now, self.known, self.name, str(self.fence)]
        answer = self.client.eval(script.source.decode(), len(keys), *keys, *head, *words, *needs.values())
        assert isinstance(answer, bytes)
        return parse(answer)

    def take(self, number: str, needs: dict[str, str], arrived: str = "") -> Told:
        return self.call(TAKE, [number, arrived, "0", "0", "", ""], needs)

    def give(self, batch: int, needs: dict[str, str]) -> Told:
        return self.call(GIVE, [str(batch)], needs)

    def undo(self, number: str, needs: dict[str, str]) -> Told:
        return self.call(UNDO, [number], needs)

    def beat(self, needs: dict[str, str] | None = None, lifetime: int = LIFETIME) -> Told:
        return self.call(BEAT, [str(lifetime)], needs or {})

    def level(self, bucket: str, shape: Shape) -> int:
        return self.call(LOOK, [""], {bucket: need_words(shape)}).buckets[0].level


@pytest.fixture(scope="module")
def client(shared_server: Server) -> Iterator[redis.Redis]:
    with shared_server.client() as client:
        yield client


@pytest.fixture
def one(client: redis.Redis) -> Replica:
    return Replica(client, f"steps{next(names)}", "one")


@pytest.fixture
def two(one: Replica) -> Replica:
    return Replica(one.client, one.space, "two")


def test_what_a_lost_call_took_is_given_back_once(one: Replica) -> None:
    asked = {"a": need_words(FIXED, 3000, 3000), "s": need_words(SLOTS, 2000)}
    assert one.take("7", asked).amounts == (6000, 2000)
    shapes = {"a": need_words(FIXED), "s": need_words(SLOTS)}
    assert one.undo("7", shapes).status == "undone"
    assert (one.level("a", FIXED), one.level("s", SLOTS)) == (10**6, 0)
    assert one.undo("7", shapes).status == "unknown"
    assert one.level("a", FIXED) == 10**6


def test_a_refused_call_that_gave_back_is_known_too(one: Replica) -> None:
    assert one.take("1", {"a": need_words(FIXED, 10**6)}, "").status == "taken"
    assert one.take("2", {"a": need_words(FIXED, 5000, 0, 1000)}).status == "short"
    assert one.undo("2", {"a": need_words(FIXED)}).status == "undone", "so what it gave back is not given again"
    assert one.level("a", FIXED) == 1000


def test_an_answer_that_arrived_is_forgotten(one: Replica) -> None:
    one.take("1", {"a": need_words(FIXED, 1000)})
    one.take("2", {"a": need_words(FIXED, 1000)}, arrived="1")
    assert one.undo("1", {"a": need_words(FIXED)}).status == "unknown"
    assert one.undo("2", {"a": need_words(FIXED)}).status == "undone"


def test_a_call_from_before_the_fence_is_void(one: Replica) -> None:
    one.fence = 2
    one.beat()
    one.fence = 1
    assert one.take("1", {"a": need_words(FIXED, 1000)}).status == "void"
    one.beat()
    one.fence = 2
    assert one.take("2", {"a": need_words(FIXED, 1000)}).status == "taken", "a late beat moves no fence back"
    assert one.level("a", FIXED) == 10**6 - 1000


def test_a_batch_counts_once(one: Replica, two: Replica) -> None:
    one.take("1", {"a": need_words(FIXED, 5000)})
    back = {"a": need_words(FIXED, back=1000)}
    assert [one.give(number, back).status for number in (1, 1, 2, 1)] == ["given", "replayed", "given", "replayed"]
    assert two.give(1, back).status == "given", "numbers are each replica's own"
    assert one.level("a", FIXED) == 10**6 - 2000


def test_slots_are_counted_while_their_replica_lives(one: Replica, two: Replica) -> None:
    assert (one.beat().status, two.beat().status) == ("new", "new")
    one.take("1", {"s": need_words(SLOTS, 3000)})
    two.take("1", {"s": need_words(SLOTS, 2000)})
    assert two.take("2", {"s": need_words(SLOTS, 1000)}).status == "short"
    assert two.beat().live == 2
    two.now = NOW + LIFETIME
    told = two.take("3", {"s": need_words(SLOTS, 1000)})
    assert (told.status, told.live) == ("taken", 1)
    two.beat()
    one.now = NOW + LIFETIME + 1
    assert one.beat().status == "new"
    assert one.beat({"s": need_words(SLOTS, 3000)}).status == "known"
    assert one.level("s", SLOTS) == -6000, "what is in use is in use"
    one.beat(lifetime=0)
    assert two.level("s", SLOTS) == -3000
    assert two.beat().live == 1


def test_more_slots_given_back_than_held_are_not_somebody_elses(one: Replica, two: Replica) -> None:
    one.beat()
    two.beat()
    one.take("1", {"s": need_words(SLOTS, 1000)})
    two.take("1", {"s": need_words(SLOTS, 2000)})
    one.give(1, {"s": need_words(SLOTS, back=9000)})
    assert two.level("s", SLOTS) == -2000


def test_an_emptied_store_starts_a_generation_at_nothing(one: Replica, two: Replica) -> None:
    one.known = one.take("1", {"a": need_words(RATE, 1000)}).generation
    assert one.level("b", RATE) == 60_000, "nobody has drawn on it"
    one.client.delete(*(f"{one.space}:{key}" for key in ("generation", "replicas", "r:one", "a")))
    one.now = two.now = NOW + SECOND
    # A newcomer knows of no loss; the first that does starts another generation.
    full = two.beat()
    one.now = NOW + 2 * SECOND
    emptied = one.beat()
    assert len({one.known, full.generation, emptied.generation}) == 3
    one.now = two.now = NOW + 12 * SECOND
    assert one.level("a", RATE) == 10_000
    one.known, two.known = emptied.generation, full.generation
    assert two.level("a", RATE) == 10_000
    assert two.beat().generation == one.beat().generation == emptied.generation


def test_a_key_lives_until_a_new_bucket_would_be_the_same(one: Replica) -> None:
    one.now = None
    before = time.time_ns() // 1000
    told = one.take("1", {"a": need_words(RATE, 30_000), "s": need_words(SLOTS, 1000), "f": need_words(FIXED, 1)})
    assert before <= told.now <= time.time_ns() // 1000, "by the server's time"
    life = one.client.pttl(f"{one.space}:a")
    assert isinstance(life, int)
    assert 30_000 < life <= 31_001
    assert one.client.pttl(f"{one.space}:f") == -1, "what never refills is never forgotten"
    lives = one.client.pttl(f"{one.space}:s")
    assert isinstance(lives, int)
    assert 0 < lives <= 86_400_000


def test_what_a_former_connection_said_of_slots_is_void(one: Replica, two: Replica) -> None:
    """A server that was frozen may read it after what the next connection said."""
    one.fence = 2
    assert one.beat({"s": need_words(SLOTS, 1000)}).status == "new"
    one.fence = 1
    for late in (4000, 0):
        assert one.beat({"s": need_words(SLOTS, late)}).status == "void"
        assert two.level("s", SLOTS) == -1000


@pytest.mark.parametrize("spoilt", ["word", "half", "other kind", "nothing"])
@pytest.mark.parametrize("shape", [RATE, SLOTS])
def test_a_key_that_holds_something_else_is_a_new_bucket(one: Replica, spoilt: str, shape: Shape) -> None:
    """It must not keep everything else that is carried on together with it."""
    key = f"{one.space}:x"

    def spoil() -> None:
        one.client.delete(key)
        if (spoilt == "other kind" and shape.slots) or spoilt in ("word", "half", "nothing"):
            one.client.set(key, {"word": "a b c d", "half": "12 5", "nothing": ""}.get(spoilt, "1 2 3 4"))
        else:
            one.client.hset(key, "r:two", "x")

    spoil()
    assert one.call(LOOK, [""], {"x": need_words(shape)}).buckets[0].level == (0 if shape.slots else shape.capacity)
    spoil()
    assert one.take("1", {"x": need_words(shape, 1000), "a": need_words(FIXED, 1000)}).status == "taken"
    spoil()
    assert one.give(1, {"x": need_words(shape, back=0), "a": need_words(FIXED, back=1000)}).status == "given"
    spoil()
    assert one.undo("1", {"x": need_words(shape), "a": need_words(FIXED)}).status == "undone"
    spoil()
    if shape.slots:
        assert one.beat({"x": need_words(shape, 1000)}).status == "new"
        assert one.level("x", shape) == -1000
    assert one.level("a", FIXED) == 10**6


def test_slots_nobody_can_read_are_nobodys(one: Replica, two: Replica) -> None:
    one.beat()
    two.beat()
    one.client.hset(f"{one.space}:s", mapping={"r:two": "x", "r:one": "y", "promises": "1 2"})
    assert one.level("s", SLOTS) == 0
    assert one.take("1", {"s": need_words(SLOTS, 1000)}).status == "taken"
    assert two.level("s", SLOTS) == -1000


def test_a_generation_nobody_can_read_is_a_lost_one(one: Replica) -> None:
    one.known = one.beat().generation
    key = f"{one.space}:generation"
    for spoil in (lambda: one.client.set(key, "x"), lambda: one.client.hset(key, "x", "y")):
        one.client.delete(key)
        spoil()
        assert one.level("a", RATE) == 0


def test_a_debt_has_an_end(one: Replica) -> None:
    """What an engine says it used may be anything; the arithmetic stays exact."""
    for number in range(3):
        one.give(number + 1, {"a": need_words(RATE, back=-(10**25))})
    assert one.level("a", RATE) == -LARGEST
    one.now = NOW + 60 * SECOND
    assert one.level("a", RATE) == -LARGEST + 60_000
    assert one.take("9", {"a": need_words(RATE, 1000)}).wait <= NEVER


def test_a_server_whose_clock_was_far_ahead_goes_on_by_the_right_one(one: Replica) -> None:
    """As after a failover to a machine with another clock. A little is waited for: it might step again."""
    one.take("1", {"a": need_words(RATE, 60_000)})
    one.now = NOW - STEP
    assert one.take("2", {"a": need_words(RATE, 1000)}).wait == STEP + SECOND + 1
    one.now = NOW - 3600 * SECOND
    assert one.take("3", {"a": need_words(RATE, 1000)}).wait == SECOND + 1
    one.now += SECOND
    assert one.take("4", {"a": need_words(RATE, 1000)}).status == "taken"
