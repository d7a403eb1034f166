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

from gateway.metrics import Metrics
from gateway.policy.fairness import Charge
from gateway.policy.queue import Queue, QueueRules, Waiting
from gateway.policy.token_bucket import SECOND, STEP
from gateway.serving.sharing import MOST_TENANTS, Sharing
from gateway.store import scripts
from gateway.store.exchange import Exchange
from gateway.store.scripts import BEAT, Script, Told, parse
from tests.store.servers import Deaf, Server, until
from tests.store.test_replicas import a_store

NOW = 1_790_000_000 * SECOND
KEPT = 3 * SECOND
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


class Line:
    """A session whose calls run at once, and are lost before or after that as a test says."""

    def __init__(self, client: redis.Redis, space: str, name: str) -> None:
        self.client = client
        self.space = space
        self.name = name
        self.now = NOW
        self.fence = 1
        self.generation = ""
        self.serving = True
        self.lost = ""

    def call(self, script: Script, keys: Sequence[str], words: Sequence[str | bytes]) -> Told:
        keys = [f"{self.space}:{key}" for key in ("generation", "replicas", f"r:{self.name}", *keys)]
        head = (str(self.now), self.generation, self.name, str(self.fence))
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


@dataclass
class Person:
    """One replica's end of the conversation."""

    line: Line
    talker: Talker
    exchange: Exchange
    dropped: list[bool]

    def speak(self, now: int | None = None, lost: str = "") -> None:
        if now is not None:
            self.line.now = now
        self.line.lost = lost
        self.exchange.speak()


@pytest.fixture(scope="module")
def client(shared_server: Server) -> Iterator[redis.Redis]:
    with shared_server.client() as client:
        for script in scripts.ALL:
            client.script_load(script.source)
        yield client


def people(client: redis.Redis, count: int) -> list[Person]:
    space = f"talk{next(names)}"
    made = []
    for at in range(count):
        line, talker, dropped = Line(client, space, f"r{at}"), Talker(f"r{at}"), [False]
        exchange = Exchange(line, lambda: None, partial(dropped.append, True), NOW)  # type: ignore[arg-type]
        exchange.join(talker)
        made.append(Person(line, talker, exchange, dropped))
    return made


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


# --- what gateways say ------------------------------------------------------------------------------------------------


def gateway() -> tuple[Queue, Sharing, Metrics]:
    queue, metrics = Queue(QueueRules()), Metrics(10)
    return queue, Sharing(queue, metrics, lambda: 5.0), metrics


def test_what_a_gateway_says_another_understands() -> None:
    queue, sharing, _ = gateway()
    assert sharing.tell() == b""
    for tenant, cost, weight in (("a", 3.5, 2.0), ("ä|\n", 4.0, 1.0)):
        assert queue.enter("line", Waiting(tenant, 0.0, 100.0, cost=cost, weight=weight), 0.0) is None
    items = [queue.next(["line"], lambda item: True, 0.0) for _ in range(2)]
    message = sharing.tell()
    assert b"\n" not in message
    assert items[0] is not None
    queue.settle(items[0], 1.0)
    other, hears, metrics = gateway()
    assert other.enter("line", Waiting("z", 0.0, 100.0), 0.0) is None
    hears.told([message, b"what?", sharing.tell()])
    shares = other.line("line").classes[0].shares
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
