"""Keys of the state database while the gateway runs: made, revoked, expired, and when the database is away."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from gateway.keyring import POLL_INTERVAL
from gateway.settings import Caps, KeySettings, State
from gateway.state.keys import CreatedKey, KeyStore
from tests.conftest import Connect
from tests.support.gateway import AUTH, CHAT, MODEL, Gateway, StartGateway, chat, relayed
from tests.support.recordings import load
from tests.support.script import DONE, Gate, event_stream, play
from tests.support.upstream import ScriptedUpstream


class Operator:
    """Somebody with the command line on the same database: every change is seen at the next look."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._store = KeyStore(gateway.replica.settings.state_url)

    async def create(self, name: str, *args: Any, **kwargs: Any) -> CreatedKey:
        created = await asyncio.to_thread(self._store.create, name, *args, **kwargs)
        await self._gateway.replica.keyring.look()
        return created

    async def revoke(self, created: CreatedKey) -> None:
        await asyncio.to_thread(self._store.revoke, created.record.public_id)
        await self._gateway.replica.keyring.look()

    async def close(self) -> None:
        await asyncio.to_thread(self._store.close)


@pytest.fixture
async def gateway(start_gateway: StartGateway, upstream: ScriptedUpstream) -> Gateway:
    """A gateway that knows the state database's keys too."""
    return await start_gateway(upstream, database=True)


@pytest.fixture
async def operator(gateway: Gateway, upstream: ScriptedUpstream) -> Any:
    """An operator of the test's gateway, whose engine answers everything well."""
    upstream.always(play(load("vllm", "chat_basic")), path=CHAT)
    someone = Operator(gateway)
    yield someone
    await someone.close()


async def status(gateway: Gateway, key: str, **fields: Any) -> int:
    return (await gateway.ask(chat(**fields), headers=[("authorization", f"Bearer {key}")])).status


async def test_a_new_key_works_and_a_revoked_one_does_not(gateway: Gateway, operator: Operator) -> None:
    """Without a restart, and the file's keys beside it."""
    assert await status(gateway, "fb-000000000000-x") == 401
    created = await operator.create("bob", "research")
    assert created.key.startswith(f"fb-{created.record.public_id}-")
    assert await status(gateway, created.key) == 200
    line = gateway.lines("request")[-1]
    assert (line["key"], line["tenant"]) == ("bob", "research")
    await operator.revoke(created)
    assert await status(gateway, created.key) == 401
    assert (await gateway.ask(chat())).status == 200
    assert [change["keys"] for change in gateway.lines("keys_changed")] == [1, 0]


async def test_a_key_of_the_database_is_limited_like_one_of_the_file(gateway: Gateway, operator: Operator) -> None:
    """Models, caps and its end."""
    other = await operator.create("other", None, ["other-*"])
    capped = await operator.create("capped", None, [MODEL], Caps(max_tokens=5))
    expired = await operator.create("expired", None, None, None, datetime.now(UTC) - timedelta(seconds=1))
    assert await status(gateway, other.key) == 403
    assert await status(gateway, capped.key, max_tokens=5) == 200
    assert await status(gateway, capped.key, max_tokens=6) == 400
    assert await status(gateway, expired.key) == 401
    listed = await gateway.get("/v1/models", [("authorization", f"Bearer {other.key}")])
    assert listed.json()["data"] == []


async def test_the_files_names_win(gateway: Gateway, operator: Operator) -> None:
    """A key of the database with a name that the file uses lets nobody in."""
    created = await operator.create("alice")
    assert await status(gateway, created.key) == 401
    assert (await gateway.ask(chat())).status == 200


async def test_a_revoked_keys_running_stream_ends_as_it_should(
    gateway: Gateway, upstream: ScriptedUpstream, operator: Operator, connect: Connect
) -> None:
    """A change of keys is for requests to come."""
    created = await operator.create("bob")
    gate = Gate()
    stream = event_stream(load("vllm", "chat_stream").events())
    upstream.queue(stream.do(gate, stream.after_frame(1)), path=CHAT)
    client = await connect(gateway.url)
    client.post(CHAT, chat(stream=True), [("authorization", f"Bearer {created.key}")])
    await upstream.saw("gate")
    await operator.revoke(created)
    gate.open()
    assert (await client.response()).events()[-1] == DONE
    client.post(CHAT, chat(), [("authorization", f"Bearer {created.key}")])
    assert (await client.response()).status == 401


async def test_a_change_is_seen_within_a_second_or_so(
    start_gateway: StartGateway, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the replica's own looks, a second apart where nobody hurries them: here nobody asks it to look."""
    upstream.always(play(load("vllm", "chat_basic")), path=CHAT)
    assert POLL_INTERVAL <= 1
    monkeypatch.setattr("gateway.keyring.POLL_INTERVAL", 0.02)
    gateway = await start_gateway(upstream, database=True)
    store = KeyStore(gateway.replica.settings.state_url)
    created = await asyncio.to_thread(store.create, "bob")
    await asyncio.to_thread(store.close)
    await gateway.line("keys_changed")
    assert await status(gateway, created.key) == 200


def break_database(folder: Path) -> None:
    """Put something else in the place of the database, as a failing disk would."""
    for file in folder.glob("forebay.db*"):
        file.unlink()
    (folder / "forebay.db").write_bytes(b"this is no database" * 1000)


async def test_known_keys_keep_working_while_the_database_is_away(
    start_gateway: StartGateway, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """For the stated time; then those of the database are dropped, and those of the file stay."""
    gateway = await start_gateway(upstream, state=State(key_cache=600))
    upstream.always(play(load("vllm", "chat_basic")), path=CHAT)
    operator = Operator(gateway)
    created = await operator.create("bob")
    await operator.close()
    keyring = gateway.replica.keyring
    # What is open keeps reading the old file: the store is closed, so that the next look meets the new one.
    assert keyring._store is not None
    await asyncio.to_thread(keyring._store.close)
    break_database(tmp_path)
    await keyring.look()
    await keyring.look()
    assert len(gateway.lines("state_database_away")) == 1, "said once, not at every look"
    assert gateway.lines("state_database_away")[0]["known_keys_work_for_seconds"] == 600
    gateway.advance(599)
    await keyring.look()
    assert await status(gateway, created.key) == 200
    gateway.advance(2)
    await keyring.look()
    assert await status(gateway, created.key) == 401
    assert (await gateway.ask(chat(), headers=AUTH)).status == 200
    assert len(gateway.lines("keys_of_database_dropped")) == 1


async def test_without_authentication_the_database_is_left_alone(
    start_gateway: StartGateway, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """A laptop needs no database to try the gateway."""
    gateway = await start_gateway(upstream, auth="none", keys=())
    await gateway.replica.keyring.look()
    assert list(tmp_path.glob("*.db")) == []
    assert relayed(upstream) == []


async def test_the_same_key_in_file_and_database_is_the_files(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    """What the file declares is what it may do."""
    gateway = await start_gateway(
        upstream, keys=(KeySettings(name="file", key=SecretStr("shared"), models=()),), database=True
    )
    store = KeyStore(gateway.replica.settings.state_url)
    await asyncio.to_thread(store.import_key, "database", key="shared")
    await asyncio.to_thread(store.close)
    await gateway.replica.keyring.look()
    assert await status(gateway, "shared") == 403
    assert gateway.lines("request")[-1]["key"] == "file"
