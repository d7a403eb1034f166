"""What has to change, and that doing it leaves nothing to change: as values, and in a database."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.limits import OrganisationLimits
from gateway.settings import ConfigError
from gateway.state.apply import apply, differences, read_wanted
from gateway.state.database import Stale, upgrade
from gateway.state.keys import KeyStore
from gateway.state.plan import Change, Picture, obstacles, outcome, plan
from gateway.state.store import Kind
from tests.support.databases import Database
from tests.support.examples import examples

NOTHING: Mapping[Kind, set[str]] = {"key": set(), "tenant": set(), "organisation": set()}
NAMES = st.sampled_from(["a", "b", "c"])
LIMITS = st.sampled_from([{}, {"concurrent": 1}, {"requests": [{"rate": "60/m"}]}])
DIGESTS = ["1" * 64, "2" * 64, "3" * 64, "4" * 64]


def wanted_key(name: str, **more: Any) -> dict[str, Any]:
    """The fields of a key that a file can say."""
    fields: dict[str, Any] = {
        "name": name,
        "tenant": name,
        "models": None,
        "caps": {},
        "limits": None,
        "trust_domain": None,
    }
    return {**fields, "admin": False, "expires": None, **more}


def stored_key(name: str, public_id: str, **more: Any) -> dict[str, Any]:
    return {**wanted_key(name), "id": public_id, "replaces": None, "revoked": None, **more}


def groups(kind: Kind) -> st.SearchStrategy[dict[str, Any]]:
    more: dict[str, Any] = {"organisation": st.none() | NAMES} if kind == "tenant" else {"tenants": LIMITS}
    entries = st.dictionaries(NAMES, st.fixed_dictionaries({"limits": LIMITS, "keys": LIMITS, **more}))
    return entries.map(lambda found: {name: {"name": name, **fields} for name, fields in found.items()})


KEYS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["alice", "bob", "serve-8000"]),
        "tenant": NAMES,
        "models": st.none() | st.lists(NAMES, max_size=2),
        "caps": st.sampled_from([{}, {"n": 2}]),
        "limits": st.none() | LIMITS,
        "trust_domain": st.none() | NAMES,
        "admin": st.booleans(),
        "expires": st.sampled_from([None, "2030-01-01T00:00:00+00:00", "2020-01-01T00:00:00+00:00"]),
    }
)


@st.composite
def stored_keys(draw: st.DrawFn) -> dict[str, Any]:
    """Keys of a database, some revoked and some the heirs of others."""
    keys: dict[str, Any] = {}
    for digest in draw(st.lists(st.sampled_from(DIGESTS), unique=True)):
        heir_of = draw(st.sampled_from([None, *(key["id"] for key in keys.values())]))
        revoked = draw(st.sampled_from([None, None, "2026-01-01T00:00:00+00:00"]))
        keys[digest] = {**draw(KEYS), "id": digest[:12], "replaces": heir_of, "revoked": revoked}
    return keys


WANTED = st.builds(
    Picture,
    st.none() | groups("organisation"),
    st.none() | groups("tenant"),
    st.none() | st.dictionaries(st.sampled_from(DIGESTS), KEYS),
)
STORED = st.builds(Picture, groups("organisation"), groups("tenant"), stored_keys())


@given(wanted=WANTED, stored=STORED, prune=st.booleans())
def test_a_plan_that_is_done_leaves_nothing_to_do(wanted: Picture, stored: Picture, prune: bool) -> None:
    """And what the file wants is there, what it leaves alone is as it was."""
    changes = plan(wanted, stored, prune)
    after = outcome(stored, changes)
    assert plan(wanted, after, prune) == []
    for kind in ("organisation", "tenant", "key"):
        named = {"organisation": wanted.organisation, "tenant": wanted.tenant, "key": wanted.key}[kind]
        if named is None:
            assert after.table(kind) == stored.table(kind)
            continue
        assert {*named} <= {*after.table(kind)}
        if not prune:
            assert {*stored.table(kind)} <= {*after.table(kind)}
        elif kind != "key":
            assert {*after.table(kind)} == {*named}
    for change in changes:
        assert list(change.lines())
        assert change.differing() if change.action == "update" else True


@given(stored=STORED, prune=st.booleans())
def test_what_is_there_is_what_is_wanted(stored: Picture, prune: bool) -> None:
    fields = {*wanted_key("x")}
    keys = {
        digest: {name: value for name, value in key.items() if name in fields}
        for digest, key in stored.table("key").items()
    }
    assert plan(Picture(stored.organisation, stored.tenant, keys), stored, prune) == []


def test_changes_come_in_an_order_that_can_be_done() -> None:
    wanted = Picture({"new": {"name": "new"}}, {"t": {"name": "t", "organisation": "new"}}, {"1": wanted_key("alice")})
    stored = Picture({"old": {"name": "old"}}, {"u": {"name": "u", "organisation": "old"}}, {"2": stored_key("b", "i")})
    assert [(one.action, one.kind, one.name) for one in plan(wanted, stored, prune=True)] == [
        ("create", "organisation", "new"), ("create", "tenant", "t"), ("create", "key", "alice"),
        ("remove", "key", "b"), ("remove", "tenant", "u"), ("remove", "organisation", "old"),
    ]  # fmt: skip


def test_a_change_is_told_field_by_field() -> None:
    stored = Picture(key={"1": stored_key("alice", "0123456789ab", models=["a"], caps={"n": 1})})
    wanted = Picture({}, {}, {"1": wanted_key("alice", caps={"n": 2}), "2": wanted_key("bob", models=["m", "q*"])})
    (update, create) = plan(wanted, stored)
    assert list(update.lines()) == [
        "~ key alice (0123456789ab)", "    models: [a] → none", "    caps: {n: 1} → {n: 2}",
    ]  # fmt: skip
    assert list(create.lines()) == ["+ key bob", "    tenant: bob", "    models: [m, q*]"]
    assert "2" * 64 not in repr(create)


def test_a_key_that_was_rotated_since_is_left_to_its_heir() -> None:
    """The file still names the old one: it ends when its overlap does, and its heir is no stranger to be revoked."""
    end = "2026-11-25T00:00:00+00:00"
    old, heir = stored_key("alice", "old", expires=end), stored_key("alice", "heir", replaces="old")
    stored = Picture(key={"1": old, "2": heir, "3": stored_key("alice", "heir's heir", replaces="heir")})
    assert plan(Picture(key={"1": wanted_key("alice")}), stored, prune=True) == []
    # Once the file names the heir, the old one is nobody's.
    gone = plan(Picture(key={"2": wanted_key("alice")}), stored, prune=True)
    assert [(one.action, one.ident) for one in gone] == [("remove", "1")]


def test_what_serve_made_for_itself_is_not_pruned() -> None:
    stored = Picture(key={"1": stored_key("serve-8000", "a"), "2": stored_key("admin-of-serve-8000", "b")})
    assert plan(Picture(key={}), stored, prune=True) == []


def test_what_stands_in_the_way_is_told_whole() -> None:
    stored = Picture(
        {"acme": {"name": "acme"}},
        {"used": {"name": "used", "organisation": None}, "of": {"name": "of", "organisation": "acme"}},
        {"1": stored_key("gone", "a", revoked="2026-01-01T00:00:00+00:00"), "2": stored_key("k", "b", tenant="used")},
    )
    wanted = Picture({}, {"of": {"name": "of", "organisation": "acme"}}, None)
    named = Picture(None, None, {"1": wanted_key("gone"), "3": wanted_key("declared")})
    own: Mapping[Kind, set[str]] = {**NOTHING, "key": {"declared"}}
    assert obstacles(wanted, stored, plan(wanted, stored, prune=True), own) == [
        "tenant 'of' belongs to organisation 'acme': there is none",
        "tenant 'used' cannot be removed: keys belong to it: k",
    ]
    assert obstacles(named, stored, plan(named, stored), own) == [
        "key 'declared' is declared in the gateway's configuration, which wins; take it out of one",
        "key 'gone' was revoked and cannot come back; make another and name its hash",
    ]


# --- in a database -----------------------------------------------------------------------------------------------


@pytest.fixture
def store(database: Database) -> Iterator[KeyStore]:
    with KeyStore(database.url) as opened:
        yield opened


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


FILE = f"""
organisations: {{acme: {{limits: {{budgets: {{usd: 20000}}}}, keys: {{concurrent: none}}}}}}
tenants: {{search: {{organisation: acme, limits: {{tokens: 3M/m}}}}}}
keys:
  - {{name: alice, sha256: {digest("sk-a")}, tenant: search, models: [m], limits: {{requests: 60/m}}, caps: {{n: 2}}}}
  - {{name: bob, key_file: bob.key, expires: 2030-01-01, admin: true}}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("bob.key").write_text("sk-b\n")
    Path("keys.yaml").write_text(FILE)
    return Path("keys.yaml")


def told(changes: list[Change]) -> list[tuple[str, str, str]]:
    return [(one.action, one.kind, one.name) for one in changes]


def test_a_file_is_brought_about_in_one_step_and_only_once(store: KeyStore, file: Path) -> None:
    wanted = read_wanted(file)
    made = [("create", "organisation", "acme"), ("create", "tenant", "search"), ("create", "key", "alice"),
            ("create", "key", "bob")]  # fmt: skip
    assert told(differences(store, wanted, NOTHING)) == made
    assert store.version() == 1
    assert told(apply(store, wanted, NOTHING)) == made
    snapshot = store.load_all()
    assert snapshot.version == 2, "everything at once"
    assert {key.hex() for key in snapshot.records} == {digest("sk-a"), digest("sk-b")}
    alice = snapshot.records[bytes.fromhex(digest("sk-a"))]
    assert (alice.tenant, alice.models, alice.caps.n) == ("search", ("m",), 2)
    assert snapshot.organisations["acme"].entry.keys.model_fields_set == {"concurrent"}
    assert [(one.action, one.kind) for one in store.audit()] == [
        ("create", "key"), ("create", "key"), ("create", "tenant"), ("create", "organisation"),
    ]  # fmt: skip
    for prune in (False, True):
        assert apply(store, wanted, NOTHING, prune) == []
    assert store.version() == 2


def test_changed_and_pruned(store: KeyStore, file: Path) -> None:
    apply(store, read_wanted(file), NOTHING)
    extra = store.create("extra")
    file.write_text(f"tenants: {{}}\nkeys: [{{name: alice, sha256: {digest('sk-a')}, limits: {{concurrent: 1}}}}]\n")
    wanted = read_wanted(file)
    done = apply(store, wanted, NOTHING, prune=True)
    assert told(done) == [
        ("update", "key", "alice"), ("remove", "key", "bob"), ("remove", "key", "extra"),
        ("remove", "tenant", "search"),
    ]  # fmt: skip
    assert set(done[0].differing()) == {"tenant", "models", "caps", "limits"}
    assert [one.name for one in store.groups("organisation")] == ["acme"], "a part the file has not is left alone"
    assert store.find(extra.record.public_id).revoked_at is not None
    assert store.version() == 4
    file.write_text(FILE)
    with pytest.raises(ConfigError, match="key 'bob' was revoked and cannot come back"):
        apply(store, read_wanted(file), NOTHING)
    assert store.version() == 4


def test_what_has_changed_since_it_was_shown_is_not_done(store: KeyStore, file: Path) -> None:
    wanted = read_wanted(file)
    shown = differences(store, wanted, NOTHING)
    store.put_group("organisation", "acme", OrganisationLimits())
    with pytest.raises(Stale, match="somebody else has changed keys or tenants in the meantime"):
        apply(store, wanted, NOTHING, shown=shown)
    assert store.list() == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "keys: [{name: a, key: hunter2}]",
            "keys[0]: a key itself does not belong into this file; write sha256, key_file",
        ),
        ("keys: [{name: a}]", "keys[0]: should have exactly one of sha256, key, key_file and key_env"),
        ("keys: [{name: a, key_file: nowhere}]", "keys[0]: key 'a': file nowhere cannot be read"),
        ("tenants: {a: {limit: {}}}", "tenants.a.limit: unknown key; did you mean tenants.a.limits?"),
        ("teams: {}", "teams: unknown key"),
        (f"keys: [{{name: a, sha256: {'a' * 64}}}, {{name: b, sha256: {'a' * 64}}}]", "keys[1]: is the same key as"),
    ],
)
def test_a_file_that_cannot_be_meant_is_told(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_wanted(file)
    assert said in str(caught.value)
    assert "hunter2" not in str(caught.value)


@settings(max_examples=examples(8))
@given(first=WANTED, second=WANTED, prune=st.booleans())
def test_a_database_takes_any_plan_or_none_of_it(empty: bytes, first: Picture, second: Picture, prune: bool) -> None:
    """One file after another; what stands in the way leaves the database as it was."""
    with TemporaryDirectory() as folder:
        Path(folder, "forebay.db").write_bytes(empty)
        with KeyStore(f"sqlite:///{folder}/forebay.db") as store:
            for wanted in (first, second):
                before = store.version()
                try:
                    done = apply(store, wanted, NOTHING, prune)
                except ConfigError:
                    assert store.version() == before
                    continue
                assert store.version() == before + bool(done)
                assert len(store.audit(limit=1000)) >= len(done)
                assert differences(store, wanted, NOTHING, prune) == []


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A database up to date with nothing in it."""
    folder = tmp_path_factory.mktemp("empty")
    upgrade(f"sqlite:///{folder}/forebay.db")
    return (folder / "forebay.db").read_bytes()
