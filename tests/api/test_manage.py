"""Keys, tenants, organisations and the audit by API: who may, what each call does, and what it never tells."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from gateway.app import Replica
from gateway.keyring import POLL_INTERVAL
from gateway.settings import KeySettings
from gateway.state.keys import KeyStore
from tests.support.client import Response, error_of
from tests.support.gateway import CHAT, KEY, Face, Gateway, StartGateway, chat, until
from tests.support.recordings import load
from tests.support.script import play
from tests.support.table import each
from tests.support.upstream import ScriptedUpstream

ROOT = "fb-root-secret"
KEYS = (
    KeySettings(name="alice", key=SecretStr(KEY), tenant="declared"),
    KeySettings(name="root", key=SecretStr(ROOT), admin=True, models=()),
)
PATHS = [
    ("GET", "/admin/keys"), ("POST", "/admin/keys"), ("GET", "/admin/keys/x"), ("PATCH", "/admin/keys/x"),
    ("DELETE", "/admin/keys/x"), ("POST", "/admin/keys/x/rotate"), ("GET", "/admin/tenants"),
    ("PUT", "/admin/tenants/x"), ("DELETE", "/admin/tenants/x"), ("GET", "/admin/organisations"),
    ("PUT", "/admin/organisations/x"), ("DELETE", "/admin/organisations/x"), ("GET", "/admin/audit"),
]  # fmt: skip


class Api:
    """The admin API of a gateway, with a key."""

    def __init__(self, gateway: Gateway, key: str = ROOT) -> None:
        self.gateway, self.key = gateway, key

    async def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> Response:
        named = [(name.replace("_", "-"), value) for name, value in headers.items()]
        return await self.gateway.admin(method, f"/admin/{path}", body, key=self.key, headers=named)

    async def ok(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        answer = await self(method, path, body, **headers)
        assert answer.status in (200, 201), answer.body
        return answer.json()

    async def refused(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str, str]:
        answer = await self(method, path, body, **headers)
        error = error_of(answer)
        return answer.status, error["code"], error["message"]


@pytest.fixture
def face() -> Face:
    """The operators' listener is the same behind either face: shown on one."""
    return "protocol"


@pytest.fixture
async def api(start_gateway: StartGateway, upstream: ScriptedUpstream) -> Api:
    """The admin API of a gateway whose engine answers everything well."""
    upstream.always(play(load("vllm", "chat_basic")), path=CHAT)
    return Api(await start_gateway(upstream, keys=KEYS, database=True))


async def works(gateway: Gateway, key: str) -> bool:
    status = (await gateway.ask(chat(), headers=[("authorization", f"Bearer {key}")])).status
    assert status in (200, 401)
    return status == 200


# --- who may, and where ----------------------------------------------------------------------------------------------


async def test_only_an_admin_key_on_the_operators_listener(api: Api) -> None:
    for method, path in PATHS:
        for key, status in ((KEY, 403), ("nobody", 401)):
            assert (await api.gateway.admin(method, path, {}, key=key)).status == status, (method, path)
        assert (await api.gateway.get(path, [("authorization", f"Bearer {ROOT}")], method=method)).status == 404


async def test_they_are_documented(api: Api) -> None:
    documented = (await api.gateway.get("/openapi.json", admin=True)).json()["paths"]
    for method, path in PATHS:
        shown = path.replace("/x", "/{key}" if "keys" in path else "/{name}")
        assert documented[shown][method.lower()]["summary"]


# --- keys ------------------------------------------------------------------------------------------------------------


async def test_a_key_lives_from_its_creation_to_its_revocation(api: Api) -> None:
    """Known to this replica when it is answered; told once."""
    rights = {"team": "research", "caps": {"n": 2}, "limits": {"requests": "600/m"}, "expires": "30d"}
    answer = await api("POST", "keys", {"name": "bob", **rights})
    made = answer.json()
    assert (answer.status, answer.header("cache-control")) == (201, "no-store")
    assert (made["tenant"], made["caps"], made["limits"]) == (
        "research", {"n": 2}, {"requests": [{"rate": "600/m"}]},
    )  # fmt: skip
    assert await works(api.gateway, made["key"])
    shown = await api("GET", f"keys/{made['id']}")
    assert shown.json() == {name: value for name, value in made.items() if name != "key"}
    assert shown.header("etag") == answer.header("etag")
    assert (await api.ok("GET", "keys/bob"))["id"] == made["id"]
    changed = await api.ok("PATCH", f"keys/{made['id']}", {"models": [], "caps": None})
    assert (changed["models"], changed["caps"], changed["tenant"]) == ([], {}, "research")
    assert (await api.gateway.ask(chat(), headers=[("authorization", f"Bearer {made['key']}")])).status == 403
    revoked = await api.ok("DELETE", f"keys/{made['id']}")
    assert (revoked["state"], bool(revoked["revoked"])) == ("revoked", True)
    assert not await works(api.gateway, made["key"])
    assert await api.refused("DELETE", f"keys/{made['id']}") == (
        400, "not_possible", f"Key {made['id']} (bob) is revoked already.",
    )  # fmt: skip


async def test_a_key_is_let_in_by_its_hash_and_nothing_is_told_of_it(api: Api) -> None:
    digest = hashlib.sha256(b"sk-elsewhere").hexdigest()
    answer = await api("POST", "keys", {"name": "bob", "sha256": digest})
    assert (answer.status, "key" in answer.json()) == (201, False)
    assert digest.encode() not in answer.body
    assert await works(api.gateway, "sk-elsewhere")
    assert (await api.refused("POST", "keys", {"name": "bob", "sha256": digest}))[0] == 400


async def test_a_rotated_key_and_its_heir_both_work_for_the_overlap(api: Api) -> None:
    old = await api.ok("POST", "keys", {"name": "a/b", "tenant": "t"})
    answer = await api("POST", "keys/a%2Fb/rotate", {"overlap": "1h"})
    new = answer.json()
    assert (answer.status, answer.header("cache-control")) == (201, "no-store")
    assert (new["replaces"], new["tenant"], new["replaced"]["id"]) == (old["id"], "t", old["id"])
    assert new["replaced"]["expires"] is not None
    assert await works(api.gateway, old["key"])
    assert await works(api.gateway, new["key"])
    assert await api.refused("GET", "keys/a/b") == (
        400, "not_possible", f"Several keys are named 'a/b': {old['id']}, {new['id']}; say which one by its id.",
    )  # fmt: skip
    now = (await api.ok("POST", f"keys/{new['id']}/rotate", {"overlap": 0}))["key"]
    assert (await works(api.gateway, new["key"]), await works(api.gateway, now)) == (False, True)
    assert (await api("POST", f"keys/{old['id']}/rotate")).status == 400


async def test_lists_show_file_and_database_and_filter(api: Api) -> None:
    made = await api.ok("POST", "keys", {"name": "bob", "tenant": "t"})
    await api.ok("DELETE", f"keys/{made['id']}")
    listed = {one["name"]: one for one in (await api.ok("GET", "keys"))["data"]}
    assert {name: (one["source"], one["state"], one["id"]) for name, one in listed.items()} == {
        "alice": ("file", "live", None), "root": ("file", "live", None), "bob": ("database", "revoked", made["id"]),
    }  # fmt: skip
    for query, names in (
        ("tenant=t", ["bob"]), ("team=declared", ["alice"]), ("state=live", ["alice", "root"]),
        ("state=revoked&tenant=t", ["bob"]), ("state=expired", []),
    ):  # fmt: skip
        assert [one["name"] for one in (await api.ok("GET", f"keys?{query}"))["data"]] == names, query
    status, _, said = await api.refused("GET", "keys?stat=live")
    assert (status, said) == (400, "stat: unknown key; did you mean state?")


async def test_what_the_file_declares_is_read_only(api: Api) -> None:
    told = "is declared in the configuration file, which wins: change it there, or take another name."
    for method, path, body in (
        ("POST", "keys", {"name": "alice"}),
        ("PATCH", "keys/alice", {"models": []}),
        ("DELETE", "keys/alice", None),
        ("POST", "keys/alice/rotate", None),
    ):
        status, code, said = await api.refused(method, path, body)
        assert (status, code, said) == (400, "declared_in_file", f"Key 'alice' {told}")
    assert (await api.ok("GET", "keys/alice"))["source"] == "file"


@each(
    ("method", "path", "body", "said"),
    [
        ("POST", "keys", {"nmae": "a", "name": "a"}, "nmae: unknown key; did you mean name?"),
        ("POST", "keys", {"name": "a", "caps": {"max_token": 1}}, "did you mean caps.max_tokens?"),
        ("POST", "keys", {"name": "a", "limits": {"request": "1/s"}}, "did you mean limits.requests?"),
        ("POST", "keys", {}, "name: is missing"),
        ("POST", "keys", {"name": "a", "sha256": "hunter2"}, "sha256: should be 64 hexadecimal digits"),
        ("POST", "keys", {"name": "a", "expires": "soon"}, "expires: should be a time such as 2030-01-31"),
        ("POST", "keys", [], "The body should be a JSON object."),
        ("PATCH", "keys/x", None, "The body is missing."),
        ("PATCH", "keys/x", {"admin": True}, "admin: unknown key"),
        ("PUT", "tenants/x", {"limit": {}}, "limit: unknown key; did you mean limits?"),
        ("PUT", "tenants/x", {"keys": {"tokens": "lots"}}, "should be a rate such as 10/s"),
        ("GET", "audit?limit=0", None, "limit: should be greater than or equal to 1"),
    ],
)
async def test_what_is_wrong_is_said_in_full_and_without_the_value(
    api: Api, method: str, path: str, body: Any, said: str
) -> None:
    status, code, told = await api.refused(method, path, body)
    assert (status, code) in ((400, None), (400, "not_possible"))
    assert said in told
    assert "hunter2" not in told


async def test_a_stale_change_is_refused_and_names_who_was_faster(api: Api) -> None:
    made = await api("POST", "keys", {"name": "bob"})
    read = made.header("etag") or ""
    newer = await api("PATCH", "keys/bob", {"models": []}, if_match=read)
    assert newer.status == 200
    status, code, said = await api.refused("PATCH", "keys/bob", {"models": None}, if_match=read)
    assert (status, code) == (412, "changed_meanwhile")
    assert said.startswith("Key 'bob' was changed since you read it, by key root of the file at 20")
    assert (await api("DELETE", "keys/bob", if_match=newer.header("etag") or "")).status == 200


async def test_the_last_admin_does_not_lock_everybody_out(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    gateway = await start_gateway(upstream, keys=(KEYS[0],), database=True)
    with KeyStore(gateway.replica.settings.state_url) as store:
        made = store.create("root", admin=True)
    await gateway.replica.keyring.look()
    api = Api(gateway, made.key)
    own = f"keys/{made.record.public_id}"
    for method, body in (("DELETE", None), ("PATCH", {"expires": "2020-01-01"})):
        status, code, said = await api.refused(method, own, body)
        assert (status, code) == (400, "not_possible")
        assert "is the last admin key" in said
    assert (await api("DELETE", f"{own}?force=true")).status == 200
    assert (await api("GET", own)).status == 401


# --- tenants and organisations ---------------------------------------------------------------------------------------


async def test_tenants_and_organisations(api: Api) -> None:
    assert await api.refused("PUT", "tenants/search", {"organisation": "acme"}) == (
        404, "not_found", "No organisation 'acme' in the database; `forebay organisations list` shows them.",
    )  # fmt: skip
    acme = await api.ok("PUT", "organisations/acme", {"tenants": {"tokens": "1M/m"}})
    assert acme == {
        "object": "organisation", "name": "acme", "limits": {}, "tenants": {"tokens": [{"rate": "1M/m"}]}, "keys": {},
        "created": acme["created"], "source": "database",
    }  # fmt: skip
    put = await api("PUT", "tenants/search", {"organisation": "acme", "keys": {"concurrent": "none"}})
    assert (put.json()["organisation"], put.json()["keys"]) == ("acme", {"concurrent": None})
    assert [one["name"] for one in (await api.ok("GET", "tenants"))["data"]] == ["search"]
    assert [one["name"] for one in (await api.ok("GET", "organisations"))["data"]] == ["acme"]
    assert (await api.ok("GET", "tenants/search"))["keys"] == {"concurrent": None}
    assert api.gateway.replica.keyring.snapshot.tenants["search"].organisation == "acme"
    await api.ok("PUT", "tenants/search", {"organisation": "acme"}, if_match=put.header("etag") or "")
    assert (await api("PUT", "tenants/search", {}, if_match=put.header("etag") or "")).status == 412
    assert (await api.refused("DELETE", "organisations/acme"))[:2] == (400, "not_possible")
    for path in ("tenants/search", "organisations/acme"):
        await api.ok("DELETE", path)
        assert (await api("GET", path)).status == 404


async def test_limits_of_the_database_count_at_once(api: Api) -> None:
    """Those a key has from its tenant, and those of its own once it has some."""
    await api.ok("PUT", "tenants/research", {"keys": {"requests": {"rate": "1/h", "burst": 1}}})
    made = await api.ok("POST", "keys", {"name": "bob", "tenant": "research"})

    async def asked() -> int:
        return (await api.gateway.ask(chat(), headers=[("authorization", f"Bearer {made['key']}")])).status

    assert [await asked(), await asked()] == [200, 429]
    await api.ok("PATCH", "keys/bob", {"limits": {"requests": "none"}})
    assert [await asked(), await asked()] == [200, 200]
    await api.ok("PATCH", "keys/bob", {"limits": None})
    assert await asked() == 429
    await api.ok("PUT", "tenants/research", {})
    assert await asked() == 200


# --- audit -----------------------------------------------------------------------------------------------------------


async def test_the_audit_is_paged_and_names_key_and_request(api: Api) -> None:
    answers = [await api("POST", "keys", {"name": f"k{number}"}) for number in range(3)]
    page = await api.ok("GET", "audit?limit=2&kind=key")
    assert [one["name"] for one in page["data"]] == ["k2", "k1"]
    assert [one["request_id"] for one in page["data"]] == [one.header("x-request-id") for one in answers[:0:-1]]
    assert {one["actor"] for one in page["data"]} == {"key root of the file"}
    rest = await api.ok("GET", f"audit?limit=2&kind=key&before={page['next']}")
    assert ([one["name"] for one in rest["data"]], rest["has_more"], rest["next"]) == (["k0"], False, None)
    assert (await api.ok("GET", "audit?since=1h&name=k1"))["data"] == page["data"][1:]
    assert (await api.ok("GET", "audit?since=2099-01-01"))["data"] == []
    assert (await api.ok("GET", "audit?kind=tenant"))["data"] == []
    told = json.dumps([page, rest])
    for answer in answers:
        assert answer.json()["key"].rpartition("-")[2] not in told
        assert hashlib.sha256(answer.json()["key"].encode()).hexdigest() not in told


# --- without a database ----------------------------------------------------------------------------------------------


async def test_a_database_that_is_away_is_a_503(api: Api, tmp_path: Path) -> None:
    keyring = api.gateway.replica.keyring
    assert keyring._store is not None
    await asyncio.to_thread(keyring._store.close)
    for file in tmp_path.glob("forebay.db*"):
        file.unlink()
    (tmp_path / "forebay.db").write_bytes(b"this is no database" * 1000)
    status, code, said = await api.refused("POST", "keys", {"name": "bob"})
    assert (status, code) == (503, "state_unavailable")
    assert "file is not a database" in said


async def test_a_gateway_without_a_database_says_so(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    gateway = await start_gateway(upstream, keys=KEYS, auth="none")
    status, code, said = await Api(gateway).refused("GET", "keys")
    assert (status, code) == (503, "state_unavailable")
    assert "uses no state database" in said


# --- every replica ---------------------------------------------------------------------------------------------------


async def test_a_revoked_key_is_gone_from_every_replica_within_a_second(
    api: Api, start_gateway: StartGateway, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them on one database; the one that was not asked finds out by its own looks, a second apart where nobody
    hurries them."""
    assert POLL_INTERVAL <= 1
    monkeypatch.setattr("gateway.keyring.POLL_INTERVAL", 0.02)
    other = await start_gateway(upstream, keys=KEYS, database=True)
    replicas: list[Replica] = [api.gateway.replica, other.replica]
    assert len({replica.settings.state_url for replica in replicas}) == 1
    made = await api.ok("POST", "keys", {"name": "bob"})
    heir = await api.ok("POST", "keys/bob/rotate")
    await other.replica.keyring.look()
    assert await works(other, heir["key"])
    for key in (made, heir):
        await api.ok("DELETE", f"keys/{key['id']}")
        assert not await works(api.gateway, key["key"])
    await until(lambda: other.lines("keys_changed")[-1]["keys"] == 0, "the other replica did not find out")
    for key in (made, heir):
        assert not await works(other, key["key"])
