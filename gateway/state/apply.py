"""A file of keys, tenants and organisations that live in the database: read, compared and brought about as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError, model_validator

from gateway.limits import OrganisationLimits, TenantLimits
from gateway.settings import ConfigError, KeySettings, explain, read_tree
from gateway.state import plan as planning
from gateway.state.database import NotPossible, Stale
from gateway.state.keys import (
    KeyRecord,
    KeyStore,
    StoredKey,
    insert_key,
    new_public_id,
    read_keys,
    record_of_setting,
    write_key,
)
from gateway.state.plan import Picture, obstacles, plan
from gateway.state.store import Change, Fields, Kind
from gateway.state.tenants import Entry, Group, GroupKind, entry_of, find_group, read_groups, remove_group, write_group
from gateway.values import Name, Section

_KEY_FIELDS = ("name", "tenant", "models", "caps", "limits", "trust_domain", "admin", "expires")


class KeyEntry(KeySettings):
    """A key of the file: itself it is elsewhere, this file is for everybody who may read the repository."""

    @model_validator(mode="after")
    def _not_here(self) -> KeyEntry:
        if self.key is not None:
            raise ValueError("a key itself does not belong into this file; write sha256, key_file or key_env")
        return self


class Wanted(Section):
    """The file. What is left out as a whole is left alone, also by `--prune`."""

    organisations: dict[Name, OrganisationLimits] | None = None
    """By name."""
    tenants: dict[Name, TenantLimits] | None = None
    """By name."""
    keys: tuple[KeyEntry, ...] | None = None
    """Each is known by its SHA-256; two may have one name while one takes the other's place."""


def read_wanted(file: Path) -> Picture:
    """Read what a file wants. ConfigError with everything that is wrong with it."""
    try:
        wanted = Wanted.model_validate(read_tree(file))
    except ValidationError as error:
        raise ConfigError(explain(error, Wanted)) from None
    return Picture(_groups("organisation", wanted.organisations), _groups("tenant", wanted.tenants), _keys(wanted.keys))


def _groups(kind: GroupKind, entries: Mapping[str, Entry] | None) -> dict[str, Fields] | None:
    return None if entries is None else {name: Group(kind, name, entry).fields for name, entry in entries.items()}


def _keys(entries: tuple[KeyEntry, ...] | None) -> dict[str, Fields] | None:
    if entries is None:
        return None
    keys: dict[str, Fields] = {}
    problems: list[str] = []
    for index, entry in enumerate(entries):
        try:
            digest = entry.digest().hex()
        except ConfigError as error:
            problems += [f"keys[{index}]: {problem}" for problem in error.problems]
            continue
        if digest in keys:
            problems.append(f"keys[{index}]: is the same key as another one ({keys[digest]['name']!r})")
        keys[digest] = _compared(StoredKey(record_of_setting(entry, "", "database")))
    if problems:
        raise ConfigError(problems)
    return keys


def _compared(key: StoredKey) -> dict[str, Any]:
    return {name: value for name, value in key.fields.items() if name in _KEY_FIELDS}


def _stored(connection: sa.Connection) -> Picture:
    groups = {
        kind: {group.name: group.fields for group in read_groups(connection, kind)}
        for kind in ("organisation", "tenant")
    }
    keys = {digest: key.fields for digest, key in read_keys(connection).items()}
    return Picture(groups["organisation"], groups["tenant"], keys)


def differences(
    store: KeyStore, wanted: Picture, own: Mapping[Kind, set[str]], prune: bool = False
) -> list[planning.Change]:
    """Return what `apply` would do. ConfigError when it cannot be done."""
    with store.reading() as connection:
        return _plan(connection, wanted, own, prune)


def _plan(
    connection: sa.Connection, wanted: Picture, own: Mapping[Kind, set[str]], prune: bool
) -> list[planning.Change]:
    stored = _stored(connection)
    changes = plan(wanted, stored, prune)
    if problems := obstacles(wanted, stored, changes, own):
        raise ConfigError(problems)
    return changes


def apply(
    store: KeyStore,
    wanted: Picture,
    own: Mapping[Kind, set[str]],
    prune: bool = False,
    shown: list[planning.Change] | None = None,
) -> list[planning.Change]:
    """Do it all, in one transaction; return what was done. Stale when it is no longer what was `shown`."""
    with store.changing() as change:
        changes = _plan(change.connection, wanted, own, prune)
        if shown is not None and changes != shown:
            raise Stale("somebody else has changed keys or tenants in the meantime; look again: forebay diff")
        keys = read_keys(change.connection)
        for one in changes:
            if one.kind == "key":
                _do_key(change, one, keys.get(one.ident))
            else:
                _do_group(change, one)
    return changes


def _do_group(change: Change, one: planning.Change) -> None:
    assert one.kind != "key"
    before = find_group(change.connection, one.kind, one.name)
    if one.after is None:
        assert before is not None
        remove_group(change, before)
        return
    write_group(change, before, Group(one.kind, one.name, entry_of(one.kind, one.after)))


def _do_key(change: Change, one: planning.Change, before: StoredKey | None) -> None:
    if one.after is None:
        assert before is not None
        write_key(change, before, dataclasses.replace(before, revoked_at=change.now), "revoke")
    elif before is None:
        insert_key(change, one.ident, _record(one.after, new_public_id()))
    else:
        record = _record({**_compared(before), **one.after}, before.record.public_id)
        record = dataclasses.replace(record, replaces=before.record.replaces)
        write_key(change, before, dataclasses.replace(before, record=record), "update")


def _record(fields: Fields, public_id: str) -> KeyRecord:
    try:
        key = KeySettings.model_validate({**fields, "sha256": "0" * 64})
    except ValidationError as error:
        raise NotPossible("; ".join(explain(error, KeySettings))) from None
    return record_of_setting(key, public_id, "database")
