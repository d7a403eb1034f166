"""Keeps the table of keys current: what the file declares and what the state database holds, together.

The database is looked at once a second for its version; a revoked key is gone within that. While the database is away
known keys keep working for a stated time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from gateway import limits
from gateway.api.auth import Authenticator
from gateway.log import Log
from gateway.settings import Settings
from gateway.state.database import StateError, exists, upgrade
from gateway.state.declared import known_limits
from gateway.state.keys import KeySnapshot, KeyStore, declared, merge
from gateway.state.management import Management
from gateway.state.store import Actor

POLL_INTERVAL = 1.0
"""Seconds between two looks at the database's version."""

_EMPTY = KeySnapshot(-1, {})


class Keyring:
    """The keys of one replica. With ``auth: none`` everybody is let in and the database is left alone."""

    def __init__(
        self,
        settings: Settings,
        authenticator: Authenticator,
        log: Log,
        clock: Callable[[], float],
        limits_known: Callable[[limits.Declared], None],
    ) -> None:
        self._settings = settings
        self._limits_known = limits_known
        """Is told the limits of file and database together, whenever they may have changed."""
        self._looking = asyncio.Lock()
        self._authenticator = authenticator
        self._log = log
        self._clock = clock
        self._store: KeyStore | None = None
        self._snapshot = _EMPTY
        self._seen_at = clock()
        self._away = False

    async def start(self) -> None:
        """Open and migrate the database, read all keys. Raises StateError or ConfigError."""
        await self._open_if_needed(self._settings)
        self._apply(self._settings)

    async def _open_if_needed(self, settings: Settings) -> None:
        """With ``auth: none`` only admin keys matter: a database that is not there, or not well, keeps nobody out."""
        if settings.auth == "keys":
            await asyncio.to_thread(self._open, settings)
        elif settings.admin.enabled and exists(settings.state_url):
            try:
                await asyncio.to_thread(self._open, settings)
            except StateError as error:
                self._is_away(error)

    def _open(self, settings: Settings) -> None:
        upgrade(settings.state_url)
        self._store = KeyStore(settings.state_url)
        self._snapshot = self._store.load_all()
        self._seen_at = self._clock()

    def management(self, actor: Actor) -> Management:
        """What is done to keys and tenants in somebody's name. StateError where there is no database."""
        if self._store is None:
            raise StateError("this gateway uses no state database: `auth` is none, and there was none at its start")
        return Management(self._store.acting_as(actor), self._settings)

    @property
    def snapshot(self) -> KeySnapshot:
        """What the database held at the last look: keys, tenants and organisations."""
        return self._snapshot

    def _apply(self, settings: Settings) -> None:
        known = merge(declared(settings.keys), self._snapshot)
        self._settings = settings
        self._authenticator.replace(None if settings.auth == "none" else known, known)
        self._limits_known(known_limits(settings, self._snapshot))

    async def reconfigure(self, settings: Settings) -> None:
        """Take the file's keys anew. ConfigError when one cannot be read, StateError; then nothing has changed."""
        if settings.auth == "keys" and self._store is None:
            declared(settings.keys)
            await asyncio.to_thread(self._open, settings)
        self._apply(settings)

    async def keep_current(self) -> None:
        """Look at the database from time to time, for ever."""
        while True:
            await asyncio.sleep(POLL_INTERVAL)
            await self.look()

    async def look(self) -> None:
        """Take over what has changed in the database."""
        # One after another: an older state, read slowly, must not come after a newer one.
        async with self._looking:
            await self._look()

    async def _look(self) -> None:
        store = self._store
        if store is None:
            return
        try:
            version = await asyncio.to_thread(store.version)
            if version != self._snapshot.version:
                self._snapshot = await asyncio.to_thread(store.load_all)
                self._apply(self._settings)
                self._log.say("info", "keys_changed", keys=len(self._snapshot.records), version=version)
        except StateError as error:
            self._is_away(error)
            return
        self._seen_at = self._clock()
        if self._away:
            self._away = False
            self._log.say("info", "state_database_back")

    def _is_away(self, error: StateError) -> None:
        if not self._away:
            self._away = True
            kept = self._settings.state.key_cache
            self._log.say("error", "state_database_away", error=str(error), known_keys_work_for_seconds=kept)
        expired = self._clock() - self._seen_at > self._settings.state.key_cache
        if expired and self._snapshot.records:
            # Whom the file's keys belong to is limited as before.
            self._snapshot = replace(_EMPTY, tenants=self._snapshot.tenants, organisations=self._snapshot.organisations)
            self._apply(self._settings)
            self._log.say("error", "keys_of_database_dropped", why="the state database has been away for too long")

    async def stop(self) -> None:
        """Close the database."""
        if self._store is not None:
            await asyncio.to_thread(self._store.close)
            self._store = None
