"""Engines start first and stop last, the replica in between, and what goes wrong is said and leaves nothing behind."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import socket
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from engines.environments import EngineEnvironment
from engines.minder import Address, RestartPolicy
from engines.minding import Minder, MinderError
from engines.models import ModelFiles
from gateway import local
from gateway.greeting import Display
from gateway.local import (
    Plan,
    PreparedEngine,
    Replica,
    StartError,
    StopRequested,
    admin_pass,
    check_ports,
    greet_when_ready,
    interruptible,
    key_or_note,
    look_until_ready,
    make_plan,
    make_start_key,
    minder_for,
    replica_command,
    replica_environment,
    run_directory,
    run_engines,
)
from gateway.operate import stop_engine
from gateway.settings import Settings, load
from gateway.state.database import StateError
from gateway.state.keys import KeyStore
from tests.support.control import EVENTS, control_port, event, said
from tests.support.control import STATE as SERVES
from tests.support.script import json_answer
from tests.support.sockets import bind_free, free_port
from tests.support.upstream import ScriptedUpstream

FAKE = [sys.executable, "-I", "-S", str(Path(__file__).with_name("fake_child.py"))]


QUICK = RestartPolicy(first=0.01, never_ready=1)
NO_SECOND_CHANCE = RestartPolicy(never_ready=1, storm=1)


class House:
    """Fake engines and a fake replica under `run_engines`, what was said, and in which order things happened."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.order_file = directory / "order"
        self.order_file.touch()
        self.said = io.StringIO()
        self.display = Display(self.said)
        self.port = free_port()
        self.settings = Settings.model_validate({"listen": {"port": self.port}, "data_dir": directory})
        self.greeted: asyncio.Future[tuple[str, ...]] = asyncio.get_running_loop().create_future()
        self.minders: list[Minder] = []
        self.replica = self._replica()

    def _replica(self, *arguments: str, grace: float = 30.0) -> Replica:
        command = [*FAKE, "gateway", str(self.order_file), "--port", str(self.port), *arguments]
        return Replica(command, {}, grace)

    def engine(self, name: str, *arguments: str, policy: RestartPolicy = QUICK, keep: bool = False) -> Path:
        """Add an engine; return its socket."""
        path = self.directory / f"{name}.sock"
        self.minders.append(
            Minder(
                name,
                [*FAKE, name, str(self.order_file), "--unix", str(path), *arguments],
                environment=os.environ,
                address=Address(unix=path),
                log_path=self.directory / f"{name}.log",
                policy=policy,
                keep=keep,
                settle=0.1,
                on_trouble=self.display.say,
            )
        )
        return path

    def with_replica(self, *arguments: str, grace: float = 30.0) -> None:
        self.replica = self._replica(*arguments, grace=grace)

    def start(self) -> asyncio.Task[int]:
        running = run_engines(self.replica, self.minders, self.settings, self.display, self.greeted.set_result)
        return asyncio.create_task(running)

    async def replica_answers(self) -> None:
        async with httpx.AsyncClient(verify=False) as client:
            assert (await client.get(f"http://127.0.0.1:{self.port}/health/ready")).is_success

    @property
    def order(self) -> list[str]:
        return self.order_file.read_text().splitlines()


@pytest.fixture
async def house(tmp_path: Path) -> House:
    return House(tmp_path)


async def end_at(url: str, unix: Path | None = None) -> None:
    """Make a fake child end by itself."""
    transport = httpx.AsyncHTTPTransport(verify=False, uds=str(unix) if unix else None)
    async with httpx.AsyncClient(transport=transport) as client:
        with suppress(httpx.TransportError):
            await client.get(f"{url}/exit")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_engines_start_first_and_stop_last(house: House, number: signal.Signals) -> None:
    house.engine("engine")
    running = house.start()
    assert await house.greeted == ("fake-model",)
    os.kill(os.getpid(), number)
    with pytest.raises(asyncio.CancelledError):
        await running
    assert house.order == ["engine up", "gateway up", "gateway down", "engine down"]
    assert "stopping in order" in house.said.getvalue()


async def test_an_engine_that_cannot_load_is_explained_and_the_gateway_never_starts(house: House) -> None:
    house.engine("good")
    house.engine("bad", "--crash")
    with pytest.raises(MinderError, match=r"bad ended by itself .*RuntimeError: no memory for the weights"):
        await house.start()
    assert house.order in (["good up", "good down"], ["good down"], [])  # it may be stopped before it is up


async def test_a_gateway_that_cannot_start_takes_the_engines_down(house: House) -> None:
    house.engine("engine")
    house.with_replica("--crash")
    with pytest.raises(StartError, match="the gateway ended with exit code 1; its lines above say why"):
        await house.start()
    assert house.order == ["engine up", "engine down"]


async def test_an_engine_that_ends_by_itself_comes_back(house: House) -> None:
    """The gateway and its clients stay; requests meanwhile are refused or served elsewhere."""
    path = house.engine("engine")
    running = house.start()
    await house.greeted
    await end_at("http://engine", path)
    async with asyncio.timeout(60):
        while "engine serves again" not in house.said.getvalue():
            await asyncio.sleep(0.01)
    assert "engine ended by itself after" in house.said.getvalue()
    assert re.search(r"\(exit code 3\): .*; starting it again in 0 s", house.said.getvalue())
    await house.replica_answers()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert house.order == ["engine up", "gateway up", "engine up", "gateway down", "engine down"]


async def test_without_its_last_engine_the_gateway_stops(house: House) -> None:
    path = house.engine("engine", policy=NO_SECOND_CHANCE)
    running = house.start()
    await house.greeted
    await end_at("http://engine", path)
    assert await running == 1
    assert house.order == ["engine up", "gateway up", "gateway down"]
    assert "engine ended by itself after" in house.said.getvalue()
    assert "given up: it ended once within 900 s" in house.said.getvalue()
    assert "no engine is left: stopping" in house.said.getvalue()


async def test_with_another_engine_the_gateway_goes_on(house: House) -> None:
    first = house.engine("first", policy=NO_SECOND_CHANCE)
    house.engine("second")
    running = house.start()
    await house.greeted
    gone = asyncio.create_task(house.minders[0].wait())
    await end_at("http://engine", first)
    await gone
    await house.replica_answers()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(asyncio.CancelledError):
        await running
    assert house.order[-2:] == ["gateway down", "second down"]
    assert "first ended by itself" in house.said.getvalue()


async def test_a_kept_engine_outlives_its_gateway_and_the_next_one_takes_it_over(house: House, tmp_path: Path) -> None:
    """A gateway is restarted for a new release in a second; a large model loads for minutes."""
    house.engine("engine", keep=True)
    first = house.minders[0]
    running = house.start()
    await house.greeted
    pid = first.engine_pid
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert house.order == ["engine up", "gateway up", "gateway down"]
    again = House(tmp_path)
    again.engine("engine", keep=True)
    running = again.start()
    await again.greeted
    assert again.minders[0].adopted
    assert again.minders[0].engine_pid == pid
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    # With other arguments it is another engine: the old one ends first.
    last = House(tmp_path)
    last.engine("engine", "--stubborn", keep=True)
    running = last.start()
    await last.greeted
    assert not last.minders[0].adopted
    assert last.minders[0].engine_pid != pid
    assert "engine is there with other arguments: ending it first" in last.said.getvalue()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await stop_engine(f"unix:{last.minders[0].control}", drain=0, grace=0)
    assert last.order[-4:] == ["engine down", "engine up", "gateway up", "gateway down"]


async def test_how_an_engine_ended_is_told_however_soon_it_did(tmp_path: Path) -> None:
    """Its minder leaves with it, and answers nobody who asks afterwards."""
    stopped = asyncio.Event()

    async def answer(call: str, writer: asyncio.StreamWriter) -> None:
        if call == "POST /stop":
            writer.write(said(SERVES))
            await writer.drain()
            stopped.set()
        elif not stopped.is_set():
            writer.write(EVENTS + event())
            await stopped.wait()
            writer.write(event(phase="stopped", message="fake stopped (exit code 0)"))

    async with control_port(tmp_path / "control", answer):
        told = await stop_engine(f"unix:{tmp_path / 'control'}", drain=0, grace=0)
    assert told == "fake stopped (exit code 0)"


async def test_without_the_gateway_the_engines_stop(house: House) -> None:
    house.engine("engine")
    running = house.start()
    await house.greeted
    await end_at(f"http://127.0.0.1:{house.port}")
    assert await running == 1
    assert house.order == ["engine up", "gateway up", "engine down"]
    assert "the gateway ended by itself with exit code 3: stopping" in house.said.getvalue()


async def test_a_gateway_that_does_not_stop_is_killed_after_its_time(house: House) -> None:
    house.engine("engine")
    house.with_replica("--stubborn", grace=0.05)
    running = house.start()
    await house.greeted
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert house.order == ["engine up", "gateway up", "engine down"]
    assert await house.replica.wait() == -signal.SIGKILL


async def test_sighup_is_the_gateway_s(house: House) -> None:
    house.engine("engine")
    running = house.start()
    await house.greeted
    os.kill(os.getpid(), signal.SIGHUP)
    while "gateway reload" not in house.order:
        assert not running.done()
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_reload_that_is_asked_for_too_early_ends_no_gateway() -> None:
    """Between its first instruction and the moment it knows what SIGHUP asks for, seconds pass."""
    replica = Replica(["sleep", "3600"], {}, 30.0)
    await replica.start()
    replica.reload()
    await replica.stop()
    assert await replica.wait() == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts_what_blocks(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(StopRequested), interruptible():
        os.kill(os.getpid(), number)
        signal.pause()
    assert signal.getsignal(number) is before


# --- ports -------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_said_with_what_to_type() -> None:
    with bind_free() as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartError) as caught:
            check_ports(Settings.model_validate({"listen": {"port": port}, "admin": {"enabled": False}}))
        assert str(caught.value) == (
            f"port {port} of 127.0.0.1 is in use; stop the program that uses it or choose another port,"
            f" for example: forebay serve --port {port + 10}"
        )
        with pytest.raises(StartError, match=f"port {port} .* FOREBAY_ADMIN__PORT={port + 10} forebay serve"):
            check_ports(Settings.model_validate({"listen": {"port": free_port()}, "admin": {"port": port}}))
        check_ports(Settings.model_validate({"listen": {"unix_socket": "/x"}, "admin": {"enabled": False}}))


def test_an_address_of_another_machine_and_a_port_of_root_s(monkeypatch: pytest.MonkeyPatch) -> None:
    no_admin = {"admin": {"enabled": False}}
    with pytest.raises(StartError, match=r"203\.0\.113\.1 cannot be listened on .*; name an address of this machine"):
        check_ports(Settings.model_validate({"listen": {"host": "203.0.113.1"}, **no_admin}))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(StartError, match="port 80 needs more rights than this user has; choose one above 1023"):
        check_ports(Settings.model_validate({"listen": {"port": 80}, **no_admin}))


# --- greeting and keys -------------------------------------------------------------------------------------------


async def test_a_person_is_told_when_no_engine_answers_and_when_one_does(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {"listen": {"port": house.port}, "upstreams": [{"url": "http://a:1"}, {"url": "http://b:1"}]}
    settings = Settings.model_validate(tree)
    greeting = asyncio.create_task(greet_when_ready(settings, "fb-key", ("A note.",), house.display, patience=0))
    while not house.said.getvalue():
        await asyncio.sleep(0)
    assert house.said.getvalue() == (
        "forebay: no engine answers at http://a:1, http://b:1; requests get a 503 until one does\n"
    )
    assert capsys.readouterr().out == ""
    await house.replica.start()
    await greeting
    await house.replica.stop()
    shown = capsys.readouterr().out
    assert "Models: fake-model\n" in shown
    assert "fb-key" in shown
    assert "A note." in shown


async def test_a_gateway_that_lets_nobody_in_for_lack_of_its_store_of_limits_is_there(
    upstream: ScriptedUpstream,
) -> None:
    """Its engines took minutes to load: they are not ended because something else is away."""
    settings = Settings.model_validate({"listen": {"port": urlsplit(upstream.url).port}})
    endpoints = b'[{"name": "a", "healthy": true, "models": ["m"]}]'
    for status in (b"no healthy engine", b"limits cannot be checked"):
        body = b'{"status": "%s", "limits": "closed", "endpoints": %s}' % (status, endpoints)
        upstream.queue(json_answer(body, status=503), path="/health/ready")
    assert await look_until_ready(settings) == ("m",)
    assert len(upstream.requests) == 2


def test_a_key_is_made_only_where_there_is_none_and_only_for_a_person() -> None:
    local, network = Settings(), Settings.model_validate({"listen": {"host": "0.0.0.0"}})
    assert key_or_note(network) == (
        None,
        ("Keys: none yet, nobody is let in; make one with: forebay keys create --name NAME",),
    )
    first, second = key_or_note(local), key_or_note(local)
    assert first[0] is not None
    assert second[0] not in (None, first[0])
    with KeyStore(local.state_url) as store:
        assert len(store.load_all().records) == 1
        store.create("alice")
    known = (None, ("Keys: 1 known by name; make another with: forebay keys create --name NAME",))
    assert key_or_note(local) == known
    assert key_or_note(network) == known
    assert key_or_note(Settings(auth="none")) == (None, ())


# --- plans -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("FOREBAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FOREBAY_HOME", str(tmp_path / "home"))


def test_with_no_configuration_the_packaged_model_runs_on_the_cpu() -> None:
    plan = make_plan(None, {}, None, None)
    (engine,) = plan.settings.engines
    assert (engine.kind, engine.device, engine.model) == ("vllm", "cpu", "smollm2-135m-instruct")
    assert plan.settings.shutdown.announce == 0  # a laptop has no load balancer


def test_model_and_device_change_the_one_engine(tmp_path: Path) -> None:
    file = tmp_path / "forebay.yaml"
    file.write_text("engines: [{name: mine, max_model_len: 512}]\nshutdown: {announce: 3s}\n")
    plan = make_plan(file, {"listen": {"host": "0.0.0.0"}}, "Qwen/Qwen3-8B", "cuda")
    (engine,) = plan.settings.engines
    assert (engine.name, engine.max_model_len, engine.device, engine.model) == ("mine", 512, "cuda", "Qwen/Qwen3-8B")
    assert (plan.settings.listen.host, plan.settings.shutdown.announce) == ("0.0.0.0", 3)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"upstreams": [{"url": "http://a"}]}, "only upstreams are configured"),
        ({"engines": [{"name": "a"}, {"name": "b"}]}, "2 of them are configured"),
    ],
)
def test_model_and_device_need_one_engine(tree: dict[str, object], said: str) -> None:
    with pytest.raises(StartError, match=f"--model and --device change the one engine of this machine, but {said}"):
        make_plan(None, tree, "m", None)


def test_a_gateway_open_to_the_network_announces_its_end() -> None:
    assert make_plan(None, {"listen": {"host": "0.0.0.0"}}, None, None).settings.shutdown.announce == 5


def test_port_zero_becomes_a_number() -> None:
    plan = make_plan(None, {"listen": {"port": 0, "host": "127.0.0.1"}, "admin": {"port": 0}}, None, None)
    assert plan.settings.listen.port != 0
    assert plan.settings.admin.port != 0
    assert plan.overrides["listen"] == {"host": "127.0.0.1", "port": plan.settings.listen.port}


def prepared(tmp_path: Path, tree: dict[str, object]) -> tuple[Plan, PreparedEngine]:
    plan = make_plan(None, tree, None, None)
    environment, model = EngineEnvironment(tmp_path / "env"), ModelFiles("org/Model", "model")
    return plan, PreparedEngine(plan.settings.engines[0], environment, model)


def test_the_replica_learns_what_was_typed_and_where_the_engines_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree: dict[str, object] = {
        "auth": "none",
        "upstreams": [{"url": "http://other:8000", "api_key": "secret", "models": {"a": "b"}}],
        "engines": [{"name": "mine", "port": free_port()}],
    }
    plan, engine = prepared(tmp_path, tree)
    spec = engine.private_spec(plan.settings, tmp_path)
    for name, value in replica_environment(plan, [spec], [Path("/run/mine.control")]).items():
        monkeypatch.setenv(name, value)
    child = load(None)
    assert child.auth == "none"
    assert child.engines == ()
    other, mine = child.upstreams
    assert (other.url, other.credential(), other.models) == ("http://other:8000", "secret", {"a": "b"})
    assert (mine.url, mine.name, mine.credential()) == (str(spec.address), "mine", spec.api_key)
    assert replica_command(Plan(plan.settings, Path("f.yaml"), {}))[1:] == ["-m", "gateway.app", "--config", "f.yaml"]


def test_an_engine_is_private_to_its_gateway(tmp_path: Path) -> None:
    """On a Unix socket in a directory of its user's, or on its port with a key that no command line shows."""
    plan, engine = prepared(tmp_path, {"engines": [{"name": "mine", "environment": {"A": "b"}}]})
    spec = engine.private_spec(plan.settings, tmp_path)
    assert (spec.address, spec.api_key) == (Address(unix=tmp_path / "8000-3fd305.sock"), None)
    assert (spec.model, spec.model_is_local, spec.served_name) == ("org/Model", False, "model")
    port = free_port()
    plan, engine = prepared(tmp_path, {"engines": [{"name": "mine", "port": port, "served_name": "public"}]})
    spec = engine.private_spec(plan.settings, tmp_path)
    assert spec.address == Address(port=port)
    assert spec.served_name == "public"
    assert spec.api_key is not None
    assert spec.api_key not in repr(spec)


def test_an_engine_that_knows_no_sockets_is_given_a_port_and_a_key(tmp_path: Path) -> None:
    """Of two each has ports of its own, and none is one that somebody listens on or that is promised to another."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        first = taken.getsockname()[1]
        tree: dict[str, object] = {
            "listen": {"port": first + 2},
            "engines": [{"name": "a", "kind": "sglang"}, {"name": "b", "kind": "sglang"}],
        }
        plan, engine = prepared(tmp_path, tree)
        specs = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local, "FIRST_ENGINE_PORT", first)
            for settings in plan.settings.engines:
                one = PreparedEngine(settings, engine.environment, engine.model)
                specs.append(one.private_spec(plan.settings, tmp_path))
    ports = [spec.address.port for spec in specs]
    assert all(spec.address.unix is None and spec.api_key for spec in specs)
    assert [(port - first) % 2 for port in ports] == [0, 1]
    assert not {first, first + 2} & set(ports)


def test_a_data_directory_that_cannot_be_written_is_said() -> None:
    with tempfile.NamedTemporaryFile() as file, pytest.raises(StartError, match="choose another one with FOREBAY_HOME"):
        run_directory(Settings(data_dir=Path(file.name))).__enter__()


def test_sockets_lie_where_only_their_user_can_enter_and_their_path_fits(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as short, run_directory(Settings(data_dir=Path(short))) as directory:
        assert directory == Path(short) / "run"
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    with run_directory(Settings(data_dir=tmp_path / ("long" * 30))) as directory:
        assert len(os.fsencode(directory)) < 90
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert not directory.exists()


def test_what_others_have_put_there_is_not_trusted(tmp_path: Path) -> None:
    """A run directory that anybody could enter is closed, and keys are written through nobody's file or link."""
    directory = tmp_path / "run"
    directory.mkdir()
    directory.chmod(0o777)
    with run_directory(Settings(data_dir=tmp_path)):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (directory / "admin-8000.new").symlink_to(victim)
    local.write_private(directory / "admin-8000.json", {"key": "secret"})
    assert victim.read_text() == "mine"
    (directory / "admin-8000.new").touch(0o666)
    local.write_private(directory / "admin-8000.json", {"key": "secret"})
    assert stat.S_IMODE((directory / "admin-8000.json").stat().st_mode) == 0o600


def test_an_engine_is_found_again_wherever_it_stands_in_the_file(tmp_path: Path) -> None:
    """One that is kept would be taken for another gateway's if the one above it were taken out."""
    places = []
    for names in (("a", "b"), ("b",)):
        plan, engine = prepared(tmp_path, {"engines": [{"name": name} for name in names]})
        last = PreparedEngine(plan.settings.engines[-1], engine.environment, engine.model)
        places.append((last.control(plan.settings, tmp_path), last.private_spec(plan.settings, tmp_path).address))
    assert places[0] == places[1]


@pytest.mark.parametrize(("remote", "hosts"), [("off", ()), ("engine", ("images.example",))])
def test_an_engine_may_fetch_media_only_from_the_configured_hosts(
    tmp_path: Path, remote: str, hosts: tuple[str, ...]
) -> None:
    plan, engine = prepared(tmp_path, {"media": {"remote": remote, "hosts": list(hosts)}})
    assert engine.private_spec(plan.settings, tmp_path).allowed_media_domains == hosts


def test_loading_is_shown_from_the_first_moment(tmp_path: Path) -> None:
    plan, engine = prepared(tmp_path, {})
    said = io.StringIO()
    minder_for(engine, engine.private_spec(plan.settings, tmp_path), plan.settings, Display(said))
    assert said.getvalue() == "start local (vllm on cpu, model): starting its program\n"


# --- keys for a start --------------------------------------------------------------------------------------------


def test_each_start_on_a_port_replaces_its_last_key_alone() -> None:
    first, second = (Settings.model_validate({"listen": {"port": port}}) for port in (8000, 8100))
    keys = [make_start_key(first), make_start_key(second), make_start_key(first)]
    assert None not in keys
    with KeyStore(first.state_url) as store:
        assert [record.name for record in store.load_all().records.values()] == ["serve-8100", "serve-8000"]
    assert make_start_key(Settings(auth="none")) is None


def test_a_gateway_that_asks_nobody_for_a_key_needs_no_database(tmp_path: Path) -> None:
    """Its operator's pass is a comfort; where keys are asked for, nothing works without."""
    (tmp_path / "file").touch()
    said: list[str] = []
    with admin_pass(Settings(auth="none", data_dir=tmp_path / "file" / "data"), said.append):
        assert "cannot be made: Not a directory" in said[0]
        assert said[0].endswith("`forebay engines list` and its like do not find this gateway")
    with pytest.raises(StateError), admin_pass(Settings(data_dir=tmp_path / "file" / "data"), said.append):
        pass
