"""The doctor says what is there, what is missing and what to type, and changes nothing."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import sqlalchemy as sa

from engines.devices import Device, Found
from gateway import doctor
from gateway.cli import app
from gateway.doctor import Finding, State, examine
from gateway.state.database import describe, upgrade
from tests.store.servers import Server
from tests.support.command import CliRunner
from tests.support.databases import Postgresql
from tests.support.sockets import bind_free, free_port

CPU = Found(Device.CPU, 2, "x86_64")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with a CPU, free ports and an empty data directory."""
    for name in [name for name in os.environ if name.startswith("FOREBAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FOREBAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FOREBAY_LISTEN__PORT", str(free_port()))
    monkeypatch.setenv("FOREBAY_ADMIN__PORT", str(free_port()))
    monkeypatch.setattr(doctor, "detect", lambda: (CPU,))
    monkeypatch.setattr(doctor, "problems", lambda recipe, data_dir: ())
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def findings(config: Path | None = None) -> dict[str, Finding]:
    return {finding.subject: finding for finding in examine(config)}


def test_a_fresh_machine_lacks_nothing_that_serve_would_not_make(home: Path) -> None:
    found = findings()
    assert {finding.state for finding in found.values()} <= {State.GOOD, State.ABSENT}
    assert found["state"] == Finding("state", State.ABSENT, f"{home}/forebay.db is made at the first start")
    assert found["vllm on cpu"].remedy == "forebay engines install vllm --device cpu"
    assert found["cpu"].detail == "2 x x86_64"
    assert not home.exists()


def test_an_engine_that_is_there_and_one_that_cannot_be(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.environments import EngineEnvironment

    cuda = Found(Device.CUDA, 1, "GPU")
    npu = Found(Device.ASCEND, 8, "NPU", "the driver is missing")
    monkeypatch.setattr(doctor, "detect", lambda: (cuda, npu, CPU))
    monkeypatch.setattr(
        doctor,
        "find_environment",
        lambda recipe, data_dir: EngineEnvironment(data_dir / "there") if recipe.name == "vllm-cpu" else None,
    )
    monkeypatch.setattr(
        doctor, "problems", lambda recipe, data_dir: ["needs a C compiler"] if recipe.name == "vllm-cuda" else []
    )
    found = findings()
    assert found["vllm on cpu"] == Finding("vllm on cpu", State.GOOD, f"{home}/there")
    assert found["vllm on cuda"] == Finding("vllm on cuda", State.BAD, "needs a C compiler")
    assert found["ascend"] == Finding("ascend", State.BAD, "the driver is missing")


def test_a_wrong_configuration_ends_the_examination() -> None:
    Path("f.yaml").write_text("listen: {prot: 1}\n")
    *_, last = examine(Path("f.yaml"))
    assert last == Finding(
        "configuration",
        State.BAD,
        "listen.prot: unknown key; did you mean listen.port?",
        "forebay config check f.yaml",
    )


def test_a_port_in_use_and_a_database_that_is_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir()
    (home / "forebay.db").write_text("this is no database, it is a text of some length")
    with bind_free() as taken:
        taken.listen()
        monkeypatch.setenv("FOREBAY_LISTEN__PORT", str(taken.getsockname()[1]))
        found = findings()
    assert found["ports"].state is State.BAD
    assert "is in use" in found["ports"].detail
    assert found["state"].state is State.BAD
    assert "file is not a database" in found["state"].detail


def test_a_database_that_is_there(home: Path) -> None:
    upgrade(f"sqlite:///{home}/forebay.db")
    assert findings()["state"] == Finding("state", State.GOOD, f"{home}/forebay.db")


def test_a_database_of_a_server(postgresql: Postgresql, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_STATE__URL", postgresql.url)
    assert findings()["state"] == Finding("state", State.GOOD, describe(sa.make_url(postgresql.url)))
    gc.collect(1)  # a connection left open says so now
    postgresql.go_away()
    try:
        found = findings()["state"]
    finally:
        postgresql.come_back()
    assert found.state is State.BAD
    assert "check that it is running and that state.url is right" in found.detail


class Engine(BaseHTTPRequestHandler):
    """An engine that wants a key."""

    def do_GET(self) -> None:
        known = self.headers["authorization"] == "Bearer engine-key"
        body = b'{"data": [{"id": "m"}]}' if self.path == "/v1/models" else b"[]"
        self.send_response(200 if known else 401)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


@pytest.fixture
def engine_url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", free_port()), Engine) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_upstreams_are_asked_with_their_key(engine_url: str) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    Path("f.yaml").write_text(f"upstreams: [{{url: {engine_url}, api_key: engine-key}}, {{url: {gone}}}]\n")
    found = findings(Path("f.yaml"))
    assert found[f"upstream {engine_url}"] == Finding(f"upstream {engine_url}", State.GOOD, "serves m")
    assert found[f"upstream {gone}"].state is State.BAD
    assert "does not answer as vllm does" in found[f"upstream {gone}"].detail
    Path("f.yaml").write_text(f"upstreams: [{{url: {engine_url}, name: mine}}]\n")
    assert findings(Path("f.yaml"))["upstream mine"].detail == "answers 401 to /v1/models"


def test_the_store_of_limits_is_tried_and_its_password_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server("requirepass sesame")
    server.start()
    try:
        monkeypatch.setenv("FOREBAY_LIMITS__STORE__URL", server.url.replace("://", "://:sesame@"))
        assert findings()["limits.store"] == Finding("limits.store", State.GOOD, server.url)
        monkeypatch.setenv("FOREBAY_LIMITS__STORE__URL", server.url.replace("://", "://:open@"))
        monkeypatch.setattr(doctor, "PROBE_TIMEOUT", 0.1)
        told = f"{server.url} cannot be used (AuthenticationError)"
        assert findings()["limits.store"] == Finding("limits.store", State.BAD, told)
    finally:
        server.close()


def test_the_command_shows_each_finding_and_fails_when_one_is_wrong() -> None:
    result = CliRunner().invoke(app, ["doctor"], catch_exceptions=False)
    assert result.exit_code == 0
    assert f"ok  python: {sys.version.split()[0]} on " in result.stdout
    assert " -  vllm on cpu: is not installed" in result.stdout
    assert "      type: forebay engines install vllm --device cpu\n" in result.stdout
    Path("forebay.yaml").write_text("auth: nobody\n")
    result = CliRunner().invoke(app, ["doctor"], catch_exceptions=False)
    assert result.exit_code == 1
    assert "!!  configuration: auth: should be 'keys' or 'none'" in result.stdout
