"""Follows the agents beside engines (``engines.minder``): by their word an engine is routed to, or not.

An engine is sent new requests while its agent calls it ``serving``, and in no other phase: not between ready and what
has to be done before traffic, not while it drains, not while it is down. Where no agent answers, the looks of ``watch``
decide alone, except for an engine that waits for its owner after each start: that one may have been started anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterable

from engines.minder import DRAINING, SERVING, State
from engines.minding import MinderClient, MinderError
from gateway.log import Log
from gateway.serving.pool import Endpoint

HOLD = "minder"
"""Under which name an agent keeps requests from its engine."""
FIRST_CONTACT = 2.0
"""Seconds an agent has to answer before its engine is routed to without it."""
AGAIN = 1.0
"""Seconds after which an agent that is lost is looked for again."""
LOOK = 0.05
"""Seconds between two looks at whether an endpoint has drained."""


class Minders:
    """The agents of a replica's endpoints, by endpoint."""

    def __init__(self, log: Log) -> None:
        self.states: dict[Endpoint, State] = {}
        """What each agent said last; without those that cannot be reached."""
        self._log = log
        self._id = secrets.token_hex(8)
        self._clients: dict[Endpoint, MinderClient] = {}
        self._tasks: dict[Endpoint, asyncio.Task[None]] = {}
        self._draining: dict[Endpoint, asyncio.Task[None]] = {}

    async def watch(self, endpoints: Iterable[Endpoint]) -> None:
        """Follow the agents of these endpoints; returns when each has answered, or had time enough to."""
        contacts = []
        for endpoint in endpoints:
            if endpoint.spec.minder is not None:
                client = self._clients[endpoint] = MinderClient(
                    endpoint.spec.minder.address, endpoint.spec.minder.token
                )
                contact = asyncio.Event()
                following = self._follow(endpoint, client, contact)
                self._tasks[endpoint] = asyncio.create_task(following, name=f"minder of {endpoint.name}")
                contacts.append(contact.wait())
        if contacts:
            with contextlib.suppress(TimeoutError):
                # Not wait_for: before Python 3.12 it may swallow a cancellation.
                async with asyncio.timeout(FIRST_CONTACT):
                    await asyncio.gather(*contacts)

    async def forget(self, endpoints: Iterable[Endpoint]) -> None:
        """Follow these no longer."""
        for endpoint in list(endpoints):
            tasks = [table.pop(endpoint) for table in (self._tasks, self._draining) if endpoint in table]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            client = self._clients.pop(endpoint, None)
            if client is not None:
                await client.close()
            self.states.pop(endpoint, None)

    async def stop(self) -> None:
        """Follow nobody any more."""
        await self.forget(list(self._clients))

    async def tell(self, endpoint: Endpoint, path: str, **fields: object) -> State:
        """Send an agent a call and act on the state it leaves. MinderError when it is refused or nobody answers."""
        before = self.states.get(endpoint)
        state = await self._clients[endpoint].call("POST", path, **fields)
        # What has been heard meanwhile may be newer than the answer; and where it is older, what is new will be heard.
        if self.states.get(endpoint) is before:
            self._take(endpoint, state)
        return state

    async def _follow(self, endpoint: Endpoint, client: MinderClient, contact: asyncio.Event) -> None:
        while True:
            try:
                async for item in client.events(follower=self._id):
                    if isinstance(item, State):
                        self._take(endpoint, item)
                        contact.set()
                why = "it ended"
            except MinderError as error:
                why = str(error)
            contact.set()
            self._lose(endpoint, why)
            await asyncio.sleep(AGAIN)

    def _take(self, endpoint: Endpoint, state: State) -> None:
        before = self.states.get(endpoint)
        self.states[endpoint] = state
        if state.phase == SERVING:
            endpoint.holds.discard(HOLD)
        else:
            endpoint.holds.add(HOLD)
        if before is None or before.phase != state.phase:
            told = {"message": state.message} if state.message else {}
            self._log.say("info", "engine_phase", endpoint=endpoint.name, phase=state.phase, **told)
        if state.phase == DRAINING and not state.drained and endpoint not in self._draining:
            self._draining[endpoint] = asyncio.create_task(self._drain(endpoint), name=f"drain {endpoint.name}")

    def _lose(self, endpoint: Endpoint, why: str) -> None:
        state = self.states.pop(endpoint, None)
        if state is None:
            return
        self._log.say("warning", "minder_lost", endpoint=endpoint.name, why=why)
        if not state.gated:
            endpoint.holds.discard(HOLD)

    async def _drain(self, endpoint: Endpoint) -> None:
        """Tell the agent once no request is left there."""
        try:
            while (state := self.states.get(endpoint)) is not None and state.phase == DRAINING and not state.drained:
                if not endpoint.in_flight and await self._told_drained(endpoint):
                    return
                await asyncio.sleep(LOOK if endpoint.in_flight else AGAIN)
        finally:
            self._draining.pop(endpoint, None)

    async def _told_drained(self, endpoint: Endpoint) -> bool:
        try:
            await self._clients[endpoint].call("POST", "/drained", follower=self._id)
        except MinderError as error:
            self._log.say("warning", "drain_not_told", endpoint=endpoint.name, why=str(error))
            return False
        return True
