"""The owner's side of an engine's agent (``engines.minder``): start it or find it, follow it, tell it, stop it.

``Minder`` is for who owns an engine; ``MinderClient`` speaks to any agent's control port, and is all that a gateway or
a command needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from engines.minder import (
    DRAINING,
    FAILED,
    GIVE_UP,
    ORPHAN_GRACE,
    READY,
    SERVING,
    SETTLE,
    STARTING,
    STOPPED,
    STOPPING,
    WAITING,
    Address,
    AddressError,
    Exit,
    Phase,
    Progress,
    RestartPolicy,
    State,
    arguments_digest,
    claim,
    listen_unix,
    listens,
    parse_address,
    read_state,
    this_program,
)

CALL_WITHIN = 10.0
"""Seconds an agent has to answer a call."""
SILENT_FOR = 45.0
"""Seconds of silence, three heartbeats, after which a stream of events counts as lost."""
MOST_BYTES = 2 * 1024 * 1024
"""Bytes of an answer, or of a line of a stream; no agent sends more."""
FOLLOW_AGAIN = 0.2
"""Seconds after which an agent that is there, but does not let itself be followed, is asked again."""
HOOK_AGAIN = 5.0
"""Seconds after which what is to be done before traffic is tried again."""

PERSONS = RestartPolicy(never_ready=1)
"""For an engine that a person has just configured: one that was never ready is told at once, not tried again."""


class MinderError(Exception):
    """The engine cannot be started or spoken to; the message says what happened and what to do."""


# --- speaking to an agent --------------------------------------------------------------------------------------------


class MinderClient:
    """Calls to one control port. ``address`` is ``unix:/path`` or ``http://host:port``; the latter needs a token."""

    def __init__(self, address: str, token: str | None = None) -> None:
        self.address = address
        where = parse_address(address)
        self._client = httpx.AsyncClient(
            base_url="http://minder" if where.unix is not None else address,
            # There is no TLS here, and reading all the world's certificates would take longer than most calls.
            transport=httpx.AsyncHTTPTransport(verify=False, uds=str(where.unix) if where.unix is not None else None),
            headers={} if token is None else {"authorization": f"Bearer {token}"},
            timeout=CALL_WITHIN,
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close what is open."""
        await self._client.aclose()

    async def call(self, method: str, path: str, **fields: object) -> State:
        """Send one call and return the state it left. MinderError when it is refused or nobody answers."""
        with self._translated():
            async with asyncio.timeout(CALL_WITHIN), self._client.stream(method, path, json=fields or None) as answer:
                body = await _whole(answer)
            self._check(answer, body)
            return read_state(json.loads(body))

    async def events(self, *, follower: str = "", lines: bool = False) -> AsyncGenerator[State | str, None]:
        """Yield each state, beginning with this moment's, and each line of the engine's output if wanted.

        Ends when the agent ends; MinderError when it cannot be reached or is silent. ``follower`` names a gateway that
        will tell when it has drained.
        """
        query = {"follower": follower, "lines": "1" if lines else "0"}
        with self._translated():
            async with self._client.stream("GET", "/events", params=query, timeout=SILENT_FOR) as answer:
                if answer.status_code != httpx.codes.OK:
                    self._check(answer, await _whole(answer))
                async for text in _lines(answer):
                    if text:
                        item = json.loads(text)
                        yield item["line"] if "line" in item else read_state(item["state"])

    async def logs(self, lines: int, *, follow: bool = False) -> AsyncGenerator[str, None]:
        """Yield the engine's last lines, and those to come if wanted. MinderError when it cannot be reached."""
        query = {"lines": str(lines), "follow": "1" if follow else "0"}
        with self._translated():
            async with self._client.stream("GET", "/logs", params=query, timeout=SILENT_FOR) as answer:
                if answer.status_code != httpx.codes.OK:
                    self._check(answer, await _whole(answer))
                async for text in _lines(answer):
                    if text:
                        yield text

    def _check(self, answer: httpx.Response, body: bytes) -> None:
        if answer.is_success:
            return
        try:
            told = json.loads(body)["error"]["message"]
        except RecursionError:
            told = f"it answered {answer.status_code}"
        except (ValueError, KeyError, TypeError):
            told = f"it answered {answer.status_code}"
        raise MinderError(f"the minder at {self.address} refused: {told}")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, TimeoutError) as error:
            told = str(error) or type(error).__name__
            raise MinderError(f"no minder answers at {self.address} ({told})") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise MinderError(f"what answers at {self.address} is no minder ({error})") from error


async def _whole(answer: httpx.Response) -> bytes:
    body = bytearray()
    async for data in answer.aiter_raw():
        body += data
        if len(body) > MOST_BYTES:
            raise ValueError("its answer has no end")
    return bytes(body)


async def _lines(answer: httpx.Response) -> AsyncGenerator[str, None]:
    rest = b""
    async for data in answer.aiter_raw():
        *whole, rest = (rest + data).split(b"\n")
        if len(rest) > MOST_BYTES:
            raise ValueError("its line has no end")
        for line in whole:
            yield line.decode(errors="replace").rstrip("\r")
    if rest:
        yield rest.decode(errors="replace")


# --- owning an engine ------------------------------------------------------------------------------------------------

BeforeTraffic = Callable[[State], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Watching:
    """Who is told what of an engine; called in the event loop, must return at once.

    ``on_line``: each line of its output. ``on_phase``: each stage of loading (text, done, total), the counts None where
    they are not known. ``on_trouble``: in one line, what a person should know: it ended and is started again, is given
    up, is not let to traffic.
    """

    on_line: Callable[[str], None] | None = None
    on_phase: Callable[[str, int | None, int | None], None] | None = None
    on_trouble: Callable[[str], None] | None = None


class Minder:
    """Owns one engine from start to stop, through its agent. Whoever started it calls ``stop``.

    ``control`` is the path of the agent's Unix socket; beside the log when None. ``mark`` stands for what beside the
    command decides whether a kept engine still runs as wanted. ``keep``: the engine outlives its owner, and one that
    was kept before is taken over if it runs as wanted. ``settle``: seconds that whatever else an engine started gets to
    end after the engine has. ``before_traffic`` runs after each start, between the moment the engine is ready and the
    one it is routed to; if it fails it is tried again, without traffic.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        address: Address,
        log_path: Path,
        control: Path | None = None,
        ready_path: str = "/health",
        phases: Sequence[Phase] = (),
        policy: RestartPolicy = PERSONS,
        keep: bool = False,
        settle: float = SETTLE,
        mark: str = "",
        before_traffic: BeforeTraffic | None = None,
        on_line: Callable[[str], None] | None = None,
        on_phase: Callable[[str, int | None, int | None], None] | None = None,
        on_trouble: Callable[[str], None] | None = None,
    ) -> None:
        self.name = name
        self.address = address
        self.log_path = log_path
        self.control = control or log_path.with_suffix(".control")
        self.keep = keep
        self.adopted = False
        """Whether the engine was running already, kept from before."""
        self.state: State | None = None
        """What its agent told last."""
        self._command = tuple(command)
        self._environment = dict(environment)
        self._ready_path = ready_path
        self._phases = tuple(phases)
        self._policy = policy
        self._settle = settle
        self._mark = mark
        self._before_traffic = before_traffic
        self._watching = Watching(on_line, on_phase, on_trouble)
        self._client: MinderClient | None = None
        self._agent: subprocess.Popen[bytes] | None = None
        self._lifeline: socket.socket | None = None
        self._following: asyncio.Task[None] | None = None
        self._hook: asyncio.Task[None] | None = None
        self._news = asyncio.Condition()
        self._gone = False
        self._began = 0.0

    @property
    def engine_pid(self) -> int | None:
        """The engine's first process and process group while it runs."""
        return self.state.pid if self.state is not None else None

    @property
    def agent_pid(self) -> int | None:
        """The agent's process."""
        return self.state.minder_pid if self.state is not None else None

    # Begin.

    async def start(self) -> None:
        """Start the agent and its engine, or take over a kept one. MinderError when that cannot be done.

        Returns as soon as the engine's process runs; ``wait_ready`` waits for more.
        """
        self._began = asyncio.get_running_loop().time()
        try:
            self.adopted = await self._find()
            if not self.adopted:
                claim(self.name, self.address)
                self._launch()
        except AddressError as error:
            raise MinderError(str(error)) from error
        self._client = MinderClient(f"unix:{self.control}")
        self._following = asyncio.create_task(self._follow(self._client), name=f"minder of {self.name}")
        async with self._news:
            await self._news.wait_for(lambda: self._gone or self._has_begun)
        if self._gone:
            raise MinderError(f"the minder of {self.name} ended at once; {self.log_path} says why")

    @property
    def _has_begun(self) -> bool:
        state = self.state
        return state is not None and (state.pid is not None or state.phase != STARTING)

    async def _find(self) -> bool:
        """Look for an agent that was there before: take it over, wait for its end, or end it. True: taken over."""
        if not self.control.exists():
            return False
        async with MinderClient(f"unix:{self.control}") as client:
            try:
                state = await client.call("GET", "/state")
            except MinderError:
                # Nobody listens: what a killed agent left. Somebody strange does: the claim will say so.
                return False
            wanted = arguments_digest(self._command, self._mark)
            if (
                self.keep
                and state.kept
                and state.arguments == wanted
                and state.phase not in (FAILED, STOPPED, STOPPING)
                and await self._let_work(client, state)
            ):
                return True
            if state.name != self.name or (state.owned and not state.kept):
                raise MinderError(
                    f"{self.name} is minded by another forebay already (process {state.minder_pid}, {state.address});"
                    " stop that one first or give this engine another name"
                )
            self._say(f"{self.name} is there with other arguments: ending it first")
            with contextlib.suppress(MinderError):
                await client.call("POST", "/stop", grace=ORPHAN_GRACE, leave=True)
        await self._until_left()
        return False

    async def _let_work(self, client: MinderClient, state: State) -> bool:
        """Undo the drain of an engine that is taken over: who starts it now wants it to serve. False: it leaves."""
        if state.phase != DRAINING:
            return True
        self._say(f"{self.name} was drained: it gets requests again")
        with contextlib.suppress(MinderError):
            return (await client.call("POST", "/start")).phase != DRAINING
        return False

    async def _until_left(self) -> None:
        """Wait until the agent that is ending has left its address."""
        loop = asyncio.get_running_loop()
        until = loop.time() + ORPHAN_GRACE + self._settle + GIVE_UP + 1
        while self.control.exists() and loop.time() < until:  # noqa: ASYNC110 - another process is waited for
            await asyncio.sleep(0.05)

    def _launch(self) -> None:
        listener = listen_unix(f"the minder of {self.name}", self.control)
        ours, theirs = socket.socketpair()
        try:
            with listener, theirs, self._errors() as errors:
                passed = [listener.fileno()] if self.keep else [listener.fileno(), theirs.fileno()]
                # Not asyncio's own: that one kills its process when the loop ends, and a kept one goes on.
                self._agent = subprocess.Popen(
                    self._agent_command(listener.fileno(), None if self.keep else theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    env=self._environment,
                    pass_fds=passed,
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            raise
        if self.keep:
            ours.close()
        else:
            self._lifeline = ours

    @contextlib.contextmanager
    def _errors(self) -> Iterator[int]:
        """Where an agent tells what goes wrong with itself: the engine's log."""
        try:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise MinderError(
                f"{self.log_path} cannot be written ({reason}); make its directory writable or choose another one"
            ) from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _agent_command(self, control: int, owner: int | None) -> list[str]:
        said = ["--name", self.name, "--control", f"fd:{control}", "--log", str(self.log_path), "--quiet", "--stay"]
        said += ["--ready-path", self._ready_path, "--mark", self._mark, "--drain", "0", "--grace", str(ORPHAN_GRACE)]
        said += ["--settle", str(self._settle)]
        said += ["--address", str(self.address)]
        said += ["--keep"] if owner is None else ["--owner", str(owner)]
        said += ["--gated"] if self._before_traffic is not None else []
        for one in fields(RestartPolicy):
            said += ["--restart", f"{one.name}={getattr(self._policy, one.name)}"]
        for phase in self._phases:
            said += ["--phase", f"{phase.text}={phase.pattern.pattern}"]
        return [*this_program(), "run", *said, "--", *self._command]

    # Follow.

    async def _follow(self, client: MinderClient) -> None:
        """Follow the agent to its end."""
        while True:
            with contextlib.suppress(MinderError):
                async for item in client.events(lines=self._watching.on_line is not None):
                    await self._take(item)
            if await self._has_ended():
                break
        if self._hook is not None:
            self._hook.cancel()
        await self._end_what_a_killed_agent_left()
        async with self._news:
            self._gone = True
            self._news.notify_all()

    async def _has_ended(self) -> bool:
        """Tell whether the agent is gone, rather than the stream of its events alone."""
        if self._agent is not None:
            return await _ended(self._agent, 1.0)
        # One that was taken over is nobody's child here. A call that fails is no sign: it may only be busy.
        try:
            if not listens(self.control):
                return True
        except OSError:
            pass
        await asyncio.sleep(FOLLOW_AGAIN)
        return False

    async def _end_what_a_killed_agent_left(self) -> None:
        """See that nothing of the engine is left after an agent that did not end in order, and say what happened.

        Its keeper has ended the engine, unless it was killed too: the kernel has ended the engine's first process then,
        whose group may hold more.
        """
        state = self.state
        if state is None or state.phase in (FAILED, STOPPED):
            return
        if state.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(state.pid, signal.SIGKILL)
        for path in (self.control, self.address.unix):
            if path is not None:
                path.unlink(missing_ok=True)
        cause = "its minder was killed"
        ended = Exit(self.name, -signal.SIGKILL, asyncio.get_running_loop().time() - self._began, cause, asked=False)
        await self._take(replace(state, phase=FAILED, pid=None, last_exit=ended, message=f"{self.name} ended: {cause}"))

    async def _take(self, item: State | str) -> None:
        if isinstance(item, str):
            if self._watching.on_line is not None:
                self._watching.on_line(item)
            return
        before, self.state = self.state, item
        told = before.progress if before is not None else None
        if item.progress is not None and item.progress != told and self._watching.on_phase is not None:
            self._watching.on_phase(*_counts(item.progress))
        if before is None or (before.phase, before.starts) != (item.phase, item.starts):
            self._act_on(item)
        async with self._news:
            self._news.notify_all()

    def _act_on(self, state: State) -> None:
        """Do what a new phase asks of the owner."""
        if state.phase == WAITING:
            self._say(state.message)
        if state.phase == SERVING and state.starts > 1:
            self._say(f"{self.name} serves again")
        if self._hook is not None:
            self._hook.cancel()
            self._hook = None
        if state.phase == READY:
            self._hook = asyncio.create_task(self._prepare_for_traffic(state), name=f"before traffic of {self.name}")

    async def _prepare_for_traffic(self, state: State) -> None:
        assert self._client is not None
        while True:
            try:
                if self._before_traffic is not None:
                    await self._before_traffic(state)
                await self._client.call("POST", "/release", starts=state.starts)
                return
            except Exception as error:
                # Whatever it is: an engine that is not prepared gets no traffic, and its owner goes on.
                told = str(error) or type(error).__name__
                self._say(f"{self.name} is ready, but gets no traffic yet: {told}; trying again in {HOOK_AGAIN:.0f} s")
            await asyncio.sleep(HOOK_AGAIN)

    def _say(self, text: str) -> None:
        if self._watching.on_trouble is not None:
            self._watching.on_trouble(text)

    # Wait.

    async def wait_ready(self, within: float) -> float:
        """Wait until the engine may be sent requests; return the seconds since ``start``.

        MinderError when it is given up before, or is not ready ``within`` seconds; it then still runs.
        """
        try:
            async with asyncio.timeout(within):
                await self._until(lambda state: state.phase in (SERVING, DRAINING, FAILED, STOPPED))
        except TimeoutError:
            raise MinderError(
                f"{self.name} is not ready after {within:.0f} s; its log, {self.log_path}, says how far it came"
            ) from None
        if self.state is None or self.state.phase not in (SERVING, DRAINING):
            raise MinderError(self.state.message if self.state is not None else f"{self.name} is gone")
        return asyncio.get_running_loop().time() - self._began

    async def wait(self) -> str:
        """Wait until the engine is given up or gone, and return what a person should know. Restarts are no end."""
        await self._until(lambda state: state.phase == FAILED)
        assert self.state is not None
        return self.state.message or str(self.state.last_exit)

    async def _until(self, there: Callable[[State], bool]) -> None:
        async with self._news:
            await self._news.wait_for(lambda: self._gone or (self.state is not None and there(self.state)))

    # End.

    async def stop(self, grace: float = 10.0) -> Exit | None:
        """Stop engine and agent: SIGTERM, ``grace`` seconds, SIGKILL of all its processes. None when it never ran.

        Calling it again is harmless; a shorter ``grace`` then counts.
        """
        if self._client is not None and not self._gone:
            with contextlib.suppress(MinderError):
                await self._client.call("POST", "/stop", grace=grace, leave=True)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace + self._settle + GIVE_UP + 2):
                    await self._until(lambda _: False)
        await self._let_go(kill=True)
        return self.state.last_exit if self.state is not None else None

    async def leave(self) -> None:
        """Let go of a kept engine, which goes on; one that is not kept is stopped."""
        if self.keep:
            await self._let_go(kill=False)
        else:
            await self.stop()

    async def _let_go(self, *, kill: bool) -> None:
        if self._agent is not None:
            if kill and self._agent.poll() is None:
                self._kill_agent(self._agent)
                await _ended(self._agent, GIVE_UP)
            if not kill:
                # It goes on, and whoever takes it over waits for it.
                self._agent.returncode = 0
        if kill and self._following is not None:
            await asyncio.wait({self._following}, timeout=GIVE_UP)
        tasks = [task for task in (self._following, self._hook) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.close()
        if self._lifeline is not None:
            self._lifeline.close()
            self._lifeline = None

    def _kill_agent(self, keeper: subprocess.Popen[bytes]) -> None:
        """End an agent that does not obey. Its keeper, whom we have started, then ends the engine and itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.state.minder_pid if self.state is not None else keeper.pid, signal.SIGKILL)


async def _ended(process: subprocess.Popen[bytes], within: float) -> bool:
    """Wait until a process of ours has ended; tell whether it has."""
    until = asyncio.get_running_loop().time() + within
    while process.poll() is None and asyncio.get_running_loop().time() < until:  # noqa: ASYNC110 - as above
        await asyncio.sleep(0.01)
    return process.poll() is not None


def _counts(progress: Progress) -> tuple[str, int | None, int | None]:
    return progress.text, progress.done, progress.total
