"""Gateways whose state is in PostgreSQL: one set of keys, one ledger, and what happens while the server is away."""

from __future__ import annotations

import asyncio

import pytest

from gateway.settings import State
from gateway.state.database import upgrade
from tests.api.test_admin_endpoints import ADMIN, KEYS
from tests.support.databases import Postgresql
from tests.support.gateway import CHAT, Gateway, StartGateway, chat
from tests.support.recordings import load
from tests.support.script import play
from tests.support.upstream import ScriptedUpstream

pytestmark = pytest.mark.parametrize("face", ["protocol"], indirect=True)
OPERATOR = dict(ADMIN)["authorization"].removeprefix("Bearer ")


async def asked(gateway: Gateway, key: str) -> int:
    return (await gateway.ask(chat(), headers=[("authorization", f"Bearer {key}")])).status


async def flushed(gateway: Gateway) -> None:
    books = gateway.replica.books
    assert books is not None
    await books.flush()


async def test_two_gateways_have_one_set_of_keys_and_one_ledger(
    start_gateway: StartGateway, upstream: ScriptedUpstream, postgresql: Postgresql
) -> None:
    await asyncio.to_thread(postgresql.clear)
    upstream.always(play(load("vllm", "chat_basic")), path=CHAT)
    one, other = [await start_gateway(upstream, keys=KEYS, state=State(url=postgresql.url)) for _ in range(2)]
    made = (await one.admin("POST", "/admin/keys", {"name": "bob", "tenant": "t"}, key=OPERATOR)).json()
    await other.replica.keyring.look()
    assert [await asked(gateway, made["key"]) for gateway in (one, other, other)] == [200, 200, 200]
    await flushed(one)
    await flushed(other)
    sums = await one.get("/admin/usage?by=tenant,day&tenant=t", ADMIN, admin=True)
    assert [row["requests"] for row in sums.json()["data"]] == [3]
    table = await other.get("/admin/usage?by=key,model&tenant=t&format=csv", ADMIN, admin=True)
    assert len(table.body.splitlines()) == 2

    await asyncio.to_thread(postgresql.go_away)
    try:
        await other.replica.keyring.look()
        assert await asked(other, made["key"]) == 200, "known keys keep working"
        await flushed(other)
        assert (await one.admin("POST", "/admin/keys", {"name": "eve"}, key=OPERATOR)).status == 503
        assert (await one.get("/admin/usage", ADMIN, admin=True)).status == 503
    finally:
        await asyncio.to_thread(postgresql.come_back)
    assert (await one.admin("DELETE", f"/admin/keys/{made['id']}", key=OPERATOR)).status == 200
    await other.replica.keyring.look()
    assert [await asked(gateway, made["key"]) for gateway in (one, other)] == [401, 401]
    await flushed(other)
    sums = await one.get("/admin/usage?by=tenant&tenant=t", ADMIN, admin=True)
    assert [row["requests"] for row in sums.json()["data"]] == [4]
    said = {line["event"] for line in other.lines()}
    assert {"state_database_away", "state_database_back", "usage_spooled", "usage_stored_again"} <= said


async def test_gateways_that_start_at_once_make_the_database_once(
    start_gateway: StartGateway, upstream: ScriptedUpstream, postgresql: Postgresql
) -> None:
    await asyncio.to_thread(postgresql.empty)
    state = State(url=postgresql.url)
    await asyncio.gather(*(start_gateway(upstream, keys=KEYS, state=state) for _ in range(2)))
    await asyncio.to_thread(upgrade, postgresql.url)
