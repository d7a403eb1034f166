"""Endpoints by command: who may, what each word does to routing and to requests under way, and by a minder's word."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from engines.minder import Address, RestartPolicy, State
from engines.minding import Minder
from gateway.cli import app
from gateway.serving.pool import Endpoint
from gateway.settings import KeySettings, Upstream
from gateway.state.database import upgrade
from gateway.state.keys import KeyStore
from tests.conftest import Connect
from tests.support.client import RawClient, Response
from tests.support.command import CliRunner
from tests.support.control import EVENTS, STATE, control_port, event, said
from tests.support.gateway import AUTH, CHAT, JSON, KEY, MODEL, Gateway, StartGateway, chat, relayed, serving, until
from tests.support.recordings import load
from tests.support.script import DONE, Gate, play
from tests.support.upstream import ScriptedUpstream

ADMIN_KEY = "fb-operator-secret"
ADMIN = (("authorization", f"Bearer {ADMIN_KEY}"),)
KEYS = (
    KeySettings(name="alice", key=SecretStr(KEY)),
    KeySettings(name="operator", key=SecretStr(ADMIN_KEY), admin=True, models=()),
)
STREAM = play(load("vllm", "chat_stream"))
GOOD = play(load("vllm", "chat_basic"))
FAKE_CHILD = [sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "fake_child.py")]


async def act(gateway: Gateway, name: str, action: str, body: Any = None) -> Response:
    async with await RawClient.connect(gateway.admin_url) as client:
        data = b"" if body is None else json.dumps(body).encode()
        client.request("POST", f"/admin/endpoints/{name}/{action}", [*ADMIN, *(JSON if data else ())], data)
        return await client.response()


async def listed(gateway: Gateway) -> dict[str, dict[str, Any]]:
    answer = await gateway.get("/admin/endpoints", ADMIN, admin=True)
    assert answer.status == 200
    return {one["name"]: one for one in answer.json()["data"]}


@pytest.fixture
async def two(start_gateway: StartGateway, upstream: ScriptedUpstream, journal: Any) -> AsyncIterator[Any]:
    """A gateway in front of two engines, ``one`` and ``other``, and these."""
    async with ScriptedUpstream(journal=journal) as other:
        for engine in (upstream, other):
            engine.always(GOOD, path=CHAT)
        gateway = await start_gateway(serving(upstream, name="one"), serving(other, name="other"), keys=KEYS)
        yield gateway, upstream, other


# --- who may ---------------------------------------------------------------------------------------------------------


async def test_only_an_admin_key_is_let_in(two: Any) -> None:
    """And metrics and health stay open to whoever reaches the operators' listener."""
    gateway, *_ = two
    for headers, status, code in (
        ((), 401, "invalid_api_key"),
        ((("authorization", "Bearer nobody"),), 401, "invalid_api_key"),
        (AUTH, 403, "admin_only"),
    ):
        answer = await gateway.get("/admin/endpoints", headers, admin=True)
        assert (answer.status, answer.json()["error"]["code"]) == (status, code)
        assert "forebay keys create --admin" in answer.json()["error"]["message"]
    assert set(await listed(gateway)) == {"one", "other"}
    for path in ("/metrics", "/health/ready"):
        assert (await gateway.get(path, admin=True)).status == 200


async def test_a_large_body_is_not_read(two: Any) -> None:
    """Nobody has shown a key yet, and what parses it also serves everybody else."""
    gateway, *_ = two
    for size, status in ((1_000, 401), (5_000_000, 400)):
        async with await RawClient.connect(gateway.admin_url) as client:
            client.request("POST", "/admin/endpoints/one/cordon", JSON, b'"' + b"x" * size + b'"')
            assert (await client.response()).status == status


async def test_clients_do_not_reach_it(two: Any) -> None:
    gateway, *_ = two
    assert (await gateway.get("/admin/endpoints", ADMIN)).status == 404


async def test_an_open_gateway_keeps_its_admin_api_closed(
    start_gateway: StartGateway, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """`auth: none` lets everybody ask a model, and nobody restart one; keys of the database count if there is one."""
    url = f"sqlite:///{tmp_path}/forebay.db"
    await asyncio.to_thread(upgrade, url)
    with KeyStore(url) as store:
        admin = store.create("operator", admin=True).key
        plain = store.create("alice").key
    gateway = await start_gateway(upstream, auth="none", keys=())
    assert (await gateway.get("/v1/models")).status == 200
    for key, status in ((None, 401), ("anything", 401), (plain, 401), (admin, 200)):
        headers = (("authorization", f"Bearer {key}"),) if key else ()
        assert (await gateway.get("/admin/endpoints", headers, admin=True)).status == status, key


# --- what each word does ---------------------------------------------------------------------------------------------


async def test_a_cordoned_endpoint_gets_nothing_new(two: Any) -> None:
    gateway, one, other = two
    assert (await act(gateway, "one", "cordon")).status == 202
    for _ in range(4):
        assert (await gateway.ask(chat())).status == 200
    assert (len(relayed(one)), len(relayed(other))) == (0, 4)
    assert (await listed(gateway))["one"]["state"] == "cordoned"
    metrics = (await gateway.get("/metrics", admin=True)).body
    assert b'forebay_endpoint_cordoned{endpoint="one"} 1.0' in metrics
    assert b'forebay_endpoint_cordoned{endpoint="other"} 0.0' in metrics
    await act(gateway, "one", "uncordon")
    for _ in range(4):
        await gateway.ask(chat())
    assert len(relayed(one)) > 0


async def test_what_a_drained_endpoint_works_on_goes_on(two: Any, connect: Connect) -> None:
    gateway, one, _ = two
    gate = Gate()
    await act(gateway, "other", "cordon")
    one.always(STREAM.do(gate, STREAM.after_frame(1)), path=CHAT)
    client = await connect(gateway.url)
    client.post(CHAT, chat(stream=True), AUTH)
    await gate.reached()
    answer = await act(gateway, "one", "drain")
    assert (answer.json()["state"], answer.json()["in_flight"]) == ("cordoned", 1)
    # With both out of routing there is nobody, and the readiness of the gateway says so.
    assert (await gateway.ask(chat())).status == 503
    assert (await gateway.get("/health/ready")).status == 503
    gate.open()
    assert (await client.response()).events()[-1] == DONE
    await gateway.idle()
    assert (await listed(gateway))["one"]["in_flight"] == 0


async def test_what_an_ejected_endpoint_works_on_is_cut_off(two: Any, connect: Connect) -> None:
    """Nothing has reached the client yet: another engine serves it, and the client sees a good answer."""
    gateway, one, other = two
    gate = Gate()
    await act(gateway, "other", "cordon")
    one.always(STREAM.do(gate, STREAM.after_head), path=CHAT)
    client = await connect(gateway.url)
    client.post(CHAT, chat(), AUTH)
    await gate.reached()
    await act(gateway, "other", "uncordon")
    assert (await act(gateway, "one", "eject")).status == 202
    assert (await client.response()).status == 200
    assert len(relayed(other)) == 1
    gate.open()
    await gateway.idle()


async def test_what_cannot_be_done_says_why(two: Any) -> None:
    gateway, *_ = two
    answer = await act(gateway, "nobody", "cordon")
    assert (answer.status, answer.json()["error"]["code"]) == (404, "endpoint_not_found")
    assert answer.json()["error"]["message"] == "There is no endpoint 'nobody'. There are: one, other."
    answer = await act(gateway, "one", "restart")
    assert (answer.status, answer.json()["error"]["code"]) == (400, "not_possible")
    assert "one has no minder" in answer.json()["error"]["message"]
    assert (await act(gateway, "one", "explode")).status == 400
    assert (await act(gateway, "one", "drain", {"drain": -1})).status == 400
    assert (await act(gateway, "one", "drain", {"patience": 1})).status == 400


async def test_an_endpoint_named_by_its_url_is_found(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    gateway = await start_gateway(upstream, keys=KEYS)
    for name in (upstream.url, upstream.url.replace("/", "%2F").replace(":", "%3A")):
        assert (await act(gateway, name, "cordon")).json()["cordoned"]


# --- by a minder's word ----------------------------------------------------------------------------------------------


class Minded:
    """A fake engine under a real minder, and what its owner is told."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.order = folder / "order"
        self.order.touch()
        self.socket = folder / "engine.sock"
        self.minder = Minder(
            "fake",
            [*FAKE_CHILD, "engine", str(self.order), "--unix", str(self.socket)],
            environment=os.environ,
            address=Address(unix=self.socket),
            log_path=folder / "engine.log",
            control=folder / "control",
            settle=0.1,
            **{"policy": RestartPolicy(first=0.01), **more},
        )

    def upstream(self) -> Upstream:
        control = f"unix:{self.minder.control}"
        return Upstream(url=f"unix:{self.socket}", name="fake", models={MODEL: "fake-model"}, minder=control)


@pytest.fixture
async def minded(tmp_path: Path) -> AsyncIterator[Minded]:
    engine = Minded(tmp_path)
    await engine.minder.start()
    await engine.minder.wait_ready(60)
    yield engine
    await engine.minder.stop(10)


def choosable(endpoint: Endpoint) -> bool:
    return endpoint.available


async def state_is(gateway: Gateway, state: str, starts: int = 1) -> dict[str, Any]:
    """Wait until an endpoint is told to be so, in that start or a later one."""
    async with asyncio.timeout(60):
        while True:
            one = (await listed(gateway))["fake"]
            if one["state"] == state and one["minder"].get("starts", 0) >= starts:
                return one
            # The processes it waits for need the processor.
            await asyncio.sleep(0.01)


async def test_a_restart_is_rolling(start_gateway: StartGateway, minded: Minded) -> None:
    """Out of routing first, drained by what is in flight here, stopped, started, and traffic again."""
    gateway = await start_gateway(minded.upstream(), keys=KEYS)
    (endpoint,) = gateway.replica.pool.endpoints
    before = await state_is(gateway, "serving")
    endpoint.in_flight = 1
    answer = await act(gateway, "fake", "restart", {"drain": 3600})
    assert answer.json()["state"] == "draining"
    assert not endpoint.available
    await asyncio.sleep(0)
    assert minded.order.read_text() == "engine up\n"
    endpoint.in_flight = 0
    after = await state_is(gateway, "serving", starts=2)
    assert minded.order.read_text() == "engine up\nengine down\nengine up\n"
    assert after["minder"]["pid"] != before["minder"]["pid"]
    assert after["minder"]["restarts"] == 0
    assert not after["cordoned"]


async def test_an_engine_that_dies_is_out_of_routing_until_its_minder_has_it_back(
    start_gateway: StartGateway, minded: Minded
) -> None:
    gateway = await start_gateway(minded.upstream(), keys=KEYS)
    before = await state_is(gateway, "serving")
    os.kill(before["minder"]["pid"], signal.SIGKILL)
    after = await state_is(gateway, "serving", starts=2)
    assert after["minder"]["restarts"] == 1
    assert b'forebay_engine_restarts_total{endpoint="fake"} 1.0' in (await gateway.get("/metrics", admin=True)).body
    phases = [line["phase"] for line in gateway.lines("engine_phase")]
    assert phases[0] == phases[-1] == "serving"
    assert "waiting" in phases


async def test_an_engine_that_is_given_up_says_why_and_a_restart_revives_it(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    engine = Minded(tmp_path, policy=RestartPolicy(storm=1))
    await engine.minder.start()
    try:
        await engine.minder.wait_ready(60)
        gateway = await start_gateway(engine.upstream(), keys=KEYS)
        os.kill((await state_is(gateway, "serving"))["minder"]["pid"], signal.SIGKILL)
        failed = await state_is(gateway, "failed")
        assert failed["minder"]["pid"] is None
        assert failed["minder"]["message"].endswith("given up: it ended once within 900 s")
        refused = await gateway.ask(chat())
        assert (refused.status, refused.json()["error"]["code"]) == (503, "server_is_overloaded")
        assert refused.header("retry-after") is not None
        assert (await act(gateway, "fake", "restart")).status == 202
        await state_is(gateway, "serving", starts=2)
    finally:
        await engine.minder.stop(10)


async def test_a_drain_is_every_replica_s_and_uncordon_undoes_it(start_gateway: StartGateway, minded: Minded) -> None:
    gateway = await start_gateway(minded.upstream(), keys=KEYS)
    assert (await act(gateway, "fake", "drain")).json()["state"] == "draining"
    await until(lambda: minded.minder.state is not None and minded.minder.state.drained, "it never drained")
    assert (await act(gateway, "fake", "uncordon")).status == 202
    # Its answer may still say what was heard of the agent meanwhile: that it had drained.
    await state_is(gateway, "serving")


async def test_no_traffic_before_what_its_owner_has_to_do(start_gateway: StartGateway, tmp_path: Path) -> None:
    """An engine that was restarted has lost its adapters: it answers, and gets no request before they are back."""
    gates = [asyncio.Event(), asyncio.Event()]
    seen: list[State] = []

    async def reload_adapters(state: State) -> None:
        seen.append(state)
        await gates[len(seen) - 1].wait()

    engine = Minded(tmp_path, before_traffic=reload_adapters)
    await engine.minder.start()
    try:
        await until(lambda: seen, "the hook was never called")
        gateway = await start_gateway(engine.upstream(), keys=KEYS)
        (endpoint,) = gateway.replica.pool.endpoints
        assert endpoint.healthy
        assert (await gateway.ask(chat())).status == 503
        gates[0].set()
        pid = (await state_is(gateway, "serving"))["minder"]["pid"]
        assert choosable(endpoint)
        # The same after it was killed, without anybody's help.
        os.kill(pid, signal.SIGKILL)
        await until(lambda: len(seen) == 2, "the hook was not called again")
        await gateway.replica.watcher.look(endpoint)
        assert endpoint.healthy
        assert not choosable(endpoint)
        gates[1].set()
        await state_is(gateway, "serving", starts=2)
        assert choosable(endpoint)
    finally:
        await engine.minder.stop(10)


async def test_a_minder_that_is_killed_takes_its_engine_along_and_is_said(
    start_gateway: StartGateway, minded: Minded
) -> None:
    gateway = await start_gateway(minded.upstream(), keys=KEYS)
    one = await state_is(gateway, "serving")
    os.kill(one["minder"]["minder_pid"], signal.SIGKILL)
    await gateway.line("minder_lost")
    assert (await gateway.ask(chat())).status in (502, 503)
    assert not (await listed(gateway))["fake"]["minder"]["reached"]


async def test_a_minder_that_is_not_there_holds_nothing_up(
    start_gateway: StartGateway, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """The engine answers: looks decide, as for any engine without one. To be told something it needs its minder."""
    upstream.always(GOOD, path=CHAT)
    gateway = await start_gateway(serving(upstream, name="one", minder=f"unix:{tmp_path}/nowhere"), keys=KEYS)
    assert (await gateway.ask(chat())).status == 200
    answer = await act(gateway, "one", "restart")
    assert answer.status == 400
    assert "one cannot be told: no minder answers at unix:" in answer.json()["error"]["message"]
    assert (await act(gateway, "one", "cordon")).json()["state"] == "cordoned"


GARBAGE = {
    "not HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "not JSON": EVENTS + b"<html>\n",
    "nested without end": EVENTS + b"[" * 100_000 + b"\n",
    "a line without end": EVENTS + b"x" * 3_000_000,
    "a refusal without end": b"HTTP/1.1 500 No\r\n\r\n" + b"x" * 3_000_000,
    "no state": EVENTS + b'{"state": {}}\n',
    "a phase that is none": EVENTS + event(phase=["serving"]),
    "a count that is none": EVENTS + event(restarts="many"),
    "a count beyond counting": EVENTS + event(restarts=10**400),
    "a time that is none": EVENTS + event(since=float("nan")),
    "a text that is none": EVENTS + event(message="\ud800"),
}


@pytest.mark.parametrize("told", GARBAGE)
async def test_what_is_no_minder_harms_nothing(
    start_gateway: StartGateway, upstream: ScriptedUpstream, tmp_path: Path, told: str
) -> None:
    """Requests, metrics and the list go on; a command says that nobody obeys; its token is told nobody else."""

    async def answer(request: str, writer: asyncio.StreamWriter) -> None:
        writer.write(GARBAGE[told])

    upstream.always(GOOD, path=CHAT)
    async with control_port(tmp_path / "control", answer):
        gateway = await start_gateway(serving(upstream, name="one", minder=f"unix:{tmp_path}/control"), keys=KEYS)
        assert (await gateway.ask(chat())).status == 200
        assert (await gateway.get("/metrics", admin=True)).status == 200
        assert not (await listed(gateway))["one"]["minder"]["reached"]
        answered = await act(gateway, "one", "restart")
        assert answered.status == 400
        assert "one cannot be told: " in answered.json()["error"]["message"]
        (endpoint,) = gateway.replica.pool.endpoints
        assert not gateway.replica.minders._tasks[endpoint].done()


async def test_an_answer_that_comes_late_does_not_count(
    start_gateway: StartGateway, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """A drain is undone by another gateway before its own answer is read: the stream's word is the newer one."""
    news: asyncio.Queue[bytes] = asyncio.Queue()
    heard = asyncio.Event()

    async def answer(request: str, writer: asyncio.StreamWriter) -> None:
        if request == "GET /events":
            writer.write(EVENTS + event())
            while True:
                writer.write(await news.get())
        news.put_nowait(event(phase="draining") + event(phase="serving", message="undone"))
        await heard.wait()
        writer.write(said(STATE | {"phase": "draining"}))

    async with control_port(tmp_path / "control", answer):
        gateway = await start_gateway(serving(upstream, name="one", minder=f"unix:{tmp_path}/control"), keys=KEYS)
        (endpoint,) = gateway.replica.pool.endpoints
        draining = asyncio.create_task(act(gateway, "one", "drain"))
        await until(lambda: gateway.replica.minders.states[endpoint].message == "undone", "the stream was not heard")
        heard.set()
        assert (await draining).json()["state"] == "serving"
        assert endpoint.available


# --- the command -----------------------------------------------------------------------------------------------------


async def forebay(gateway: Gateway, *arguments: str) -> tuple[int, str, str]:
    """Run a command; return its exit code and what it wrote. In this process, since starting one takes longest."""
    environment = {
        **{name: None for name in os.environ if name.startswith("FOREBAY_")},
        "FOREBAY_ADMIN_URL": gateway.admin_url,
        "FOREBAY_ADMIN_KEY": ADMIN_KEY,
        "COLUMNS": "250",
    }
    told = await asyncio.to_thread(CliRunner().invoke, app, arguments, env=environment)
    return told.exit_code, told.stdout, told.stderr


async def test_an_endpoint_without_a_minder_obeys_the_commands(two: Any, face: str, connect: Connect) -> None:
    """What a gateway can do by itself needs nobody beside the engine; what it cannot is told with the reason."""
    if face == "asgi":
        return  # they speak to the operators' listener, which is the same behind either face
    gateway, one, other = two
    gate = Gate()
    assert await forebay(gateway, "engines", "cordon", "other") == (0, "other is cordoned\n", "")
    one.always(STREAM.do(gate, STREAM.after_frame(1)), path=CHAT)
    client = await connect(gateway.url)
    client.post(CHAT, chat(stream=True), AUTH)
    await gate.reached()
    assert await forebay(gateway, "engines", "uncordon", "other") == (0, "other is serving\n", "")
    # Drained: nothing new, and what is under way is waited for, so long as somebody wants to wait.
    code, out, err = await forebay(gateway, "engines", "drain", "one", "--within", "0")
    assert (code, out) == (1, "")
    assert err.endswith(
        "forebay: one is not drained after 0 s (under way: 1) and gets no new requests; wait longer, or let it have"
        " them again: forebay engines uncordon one\n"
    )
    assert (await gateway.ask(chat())).status == 200
    assert len(relayed(other)) == 1
    code, out, _ = await forebay(gateway, "engines", "list")
    assert [line.split()[4:9:3] for line in out.splitlines()[1:]] == [["cordoned", "1"], ["serving", "0"]]
    # Ejected: what it hangs on is cut off, and the client is told.
    assert await forebay(gateway, "engines", "eject", "one") == (0, "one is cordoned\n", "")
    *_, last = (await client.response()).events()
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_failed"
    gate.open()
    await gateway.idle()
    code, out, _ = await forebay(gateway, "engines", "drain", "one")
    assert (code, out) == (0, "one works on nothing and gets nothing new; undo: forebay engines uncordon one\n")
    for action in ("restart", "stop"):
        code, out, err = await forebay(gateway, "engines", action, "one")
        assert (code, out) == (1, "")
        assert "one has no minder" in err
    assert await forebay(gateway, "engines", "uncordon", "one") == (0, "one is serving\n", "")


async def test_a_drain_of_what_does_not_work_has_nothing_to_wait_for(
    start_gateway: StartGateway, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    async def answer(request: str, writer: asyncio.StreamWriter) -> None:
        writer.write(EVENTS + event(phase="failed"))
        await asyncio.Event().wait()

    async with control_port(tmp_path / "control", answer):
        gateway = await start_gateway(serving(upstream, name="one", minder=f"unix:{tmp_path}/control"), keys=KEYS)
        code, out, err = await forebay(gateway, "engines", "drain", "one", "--within", "1")
        assert (code, err) == (0, ""), err
        assert out.startswith("one works on nothing")


async def test_the_commands_do_the_same(start_gateway: StartGateway, minded: Minded, face: str) -> None:
    if face == "asgi":
        return  # they speak to the operators' listener, which is the same behind either face
    gateway = await start_gateway(minded.upstream(), keys=KEYS)
    pid = (await state_is(gateway, "serving"))["minder"]["pid"]
    code, out, _ = await forebay(gateway, "engines", "list")
    head, row = (line.split() for line in out.splitlines())
    assert (code, head[:2]) == (0, ["name", "kind"])
    assert row == ["fake", "vllm", "-", MODEL, "serving", str(pid), "0", "0", f"unix:{minded.socket}"]
    code, out, _ = await forebay(gateway, "engines", "drain", "fake")
    assert (code, out) == (0, "fake works on nothing and gets nothing new; undo: forebay engines uncordon fake\n")
    assert await forebay(gateway, "engines", "uncordon", "fake") == (0, "fake is serving\n", "")
    code, out, err = await forebay(gateway, "engines", "restart", "fake")
    assert (code, out) == (0, "fake serves again\n"), err
    assert (await listed(gateway))["fake"]["minder"]["pid"] != pid
    code, out, err = await forebay(gateway, "engines", "logs", "fake", "-n", "0")
    assert (code, out, err) == (0, "", "")
    code, _, err = await forebay(gateway, "engines", "restart", "other")
    assert (code, err) == (1, "forebay: there is no engine 'other'; there are: fake\n")
    code, out, _ = await forebay(gateway, "engines", "stop", "fake")
    assert (code, out) == (0, "fake stopped (exit code 0)\n")
