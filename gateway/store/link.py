"""One connection to a Redis server over which all calls of a replica go.

Rule 1: the calls of one turn of the event loop leave in one write; answers come in their order.
Rule 2: a call ends once: with the script's answer, or lost (``None``), when nobody knows whether it was run.
Rule 3: after any error but a script the server does not know the connection is given up and made anew, after a wait
        that grows and is left to chance. Passwords are in no message.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import MovedError, NoScriptError, RedisError

from gateway.redis_url import Address, Target
from gateway.store.scripts import ALL, Script, Told, pack, parse

_log = logging.getLogger(__name__)

FIRST_WAIT = 0.02
LONGEST_WAIT = 1.0
"""Seconds between attempts to connect, at the most."""
OPENING = 1.0
"""Seconds for a connection to be made, the login and the scripts with it."""
Done = Callable[[Told | None], None]


class _Call:
    __slots__ = ("args", "done", "keys", "script", "sent")

    def __init__(self, script: Script, keys: Sequence[str], args: Sequence[str | bytes], done: Done) -> None:
        self.script = script
        self.keys = keys
        self.args = args
        self.done = done
        self.sent = 0.0

    def packed(self, *, whole: bool) -> bytes:
        name, what = (b"EVAL", self.script.source) if whole else (b"EVALSHA", self.script.sha)
        return pack((name, what, str(len(self.keys)), *self.keys, *self.args))


class Link:
    """A connection that is made again whenever it is lost. ``on_up`` is called when calls may be made, ``on_down``
    after all calls on their way have been told that they are lost."""

    def __init__(
        self, target: Target, on_up: Callable[[], None], on_down: Callable[[], None], chance: random.Random
    ) -> None:
        self._target = target
        self._on_up = on_up
        self._on_down = on_down
        self._chance = chance
        self._connection: Any = None
        self._waiting: list[_Call] = []
        self._flight: deque[_Call] = deque()
        self._task: asyncio.Task[None] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._attempts = 0
        self.trouble = ""
        """What was wrong with the last connection; without passwords."""
        self._moved: Address | None = None
        self._seed = 0
        self._closing = False

    # --- calls ------------------------------------------------------------------------------------------------------

    @property
    def up(self) -> bool:
        """Whether calls may be made."""
        return self._connection is not None

    @property
    def oldest(self) -> float | None:
        """Since when, by the loop's time, the oldest call waits for its answer; None: none does."""
        if self._flight:
            return self._flight[0].sent
        return self._waiting[0].sent if self._waiting else None

    def call(self, script: Script, keys: Sequence[str], args: Sequence[str | bytes], done: Done) -> None:
        """Have a script run; only while ``up``."""
        loop = asyncio.get_running_loop()
        call = _Call(script, keys, args, done)
        call.sent = loop.time()
        if not self._waiting:
            loop.call_soon(self._write)
        self._waiting.append(call)

    def _write(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting and self._connection is not None:
            self._flight.extend(waiting)
            writer = self._connection._writer
            if writer is not None:
                # Else it has ended, which its reader is about to hear: then they are lost.
                writer.write(b"".join([call.packed(whole=False) for call in waiting]))

    def healthy(self) -> None:
        """What came up has proved itself: the next loss is a first one."""
        self._attempts = 0
        self.trouble = ""

    def drop(self) -> None:
        """Give the connection up, and make it anew."""
        if self._reader is not None:
            self._reader.cancel()
        self._lose()

    def _lose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        connection._close()
        lost = [*self._flight, *self._waiting]
        self._flight.clear()
        self._waiting.clear()
        for call in lost:
            call.done(None)
        self._on_down()

    # --- the connection ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to connect."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """End; what is on its way is lost."""
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        self._lose()

    async def _run(self) -> None:
        # While it connects, the library may take being cancelled for a failure.
        while not self._closing:
            if self._attempts:
                await asyncio.sleep(self._chance.uniform(0.25, 1) * min(LONGEST_WAIT, FIRST_WAIT * 2**self._attempts))
            self._attempts = min(self._attempts + 1, 10)
            try:
                async with asyncio.timeout(OPENING):
                    connection = await self._open()
            except Exception as error:
                # Whatever it is, it is tried again.
                self._seed += 1
                self.trouble = type(error).__name__
                _log.debug("no connection to %s: %s", self._target, self.trouble)
                continue
            self._connection = connection
            self._reader = asyncio.create_task(self._read(connection))
            self._on_up()
            try:
                await asyncio.wait((self._reader,))
            finally:
                self._reader.cancel()
                self._lose()
            if self._attempts:
                # It never proved itself; another address may do.
                self._seed += 1

    async def _open(self) -> Any:
        connection: Any = self._make(await self._find())
        try:
            await connection.connect()
            loads = [pack((b"SCRIPT", b"LOAD", script.source)) for script in ALL]
            await connection.send_packed_command(b"".join(loads), check_health=False)
            for _ in ALL:
                await connection.read_response()
        except BaseException:
            connection._close()
            raise
        return connection

    async def _read(self, connection: Any) -> None:
        """Hand on the answers until there will be no more."""
        flight = self._flight
        # Whoever is told may give the connection up; what else has been read then is nobody's answer.
        while self._connection is connection:
            try:
                told = parse(await connection.read_response(disable_decoding=True))
            except NoScriptError:
                call = flight.popleft()
                connection._writer.write(call.packed(whole=True))
                flight.append(call)
                continue
            except MovedError as moved:
                # A node that does not know its own name sends none.
                self._moved = (moved.host or connection.host, moved.port)
                return
            except Exception as error:
                # Also what no server of ours would say.
                self.trouble = type(error).__name__
                _log.debug("the connection to %s ended: %s", self._target, self.trouble)
                return
            if self._connection is connection:
                flight.popleft().done(told)

    async def _find(self) -> Address | None:
        target = self._target
        moved, self._moved = self._moved, None
        if moved is not None:
            return moved
        if not target.addresses:
            return None
        address = target.addresses[self._seed % len(target.addresses)]
        if not target.scheme.endswith("+sentinel"):
            return address
        options = {"password": target.sentinel_password, "protocol": 2, "driver_info": None}
        sentinel = self._tcp(address, options)
        try:
            await sentinel.connect()
            await sentinel.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", target.service)
            found = await sentinel.read_response()
        finally:
            sentinel._close()
        if not found:
            raise RedisError("the Sentinel does not know the service")
        return found[0].decode(), int(found[1])

    def _make(self, address: Address | None) -> Any:
        target = self._target
        options: dict[str, Any] = {
            "db": target.database,
            "username": target.username,
            "password": target.password,
            "socket_timeout": None,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "driver_info": None,
        }
        if address is None:
            return UnixDomainSocketConnection(path=target.path, **options)
        return self._tcp(address, {**options, "socket_connect_timeout": OPENING})

    def _tcp(self, address: Address, options: dict[str, Any]) -> Any:
        host, port = address
        if self._target.encrypted:
            return SSLConnection(host=host, port=port, ssl_ca_certs=self._target.ca, **options)
        return Connection(host=host, port=port, **options)
