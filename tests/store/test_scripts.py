"""The scripts in a real server against the pure functions: every state and every answer, exactly."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.policy.reservation import GRACE, Need, Short, give, take
from gateway.policy.token_bucket import SECOND, Bucket, Shape, fresh, rate_shape, refill
from gateway.store import scripts
from tests.store.servers import Server
from tests.support.examples import examples

NOW = 1_790_000_000 * SECOND
REPLICA = "r"

rates = st.builds(
    rate_shape,
    st.one_of(st.integers(1, 100), st.integers(1, 10**9)),
    st.sampled_from((1, 60, 3600, 86_400, 30 * 86_400, 7)),
    st.one_of(st.none(), st.integers(1, 100), st.integers(1, 10**9)),
)
calendars = st.builds(
    lambda capacity, starts, length, rate: Shape(
        capacity, rate, 1000 if rate else 1, NOW + starts * SECOND, NOW + (starts + length) * SECOND
    ),
    st.integers(1, 10**12),
    st.integers(-100, 0),
    st.integers(1, 100),
    st.sampled_from((0, 0, 7)),
)
slots = st.builds(lambda count: Shape(count * 1000, slots=True), st.integers(1, 20))
shapes = st.one_of(rates, rates, calendars, slots)


@dataclass(frozen=True)
class Take:
    amounts: tuple[int, ...]
    who: int
    first: bool
    more: int
    back: int
    sharers: int


@dataclass(frozen=True)
class Give:
    at: int
    amount: int


Step = Take | Give | int
amount = st.one_of(st.integers(0, 5), st.integers(0, 3000), st.integers(0, 10**6), st.integers(0, 10**12))
steps = st.one_of(
    st.builds(
        Take,
        st.tuples(amount, amount, amount),
        st.integers(0, 4),
        st.booleans(),
        st.sampled_from((0, 0, 700, 10**9)),
        st.sampled_from((0, 0, 0, 500, -300)),
        st.integers(1, 20),
    ),
    st.builds(Give, st.integers(0, 2), st.integers(-(10**13), 10**6)),
    st.builds(Give, st.integers(0, 2), st.integers(-(10**20), 10**20)),
    st.integers(-3 * SECOND, 20 * SECOND),
    st.integers(-70 * SECOND, 0),
    st.integers(0, 40 * 86_400 * SECOND),
)


@dataclass
class Expected:
    """What the pure functions say."""

    shapes: tuple[Shape, ...]
    buckets: list[Bucket] = field(default_factory=list)

    def take(self, step: Take, now: int) -> tuple[object, ...]:
        back = [step.back * (not shape.slots) for shape in self.shapes]
        before = [give(s, b, n, now) if n else b for s, b, n in zip(self.shapes, self.buckets, back, strict=True)]
        needs = [Need(s, n, step.more) for s, n in zip(self.shapes, step.amounts, strict=True)]
        result = take(needs, before, now, step.who, step.sharers, first=step.first)
        self.buckets = list(result.buckets)
        if isinstance(result, Short):
            return ("early" if result.early else "short", result.index, result.wait)
        return ("taken", result.amounts)


@pytest.fixture(scope="module")
def client(shared_server: Server) -> Iterator[redis.Redis]:
    with shared_server.client() as client:
        for script in scripts.ALL:
            client.script_load(script.source)
        yield client


def comparable(shape: Shape, bucket: Bucket) -> Bucket:
    # When a slot was taken matters to nothing.
    return Bucket(bucket.level, 0, 0, 0, bucket.promises) if shape.slots else bucket


class Sent:
    """One example on its way: all its calls in one pipeline."""

    def __init__(self, client: redis.Redis, of: tuple[Shape, ...]) -> None:
        self.pipeline = client.pipeline(transaction=False)
        self.shapes = of
        self.batch = 0

    def call(self, script: scripts.Script, now: int, head: list[str], needs: list[str], which: list[int]) -> None:
        keys = ["t:generation", "t:replicas", "t:record", *(f"t:{at}" for at in which)]
        self.pipeline.evalsha(script.sha.decode(), len(keys), *keys, str(now), "", REPLICA, *head, *needs)

    def take(self, step: Take, now: int) -> None:
        needs = [
            scripts.need_words(shape, amount, step.more, step.back * (not shape.slots))
            for shape, amount in zip(self.shapes, step.amounts, strict=True)
        ]
        head = ["0", "", "", str(step.who), str(int(step.first)), str(step.sharers), "1"]
        self.call(scripts.TAKE, now, head, needs, [0, 1, 2])

    def give(self, step: Give, now: int) -> None:
        self.batch += 1
        words = scripts.need_words(self.shapes[step.at], back=step.amount)
        self.call(scripts.GIVE, now, ["0", str(self.batch)], [words], [step.at])

    def look(self, now: int) -> None:
        self.call(scripts.LOOK, now, ["0", ""], [scripts.need_words(shape) for shape in self.shapes], [0, 1, 2])


CONTENDED = (
    rate_shape(2, 1, 4),
    rate_shape(60, 60, 3),
    Shape(5000, slots=True),
    Shape(9000, 3, 1000, NOW, NOW + 8 * SECOND),
)


@pytest.mark.parametrize("seed", range(4))
def test_the_scripts_are_the_pure_functions_where_all_want_the_same(client: redis.Redis, seed: int) -> None:
    """Refused, early, on time to the microsecond, late, unclaimed: what chance alone seldom meets."""
    chance = random.Random(seed)
    moves = (0, 0, 1, -1, 1000, 250_000, 499_999, 500_002, SECOND, SECOND + 1, GRACE, 2 * GRACE, -SECOND)
    for _ in range(40):
        of = tuple(chance.choice(CONTENDED) for _ in range(3))
        sequence: list[Step] = []
        for _ in range(40):
            amounts = (
                chance.choice((0, 500, 1000, 2000)),
                chance.choice((0, 1000, 1000)),
                chance.choice((0, 1000, 3000)),
            )
            take = Take(
                amounts,
                chance.randint(0, 3),
                chance.random() < 0.3,
                chance.choice((0, 0, 900)),
                chance.choice((0, 0, 300)),
                2,
            )
            roll = chance.random()
            if roll < 0.6:
                sequence.append(take)
            elif roll < 0.7:
                sequence.append(Give(chance.randint(0, 2), chance.choice((-20_000, -2000, 500, 1000))))
            else:
                sequence.append(chance.choice(moves))
        compare(client, of, sequence, lost=chance.random() < 0.3)


@settings(max_examples=examples(50), suppress_health_check=list(HealthCheck))
@given(st.tuples(shapes, shapes, shapes), st.lists(steps, min_size=1, max_size=25), st.booleans())
def test_the_scripts_are_the_pure_functions(
    client: redis.Redis, of: tuple[Shape, ...], sequence: list[Step], lost: bool
) -> None:
    compare(client, of, sequence, lost=lost)


def compare(client: redis.Redis, of: tuple[Shape, ...], sequence: list[Step], *, lost: bool) -> None:
    """Play a sequence on both; every state and answer is the same, also right before and at each promised time."""
    now = NOW
    sent, expected = Sent(client, of), Expected(of)
    sent.pipeline.delete("t:0", "t:1", "t:2", "t:record", "t:replicas")
    sent.pipeline.set("t:generation", f"1 {NOW - SECOND if lost else 0}")
    expected.buckets = [fresh(shape, now, NOW - SECOND if lost else 0) for shape in of]
    sent.take(Take((0, 0, 0), 0, False, 0, 0, 1), now)
    answers: list[tuple[object, ...] | None] = [expected.take(Take((0, 0, 0), 0, False, 0, 0, 1), now)]
    states: list[list[Bucket]] = [expected.buckets]
    for step in sequence:
        if isinstance(step, int):
            now += step
            continue
        if isinstance(step, Take):
            dues = sorted({p.due for b in expected.buckets for p in b.promises})
            if dues and step.more == 0 and step.back:
                now = max(now, dues[0])
            answers.append(expected.take(step, now))
            sent.take(step, now)
        else:
            buckets = list(expected.buckets)
            buckets[step.at] = give(of[step.at], buckets[step.at], step.amount, now)
            expected.buckets = buckets
            answers.append(None)
            sent.give(step, now)
        states.append(expected.buckets)
        sent.look(now)
        answers.append(None)
        states.append([refill(shape, bucket, now) for shape, bucket in zip(of, expected.buckets, strict=True)])
    for answer, state, raw in zip(answers, states, sent.pipeline.execute()[2:], strict=True):
        told = scripts.parse(raw)
        if told.status in ("given",):
            continue
        if answer is not None:
            got = ("taken", told.amounts) if told.status == "taken" else (told.status, told.index, told.wait)
            assert got == answer
        shown = [comparable(shape, bucket) for shape, bucket in zip(of, told.buckets, strict=True)]
        assert shown == [comparable(shape, bucket) for shape, bucket in zip(of, state, strict=True)]
