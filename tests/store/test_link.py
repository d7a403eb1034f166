"""The way to the server: every kind of URL, and what servers answer besides answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import pytest
import redis
from redis.crc import key_slot

from gateway.policy.token_bucket import Shape, rate_shape
from gateway.redis_url import read_url
from gateway.store.protocol import Draw, Granted, Refused, Standing, Verdict
from gateway.store.redis import Mode, RedisStore
from tests.store.drawing import look, take
from tests.store.servers import Deaf, Odd, Server, until
from tests.store.test_exchange import Holder
from tests.support.table import each, named
from tests.support.tls import AUTHORITY

DRAWS = (Draw("a", rate_shape(600, 60), 1000),)


def a_store(url: str, timeout: float = 2.0, ca: str | None = None) -> RedisStore:
    return RedisStore(
        url=url, replica_id="one", clock=lambda: time.time_ns() // 1000, mode=Mode.EXACT, timeout=timeout, ca=ca
    )


async def reserve(store: RedisStore, draws: Sequence[Draw] = DRAWS) -> Verdict:
    verdict = take(store, draws, 1)
    return verdict if isinstance(verdict, Granted | Refused) else await verdict


@contextmanager
def a_server(*options: str, sentinel_of: Server | None = None) -> Iterator[Server]:
    server = Server(*options, sentinel_of=sentinel_of)
    server.start()
    try:
        yield server
    finally:
        server.close()


async def test_every_kind_of_url_is_a_way_in(shared_server: Server) -> None:
    """A user with no rights but ours; TLS by a given authority; a socket in the file system; a database."""
    ours = "~{forebay}* +evalsha +eval +script|load +select +get +set +time +zscore +zremrangebyscore +zadd +pexpire"
    user = f"user forebay on >pa:ss@w/rd {ours} +del +zrem +zcount +zrangebyscore +hget +hset +hdel +hgetall"
    with a_server(user) as guarded:
        encrypted = Deaf(shared_server, tls=True)
        urls = (
            (encrypted.url, str(AUTHORITY)),
            (f"{encrypted.url}?ssl_ca_certs={AUTHORITY}", None),
            (guarded.url.replace("://", "://forebay:pa:ss%40w%2Frd@"), None),
            (f"unix://forebay:pa%3Ass%40w%2Frd@{guarded.socket}", None),
            (f"{guarded.url}/3", None),
        )
        async with encrypted:
            for url, ca in urls:
                store = a_store(url, ca=ca)
                store.join(Holder())
                await store.start()
                verdict = await reserve(store)
                assert isinstance(verdict, Granted)
                assert verdict.standing is Standing.STORE, url
                await until(lambda store=store: store._exchange._heard, "it may not speak")
                await store.stop()


async def test_a_wrong_password_is_a_standing_and_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with a_server("requirepass right") as server:
        store = a_store(server.url.replace("://", "://:sesame@"), timeout=0.05)
        await store.start()
        assert store.standing is Standing.DEGRADED
        await store.stop()
    assert "AuthenticationError" in caplog.text
    assert "sesame" not in caplog.text


@each(
    ("url", "shown"),
    [
        ("redis://u:sesame@host:1/2", "redis://host:1"),
        ("redis://:ses%61me@h", "redis://h:6379"),
        ("rediss://u:sesame@[::1]:7000", "rediss://::1:7000"),
        ("unix://u:sesame@/run/redis.sock", "unix:///run/redis.sock"),
        ("redis+sentinel://u:sesame@a:1,b/main/2?sentinel_password=sesame", "redis+sentinel://a:1,b:26379/main"),
        ("redis+cluster://a:1,b:2", "redis+cluster://a:1,b:2"),
        ("rediss+sentinel://u:sesame@a/main", "rediss+sentinel://a:26379/main"),
    ],
)
def test_what_is_shown_of_a_url_has_no_password(url: str, shown: str) -> None:
    target = read_url(url)
    assert str(target) == repr(target) == shown
    assert target.password in {None, "sesame"}


@each(
    "url",
    [
        "http://u:sesame@host",
        "redis://u:sesame@host:port",
        "redis://host:sesame",
        "sesame",
        "redis+sentinel://u:sesame@a:1",
        "redis://u:sesame@host/db",
    ],
)
def test_an_error_about_a_url_repeats_nothing_of_it(url: str) -> None:
    with pytest.raises(ValueError, match="URL") as raised:
        read_url(url)
    assert "sesame" not in str(raised.value)
    assert raised.value.__cause__ is None


async def test_scripts_the_server_forgot_are_sent_again(own_server: Server) -> None:
    store = a_store(own_server.url)
    await store.start()
    with own_server.client() as plain:
        plain.script_flush()
        accepted = plain.info("stats")["total_connections_received"]
        verdicts = await asyncio.gather(*(reserve(store) for _ in range(5)))
        assert all(isinstance(verdict, Granted) for verdict in verdicts)
        assert plain.info("stats")["total_connections_received"] == accepted
    (bucket,) = await look(store, DRAWS)
    assert 595_000 <= bucket.level < 596_000
    await store.stop()


@pytest.mark.usefixtures("unhandled")
async def test_answers_of_a_server_that_was_emptied_are_each_their_own_calls(own_server: Server) -> None:
    """The first of them ends the connection, the others have come with it."""
    store = a_store(own_server.url)
    await store.start()
    own_server.command("FLUSHALL")
    asked = [(Draw(f"b{at}", Shape(10**6), at),) for at in range(20)]
    verdicts = await asyncio.gather(*(reserve(store, draws) for draws in asked))
    for at, verdict in enumerate(verdicts):
        assert isinstance(verdict, Refused) == (at > 0), "it begins at nothing"
        assert verdict.standing is Standing.STORE
    await store.stop()


async def test_a_server_that_may_not_write_is_lost_until_it_may(own_server: Server) -> None:
    """As after a failover, when the old master has become a replica."""
    store = a_store(own_server.url, timeout=0.05)
    await store.start()
    own_server.command("REPLICAOF", "127.0.0.1", "1")
    verdict = await reserve(store)
    assert isinstance(verdict, Granted)
    assert verdict.standing is Standing.DEGRADED
    own_server.command("REPLICAOF", "NO", "ONE")
    await until(lambda: store.standing is Standing.STORE)
    await store.stop()


async def test_a_sentinel_names_the_master_before_and_after_a_failover() -> None:
    with ExitStack() as stack:
        old, new = (stack.enter_context(a_server()) for _ in range(2))
        new.command("REPLICAOF", "127.0.0.1", str(old.port))
        await until(lambda: b"'master_link_status': 'up'" in _info(new))
        options = [
            f"sentinel monitor main 127.0.0.1 {old.port} 1",
            "sentinel down-after-milliseconds main 200",
            "sentinel failover-timeout main 2000",
        ]
        sentinel = stack.enter_context(a_server(*options, sentinel_of=old))
        store = a_store(f"redis+sentinel://127.0.0.1:{sentinel.port}/main", timeout=0.1)
        await store.start()
        assert store.standing is Standing.STORE
        assert isinstance(await reserve(store), Granted)
        await until(lambda: sentinel.command("SENTINEL", "SLAVES", "main"))
        old.kill()
        await until(lambda: store._link._connection is None)
        assert isinstance(await reserve(store), Granted)
        await until(lambda: b"'role': 'master'" in _info(new))
        await until(lambda: store.standing is Standing.STORE)
        assert store._link._connection.port == new.port
        await store.stop()


def _info(server: Server) -> bytes:
    # A server that is promoted ends the connections it has.
    with suppress(redis.ConnectionError):
        return repr(server.command("INFO", "replication")).encode()
    return b""


async def test_a_cluster_says_which_node_has_the_buckets() -> None:
    """The first node asked has none of them."""
    options = ("cluster-enabled yes", "cluster-require-full-coverage no", "cluster-node-timeout 1000")
    with a_server(*options) as other, a_server(*options) as holder:
        holder.command("CLUSTER", "ADDSLOTS", *map(str, range(16384)))
        other.command("CLUSTER", "MEET", "127.0.0.1", str(holder.port))
        await until(lambda: all(b"cluster_state:ok" in s.command("CLUSTER", "INFO") for s in (other, holder)))
        store = a_store(f"redis+cluster://127.0.0.1:{other.port},127.0.0.1:{holder.port}")
        await store.start()
        verdict = await reserve(store)
        assert isinstance(verdict, Granted)
        assert verdict.standing is Standing.STORE
        assert store._link._connection.port == holder.port
        await store.stop()


ANSWERS = [
    b"$7\r\ngarbage\r\n",
    b"$0\r\n\r\n",
    b":1\r\n",
    b"$-1\r\n",
    b"*2\r\n:1\r\n:2\r\n",
    b"$4\r\nvoid\r\n",
    b"$16\r\ntaken 1 1 1 0 0 \xff\r\n",
    b"-ERR this is no server for you\r\n",
    b"-ASK 1 127.0.0.1:1\r\n",
    b"-MOVED 1 127.0.0.1:1\r\n",
    b"-BUSY a script\r\n",
    b"-MISCONF no disk\r\n",
    b"-OOM too much\r\n",
    b"-NOPERM not you\r\n",
    b"!\r\n",
]


async def test_whatever_a_server_answers_is_a_standing(unhandled: list[str]) -> None:
    """It is asked again, not too often, and nobody waits. All of them at once: asking again takes its time."""

    async def asked_again(answer: bytes) -> None:
        async with Odd(answer) as odd:
            store = a_store(f"redis://127.0.0.1:{odd.port}", timeout=0.05)
            store._link.start()
            verdict = await reserve(store)
            with named(answer=answer):
                assert isinstance(verdict, Granted)
                assert verdict.standing is Standing.DEGRADED
                await until(lambda: odd.met >= 3)
                assert store.standing is Standing.DEGRADED
                assert odd.met < 30
            await store._link.close()

    await asyncio.gather(*(asked_again(answer) for answer in ANSWERS))


@pytest.mark.parametrize(
    "answer", [b":1\r\n", b"*1\r\n:1\r\n", b"$3\r\nabc\r\n", b"*2\r\n$1\r\na\r\n$1\r\nb\r\n", b"*-1\r\n"]
)
async def test_whatever_a_sentinel_answers_others_are_asked(answer: bytes, unhandled: list[str]) -> None:
    async with Odd(answer) as odd:
        store = a_store(f"redis+sentinel://127.0.0.1:{odd.port}/main", timeout=0.05)
        store._link.start()
        await until(lambda: odd.met >= 3)
        await store._link.close()


async def test_a_link_ends_even_where_being_cancelled_is_taken_for_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    store = a_store("redis://127.0.0.1:1")
    opening = asyncio.Event()

    async def connect() -> None:
        opening.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ConnectionError from None

    monkeypatch.setattr(store._link, "_open", connect)
    store._link.start()
    await opening.wait()
    await asyncio.wait_for(store._link.close(), 5)


async def test_a_node_that_does_not_know_its_address_means_the_one_it_has(shared_server: Server) -> None:
    async with Odd(b"-MOVED 1 :%d\r\n" % shared_server.port) as odd:
        store = a_store(f"redis+cluster://127.0.0.1:{odd.port}")
        await store.start()
        assert store.standing is Standing.STORE
        assert store._link._connection.port == shared_server.port
        await store.stop()


@pytest.mark.parametrize("kind", ["sentinel", "cluster"])
async def test_what_names_the_server_is_spoken_to_encrypted_as_the_server_is(shared_server: Server, kind: str) -> None:
    async with Deaf(shared_server, tls=True) as encrypted:
        port = encrypted.url.rpartition(":")[2].encode()
        named = b"*2\r\n$9\r\n127.0.0.1\r\n$5\r\n" + port + b"\r\n"
        answer = named if kind == "sentinel" else b"-MOVED 1 127.0.0.1:" + port + b"\r\n"
        async with Odd(answer, tls=True) as odd:
            store = a_store(f"rediss+{kind}://127.0.0.1:{odd.port}/{'main' * (kind == 'sentinel')}", ca=str(AUTHORITY))
            await store.start()
            verdict = await reserve(store)
            assert verdict.standing is Standing.STORE
            await store.stop()


async def test_any_name_is_a_name_of_its_own(shared_server: Server, unhandled: list[str]) -> None:
    """Of whatever a client may bring into one; one that cannot be written does not turn the answers of others round."""
    names = [
        "a",
        "a\0",
        "a\0b",
        "{x}",
        "}{",
        "a}",
        "\ud800",
        "\udcff",
        "ÿ",
        "é",
        "e\u0301",
        "a b",
        "a\r\nb",
        "x" * 100_000,
        "",
    ]
    store = a_store(shared_server.url)
    await store.start()
    draws = [(Draw(f"odd:{name}", Shape(10**6), at + 1),) for at, name in enumerate(names)]
    verdicts = await asyncio.gather(*(reserve(store, draw) for draw in draws))
    for at, verdict in enumerate(verdicts):
        assert isinstance(verdict, Granted)
        assert verdict.standing is Standing.STORE
        assert verdict.levels.left(0) == 10**6 - at - 1, names[at][:9]
    with shared_server.client() as plain:
        kept = plain.keys("{forebay}:b:odd:*")
    assert isinstance(kept, list)
    assert len(kept) == len(names)
    assert {key_slot(key) for key in kept if isinstance(key, bytes)} == {key_slot(b"forebay")}
    await store.stop()
