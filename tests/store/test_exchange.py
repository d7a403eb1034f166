"""What replicas tell each other through a real server: each message once to each of the others, whatever is lost."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.catalogue import Catalogue
from gateway.metrics import Metrics
from gateway.policy.capacity import Part
from gateway.policy.fairness import Charge
from gateway.policy.queue import Queue, Waiting
from gateway.policy.token_bucket import SECOND, STEP
from gateway.serving.admission import Admission, AdmissionRules
from gateway.serving.pool import Group, Pool
from gateway.serving.sharing import MOST_TENANTS, Sharing
from gateway.store import scripts
from gateway.store.exchange import Exchange
from gateway.store.protocol import Claim, Grant, Place
from gateway.store.scripts import BEAT, Script, Told, parse
from tests.store.servers import Deaf, Server, until
from tests.store.test_replicas import a_store
from tests.support.examples import examples

NOW = 1_790_000_000 * SECOND
KEPT = LIFETIME = 3 * SECOND
names = itertools.count()


@dataclass
class Talker:
    """A member that notes what it is told."""

    name: str = ""
    to_say: list[bytes] = field(default_factory=list)
    heard: list[bytes] = field(default_factory=list)
    away: int = 0

    def tell(self) -> bytes:
        said, self.to_say = b" ".join(self.to_say), []
        return said

    def told(self, messages: Sequence[bytes]) -> None:
        for message in messages:
            self.heard += message.split()

    def missed(self) -> None:
        self.away += 1

    def claims(self, place: Place) -> Sequence[Claim]:
        return ()

    def granted(self, grants: Sequence[Grant]) -> bool:
        return False

    def alone(self, gateways: int) -> None:
        self.left_alone = gateways


@dataclass
class Holder(Talker):
    """A member that uses one endpoint of which all together may use 10 at once, and never more than its share."""

    part: Part = field(default_factory=lambda: Part(10))
    in_flight: int = 0
    waiting: int = 0
    fair: int = 0

    def claims(self, place: Place) -> Sequence[Claim]:
        part = self.part
        asked = part.ask(self.in_flight, self.waiting, place.name, place.live, place.now // SECOND)
        return [Claim("e", part.most, part.held, self.in_flight, asked, part.want)]

    def granted(self, grants: Sequence[Grant]) -> bool:
        self.part.granted(grants[0].held, grants[0].others)
        self.begin()
        return False

    def alone(self, gateways: int) -> None:
        self.part.alone(gateways)
        self.begin()

    def begin(self) -> None:
        """Send those that wait, as far as it may."""
        while self.waiting and self.in_flight < self.part.share:
            self.waiting -= 1
            self.in_flight += 1

    def end(self) -> None:
        """Have one end."""
        self.in_flight -= 1
        self.begin()


class Line:
    """A session whose calls run at once, and are lost before or after that as a test says."""

    def __init__(self, client: redis.Redis, space: str, name: str) -> None:
        self.client = client
        self.space = space
        self.name = name
        self.time = NOW
        self.fence = 1
        self.live = 1
        self.alive_until = NOW
        self.generation = ""
        self.serving = True
        self.lost = ""

    def call(self, script: Script, keys: Sequence[str], words: Sequence[str | bytes]) -> Told:
        keys = [f"{self.space}:{key}" for key in ("generation", "replicas", f"r:{self.name}", *keys)]
        head = (str(self.time), self.generation, self.name, str(self.fence))
        given: tuple[Any, ...] = (*keys, *head, *words)
        answer = self.client.evalsha(script.sha.decode(), len(keys), *given)
        assert isinstance(answer, bytes)
        return parse(answer)

    def speak(
        self, script: Script, keys: Sequence[str], words: Sequence[str | bytes], done: Callable[[Told | None], None]
    ) -> None:
        told = self.call(script, keys, words) if self.lost != "before" else None
        done(None if self.lost else told)

    def note(self, told: Told) -> None:
        self.generation = told.generation
        self.live = told.live

    def now(self) -> int:
        return self.time

    def beat(self) -> None:
        """Say that it lives."""
        self.note(self.call(BEAT, (), (str(LIFETIME),)))
        self.alive_until = self.time + LIFETIME


@dataclass
class Person:
    """One replica's end of the conversation."""

    line: Line
    talker: Talker
    exchange: Exchange
    dropped: list[bool]

    def speak(self, now: int | None = None, lost: str = "") -> None:
        if now is not None:
            self.line.time = now
        self.line.lost = lost
        self.exchange.speak()


@pytest.fixture(scope="module")
def client(shared_server: Server) -> Iterator[redis.Redis]:
    with shared_server.client() as client:
        for script in scripts.ALL:
            client.script_load(script.source)
        yield client


def people(client: redis.Redis, count: int, kind: type[Talker] = Talker) -> list[Person]:
    space = f"talk{next(names)}"
    return [person(client, space, at, kind) for at in range(count)]


def person(client: redis.Redis, space: str, at: int, kind: type[Talker] = Talker) -> Person:
    line, talker, dropped = Line(client, space, f"r{at}"), kind(f"r{at}"), [False]
    exchange = Exchange(line, lambda: None, partial(dropped.append, True), NOW)  # type: ignore[arg-type]
    exchange.join(talker)
    return Person(line, talker, exchange, dropped)


def test_each_message_is_heard_once_by_each_other_replica_whatever_is_lost(client: redis.Redis) -> None:
    """Calls that were not run, and calls that were and whose answer did not come, in any order of speakers."""
    chance = random.Random(7)
    all_of_them = people(client, 4)
    now = NOW
    said: dict[str, list[bytes]] = {one.talker.name: [] for one in all_of_them}
    for one in all_of_them:
        one.speak(now)
    for number in range(250):
        now += chance.choice([0, 1, 200_000])
        one = chance.choice(all_of_them)
        if chance.random() < 0.7:
            word = f"{one.talker.name}/{number}".encode()
            said[one.talker.name].append(word)
            one.talker.to_say.append(word)
        one.speak(now, chance.choice(["", "", "", "before", "after"]))
    for one in all_of_them * 2:
        one.speak(now)
    for one in all_of_them:
        heard = Counter(one.talker.heard)
        assert not [word for word, times in heard.items() if times > 1]
        others = {word for name, words in said.items() if name != one.talker.name for word in words}
        assert set(heard) <= others
        assert one.talker.away or set(heard) == others


def test_who_comes_hears_what_is_told_from_then_on(client: redis.Redis) -> None:
    old, other, new = people(client, 3)
    for one in (old, other):
        one.speak()
    old.talker.to_say = [b"before"]
    old.speak(NOW + 1)
    new.speak(NOW + 2)
    old.talker.to_say = [b"after"]
    old.speak(NOW + 3)
    for one in (new, other):
        one.speak(NOW + 4)
    assert (new.talker.heard, other.talker.heard, old.talker.heard) == ([b"after"], [b"before", b"after"], [])


def test_who_was_away_for_longer_than_messages_are_kept_begins_with_what_is_there(client: redis.Redis) -> None:
    away, other = people(client, 2)
    for one in (away, other):
        one.speak()
    for seconds in range(5):
        other.talker.to_say = [f"{seconds}".encode()]
        other.speak(NOW + seconds * SECOND + 1)
    away.speak(NOW + 4 * SECOND + 2)
    assert (away.talker.heard, away.talker.away) == ([b"2", b"3", b"4"], 1)
    away.speak(NOW + 5 * SECOND)
    assert away.talker.away == 1


def test_what_there_is_no_room_for_is_told_when_there_is(client: redis.Redis) -> None:
    """The list is bounded, and nothing is lost of what waits."""
    talks, hears = people(client, 2)
    hears.speak()
    for number in range(514):
        talks.talker.to_say.append(str(number).encode())
        talks.speak(NOW + number)
    hears.speak(NOW + 600)
    assert [int(word) for word in hears.talker.heard] == list(range(512))
    talks.speak(NOW + KEPT + 600)
    talks.speak(NOW + KEPT + 601)
    hears.speak(NOW + KEPT + 602)
    assert [int(word) for word in hears.talker.heard] == list(range(514))


@pytest.mark.parametrize("back", [STEP // 2, 2 * STEP])
def test_a_clock_that_is_set_back_ends_no_conversation(client: redis.Redis, back: int) -> None:
    talks, hears = people(client, 2)
    for one in (talks, hears):
        one.speak()
    for number in range(3):
        talks.talker.to_say = [str(number).encode()]
        talks.speak(NOW - back + number)
        hears.speak(NOW - back + number)
    talks.speak(NOW - back + 4)
    hears.speak(NOW - back + 4)
    assert hears.talker.heard in ([b"0", b"1", b"2"], [b"1", b"2"])
    assert hears.talker.away == 0


def test_after_all_was_forgotten_they_go_on(client: redis.Redis) -> None:
    talks, hears = people(client, 2)
    for one in (talks, hears):
        one.speak()
    client.delete(f"{talks.line.space}:told", f"{talks.line.space}:told:last", f"{talks.line.space}:r:r0")
    talks.talker.to_say = [b"on"]
    talks.speak(NOW + 1)
    hears.speak(NOW + 2)
    assert hears.talker.heard == [b"on"]


def test_what_is_no_list_of_messages_is_as_good_as_none(client: redis.Redis) -> None:
    talks, hears = people(client, 2)
    hears.speak()
    client.set(f"{talks.line.space}:told", "what")
    client.delete(f"{talks.line.space}:told:last")
    client.hset(f"{talks.line.space}:told:last", "what", "ever")
    talks.talker.to_say = [b"on"]
    talks.speak(NOW + 1)
    hears.speak(NOW + 2)
    assert hears.talker.heard == [b"on"]


def test_a_call_of_a_former_connection_says_nothing(client: redis.Redis) -> None:
    talks, hears = people(client, 2)
    hears.speak()
    talks.line.call(BEAT, (), (str(KEPT),))
    talks.line.fence = 0
    talks.talker.to_say = [b"late"]
    talks.speak(NOW + 1)
    assert talks.dropped == [False, True]
    talks.line.fence = 2
    talks.speak(NOW + 2)
    hears.speak(NOW + 3)
    assert hears.talker.heard == [b"late"]


async def test_replicas_talk_through_their_stores_and_a_lost_answer_is_told_once(shared_server: Server) -> None:
    """Four times a second by themselves; one that ends tells what it has left."""
    namespace = f"talk{next(names)}"
    async with Deaf(shared_server) as way:
        talks, hears = a_store(shared_server, namespace, url=way.url), a_store(shared_server, namespace)
        one, other = Talker(), Talker()
        talks.join(one)
        hears.join(other)
        for store in (talks, hears):
            await store.start()
        await until(lambda: talks._exchange._heard and hears._exchange._heard)
        way.deaf = True
        one.to_say = [b"first"]
        await until(lambda: other.heard == [b"first"], "never told")
        way.cut()
        one.to_say = [b"second"]
        await until(lambda: len(other.heard) == 2, "never told")
        one.to_say = [b"last"]
        await talks.stop()
        await until(lambda: len(other.heard) == 3, "it ended without a word")
        await hears.stop()
    assert other.heard == [b"first", b"second", b"last"]


# --- endpoints --------------------------------------------------------------------------------------------------------


def holders(people: Sequence[Person]) -> list[Holder]:
    return [one.talker for one in people if isinstance(one.talker, Holder)]


def recorded(client: redis.Redis, space: str, live: Sequence[Person]) -> int:
    """What the server has recorded for those who live."""
    names = {one.line.name.encode() for one in live}
    found: Any = client.hgetall(f"{space}:endpoint:e")
    return sum(int(value.split()[0]) for name, value in found.items() if name in names)


@settings(max_examples=examples(8))
@given(seed=st.integers(0, 2**32), count=st.integers(2, 12))
def test_all_that_live_never_use_more_than_there_is(client: redis.Redis, seed: int, count: int) -> None:
    """Some come, some die, calls and answers are lost, requests come and end anywhere."""
    chance = random.Random(seed)
    live = people(client, count, Holder)
    space, numbers, now = live[0].line.space, itertools.count(count), NOW
    dead: list[tuple[int, Person]] = []
    for one in live:
        one.line.beat()
    for _ in range(120):
        now += chance.choice([0, 1, 1000, 100_000, 300_000])
        for one in live:
            one.line.time = now
            if one.line.alive_until - now < 2 * SECOND:
                one.line.beat()
        dead = [(until, one) for until, one in dead if until > now]
        someone = chance.choice(live)
        holder = someone.talker
        assert isinstance(holder, Holder)
        what = chance.random()
        if what < 0.25:
            holder.waiting += chance.randint(1, 8)
            holder.begin()
        elif what < 0.5 and holder.in_flight:
            holder.end()
        elif what < 0.53 and len(live) > 1:
            live.remove(someone)
            dead.append((someone.line.alive_until, someone))
        elif what < 0.56:
            live.append(person(client, space, next(numbers), Holder))
            live[-1].line.time = now
            live[-1].line.beat()
        else:
            someone.speak(now, chance.choice(["", "", "", "", "before", "after"]))
        counted = [*live, *(one for _, one in dead)]
        assert sum(one.in_flight for one in holders(counted)) <= 10
        assert recorded(client, space, counted) <= 10
        assert all(one.in_flight <= one.part.held for one in holders(counted))


def settle(people: Sequence[Person], rounds: int = 6) -> None:
    for _ in range(rounds):
        for one in people:
            one.speak()


def test_who_wants_more_has_what_others_do_not_need_and_gives_it_back(client: redis.Redis) -> None:
    everyone = people(client, 4, Holder)
    for one in everyone:
        one.line.beat()
    settle(everyone)
    busy, idle, *_ = holders(everyone)
    assert [one.part.share for one in holders(everyone)] == [1] * 4
    busy.waiting = 20
    settle(everyone)
    assert (busy.in_flight, [one.part.share for one in holders(everyone)]) == (7, [7, 1, 1, 1])
    idle.waiting = 20
    settle(everyone)
    assert (busy.in_flight, idle.in_flight, idle.part.share) == (7, 1, 1)
    while busy.in_flight > busy.part.share:
        busy.end()
    settle(everyone)
    assert (busy.in_flight, idle.in_flight) == (4, 4)


def test_after_all_was_forgotten_nobody_gets_more_until_all_have_said_what_they_have(client: redis.Redis) -> None:
    everyone = people(client, 2, Holder)
    for one in everyone:
        one.line.beat()
    busy, other = holders(everyone)
    busy.waiting = 9
    settle(everyone)
    assert (busy.in_flight, other.part.held) == (9, 1)
    client.delete(*[f"{everyone[0].line.space}:{key}" for key in ("generation", "replicas", "endpoint:e")])
    other.waiting = 5
    for one in reversed(everyone):
        one.line.time = NOW + 1
        one.line.beat()
        one.speak(NOW + 1)
    assert (busy.part.held, other.part.held, other.in_flight) == (9, 1, 1)
    for _ in range(5):
        busy.end()
    for one in [*everyone, *reversed(everyone)]:
        one.line.time = NOW + LIFETIME
        one.line.beat()
        one.speak(NOW + LIFETIME + 1)
    assert other.in_flight == 5


def test_who_was_taken_for_dead_keeps_what_is_in_flight_and_no_more(client: redis.Redis) -> None:
    still, other = people(client, 2, Holder)
    for one in (still, other):
        one.line.beat()
    holder, other_holder = holders([still, other])
    holder.waiting = 6
    settle([still, other])
    assert holder.in_flight == 6
    holder.end()
    later = NOW + LIFETIME + 1
    other.line.time = later
    other.line.beat()
    other_holder.waiting = 10
    settle([other], 2)
    assert other_holder.in_flight == 10, "what it held is lost to all"
    holder.waiting = 5
    still.speak(later)
    assert holder.part.share <= holder.in_flight == 5
    still.line.beat()
    for _ in range(3):
        still.speak(later)
        other.speak(later)
    assert holder.in_flight == 5, "it began another one"
    assert recorded(client, still.line.space, [still]) == 5, "nobody knows what it has in flight"
    assert other_holder.part.share == 5


def test_who_has_not_said_that_it_lives_is_given_nothing(client: redis.Redis) -> None:
    """The others would count none of it."""
    one, other = people(client, 2, Holder)
    other.line.beat()
    holder = holders([one])[0]
    holder.waiting = 3
    one.speak()
    assert (holder.in_flight, recorded(client, one.line.space, [one])) == (0, 0)
    one.line.beat()
    one.speak()
    assert holder.in_flight == 3


def test_what_is_no_record_of_an_endpoint_is_as_good_as_none(client: redis.Redis) -> None:
    (one,) = people(client, 1, Holder)
    one.line.beat()
    key = f"{one.line.space}:endpoint:e"
    client.set(key, "what")
    one.speak()
    assert one.talker.part.held == 10  # type: ignore[attr-defined]
    client.hset(key, "someone", "ever")
    one.speak()
    assert set(client.hgetall(key)) == {b"r0"}


# --- what gateways say ------------------------------------------------------------------------------------------------


LINE = Group(())


def gateway() -> tuple[Queue, Sharing, Metrics]:
    metrics = Metrics(10)
    rules = AdmissionRules()
    admission = Admission(Pool(Catalogue()), metrics, lambda: 5.0, rules, lambda call: None, lambda below: 0)
    return admission.queue, Sharing(admission, metrics, lambda: 5.0, lambda: None), metrics


def test_what_a_gateway_says_another_understands() -> None:
    queue, sharing, _ = gateway()
    assert sharing.tell() == b""
    for tenant, cost, weight in (("a", 3.5, 2.0), ("ä|\n", 4.0, 1.0)):
        assert queue.enter(LINE, Waiting(tenant, 0.0, 100.0, cost=cost, weight=weight), 0.0) is None
    items = [queue.next([LINE], lambda item: True, 0.0) for _ in range(2)]
    message = sharing.tell()
    assert b"\n" not in message
    assert items[0] is not None
    queue.settle(items[0], 1.0)
    other, hears, metrics = gateway()
    assert other.enter(LINE, Waiting("z", 0.0, 100.0), 0.0) is None
    hears.told([message, b"what?", sharing.tell()])
    shares = other.line(LINE).classes[0].shares
    assert (shares.counter("a"), shares.counter("ä|\n")) == (1.75 + 0.5, 4.0)
    hears.missed()
    assert metrics.shares_lost == {"untold": 0, "unread": 1, "missed": 1}
    assert b'forebay_shares_lost_total{what="unread"} 1.0' in metrics.render()


def test_a_message_is_bounded_and_what_is_lost_is_counted() -> None:
    queue, sharing, metrics = gateway()
    assert queue.deltas is not None
    for number in range(MOST_TENANTS + 10):
        queue.deltas.note(("line", 0, str(number)), Charge(served=1.0))
    queue.deltas.lost = 3
    assert [sharing.tell().count(b"[1.0,") for _ in range(3)] == [MOST_TENANTS, 10, 0]
    assert metrics.shares_lost["untold"] == 3
