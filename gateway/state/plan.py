"""What has to change for the database to hold what a file wants. Pure: two pictures in, a list of changes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gateway.state.keys import made_by_serve
from gateway.state.store import Fields, Kind

Table = Mapping[str, Fields]
CREATE_ORDER: tuple[Kind, ...] = ("organisation", "tenant", "key")
"""Whom something belongs to goes first when things are made, and last when they are removed."""


@dataclass(frozen=True, slots=True)
class Picture:
    """Organisations and tenants by name, keys by SHA-256, each as its fields. In a wanted picture None stands for a
    part that the file leaves alone. A stored key says its `id`, what it `replaces` and when it was `revoked` too."""

    organisation: Table | None = field(default_factory=dict)
    tenant: Table | None = field(default_factory=dict)
    key: Table | None = field(default_factory=dict)

    def table(self, kind: Kind) -> Table:
        """One of the three, empty when it is left alone."""
        tables: dict[Kind, Table | None] = {"organisation": self.organisation, "tenant": self.tenant, "key": self.key}
        return tables[kind] or {}


@dataclass(frozen=True, slots=True)
class Change:
    """One thing to make, change or remove. `ident` is a group's name or a key's SHA-256; `after` holds what is wanted,
    `before` what was there."""

    action: Literal["create", "update", "remove"]
    kind: Kind
    name: str
    ident: str = field(repr=False)
    before: Fields | None
    after: Fields | None

    def lines(self) -> Iterator[str]:
        """How a person reads it: one line, and one for each field that changes."""
        sign = {"create": "+", "update": "~", "remove": "-"}[self.action]
        public_id = (self.before or {}).get("id")
        yield f"{sign} {self.kind} {self.name}" + (f" ({public_id})" if public_id else "")
        before, after = self.before or {}, self.after or {}
        if self.action == "update":
            yield from (f"    {name}: {_shown(before.get(name))} → {_shown(after[name])}" for name in self.differing())
        elif self.action == "create":
            yield from (f"    {name}: {_shown(value)}" for name, value in after.items() if value and name != "name")

    def differing(self) -> list[str]:
        """The fields of an update that change."""
        before, after = self.before or {}, self.after or {}
        return [name for name, value in after.items() if before.get(name) != value]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return "none" if value is None else str(value)


def plan(wanted: Picture, stored: Picture, prune: bool = False) -> list[Change]:
    """Return what to do, in an order that can be done. With `prune` what the file does not name is removed, from the
    parts that the file has."""
    changes = [change for kind in CREATE_ORDER for change in _made_and_changed(kind, wanted, stored)]
    if prune:
        for kind in reversed(CREATE_ORDER):
            changes.extend(_removed(kind, wanted, stored))
    return changes


def _made_and_changed(kind: Kind, wanted: Picture, stored: Picture) -> Iterator[Change]:
    there = stored.table(kind)
    rotated = _rotated(stored)
    for ident, fields in wanted.table(kind).items():
        name, before = fields["name"], there.get(ident)
        if before is None:
            yield Change("create", kind, name, ident, None, fields)
            continue
        # A key that was rotated since ends when its overlap does, whatever the file says; one revoked stays so.
        after = {key: value for key, value in fields.items() if key != "expires" or before.get("id") not in rotated}
        if not before.get("revoked") and any(before.get(key) != value for key, value in after.items()):
            yield Change("update", kind, name, ident, before, after)


def _removed(kind: Kind, wanted: Picture, stored: Picture) -> Iterator[Change]:
    named = {"organisation": wanted.organisation, "tenant": wanted.tenant, "key": wanted.key}[kind]
    if named is None:
        return
    kept = {stored.table("key")[ident]["id"] for ident in named if ident in stored.table("key")}
    successors = _successors(kept, stored) if kind == "key" else set()
    for ident, fields in stored.table(kind).items():
        is_own = kind == "key" and (made_by_serve(fields["name"]) or fields["id"] in successors)
        if ident not in named and not fields.get("revoked") and not is_own:
            yield Change("remove", kind, fields["name"], ident, fields, None)


def _rotated(stored: Picture) -> set[str]:
    """Ids of the keys whose place another one has taken."""
    return {fields["replaces"] for fields in stored.table("key").values() if not fields["revoked"]} - {None}


def _successors(ids: set[str], stored: Picture) -> set[str]:
    """Ids of the keys that took the place of those, one after another: the file need not know them yet."""
    found: set[str] = set()
    while True:
        new = {
            fields["id"] for fields in stored.table("key").values() if fields["replaces"] in ids | found
        } - found  # fmt: skip
        if not new:
            return found
        found |= new


def outcome(stored: Picture, changes: list[Change]) -> Picture:
    """Return what the database holds after the changes; a key that is made has no id yet, one removed is gone."""
    tables: dict[Kind, dict[str, Fields]] = {kind: dict(stored.table(kind)) for kind in CREATE_ORDER}
    for change in changes:
        table = tables[change.kind]
        if change.after is None:
            del table[change.ident]
        else:
            unset = {"id": change.ident[:12], "replaces": None, "revoked": None} if change.kind == "key" else {}
            table[change.ident] = {**unset, **table.get(change.ident, {}), **change.after}
    return Picture(tables["organisation"], tables["tenant"], tables["key"])


def obstacles(wanted: Picture, stored: Picture, changes: list[Change], own: Mapping[Kind, set[str]]) -> list[str]:
    """Return why it cannot be done, a line each. `own` are the names that the gateway's configuration declares."""
    after = outcome(stored, changes)
    return [
        *(
            f"{kind} {fields['name']!r} is declared in the gateway's configuration, which wins; take it out of one"
            for kind in CREATE_ORDER
            for fields in wanted.table(kind).values()
            if fields["name"] in own[kind]
        ),
        *(
            f"key {fields['name']!r} was revoked and cannot come back; make another and name its hash"
            for ident, fields in wanted.table("key").items()
            if stored.table("key").get(ident, {}).get("revoked")
        ),
        *(
            f"tenant {fields['name']!r} belongs to organisation {fields['organisation']!r}: there is none"
            for fields in after.table("tenant").values()
            if fields["organisation"] not in {None, *after.table("organisation"), *own["organisation"]}
        ),
        *_still_used(after, changes),
    ]


def _still_used(after: Picture, changes: list[Change]) -> Iterator[str]:
    live = [fields for fields in after.table("key").values() if not fields["revoked"]]
    for change in changes:
        if change.kind == "tenant" and change.after is None:
            users = sorted({key["name"] for key in live if key["tenant"] == change.name})
            if users:
                yield f"tenant {change.name!r} cannot be removed: keys belong to it: {', '.join(users)}"
