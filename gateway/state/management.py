"""Keys, tenants and organisations as whoever manages them sees them: those of the file and of the database as one.

The rule is here once, for the API and for the commands: what the file declares is shown and is not changed. Everything
blocks: call it in a thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from gateway.settings import Settings
from gateway.state.database import NoSuch
from gateway.state.declared import declared_groups, declared_keys, names, refuse_declared, users_in_file
from gateway.state.keys import CreatedKey, KeyStore, State, StoredKey
from gateway.state.store import Kind
from gateway.state.tenants import Entry, Group, GroupKind


class Management:
    """What is done to the keys, tenants and organisations of one gateway."""

    def __init__(self, store: KeyStore, settings: Settings) -> None:
        self.store = store
        self._settings = settings

    @property
    def own_names(self) -> dict[Kind, set[str]]:
        """The names that the file declares."""
        return {kind: names(self._settings, kind) for kind in ("organisation", "tenant", "key")}

    # --- keys -----------------------------------------------------------------------------------------------------

    def keys(self, tenant: str | None = None, state: State | None = None) -> list[StoredKey]:
        """Those of the file, then those of the database; all, or those of a tenant or in a state."""
        now = datetime.now(UTC)
        of_file = [
            key
            for key in declared_keys(self._settings)
            if tenant in (None, key.record.tenant) and state in (None, key.state(now))
        ]
        return [*of_file, *self.store.list(tenant, state)]

    def key(self, which: str) -> StoredKey:
        """One key by its id, or by its name."""
        of_file = [key for key in declared_keys(self._settings) if key.record.name == which]
        return of_file[0] if of_file else self.store.find(which)

    def create(self, name: str, **rights: Any) -> CreatedKey:
        """Make a key; see `KeyStore.create`."""
        refuse_declared(self._settings, "key", name)
        return self.store.create(name, **rights)

    def import_key(self, name: str, **rights: Any) -> StoredKey:
        """Store a key that was made elsewhere; see `KeyStore.import_key`."""
        refuse_declared(self._settings, "key", name)
        return self.store.import_key(name, **rights)

    def rotate(
        self, which: str, overlap: float, expires: datetime | None = None, if_match: str | None = None
    ) -> CreatedKey:
        """Make the key that takes another one's place; see `KeyStore.rotate`."""
        refuse_declared(self._settings, "key", which)
        return self.store.rotate(which, overlap, expires, if_match=if_match)

    def update(
        self, which: str, changes: Mapping[str, object], *, if_match: str | None = None, keep_admin: bool = False
    ) -> StoredKey:
        """Change a key's rights; see `KeyStore.update`."""
        refuse_declared(self._settings, "key", which)
        return self.store.update(which, changes, if_match=if_match, keep_admin=keep_admin and self._no_admin_in_file)

    def revoke(self, which: str, *, if_match: str | None = None, keep_admin: bool = False) -> StoredKey:
        """Make a key stop working; see `KeyStore.revoke`."""
        refuse_declared(self._settings, "key", which)
        return self.store.revoke(which, if_match=if_match, keep_admin=keep_admin and self._no_admin_in_file)

    @property
    def _no_admin_in_file(self) -> bool:
        return not any(key.admin for key in self._settings.keys)

    # --- tenants and organisations --------------------------------------------------------------------------------

    def groups(self, kind: GroupKind) -> list[Group]:
        """Those of the file, then those of the database."""
        return [*declared_groups(self._settings, kind).values(), *self.store.groups(kind)]

    def group(self, kind: GroupKind, name: str) -> Group:
        """One of them."""
        return declared_groups(self._settings, kind).get(name) or self.store.group(kind, name)

    def put_group(self, kind: GroupKind, name: str, entry: Entry, *, if_match: str | None = None) -> Group:
        """Make it, or let it be from now on as said."""
        refuse_declared(self._settings, kind, name)
        known = names(self._settings, "organisation")
        return self.store.put_group(kind, name, entry, if_match=if_match, known=known)

    def delete_group(self, kind: GroupKind, name: str, *, if_match: str | None = None) -> Group:
        """Forget it, unless something belongs to it."""
        is_declared = name in names(self._settings, kind)
        # One of the database that the file's hides may go: what belongs to that name has the file's.
        users = [] if is_declared else users_in_file(self._settings, kind, name)
        try:
            return self.store.delete_group(kind, name, if_match=if_match, used_by=users)
        except NoSuch:
            refuse_declared(self._settings, kind, name)
            raise
