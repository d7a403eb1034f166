"""The usage ledger: every request that ended becomes one row, off the path of requests.

``add`` is all that a request pays. Threads do the rest: ``journal`` makes rows and puts them into the spool, ten times
a second; ``commit`` stores what is in the spool, every second, and deletes it there. So a database that is slow or away
delays nobody, and a process that is killed loses a tenth of a second at most.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from math import inf
from pathlib import Path
from typing import Generic, TypeVar

from gateway.state.database import StateError
from gateway.state.spool import FAULTY, FULL, REFUSED, TORN, Spool
from gateway.state.usage import UsageRow, UsageStore

E = TypeVar("E")

MOST_ADDED = 100_000
"""Entries that wait to become rows; more than that is only seen when a disk hangs."""
PRUNE_FIRST, PRUNE_EVERY = 60.0, 3600.0
"""Seconds from the start to the first look for rows that are too old, and between two looks."""
PRUNE_BATCH = 1000
"""Rows deleted at once: writers of other replicas wait meanwhile."""
ADOPT_EVERY = 60.0
"""Seconds between two looks for what dead processes left."""


@dataclass(slots=True)
class Done:
    """What came of a step: rows stored, rows lost by reason, and why the database or the disk does not take them."""

    stored: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    away: str | None = None
    disk: str | None = None
    left: int = 0
    """Rows on disk for the next start."""
    fault: Exception | None = None
    """What an entry could not be made a row for: a mistake of ours."""


class Ledger(Generic[E]):
    """Entries in, rows out. ``row`` makes a row of an entry and runs in a thread; ``days`` 0: rows stay for ever."""

    def __init__(
        self,
        url: str,
        spool: Path,
        row: Callable[[E], UsageRow],
        *,
        days: int = 0,
        spool_bytes: int = 256 * 1024 * 1024,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.store = UsageStore(url)
        self.days = days
        self._row = row
        self._clock = clock
        self._wall = wall
        self._added: deque[E] = deque()
        self._overflown = 0
        self._spool = Spool(spool, spool_bytes, wall)
        self._spooling = threading.Lock()
        """Held for a moment by whoever touches the spool."""
        self._journalling = threading.Lock()
        """Held while entries become rows, so that rows stay in order."""
        self._committing = threading.Lock()
        """Held by whoever speaks to the database, perhaps for long."""
        self._away = False
        self._adopt_at = -inf
        self._prune_at = clock() + PRUNE_FIRST

    # --- the path of requests -----------------------------------------------------------------------------------------

    def add(self, entry: E) -> None:
        """Account for a request. An append, and nothing else."""
        if len(self._added) < MOST_ADDED:
            self._added.append(entry)
        else:
            self._overflown += 1

    @property
    def added(self) -> bool:
        """Whether there is something to journal."""
        return bool(self._added or self._overflown)

    @property
    def due(self) -> bool:
        """Whether there is something to commit, to take over or to prune."""
        now = self._clock()
        return self._spool.waiting > 0 or self._spool.first() is not None or now >= min(self._adopt_at, self._prune_at)

    # --- threads ------------------------------------------------------------------------------------------------------

    def journal(self) -> Done:
        """Make rows of what was added and put them into the spool."""
        with self._journalling:
            done = Done()
            rows = self._take(done)
            if rows:
                with self._spooling:
                    # While the database is away these files are all there is.
                    done.lost += self._spool.append(rows, sync=self._away)
                    done.disk = self._spool.trouble
            return done

    def _take(self, done: Done) -> list[UsageRow]:
        if self._overflown:
            done.lost[FULL] += self._overflown
            self._overflown = 0
        rows = []
        for _ in range(len(self._added)):
            try:
                rows.append(self._row(self._added.popleft()))
            except Exception as error:
                done.lost[FAULTY] += 1
                done.fault = error
        return rows

    def commit(self, within: float = inf) -> Done:
        """Store what is in the spool, oldest first, for about so many seconds; look after old rows."""
        with self._committing:
            return self._commit(within)

    def _commit(self, within: float) -> Done:
        done, until = Done(), self._clock() + within
        with self._spooling:
            if self._clock() >= self._adopt_at:
                self._adopt_at = self._clock() + ADOPT_EVERY
                self._spool.adopt()
            self._spool.seal()
        try:
            while self._store_first(done) and self._clock() < until:
                pass
            self._away = False
            self._prune()
        except StateError as error:
            self._away = True
            done.away = str(error)
            with self._spooling:
                self._spool.sync()
                self._spool.forget_rows()
        return done

    def _store_first(self, done: Done) -> bool:
        """Store the oldest segment; tell whether there was one."""
        with self._spooling:
            segment = self._spool.first()
            if segment is None:
                return False
            rows, torn = self._spool.read(segment)
        refused = self.store.insert(rows)
        with self._spooling:
            self._spool.done(segment)
        done.stored += len(rows) - refused
        done.lost.update({reason: count for reason, count in ((TORN, torn), (REFUSED, refused)) if count})
        return True

    def _prune(self) -> None:
        if not self.days or self._clock() < self._prune_at:
            return
        before = datetime.fromtimestamp(self._wall(), UTC) - timedelta(days=self.days)
        pruned = self.store.prune(before, PRUNE_BATCH)
        # As long as there are more, a batch with every commit.
        self._prune_at = self._clock() + (PRUNE_EVERY if pruned < PRUNE_BATCH else 0.0)

    # --- seen from outside --------------------------------------------------------------------------------------------

    def waiting(self) -> tuple[int, float, int]:
        """How many rows are not stored yet, for how many seconds the oldest of them, and their bytes on disk."""
        with self._spooling:
            rows, since, size = self._spool.waiting, self._spool.since, self._spool.bytes
        return rows + len(self._added), max(0.0, self._wall() - since) if since is not None else 0.0, size

    def close(self, within: float) -> Done:
        """Store what can be stored in that time; what cannot stays in the spool for the next start."""
        done = self.journal()
        # Somebody may hang at a database that does not answer: then its rows stay where they are.
        if self._committing.acquire(timeout=within):
            try:
                committed = self._commit(within)
            finally:
                self._committing.release()
            done.stored, done.away = committed.stored, committed.away
            done.lost.update(committed.lost)
        with self._spooling:
            waiting = self._spool.waiting
            if lost := self._spool.close():
                done.lost[FULL] += lost
            done.left = waiting - lost
        self.store.close()
        return done
