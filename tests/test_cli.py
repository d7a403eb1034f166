"""The `forebay` command: what is typed, what comes out on which stream, and the exit code."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import psutil
import pytest

from gateway.settings import load
from gateway.state.keys import KeyStore
from tests.support.command import forebay, home, refused
from tests.support.gateway import give_database
from tests.support.sockets import bind_free, free_port
from tests.support.table import each

__all__ = ["home"]

ROOT = Path(__file__).parents[1]
PATIENCE = 60.0
"""Seconds after which what should have happened counts as failed; nothing waits that long when all is well."""


# --- help and versions -------------------------------------------------------------------------------------------


@each(
    "command", ["serve", "doctor", "config check", "config schema", "keys create", "keys import", "keys revoke",
                "limits explain", "route explain",
                "keys rotate", "keys show", "keys update", "keys expire", "keys list", "tenants list",
                "tenants set",
                "tenants delete", "organisations list", "organisations set", "organisations delete", "audit", "diff",
                "apply", "engines install", "engines run", "engines list", "engines logs", "engines drain",
                "engines restart",
                "engines stop", "engines cordon", "engines uncordon", "engines eject", "engines check",
                 "engines table"]
)  # fmt: skip
def test_help_teaches_by_example(command: str) -> None:
    shown = forebay(*command.split(), "--help").stdout
    assert re.search(rf"Examples?:\s.*forebay {command}", shown, re.DOTALL)


def test_nothing_typed_shows_what_there_is() -> None:
    shown = forebay().output
    for command in ("serve", "doctor", "version", "config", "keys", "tenants", "diff", "apply", "audit", "engines"):
        assert command in shown


def test_version() -> None:
    assert re.match(r"forebay .+, Python 3\.\d+\.\d+", forebay("version").stdout)


def test_a_wrong_command_line_is_exit_code_two() -> None:
    assert forebay("keys", "create").exit_code == 2
    assert forebay("serve", "--device", "tpu").exit_code == 2


# --- config ------------------------------------------------------------------------------------------------------


def test_config_check() -> None:
    Path("forebay.yaml").write_text("listen: {port: 9000}\n")
    result = forebay("config", "check")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "forebay.yaml: fine\n", "")


def test_config_check_tells_every_mistake_on_its_own_line() -> None:
    Path("f.yaml").write_text("listen: {prot: 1}\nauth: nobody\n")
    result = forebay("config", "check", "f.yaml")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert sorted(result.stderr.splitlines()) == [
        "forebay: auth: should be 'keys' or 'none'",
        "forebay: listen.prot: unknown key; did you mean listen.port?",
    ]


def test_config_check_refuses_a_database_that_cannot_work() -> None:
    Path("f.yaml").write_text("state: {url: mysql://u:hunter2@h/d}\n")
    said = refused("config", "check", "f.yaml")
    assert said == "state.url: mysql is not supported; use sqlite or postgresql"


def test_config_check_refuses_replicas_that_share_nothing() -> None:
    Path("f.yaml").write_text("limits: {store: {replicas: 3}}\n")
    said = refused("config", "check", "f.yaml")
    assert said.startswith("limits.store: 3 replicas need a Redis server to share limits: without one each of them")


@pytest.mark.parametrize(("standing", "lines"), [("store", 2), ("degraded", 3)])
def test_limits_explain_says_when_they_are_kept_by_a_share(
    standing: str, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, object] = {
        "key": "a",
        "tenant": "t",
        "organisation": None,
        "model": "m",
        "standing": standing,
        "data": [],
    }
    monkeypatch.setattr("gateway.operate.find_gateway", lambda settings: ("http://127.0.0.1:1", "fb-admin"))
    monkeypatch.setattr("gateway.operate.Operator.limits", lambda operator, key, model: told)
    first, *more, last = shown = forebay("limits", "explain", "a", "m").stdout.splitlines()
    assert (first, last, len(shown)) == ("key a, tenant t, on m:", "nothing is limited", lines)
    assert all(f"is lost; limits are {standing} until" in line for line in more)


def test_config_check_is_loud_about_an_open_gateway() -> None:
    Path("f.yaml").write_text("auth: none\nlisten: {host: 0.0.0.0}\n")
    result = forebay("config", "check", "f.yaml")
    assert result.exit_code == 0
    assert (
        "WARNING: auth is none and 0.0.0.0 is no loopback address: everybody who can reach port 8000" in result.stderr
    )
    Path("f.yaml").write_text("auth: none\n")
    assert forebay("config", "check", "f.yaml").stderr == ""


def test_config_schema_is_json() -> None:
    schema = json.loads(forebay("config", "schema").stdout)
    assert schema["title"] == "forebay.yaml"
    assert "listen" in schema["properties"]


# --- keys --------------------------------------------------------------------------------------------------------


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def stored() -> Mapping[bytes, object]:
    with KeyStore(load(None).state_url) as store:
        return store.load_all().records


def test_a_created_key_is_alone_on_standard_output(home: Path) -> None:
    result = forebay("keys", "create", "--name", "alice")
    key = result.stdout.removesuffix("\n")
    assert re.fullmatch(r"fb-[0-9a-f]{12}-\w{43}", key)
    assert f"Revoke it: forebay keys revoke {key.split('-')[1]}" in result.stderr
    assert digest(key) in stored()
    assert (home / "forebay.db").exists()


def test_a_key_is_created_with_its_limits() -> None:
    before = datetime.now(UTC)
    key = forebay(
        "keys", "create", "--name", "a", "--tenant", "t", "--model", "m", "--model", "q*", "--max-tokens", "5", "--n",
        "2", "--context", "9", "--expires", "30d",
    ).stdout.strip()  # fmt: skip
    with KeyStore(load(None).state_url) as store:
        record = store.load_all().records[digest(key)]
    assert (record.tenant, record.models) == ("t", ("m", "q*"))
    assert (record.caps.max_tokens, record.caps.n, record.caps.context) == (5, 2, 9)
    assert record.expires_at is not None
    assert before <= record.expires_at - timedelta(days=30) <= datetime.now(UTC)


def test_a_date_to_expire_at_is_utc() -> None:
    forebay("keys", "create", "--name", "a", "--expires", "2030-01-31")
    forebay("keys", "create", "--name", "b", "--expires", "2030-01-31T12:00+02:00")
    listed = json.loads(forebay("keys", "list", "--json").stdout)
    assert [row["expires"] for row in listed] == ["2030-01-31T00:00:00+00:00", "2030-01-31T10:00:00+00:00"]
    assert refused("keys", "create", "--name", "a", "--expires", "soon").startswith("--expires soon: should be a time")


def test_keys_are_imported_by_hash_from_a_file_and_from_standard_input() -> None:
    Path("key").write_text("sk-in-a-file\n")
    ids = [
        forebay("keys", "import", "--name", "a", "--sha256", digest("sk-hashed").hex()).stdout.strip(),
        forebay("keys", "import", "--name", "b", "--key-file", "key").stdout.strip(),
        forebay("keys", "import", "--name", "c", "--key-file", "-", stdin="sk-typed\n").stdout.strip(),
    ]
    assert set(stored()) == {digest("sk-hashed"), digest("sk-in-a-file"), digest("sk-typed")}
    assert [row["id"] for row in json.loads(forebay("keys", "list", "--json").stdout)] == ids
    assert refused("keys", "import", "--name", "d", "--key-file", "key") == f"this key is already here: {ids[1]}"
    assert refused("keys", "import", "--name", "d") == "give the key by exactly one of --sha256 and --key-file"


def test_keys_are_revoked_and_listed() -> None:
    key = forebay("keys", "create", "--name", "alice").stdout.strip()
    public_id = key.split("-")[1]
    forebay("keys", "create", "--name", "old", "--expires", "2020-01-01")
    assert forebay("keys", "revoke", public_id).stdout == f"revoked {public_id} (alice)\n"
    assert digest(key) not in stored()
    assert refused("keys", "revoke", public_id) == f"key {public_id} (alice) is revoked already"
    Path("forebay.yaml").write_text("keys: [{name: declared, key: k, models: []}]\n")
    rows = [line.split() for line in forebay("keys", "list").stdout.splitlines()]
    assert rows[0] == ["id", "name", "tenant", "models", "state", "expires", "from"]
    assert rows[1] == ["-", "declared", "declared", "none", "live", "never", "file"]
    assert rows[2] == [public_id, "alice", "alice", "all", "revoked", "never", "database"]
    assert rows[3][1:5] == ["old", "old", "all", "expired"]
    assert key not in forebay("keys", "list").stdout


def test_a_name_the_file_declares_is_not_for_the_database() -> None:
    Path("forebay.yaml").write_text("keys: [{name: alice, key: k}]\n")
    said = refused("keys", "create", "--name", "alice")
    assert said == (
        "key 'alice' is declared in the configuration file, which wins: change it there, or take another name"
    )


def test_a_database_that_cannot_be_opened_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("taken").write_text("")
    monkeypatch.setenv("FOREBAY_HOME", "taken")
    assert refused("keys", "list").startswith("the state database taken/forebay.db cannot be made: ")


# --- engines and doctor ------------------------------------------------------------------------------------------


def test_an_engine_that_cannot_be_installed_is_one_line() -> None:
    said = refused("engines", "install", "nothing")
    assert said.startswith("Forebay cannot install nothing on cpu, only ")
    assert "\n" not in said


def test_a_simulated_engine_needs_no_installing(home: Path) -> None:
    """It runs in this interpreter's own environment; whoever asks is told what to type instead."""
    result = forebay("engines", "install", "simulated")
    assert (result.exit_code, result.stdout) == (0, f"{sys.prefix}\n")
    run = "forebay engines run simulated --profile h100-8b"
    assert result.stderr == f"forebay: a simulated engine needs nothing installed; run it: {run}\n"
    assert not home.exists()


def test_an_engine_of_no_known_kind_cannot_be_run() -> None:
    assert refused("engines", "run", "vlm") == "engines[0].kind: is no engine; did you mean vllm?"


def test_a_port_in_use_is_one_line_before_anything_starts(home: Path) -> None:
    with bind_free() as taken:
        taken.listen()
        port = taken.getsockname()[1]
        said = refused("serve", "--port", str(port))
    assert said.startswith(f"port {port} of 127.0.0.1 is in use; stop the program that uses it or choose another port")
    assert "\n" not in said
    assert not home.exists()


# --- serve, as a process of its own ------------------------------------------------------------------------------


class Command:
    """A `forebay` that runs, with its output and all processes it has started."""

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str], directory: Path) -> None:
        self.out, self.err = directory / "out", directory / "err"
        self.order = directory / "order"
        self.order.touch()
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, "FAKE_ORDER": str(self.order), **environment, "PYTHONPATH": str(ROOT)},
            )
        self.family: list[psutil.Process] = []

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on files holds while the command runs."""
        until = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < until, self.err.read_text() + self.out.read_text()
            select.select([], [], [], 0.02)
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def wait_ready(self) -> str:
        """Wait for the greeting and return it."""
        self.wait_for(lambda: "\ncurl " in self.out.read_text() and self.out.read_text().endswith("\n\n"))
        return self.out.read_text()

    def end(self, number: signal.Signals) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def left(self) -> list[psutil.Process]:
        """Return which of its processes outlive it for longer than an orphan may."""
        until = time.monotonic() + PATIENCE
        # One that is dead is gone, even if nobody asks for its exit code: whoever inherits orphans may take seconds.
        while (alive := [process for process in self.family if lives(process)]) and time.monotonic() < until:
            select.select([], [], [], 0.02)
        return alive


def lives(process: psutil.Process) -> bool:
    """Tell whether it runs, or could again."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


Start = Callable[..., Command]


@pytest.fixture
def start(tmp_path: Path, home: Path) -> Iterator[Start]:
    """Start commands: ``start("serve", …)``, ``fakes=True`` for a fake engine; they are ended with the test.

    ``fresh=True`` for the first start in a data directory, which takes its time to make a database.
    """
    started: list[Command] = []

    def start_command(*arguments: str, fakes: bool = True, fresh: bool = False, **environment: str) -> Command:
        if not fresh:
            home.mkdir(mode=0o700, exist_ok=True)
            give_database(home / "forebay.db")
        module = "tests.serve_with_fakes" if fakes else "gateway.cli"
        ports = {"FOREBAY_ADMIN__PORT": "0", "FOREBAY_LISTEN__PORT": "0"}
        started.append(Command(module, arguments, {**ports, **environment}, tmp_path))
        return started[-1]

    yield start_command
    for command in started:
        for process in command.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        command.process.kill()
        command.process.wait()


def pasted(greeting: str) -> tuple[str, str]:
    """Return base URL and key of a greeting's command."""
    command = re.search(r"curl (\S+)/v1/chat/completions .*?Bearer (\S+)'", greeting, re.DOTALL)
    assert command is not None, greeting
    return command[1], command[2]


def test_serve_runs_engine_and_gateway_and_ctrl_c_stops_both(start: Start) -> None:
    command = start("serve", fresh=True)
    url, key = pasted(command.wait_ready())
    answer = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"})
    assert [model["id"] for model in answer.json()["data"]] == ["fake-model"]
    assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer other"}).status_code == 401
    assert len(command.family) >= 3  # the gateway, the engine and its supervisor
    assert command.end(signal.SIGINT) == 0
    assert command.order.read_text() == "engine up\nengine down\n"
    said = command.err.read_text()
    assert "install fake: done in 0 s" in said
    assert said.index('"event":"stopped"') < said.index("forebay: stopped")
    assert command.left() == []


def test_an_open_gateway_is_said_loudly_and_a_second_signal_ends_it_now(start: Start) -> None:
    command = start("serve", "--host", "0.0.0.0", "--auth", "none", FAKE_GATEWAY="--stubborn")
    greeting = command.wait_ready()
    assert "WARNING: auth is none and 0.0.0.0 is no loopback address" in command.err.read_text()
    assert "Bearer" not in greeting
    command.process.send_signal(signal.SIGTERM)
    command.wait_for(lambda: "stopping in order" in command.err.read_text())
    assert command.end(signal.SIGTERM) == 128 + signal.SIGTERM
    assert command.left() == []


def test_a_killed_command_leaves_nothing(start: Start) -> None:
    command = start("serve", FAKE_GATEWAY="")
    command.wait_ready()
    assert command.end(signal.SIGKILL) == -signal.SIGKILL
    assert command.left() == []


def test_a_gateway_that_is_killed_ends_everything_and_is_said(start: Start) -> None:
    """Its replica is killed, for lack of memory perhaps: nothing is left half alive."""
    command = start("serve", FAKE_GATEWAY="")
    command.wait_ready()
    [replica] = [process for process in command.family if "fake_child.py gateway" in " ".join(process.cmdline())]
    replica.kill()
    assert command.process.wait(PATIENCE) == 1
    assert "the gateway ended by itself with exit code -9: stopping" in command.err.read_text()
    assert command.left() == []


def test_an_engine_that_is_killed_comes_back_behind_the_same_gateway(start: Start) -> None:
    command = start("serve", "--auth", "none")
    command.wait_ready()
    listed = json.loads(forebay("engines", "list", "--json").stdout)
    [engine] = listed
    os.kill(engine["minder"]["pid"], signal.SIGKILL)
    command.wait_for(lambda: "local serves again" in command.err.read_text())
    command.wait_for(lambda: json.loads(forebay("engines", "list", "--json").stdout)[0]["state"] == "serving")
    [again] = json.loads(forebay("engines", "list", "--json").stdout)
    assert again["minder"]["restarts"] == 1
    assert again["minder"]["pid"] != engine["minder"]["pid"]
    assert forebay("engines", "restart", "local").stdout == "local serves again\n"
    assert forebay("engines", "logs", "local").exit_code == 0
    explained = forebay("route", "explain", "fake-model").stdout
    assert explained.startswith("fake-model on /v1/chat/completions: local\n")
    assert re.search(r"local +ready +0 of 1024", explained)
    assert command.end(signal.SIGTERM) == 0
    assert command.left() == []
    assert "no gateway of this data directory" in refused("engines", "list")


def test_a_kept_engine_outlives_a_killed_command(start: Start, tmp_path: Path) -> None:
    """The next start takes it over; without a gateway it can still be asked and stopped."""
    (tmp_path / "work" / "forebay.yaml").write_text("engines: [{name: mine, keep: true}]\n")
    port = str(free_port())
    first = start("serve", FOREBAY_LISTEN__PORT=port, FAKE_GATEWAY="")
    assert "Ctrl-C stops the gateway; mine: forebay engines stop NAME" in first.wait_ready()
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    second = start("serve", FOREBAY_LISTEN__PORT=port)
    second.wait_ready()
    assert second.order.read_text().count("engine up") == 1
    assert second.end(signal.SIGINT) == 0
    assert forebay("engines", "stop", "mine").stdout == "mine stopped (exit code 0)\n"
    assert [line for line in second.order.read_text().splitlines() if "engine" in line] == ["engine up", "engine down"]
    assert first.left() == []


def test_a_signal_while_it_installs_stops_it(start: Start, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    command = start("serve", FAKE_INSTALL=str(tmp_path / "gate"))
    command.wait_for(lambda: "install fake: pretending" in command.err.read_text())
    assert command.end(signal.SIGTERM) == 0
    assert command.err.read_text() == "install fake: pretending\nforebay: stopped\n"


def test_serve_in_front_of_a_running_engine_needs_no_child(start: Start, tmp_path: Path) -> None:
    port = free_port()
    engine = [
        sys.executable,
        "-I",
        "-S",
        str(ROOT / "tests" / "fake_child.py"),
        "engine",
        str(tmp_path / "engine-order"),
    ]
    with subprocess.Popen([*engine, "--port", str(port)]) as running:
        try:
            command = start("serve", "--upstream", f"http://127.0.0.1:{port}", fakes=False)
            url, key = pasted(command.wait_ready())
            answer = httpx.get(f"{url}/v1/models/fake-model", headers={"authorization": f"Bearer {key}"})
            assert answer.json()["max_model_len"] == 2048
            assert command.family == []
            assert command.end(signal.SIGTERM) == 0
        finally:
            running.terminate()


# --- checks on an engine of one's own --------------------------------------------------------------------------------


def test_an_engine_that_is_not_there_cannot_be_checked() -> None:
    port = free_port()
    said = refused("engines", "check", f"http://127.0.0.1:{port}")
    assert said == f"no engine of kind vllm answers at http://127.0.0.1:{port}, or it serves nothing"


def test_an_engine_that_is_named_wrongly_is_told_as_a_configuration_would_tell_it() -> None:
    said = refused("engines", "check", "unix:run/engine.sock")
    assert said.startswith("upstreams[0].url: names no absolute path of a socket")
    assert "did you mean vllm?" in refused("engines", "check", "http://127.0.0.1:1", "--engine", "vlm")


def test_a_check_that_does_not_exist_is_told_with_those_that_do() -> None:
    said = refused("engines", "check", "http://127.0.0.1:1", "--only", "speed")
    assert said.startswith("there is no check 'speed'; there are models, chat, ")
