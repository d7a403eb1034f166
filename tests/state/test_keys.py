"""Keys are made, imported, revoked and loaded; every change is seen through the version; the file wins."""

from __future__ import annotations

import hashlib
import re
import sqlite3
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from gateway.settings import Caps, ConfigError, KeySettings
from gateway.state.database import StateError, upgrade
from gateway.state.keys import KeyRecord, KeySnapshot, KeyStore, declared, merge, new_key

WHEN = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    upgrade(f"sqlite:///{tmp_path}/forebay.db")
    return tmp_path / "forebay.db"


@pytest.fixture
def store(database: Path) -> Iterator[KeyStore]:
    with KeyStore(f"sqlite:///{database}") as opened:
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


def test_the_key_itself_is_neither_stored_nor_shown(store: KeyStore, database: Path) -> None:
    created = store.create("alice")
    store.close()
    secret = created.key.rpartition("-")[2]
    files = [path.read_bytes() for path in database.parent.iterdir()]
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
    assert store.revoke(created.record.public_id) == created.record
    assert store.load_all().records == {}
    (listed,) = store.list()
    assert listed.record == created.record
    assert listed.revoked_at is not None
    assert listed.created_at <= listed.revoked_at
    with pytest.raises(StateError, match=r"no key .* to revoke; `forebay keys list` shows them"):
        store.revoke(created.record.public_id)
    with pytest.raises(StateError, match=f"this key is revoked and cannot come back: {created.record.public_id}"):
        store.import_key("alice", key=created.key)


def test_an_imported_key_stays_valid_given_itself_or_as_its_hash(store: KeyStore) -> None:
    one = store.import_key("one", key="sk-from-elsewhere-1", tenant="t", models=["m"])
    two = store.import_key("two", sha256=sha256("sk-from-elsewhere-2").hex().upper(), expires=WHEN)
    assert store.load_all().records == {sha256("sk-from-elsewhere-1"): one, sha256("sk-from-elsewhere-2"): two}
    with pytest.raises(StateError, match=f"already here: {one.public_id}"):
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


def test_writers_wait_for_each_other(database: Path) -> None:
    """Four stores write at once, each through its own connections, and nothing is lost or refused."""
    url, per_writer, failures = f"sqlite:///{database}", 15, []
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


def test_readers_do_not_wait_for_a_writer(store: KeyStore, database: Path) -> None:
    created = store.create("a")
    writer = sqlite3.connect(database, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("UPDATE state_version SET version = 99")
    assert store.version() == 2
    assert set(store.load_all().records) == {sha256(created.key)}
    writer.execute("ROLLBACK")
    writer.close()


def test_a_writer_that_never_ends_is_a_clear_error(
    store: KeyStore, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.state.database.BUSY_TIMEOUT", 0.05)
    writer = sqlite3.connect(database, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    with pytest.raises(StateError, match="failed: database is locked"):
        store.create("a")
    writer.execute("ROLLBACK")
    writer.close()


def test_a_database_that_went_away_is_a_state_error(store: KeyStore, database: Path) -> None:
    store.close()
    for path in database.parent.glob("forebay.db*"):
        path.unlink()
    with pytest.raises(StateError, match=f"{database} failed: "):
        store.load_all()


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
