"""One ordered list of what happened at every end of a test, and a way to wait for the next thing.

Tests assert the order of entries ("the client went away, then the engine's connection was closed"), never the time
between them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

# How long a wait may last before the test fails and shows what did happen. It bounds a hanging test; no test depends
# on it.
PATIENCE = 10.0

# What this process does takes a few turns of the event loop; whatever takes longer needs the processor that turning
# would burn.
EAGER_TURNS = 100


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened. ``index`` orders entries across all who write to the same journal."""

    index: int
    who: str
    kind: str
    connection: int | None
    request: int | None
    detail: str

    def __str__(self) -> str:
        places = [f"{name} {number}" for name, number in (("connection", self.connection), ("request", self.request))
                  if number is not None]  # fmt: skip
        return " ".join([f"{self.index:4} {self.who}: {self.kind}", *places, self.detail]).rstrip()


class Journal:
    """Append-only, shared by an upstream and any number of clients."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._waiters: list[asyncio.Future[None]] = []

    def note(
        self, who: str, kind: str, *, connection: int | None = None, request: int | None = None, detail: str = ""
    ) -> Entry:
        """Append an entry and wake everybody who waits for one."""
        entry = Entry(len(self.entries), who, kind, connection, request, detail)
        self.entries.append(entry)
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        return entry

    def find(
        self,
        kind: str,
        *,
        who: str | None = None,
        connection: int | None = None,
        request: int | None = None,
        after: Entry | None = None,
    ) -> list[Entry]:
        """Return the entries of that kind, in order, narrowed by whatever is given."""
        return [
            entry
            for entry in self.entries[0 if after is None else after.index + 1 :]
            if entry.kind == kind
            and who in (None, entry.who)
            and connection in (None, entry.connection)
            and request in (None, entry.request)
        ]

    async def saw(
        self,
        kind: str,
        *,
        who: str | None = None,
        connection: int | None = None,
        request: int | None = None,
        after: Entry | None = None,
        times: int = 1,
    ) -> Entry:
        """Wait until that happened (``times`` times) and return the entry, at once when it already has.

        Raises ``AssertionError`` with the whole journal when it does not happen within ``PATIENCE`` seconds.
        """
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while True:
            found = self.find(kind, who=who, connection=connection, request=request, after=after)
            if len(found) >= times:
                return found[times - 1]
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                async with asyncio.timeout_at(deadline):
                    await waiter
            except TimeoutError:
                place = f" (connection={connection}, request={request})"
                raise AssertionError(f"{kind!r}{place} did not happen; what did:\n{self}") from None

    def order(self, *kinds: str) -> list[str]:
        """Return the kinds of the entries in the order they happened, only those named."""
        return [entry.kind for entry in self.entries if entry.kind in kinds]

    def __str__(self) -> str:
        return "\n".join(str(entry) for entry in self.entries) or "nothing"
