"""Keys are made, imported, revoked and loaded; every change is seen through the version; the file wins."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from gateway.limits import LimitSet, TenantLimits
from gateway.settings import Caps, ConfigError, KeySettings
from gateway.state.database import NoSuch, NotPossible, Stale, StateError, describe
from gateway.state.keys import KeyRecord, KeySnapshot, KeyStore, declared, merge, new_key, read_keys
from gateway.state.store import Actor, read_version
from tests.support.databases import Database, Postgresql, Sqlite, connected, execute, given_sqlite

WHEN = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def store(database: Database) -> Iterator[KeyStore]:
    with KeyStore(database.url) as opened:
        yield opened


def sha256(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def test_a_key_has_its_shape_and_256_bits() -> None:
    keys = {new_key("0123456789ab") for _ in range(200)}
    assert len(keys) == 200
    assert all(re.fullmatch(r"fb-0123456789ab-[0-9A-Za-z]{43}", key) for key in keys)
    assert 62**43 >= 2**256  # as many secrets fit as were drawn


def test_a_created_key_is_found_by_its_hash_with_all_its_rights(store: KeyStore) -> None:
    caps = Caps(n=2, max_tokens=100, body=1000)
    created = store.create("alice", "team", ["small", "qwen3-*"], caps, WHEN, "domain")
    assert created.record == KeyRecord(
        name="alice",
        public_id=created.key.split("-")[1],
        tenant="team",
        models=("small", "qwen3-*"),
        caps=caps,
        trust_domain="domain",
        expires_at=WHEN,
        source="database",
    )
    assert store.load_all().records == {sha256(created.key): created.record}


def test_a_plain_key_may_use_everything_for_ever(store: KeyStore) -> None:
    created = store.create("alice")
    record = store.load_all().records[sha256(created.key)]
    assert (record.tenant, record.models, record.caps, record.expires_at) == ("alice", None, Caps(), None)


def test_no_models_is_not_all_models(store: KeyStore) -> None:
    created = store.create("alice", models=[])
    assert store.load_all().records[sha256(created.key)].models == ()


def test_expiry_in_another_zone_comes_back_as_utc(store: KeyStore) -> None:
    created = store.create("alice", expires=datetime(2030, 1, 2, 5, 4, 5, tzinfo=timezone(timedelta(hours=2))))
    expires = store.load_all().records[sha256(created.key)].expires_at
    assert expires == WHEN
    assert expires is not None
    assert expires.utcoffset() == timedelta(0)


def test_the_last_moment_there_is_comes_back(store: KeyStore) -> None:
    """Wherever the database's server is: in the zone east of it that moment is of a year it cannot say."""
    last = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    created = store.create("alice", expires=last)
    assert store.load_all().records[sha256(created.key)].expires_at == last


@pytest.mark.parametrize("text", ["a\0b", "\udcff", "x" * 5000])
def test_what_no_database_holds_is_not_there(store: KeyStore, text: str) -> None:
    with pytest.raises(NoSuch):
        store.find(text)
    with pytest.raises(NoSuch):
        store.group("tenant", text)
    assert (store.list(tenant=text), store.audit(name=text)) == ((), ())


def test_the_key_itself_is_neither_stored_nor_shown(tmp_path: Path) -> None:
    with KeyStore(given_sqlite(tmp_path).url) as store:
        created = store.create("alice")
    secret = created.key.rpartition("-")[2]
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    assert files
    assert not any(secret.encode() in content for content in files)
    assert secret not in repr(created)


def test_every_change_counts_the_version_up_and_reading_does_not(store: KeyStore) -> None:
    versions = [store.version()]
    created = store.create("a")
    versions.append(store.version())
    store.import_key("b", key="an-old-key")
    versions.append(store.version())
    store.revoke(created.record.public_id)
    versions.append(store.load_all().version)
    store.list()
    assert versions == [1, 2, 3, 4]
    assert store.version() == 4


def test_a_refused_change_counts_nothing(store: KeyStore) -> None:
    store.import_key("b", key="an-old-key")
    for refused in (
        lambda: store.import_key("c", key="an-old-key"),
        lambda: store.revoke("nobody"),
        lambda: store.create("bad\nname"),
    ):
        with pytest.raises(StateError):
            refused()
    assert store.version() == 2


def test_a_revoked_key_is_gone_but_listed_and_cannot_come_back(store: KeyStore) -> None:
    created = store.create("alice")
    assert store.revoke(created.record.public_id).record == created.record
    assert store.load_all().records == {}
    (listed,) = store.list()
    assert listed.record == created.record
    assert listed.revoked_at is not None
    assert listed.created_at is not None
    assert listed.created_at <= listed.revoked_at
    with pytest.raises(StateError, match=r"key \w+ \(alice\) is revoked already"):
        store.revoke(created.record.public_id)
    with pytest.raises(StateError, match="no key 'nobody' in the database; `forebay keys list` shows them"):
        store.revoke("nobody")
    with pytest.raises(StateError, match=f"this key is revoked and cannot come back: {created.record.public_id}"):
        store.import_key("alice", key=created.key)


def test_an_imported_key_stays_valid_given_itself_or_as_its_hash(store: KeyStore) -> None:
    one = store.import_key("one", key="sk-from-elsewhere-1", tenant="t", models=["m"])
    two = store.import_key("two", sha256=sha256("sk-from-elsewhere-2").hex().upper(), expires=WHEN)
    assert store.load_all().records == {
        sha256("sk-from-elsewhere-1"): one.record,
        sha256("sk-from-elsewhere-2"): two.record,
    }
    with pytest.raises(StateError, match=f"already here: {one.record.public_id}"):
        store.import_key("again", sha256=sha256("sk-from-elsewhere-1").hex())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "should have exactly one of sha256, key"),
        ({"key": "hunter2", "sha256": "ab" * 32}, "should have exactly one of sha256, key"),
        ({"key": "hunter2 with spaces"}, "holds characters that cannot travel in a header"),
        ({"sha256": "hunter2"}, "sha256: should be 64 hexadecimal digits"),
        ({"key": "hunter2", "models": ["*a"]}, r"models\[0\]: should be a model name"),
    ],
)
def test_what_cannot_be_imported_is_explained_without_the_key(
    store: KeyStore, given: dict[str, str], said: str
) -> None:
    with pytest.raises(StateError, match=said) as caught:
        store.import_key("a", **given)  # type: ignore[arg-type]
    assert "hunter2" not in str(caught.value)


def test_replacing_leaves_one_key_of_the_name_and_others_alone(store: KeyStore) -> None:
    other = store.create("other")
    for _ in range(3):
        latest = store.create("serve-8000", replace=True)
    assert store.load_all().records == {sha256(other.key): other.record, sha256(latest.key): latest.record}
    assert len(store.list()) == 2


# --- changed, rotated, found -------------------------------------------------------------------------------------


def actions(store: KeyStore) -> list[tuple[str, str]]:
    """What the audit has, oldest first."""
    return [(entry.action, entry.name) for entry in reversed(store.audit())]


def test_a_rotated_key_has_an_heir_with_its_rights_and_works_for_the_overlap(store: KeyStore) -> None:
    rights = {"models": ["m"], "caps": Caps(n=2), "trust_domain": "d", "limits": LimitSet(concurrent=3)}
    old = store.create("alice", "team", **rights, admin=True)  # type: ignore[arg-type]
    before = datetime.now(UTC)
    new = store.rotate("alice", overlap=3600)
    assert new.record == replace(old.record, public_id=new.record.public_id, replaces=old.record.public_id)
    assert new.key.startswith(f"fb-{new.record.public_id}-")
    assert new.replaced is not None
    ends = new.replaced.record.expires_at
    assert ends is not None
    assert before + timedelta(hours=1) <= ends <= datetime.now(UTC) + timedelta(hours=1)
    assert store.load_all().records == {
        sha256(old.key): replace(old.record, expires_at=ends),
        sha256(new.key): new.record,
    }
    with pytest.raises(NotPossible, match=f"is rotated already: {new.record.public_id} takes its place"):
        store.rotate(old.record.public_id, overlap=1)


def test_a_rotation_gives_the_old_key_no_more_time_than_it_had(store: KeyStore) -> None:
    end = datetime.now(UTC) + timedelta(minutes=5)
    store.create("alice", expires=end)
    made = store.rotate("alice", overlap=3600)
    assert made.replaced is not None
    assert (made.replaced.record.expires_at, made.record.expires_at) == (end, end)
    again = store.rotate(made.record.public_id, overlap=0, expires=WHEN)
    assert again.replaced is not None
    assert again.replaced.state(datetime.now(UTC)) == "expired"
    assert again.record.expires_at == WHEN


def test_what_no_longer_works_is_not_rotated(store: KeyStore) -> None:
    store.create("old", expires=datetime(2020, 1, 1, tzinfo=UTC))
    store.revoke(store.create("gone").record.public_id)
    for name, state in (("old", "expired"), ("gone", "revoked")):
        with pytest.raises(NotPossible, match=f"is {state}; make a new one"):
            store.rotate(name, overlap=1)


def test_an_update_changes_what_it_names_and_null_takes_back(store: KeyStore) -> None:
    created = store.create("alice", "team", ["m"], Caps(n=2), WHEN, "d")
    changed = store.update("alice", {"models": ["a", "b*"], "limits": {"requests": "60/m"}})
    assert changed.record == replace(
        created.record, models=("a", "b*"), limits=LimitSet.model_validate({"requests": "60/m"})
    )
    nothing = {"tenant": None, "models": None, "caps": None, "limits": None, "expires": None, "trust_domain": None}
    assert store.update("alice", nothing).record == replace(
        created.record, tenant="alice", models=None, caps=Caps(), limits=None, expires_at=None, trust_domain=None
    )
    assert store.load_all().records[sha256(created.key)] == store.find("alice").record


def test_limits_come_back_as_they_were_written(store: KeyStore) -> None:
    """`none` says that nothing is inherited, which is something else than saying nothing."""
    limits = LimitSet.model_validate(
        {"requests": "none", "tokens": ["150k/m", {"rate": "2M/day", "burst": 9}], "budgets": {"usd": "12.50"}}
    )
    created = store.create("alice", limits=limits)
    found = store.load_all().records[sha256(created.key)].limits
    assert found == limits
    assert found is not None
    assert found.model_fields_set == {"requests", "tokens", "budgets"}


def test_an_update_that_breaks_a_rule_or_changes_nothing_leaves_no_trace(store: KeyStore) -> None:
    created = store.create("alice", models=["m"])
    for wrong, said in (
        ({"models": ["*a"]}, r"models\[0\]: should be a model name"),
        ({"limits": {"requests": "many"}}, r"limits.requests.*should be a rate"),
        ({"limits": {"request": "1/s"}}, "limits.request: unknown key; did you mean limits.requests"),
    ):
        with pytest.raises(NotPossible, match=said):
            store.update("alice", wrong)
    assert store.update("alice", {"models": ["m"]}).record == created.record
    assert (store.version(), actions(store)) == (2, [("create", "alice")])


def test_a_stale_update_is_refused_and_says_who_was_faster(store: KeyStore) -> None:
    read = store.create("alice").stored
    fast = store.acting_as(Actor("key bob (0123456789ab)"))
    newer = fast.update("alice", {"models": ["m"]})
    store.create("alice", "another")  # of the same name: its changes are not this one's
    said = r"key 'alice' was changed since you read it, by key bob \(0123456789ab\) at \d{4}-.*; read it again"
    public_id = read.record.public_id
    with pytest.raises(Stale, match=said):
        store.update(public_id, {"models": ["n"]}, if_match=read.etag)
    with pytest.raises(Stale, match=said):
        store.revoke(public_id, if_match=read.etag)
    with pytest.raises(Stale, match=said):
        store.rotate(public_id, 1, if_match=read.etag)
    assert store.revoke(read.record.public_id, if_match=newer.etag).revoked_at is not None


def test_a_key_is_found_by_its_id_or_by_a_name_that_is_one_s_own(store: KeyStore) -> None:
    first = store.create("alice")
    assert store.find("alice") == store.find(first.record.public_id)
    second = store.create("alice")
    with pytest.raises(NotPossible, match=f"several keys are named 'alice': {first.record.public_id}, "):
        store.find("alice")
    store.revoke(first.record.public_id)
    assert store.find("alice").record == second.record
    store.revoke("alice")
    with pytest.raises(NotPossible, match="several keys"):
        store.find("alice")
    with pytest.raises(NoSuch, match="no key 'bob' in the database"):
        store.find("bob")


def test_keys_are_listed_by_tenant_and_by_state(store: KeyStore) -> None:
    store.create("a", "t")
    store.create("b", "t", expires=datetime(2020, 1, 1, tzinfo=UTC))
    store.revoke(store.create("c", "other").record.public_id)

    def named(*args: Any) -> list[str]:
        return [key.record.name for key in store.list(*args)]

    assert named() == ["a", "b", "c"]
    assert named("t") == ["a", "b"]
    assert [named(None, state) for state in ("live", "expired", "revoked")] == [["a"], ["b"], ["c"]]
    assert named("t", "revoked") == []


def test_the_last_admin_key_goes_only_by_force(store: KeyStore) -> None:
    """The passes of `forebay serve` are nobody's, and an expired admin is none."""
    last = store.create("root", admin=True).record.public_id
    store.create("admin-of-serve-8000", admin=True)
    store.create("gone", admin=True, expires=datetime(2020, 1, 1, tzinfo=UTC))
    said = r"\(root\) is the last admin key.*or say force=true"
    with pytest.raises(NotPossible, match=said):
        store.revoke(last, keep_admin=True)
    with pytest.raises(NotPossible, match=said):
        store.update(last, {"expires": datetime.now(UTC)}, keep_admin=True)
    store.update(last, {"expires": WHEN}, keep_admin=True)
    other = store.create("other", admin=True).record.public_id
    store.revoke(last, keep_admin=True)
    store.revoke("admin-of-serve-8000", keep_admin=True)
    store.revoke(other)


# --- audit -------------------------------------------------------------------------------------------------------


def test_the_audit_says_who_did_what_and_holds_no_secret(store: KeyStore) -> None:
    by_api = store.acting_as(Actor("key root (0123456789ab)", "req_1"))
    key = by_api.create("alice", "t")
    imported = store.import_key("bob", key="sk-elsewhere")
    rotated = store.rotate("alice", 60)
    store.update("bob", {"models": []})
    store.revoke("bob")
    store.create("serve-1")
    store.create("serve-1", replace=True)
    entries = store.audit()
    assert actions(store) == [
        ("create", "alice"), ("create", "bob"), ("rotate", "alice"), ("rotate", "alice"), ("update", "bob"),
        ("revoke", "bob"), ("create", "serve-1"), ("delete", "serve-1"), ("create", "serve-1"),
    ]  # fmt: skip
    first, *others = reversed(entries)
    assert (first.actor, first.request_id, first.kind, first.before) == (
        "key root (0123456789ab)", "req_1", "key", None,
    )  # fmt: skip
    assert first.after == key.stored.fields
    assert {entry.actor for entry in others} == {f"local command ({pwd.getpwuid(os.getuid()).pw_name})"}
    heir, old = others[1], others[2]
    assert heir.after is not None
    assert heir.after["replaces"] == key.record.public_id
    assert (old.before, old.after) == (key.stored.fields, rotated.replaced and rotated.replaced.fields)
    update = others[3]
    assert (update.before, update.after) == (imported.fields, {**imported.fields, "models": []})
    written = json.dumps([entry.as_json() for entry in entries])
    for secret in (key.key, rotated.key, "sk-elsewhere"):
        assert secret not in written
        assert secret.rpartition("-")[2] not in written
        assert sha256(secret).hex() not in written


def test_the_audit_is_read_by_time_kind_name_and_page(store: KeyStore) -> None:
    for name in ("a", "b", "a"):
        store.create(name)
    store.put_group("tenant", "a", TenantLimits())
    last, third, second, first = store.audit()
    assert [entry.kind for entry in (last, third)] == ["tenant", "key"]
    assert store.audit(name="a", kind="key") == (third, first)
    assert store.audit(since=second.at) == (last, third, second)
    assert store.audit(limit=2) == (last, third)
    assert store.audit(limit=2, before=third.id) == (second, first)


def test_an_audit_that_cannot_be_written_undoes_the_change(store: KeyStore, database: Database) -> None:
    execute(database, "DROP TABLE audit")
    with pytest.raises(StateError, match=r'no such table: audit|relation "audit" does not exist'):
        store.create("alice")
    assert (store.list(), store.version()) == ((), 1)


def test_limits_a_newer_release_knows_more_of_are_read_and_broken_ones_told(
    store: KeyStore, database: Database
) -> None:
    """During a rolling update its replicas write what this one's do not know; revocations still have to arrive."""
    created = store.create("alice")
    for stored, found in (({"concurrent": 2, "wishes": {"a": 3}}, LimitSet(concurrent=2)), ({"concurrent": "x"}, None)):
        execute(database, "UPDATE keys SET limits = :limits", limits=json.dumps(stored))
        if found is not None:
            assert store.load_all().records[sha256(created.key)].limits == found
            continue
        with pytest.raises(StateError, match="holds what cannot be read: concurrent; another release wrote it"):
            store.load_all()


# --- several at once ---------------------------------------------------------------------------------------------


def test_writers_wait_for_each_other(database: Database) -> None:
    """Four stores write at once, each through its own connections, and nothing is lost or refused."""
    url, per_writer, failures = database.url, 15, []
    start = threading.Barrier(4)

    def write(number: int) -> None:
        try:
            with KeyStore(url) as store:
                start.wait()
                for turn in range(per_writer):
                    created = store.create(f"{number}-{turn}")
                    if turn % 3 == 0:
                        store.revoke(created.record.public_id)
        except Exception as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failures == []
    with KeyStore(url) as store:
        assert len(store.list()) == 4 * per_writer
        assert store.version() == 1 + 4 * (per_writer + per_writer // 3)


def test_readers_do_not_wait_for_a_writer(store: KeyStore, database: Database) -> None:
    created = store.create("a")
    with connected(database) as writer:
        writer.execute(sa.text("UPDATE state_version SET version = 99"))
        assert store.version() == 2
        assert set(store.load_all().records) == {sha256(created.key)}


def test_a_reader_sees_one_state(store: KeyStore, database: Database) -> None:
    """Or a comparison of keys with tenants would find what never was."""
    store.create("a")
    with store.reading() as reader, KeyStore(database.url) as other:
        assert read_version(reader) == 2
        other.create("b")
        assert (read_version(reader), len(read_keys(reader))) == (2, 1)
    assert (store.version(), len(store.list())) == (3, 2)


def test_a_writer_that_never_ends_is_a_clear_error(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.state.database.BUSY_TIMEOUT", 0.05)
    with connected(database) as writer, KeyStore(database.url) as store:
        writer.execute(sa.text("UPDATE state_version SET version = 99"))
        with pytest.raises(StateError, match=r"failed: (database is locked|canceling statement due to lock timeout); "):
            store.create("a")


def test_a_database_that_went_away_is_a_state_error_until_it_is_back(store: KeyStore, database: Database) -> None:
    created = store.create("a")
    if isinstance(database, Sqlite):
        store.close()  # a file that is open stays what it is
    database.go_away()
    try:
        for _ in range(2):
            with pytest.raises(StateError, match=f"{re.escape(describe(sa.make_url(database.url)))} failed: "):
                store.load_all()
    finally:
        database.come_back()
    assert set(store.load_all().records) == {sha256(created.key)}


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_server_that_hangs_is_one_that_is_away(
    store: KeyStore, database: Postgresql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or keys would work for ever that were revoked elsewhere, and no gateway would end."""
    store.version()
    monkeypatch.setattr("gateway.state.postgresql.ANSWER_WITHIN", 0.05)
    # The shortest that the driver waits for a connection is two seconds.
    monkeypatch.setattr("psycopg.connection.timeout_from_conninfo", lambda _: 0.05)
    try:
        with pytest.raises(StateError, match=r"failed: no answer within 0.05 s; "), store.reading() as reader:
            database.server.freeze()
            read_version(reader)
        with pytest.raises(StateError, match="failed: connection timeout expired; "):
            store.version()
    finally:
        database.server.thaw()
    monkeypatch.undo()
    assert store.version() == 1


# --- file and database together ----------------------------------------------------------------------------------


def test_the_file_wins_on_a_key_and_on_a_name(store: KeyStore) -> None:
    store.import_key("stored", key="both-have-it", models=["everything"])
    taken = store.create("declared")
    kept = store.create("kept")
    file_keys = declared(
        [
            KeySettings.model_validate({"name": "from-file", "key": "both-have-it", "models": ["small"]}),
            KeySettings.model_validate({"name": "declared", "key": "another"}),
        ]
    )
    merged = merge(file_keys, store.load_all())
    assert set(merged) == {sha256("both-have-it"), sha256("another"), sha256(kept.key)}
    assert (merged[sha256("both-have-it")].models, merged[sha256("both-have-it")].source) == (("small",), "file")
    assert sha256(taken.key) not in merged
    assert merged[sha256(kept.key)] == kept.record


def test_a_declared_key_carries_what_the_file_says() -> None:
    key = KeySettings.model_validate(
        {"name": "a", "tenant": "t", "key": "k", "models": ["m*"], "caps": {"n": 1}, "expires": WHEN}
    )
    assert declared([key]) == {
        sha256("k"): KeyRecord("a", "a", "t", ("m*",), Caps(n=1), None, WHEN, "file"),
    }
    assert merge({}, KeySnapshot(1, {})) == {}
    with pytest.raises(ConfigError, match="is empty or not set"):
        declared([KeySettings(name="a", key_env="NOT_SET")])
