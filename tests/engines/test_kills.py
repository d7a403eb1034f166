"""Whatever is killed, or cannot be had: a clear state, a clear message, and no process is left behind.

Real processes and signals. The engine is a fake one whose children are deaf to SIGTERM and in sessions of their own, as
far out of reach as a worker can be. What a killed `forebay serve` leaves is in ``tests/test_cli.py``.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from engines.minder import FAILED, SERVING, WAITING, Address, State, arguments_digest
from engines.minding import Minder, MinderClient
from tests.engines.standalone import QUICK, SETTLE, Standalone, Start
from tests.engines.test_minder import FAKE, GONE_WITHIN, assert_gone
from tests.support.control import EVENTS, STATE, control_port, event, said
from tests.support.sockets import bind_free

ONCE = ("--restart", "never_ready=1", "--stay")
"""Told at once what is the matter, and there to be asked."""


def children_said(log: Path) -> list[int]:
    return [int(pid) for pid in re.findall(r"^child (\d+)$", log.read_text(), re.MULTILINE)]


async def failed(agent: Standalone) -> State:
    """Wait until the engine is given up; return the state. Nothing but the agent and its keeper is there then."""
    state = await agent.until(FAILED)
    assert state.pid is None
    assert agent.family() == [agent.process.pid, state.minder_pid]
    return state


# --- the engine ------------------------------------------------------------------------------------------------------


async def test_a_killed_engine_comes_back(start: Start) -> None:
    agent = start(*QUICK, engine=("--child",))
    first = await agent.until(SERVING)
    family = agent.family()
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    second = await agent.until(SERVING, starts=2)
    assert second.pid not in family
    assert (second.restarts, second.message) == (1, "")
    assert second.last_exit is not None
    assert (second.last_exit.code, second.last_exit.asked) == (-signal.SIGKILL, False)
    assert "killed by SIGKILL, often for lack of memory" in str(second.last_exit)
    assert_gone(*family[2:])


async def test_an_engine_that_ends_with_its_worker_leaves_none_of_the_others(start: Start) -> None:
    """vLLM's front ends when its core has died; a second worker, which nobody has told, must not stay."""
    agent = start(*QUICK, engine=("--child", "--fragile"))
    first = await agent.until(SERVING)
    _, worker = children_said(agent.log)
    family = agent.family()
    os.kill(worker, signal.SIGKILL)
    second = await agent.until(SERVING, starts=2)
    assert re.fullmatch(
        r"fake ended by itself after \d+ s \(exit code 1\): RuntimeError: the worker has died", str(second.last_exit)
    )
    assert second.pid != first.pid
    assert_gone(*family[2:])


async def test_an_engine_that_outlives_its_worker_is_started_anew(start: Start) -> None:
    """Its front answers for ever that it is not well; nobody else would end it."""
    agent = start(*QUICK, "--dead-after", "0.05", engine=("--worker",))
    await agent.until(SERVING)
    [worker] = children_said(agent.log)
    family = agent.family()
    os.kill(worker, signal.SIGKILL)
    second = await agent.until(SERVING, starts=2)
    assert second.last_exit is not None
    assert re.search(r"\(exit code 0\): its /health answered 503 for \d+ s$", str(second.last_exit))
    assert not second.last_exit.asked
    assert_gone(*family[2:])


async def test_a_storm_is_given_up_and_a_restart_revives_it(start: Start) -> None:
    """One that is ready and dies, again and again: at some point it is better to say so than to go on."""
    agent = start(*QUICK, "--restart", "storm=3", "--stay")
    for starts in (1, 2, 3):
        state = await agent.until(SERVING, starts)
        assert state.pid is not None
        os.kill(state.pid, signal.SIGKILL)
    state = await failed(agent)
    assert state.message.endswith("given up: it ended 3 times within 900 s")
    assert state.restarts == 2
    # What happened before is forgotten: one more end is no storm.
    await agent.client.call("POST", "/restart")
    revived = await agent.until(SERVING, starts=4)
    assert (revived.restarts, revived.message) == (2, "")
    assert revived.pid is not None
    os.kill(revived.pid, signal.SIGKILL)
    assert (await agent.until(SERVING, starts=5)).restarts == 3


async def test_each_wait_of_a_storm_is_longer(start: Start) -> None:
    """So that an engine that cannot live does not keep a machine busy with loading."""
    policy = ("--restart", "first=0.4", "--restart", "jitter=0", "--restart", "never_ready=3")
    agent = start(*policy, "--stay", engine=("--crash", "ValueError: no"))
    state, waits = await agent.until(WAITING), {}
    async with asyncio.timeout(GONE_WITHIN):
        while state.phase != FAILED:
            if told := re.search(r"starting it again in (\d+) s", state.message):
                waits[state.starts] = int(told.group(1))
            # Its own work needs the processor too; no wait is so short that it would be missed.
            await asyncio.sleep(0.02)
            state = await agent.client.call("GET", "/state")
    assert waits == {1: 0, 2: 1}
    assert agent.log.read_text() == "ValueError: no\n" * 3


# --- its agent -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("victim", "code"), [(0, -signal.SIGKILL), (1, 128 + signal.SIGKILL)], ids=["keeper", "agent"])
async def test_with_the_agent_everything_ends(start: Start, victim: int, code: int) -> None:
    """Who can do nothing any more has somebody who does: the agent its keeper, the keeper its agent."""
    agent = start("--drain", "0", "--grace", "0", engine=("--child", "--stubborn"))
    await agent.until(SERVING)
    family = agent.family()
    assert len(family) == 4
    os.kill(family[victim], signal.SIGKILL)
    assert agent.wait() == code
    assert_gone(*family)


# --- its owner -------------------------------------------------------------------------------------------------------


def owner(tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a process that owns an engine; it tells pids on its output."""
    said = [str(tmp_path / "log"), str(tmp_path / "engine.sock"), *engine_command(tmp_path)]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.engines.owner", *said],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def engine_command(tmp_path: Path) -> list[str]:
    return [*FAKE, "--child", "--unix", str(tmp_path / "engine.sock")]


def pids_told(owner: subprocess.Popen[str]) -> dict[str, int]:
    """Read what an owner tells until agent, engine and the engine's child are known."""
    told: dict[str, int] = {}
    assert owner.stdout is not None
    while not {"agent", "engine", "child"} <= set(told):
        told |= {name: int(pid) for name, pid in re.findall(r"(agent|engine|child) (\d+)", owner.stdout.readline())}
    return told


def test_a_killed_owner_takes_its_engine_along(tmp_path: Path) -> None:
    with owner(tmp_path) as killed:
        told = pids_told(killed)
        killed.kill()
    assert_gone(*told.values())
    assert not (tmp_path / "engine.sock").exists()


async def test_told_to_keep_it_the_next_owner_takes_the_engine_over(tmp_path: Path) -> None:
    with owner(tmp_path, KEEP="1") as killed:
        told = await asyncio.to_thread(pids_told, killed)
        killed.kill()
    heir = Minder(
        "fake",
        engine_command(tmp_path),
        environment=os.environ,
        address=Address(unix=tmp_path / "engine.sock"),
        log_path=tmp_path / "log",
        keep=True,
        settle=SETTLE,
    )
    await heir.start()
    await heir.wait_ready(GONE_WITHIN)
    assert heir.adopted
    assert (heir.agent_pid, heir.engine_pid) == (told["agent"], told["engine"])
    assert heir.state is not None
    assert (heir.state.starts, heir.state.kept) == (1, True)
    await heir.stop(0)
    assert_gone(*told.values())


async def test_a_kept_engine_that_was_drained_serves_its_next_owner(tmp_path: Path) -> None:
    """Else a gateway that starts waits for it in vain."""
    with owner(tmp_path, KEEP="1") as killed:
        await asyncio.to_thread(pids_told, killed)
        killed.kill()
    said: list[str] = []
    heir = Minder(
        "fake",
        engine_command(tmp_path),
        environment=os.environ,
        address=Address(unix=tmp_path / "engine.sock"),
        log_path=tmp_path / "log",
        keep=True,
        settle=SETTLE,
        on_trouble=said.append,
    )
    async with MinderClient(f"unix:{heir.control}") as client:
        async with asyncio.timeout(GONE_WITHIN):
            while (await client.call("GET", "/state")).phase != SERVING:
                await asyncio.sleep(0.02)
        await client.call("POST", "/drain")
    await heir.start()
    try:
        assert heir.adopted
        assert heir.state is not None
        assert (heir.state.phase, heir.state.starts) == (SERVING, 1)
        assert said == ["fake was drained: it gets requests again"]
    finally:
        await heir.stop(0)


async def test_an_agent_that_is_busy_is_not_taken_for_dead(tmp_path: Path) -> None:
    """Its stream breaks and its calls are refused, as when too many talk to it: the kept engine is left alone."""
    engine = subprocess.Popen(["sleep", "3600"], start_new_session=True)
    command = engine_command(tmp_path)
    state = STATE | {"pid": engine.pid, "arguments": arguments_digest(command, "")}
    refused = asyncio.Event()
    asked: list[str] = []

    async def answer(request: str, writer: asyncio.StreamWriter) -> None:
        asked.append(request)
        if len(asked) == 1:
            writer.write(said(state))
        elif len(asked) == 2:
            writer.write(EVENTS + event(**state))
        elif len(asked) < 6:
            writer.write(said({"error": {"message": "too many connections"}}, 503))
        else:
            refused.set()
            writer.write(EVENTS + event(**state))
            await asyncio.Event().wait()

    heir = Minder(
        "fake",
        command,
        environment=os.environ,
        address=Address(unix=tmp_path / "engine.sock"),
        log_path=tmp_path / "log",
        control=tmp_path / "control",
        keep=True,
    )
    try:
        async with control_port(tmp_path / "control", answer):
            await heir.start()
            async with asyncio.timeout(GONE_WITHIN):
                await refused.wait()
            assert engine.poll() is None
            assert heir.state is not None
            assert (heir.state.phase, heir.engine_pid) == (SERVING, engine.pid)
            await heir.leave()
    finally:
        engine.kill()
        engine.wait()


# --- what it needs ---------------------------------------------------------------------------------------------------


async def test_a_taken_port_is_told_and_nothing_is_started(start: Start, tmp_path: Path) -> None:
    with bind_free() as stranger:
        stranger.listen()
        port = stranger.getsockname()[1]
        agent = start(*ONCE, "--address", f"http://127.0.0.1:{port}")
        state = await failed(agent)
    assert state.message == (
        f"fake cannot listen on 127.0.0.1 port {port}: address already in use; stop the program that uses it or choose"
        f" another port (the whole log: {agent.log}); given up: it ended once and was never ready"
    )
    assert "child" not in agent.log.read_text()


async def test_a_port_that_is_taken_meanwhile_is_waited_for(start: Start, tmp_path: Path) -> None:
    """Between two starts somebody else may take it: that is said, and the engine comes back when it is free."""
    agent = start(*QUICK, "--restart", "storm=100000", "--restart", "cap=0.05")
    state = await agent.until(SERVING)
    assert state.pid is not None
    os.kill(state.pid, signal.SIGSTOP)  # so that the stranger is there before it can be started again
    path = Path(agent.engine_address.removeprefix("unix:"))
    path.unlink()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(str(path))
        stranger.listen()
        # The agent removes what its engine leaves; the stranger's is put where it was.
        aside = tmp_path / "aside"
        path.rename(aside)
        os.kill(state.pid, signal.SIGKILL)
        async with asyncio.timeout(GONE_WITHIN):
            while "another program does" not in (said := (await agent.client.call("GET", "/state")).message):
                with suppress(FileNotFoundError, FileExistsError):
                    os.link(aside, path)
        assert "fake cannot listen on" in said
        assert "starting it again in" in said
        aside.unlink()
        path.unlink(missing_ok=True)
    assert (await agent.until(SERVING, starts=2)).pid != state.pid


async def test_a_missing_model_is_told_with_its_path(start: Start, tmp_path: Path) -> None:
    agent = start(*ONCE, engine=("--model", str(tmp_path / "no-model")))
    state = await failed(agent)
    assert re.fullmatch(
        r"fake ended by itself after \d+ s \(exit code 1\): FileNotFoundError: \[Errno 2\] No such file or directory:"
        r" '.*/no-model' \(the whole log: .*engine\.log\); given up: it ended once and was never ready",
        state.message,
    )


async def test_an_engine_without_memory_is_told_so(start: Start) -> None:
    """Simulated by a limit on its address space."""
    agent = start(*ONCE, engine=("--hungry",))
    state = await failed(agent)
    assert re.match(r"fake ended by itself after \d+ s \(exit code 1\): MemoryError \(the whole log", state.message)
