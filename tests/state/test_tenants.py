"""Tenants and organisations of the database, and how they are one with those of the file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gateway.limits import OrganisationLimits, TenantLimits
from gateway.settings import Settings
from gateway.state.database import NoSuch, NotPossible, Stale
from gateway.state.declared import InFile, known_limits
from gateway.state.keys import KeyStore
from gateway.state.management import Management
from gateway.state.tenants import Group
from tests.support.databases import Database


@pytest.fixture
def store(database: Database) -> Iterator[KeyStore]:
    with KeyStore(database.url) as opened:
        yield opened


def tenant(**fields: Any) -> TenantLimits:
    return TenantLimits.model_validate(fields)


def organisation(**fields: Any) -> OrganisationLimits:
    return OrganisationLimits.model_validate(fields)


def test_they_are_made_changed_listed_and_read_by_replicas(store: KeyStore) -> None:
    acme = store.put_group(
        "organisation", "acme", organisation(tenants={"tokens": "1M/m"}, keys={"concurrent": "none"})
    )
    first = store.put_group("tenant", "search", tenant(organisation="acme", limits={"requests": "60/m"}))
    again = store.put_group("tenant", "search", tenant(keys={"budgets": {"usd": "9.99"}}))
    assert (again.created_at, again.organisation, again.entry) == (
        first.created_at, None, tenant(keys={"budgets": {"usd": "9.99"}}),
    )  # fmt: skip
    assert (store.groups("tenant"), store.groups("organisation")) == ((again,), (acme,))
    snapshot = store.load_all()
    assert (snapshot.tenants, snapshot.organisations) == ({"search": again}, {"acme": acme})
    found = snapshot.organisations["acme"].entry
    assert found.keys.model_fields_set == {"concurrent"}, "none is something else than nothing said"
    assert store.version() == snapshot.version == 4
    assert [
        (one.action, one.kind, one.before and one.before["organisation"]) for one in store.audit(kind="tenant")
    ] == [
        ("update", "tenant", "acme"),
        ("create", "tenant", None),
    ]


def test_the_same_again_is_no_change(store: KeyStore) -> None:
    for _ in range(2):
        store.put_group("tenant", "a", tenant(limits={"concurrent": 1}))
    assert (store.version(), len(store.audit())) == (2, 1)


def test_what_something_belongs_to_is_not_deleted(store: KeyStore) -> None:
    store.put_group("organisation", "acme", organisation())
    store.put_group("tenant", "search", tenant(organisation="acme"))
    key = store.create("alice", "search").record.public_id
    with pytest.raises(NotPossible, match="tenant 'search' cannot be deleted while keys belong to it: alice"):
        store.delete_group("tenant", "search")
    with pytest.raises(NotPossible, match="organisation 'acme' cannot be deleted while tenants belong to it: search"):
        store.delete_group("organisation", "acme")
    store.revoke(key)
    store.delete_group("tenant", "search")
    store.delete_group("organisation", "acme")
    assert (store.groups("tenant"), store.groups("organisation")) == ((), ())
    assert [entry.action for entry in store.audit(limit=2)] == ["delete", "delete"]


def test_an_organisation_that_is_not_there_and_a_name_that_is_none(store: KeyStore) -> None:
    with pytest.raises(
        NoSuch, match="no organisation 'acmee' in the database; `forebay organisations list` shows them"
    ):
        store.put_group("tenant", "search", tenant(organisation="acmee"))
    store.put_group("tenant", "search", tenant(organisation="of-the-file"), known={"of-the-file"})
    with pytest.raises(NotPossible, match="name: should be a name of 1 to"):
        store.put_group("tenant", " ", tenant())
    with pytest.raises(NoSuch, match="no tenant 'nobody'"):
        store.delete_group("tenant", "nobody")


def test_a_stale_change_is_refused(store: KeyStore) -> None:
    read = store.put_group("tenant", "a", tenant())
    newer = store.put_group("tenant", "a", tenant(limits={"concurrent": 1}))
    said = r"tenant 'a' was changed since you read it, by local command \("
    with pytest.raises(Stale, match=said):
        store.put_group("tenant", "a", tenant(), if_match=read.etag)
    with pytest.raises(Stale, match=said):
        store.delete_group("tenant", "a", if_match=read.etag)
    store.delete_group("tenant", "a", if_match=newer.etag)
    with pytest.raises(NoSuch):
        store.put_group("tenant", "a", tenant(), if_match=newer.etag)


# --- the file's beside them --------------------------------------------------------------------------------------

FILE = Settings.model_validate(
    {
        "limits": {
            "organisations": {"acme": {}},
            "tenants": {"declared": {"organisation": "acme", "limits": {"concurrent": 7}}},
        },
        "keys": [{"name": "alice", "key": "k", "tenant": "shared"}, {"name": "root", "key": "r", "admin": True}],
    }
)


def test_what_the_file_declares_is_shown_and_left_alone(store: KeyStore) -> None:
    management = Management(store, FILE)
    management.put_group("tenant", "stored", tenant(organisation="acme"))
    shown = {one.name: one.as_json() for one in management.groups("tenant")}
    assert {name: one["source"] for name, one in shown.items()} == {"declared": "file", "stored": "database"}
    assert (shown["declared"]["limits"], shown["declared"]["created"]) == ({"concurrent": 7}, None)
    told = "declared in the configuration file, which wins: change it there"
    for refused in (
        lambda: management.put_group("tenant", "declared", tenant()),
        lambda: management.delete_group("tenant", "declared"),
        lambda: management.delete_group("organisation", "acme"),
        lambda: management.create("alice"),
        lambda: management.import_key("alice", key="x"),
        lambda: management.rotate("alice", 1),
        lambda: management.update("alice", {"models": []}),
        lambda: management.revoke("alice"),
    ):
        with pytest.raises(InFile, match=told):
            refused()
    assert store.version() == 2
    assert management.key("alice").as_json(management.store.audit()[0].at)["source"] == "file"


def test_a_key_of_the_file_keeps_its_tenant(store: KeyStore) -> None:
    management = Management(store, FILE)
    management.put_group("tenant", "shared", tenant())
    with pytest.raises(NotPossible, match="cannot be deleted while keys belong to it: alice"):
        management.delete_group("tenant", "shared")


def test_an_admin_of_the_file_is_admin_enough(store: KeyStore) -> None:
    store.create("other", admin=True)
    Management(store, FILE).revoke("other", keep_admin=True)


def test_one_that_the_file_s_hides_can_be_deleted(store: KeyStore) -> None:
    store.put_group("tenant", "declared", tenant())
    Management(store, FILE).delete_group("tenant", "declared")
    assert store.groups("tenant") == ()


def test_limits_of_both_are_one_and_the_file_wins(store: KeyStore) -> None:
    store.put_group("organisation", "acme", organisation(limits={"concurrent": 1}))
    store.put_group("organisation", "other", organisation(limits={"concurrent": 2}))
    store.put_group("tenant", "declared", tenant(limits={"concurrent": 3}))
    stored: Group = store.put_group("tenant", "stored", tenant(limits={"concurrent": 4}))
    known = known_limits(FILE, store.load_all())
    assert known.tenants == {"declared": FILE.limits.tenants["declared"], "stored": stored.entry}
    assert known.organisations == {"acme": OrganisationLimits(), "other": organisation(limits={"concurrent": 2})}
    assert known.stored == {"tenant:stored", "organisation:other"}
