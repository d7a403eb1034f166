"""Keeps the usage ledger of one replica going: when its threads work, and what metrics and log say of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from gateway.log import Log
from gateway.metrics import Metrics
from gateway.serving.ticket import Ticket
from gateway.state.ledger import Done, Ledger

JOURNAL_EVERY, COMMIT_EVERY = 0.1, 1.0
"""Seconds between two turns: how many a killed process loses, and how many the table lags behind."""
FLUSH_WITHIN = 2.0
"""Seconds that a question for sums waits for the rows of just now."""
CLOSE_WITHIN = 5.0
"""Seconds for the last rows, at the end."""


class Bookkeeper:
    """The ledger's shell in one event loop."""

    def __init__(self, ledger: Ledger[Ticket], metrics: Metrics, log: Log) -> None:
        self.ledger = ledger
        self._metrics = metrics
        self._log = log
        # One journals while the other waits for the database.
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="ledger")
        self._tasks: list[asyncio.Task[None]] = []
        self._away = False
        self._losing = False
        self._closed = False
        self._ending = asyncio.Event()

    def start(self) -> None:
        """Begin, with what was left by processes that are dead."""
        for every, turn in ((JOURNAL_EVERY, self._journal), (COMMIT_EVERY, self._commit)):
            self._tasks.append(asyncio.create_task(self._keep(every, turn), name=f"ledger {turn.__name__}"))

    async def _keep(self, every: float, turn: Callable[[], Awaitable[None]]) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every):
                    await self._ending.wait()
                    return
            try:
                await turn()
            except Exception as error:
                # Not one request less is accounted for because of a mistake of ours in one turn.
                self._log.failed("usage_not_written", error)

    async def _journal(self) -> None:
        if self.ledger.added:
            self._note(await self._in_thread(self.ledger.journal), stores=False)

    async def _commit(self) -> None:
        if self.ledger.due:
            self._note(await self._in_thread(self.ledger.commit), stores=True)

    async def _in_thread(self, step: Callable[[], Done]) -> Done:
        return await asyncio.get_running_loop().run_in_executor(self._threads, step)

    async def flush(self) -> None:
        """Have the rows of just now in the table, unless the database is slow."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_WITHIN):
                await self._journal()
                await self._commit()

    async def stop(self) -> None:
        """Write everything that is left. Call it when every request has ended."""
        if self._closed:
            return
        self._closed = True
        self._ending.set()
        # A turn that is under way says what it stored, unless the database holds it up.
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_WITHIN)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        done = await self._in_thread(lambda: self.ledger.close(CLOSE_WITHIN))
        self._note(done, stores=True)
        self._metrics.usage_waiting(done.left, 0.0, 0)
        if done.left:
            self._log.say("warning", "usage_left", rows=done.left, why="they wait on disk for the next start")
        self._threads.shutdown(wait=False)

    def measure(self) -> None:
        """Tell the metrics what waits."""
        self._metrics.usage_waiting(*self.ledger.waiting())

    def _note(self, done: Done, *, stores: bool) -> None:
        """Count what a step did, and say once what is wrong and once that it is right again."""
        self._metrics.usage_stored(done.stored)
        for reason, rows in done.lost.items():
            self._metrics.usage_lost(reason, rows)
        if stores and (done.away is not None) != self._away:
            self._away = done.away is not None
            if self._away:
                self._log.say("error", "usage_spooled", error=done.away, why="rows wait on disk until it is back")
            else:
                self._log.say("info", "usage_stored_again", rows=done.stored)
        if done.fault is not None:
            self._log.failed("usage_row_not_made", done.fault)
        if done.lost and not self._losing:
            self._log.say("error", "usage_lost", rows=dict(done.lost), disk=done.disk)
        # Said again only after a while in which nothing was lost.
        self._losing = bool(done.lost) or (self._losing and not (stores and done.away is None))
