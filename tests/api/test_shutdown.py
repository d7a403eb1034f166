"""What keeps the process from starting, told in one line; the end itself is among the faults.

``tests/faults/test_shutdown.py`` shows the announcement, the drain and the signals.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.app import main
from tests.support.holdings import open_sockets
from tests.support.sockets import bind_free, free_port
from tests.support.tls import AUTHORITY, LOCALHOST


@pytest.fixture(autouse=True)
def switch_interval() -> Iterator[None]:
    """Put back what the process sets for itself."""
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port somebody else listens on."""
    with bind_free() as sock:
        sock.listen()
        yield int(sock.getsockname()[1])


def start(folder: Path, **sections: Any) -> int:
    """Start a replica from a file with these sections, and return its exit code."""
    tree = {
        "listen": {"port": free_port()},
        "admin": {"enabled": False},
        "data_dir": str(folder),
        "upstreams": [],
        **sections,
    }
    file = folder / "forebay.yaml"
    file.write_text(yaml.safe_dump(tree))
    return main(["--config", str(file)])


def the_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that was written to standard error, and nothing else was."""
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert len(lines) == 1, output.err
    assert lines[0].startswith("forebay: ")
    return lines[0]


def test_a_port_in_use(tmp_path: Path, taken: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Which one, and what to do; nothing is left open."""
    before = open_sockets()
    assert start(tmp_path, listen={"port": taken}) == 1
    line = the_line(capsys)
    assert f"cannot listen on 127.0.0.1:{taken}: Address already in use." in line
    assert open_sockets() == before


def test_an_admin_port_in_use(tmp_path: Path, taken: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = open_sockets()
    assert start(tmp_path, admin={"port": taken}) == 1
    assert f"127.0.0.1:{taken}" in the_line(capsys)
    assert open_sockets() == before


def test_an_address_that_is_not_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(tmp_path, listen={"host": "192.0.2.1", "port": free_port()}) == 1
    assert "192.0.2.1" in the_line(capsys)


def test_a_name_that_is_no_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(tmp_path, listen={"host": "no-such-host.invalid", "port": free_port()}) == 1
    assert "no-such-host.invalid" in the_line(capsys)


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("log.file", {"log": {"file": "/nowhere/log.jsonl"}}),
    ("tls", {"listen": {"port": 0, "tls": {"certificate": "/nowhere/tls.crt", "private_key": "/nowhere/tls.key"}}}),
    ("tls", {"listen": {"port": 0, "tls": {"certificate": str(AUTHORITY), "private_key": str(LOCALHOST)}}}),
    ("tls", {"listen": {"port": 0, "tls": {"certificate": __file__, "private_key": __file__}}}),
    ("/nowhere/forebay.sock", {"listen": {"unix_socket": "/nowhere/forebay.sock"}}),
    ("ca_file", {"upstreams": [{"url": "https://engine.example", "ca_file": "/nowhere/ca.pem"}]}),
    ("ca_file", {"upstreams": [{"url": "https://engine.example", "ca_file": __file__}]}),
    ("state database", {"state": {"url": "sqlite:////proc/nowhere/forebay.db"}}),
    ("keys[0]", {"keys": [{"name": "x", "key_file": "/nowhere/key"}]}),
]


@pytest.mark.parametrize(("told", "sections"), WRONG, ids=[f"{index} {told}" for index, (told, _) in enumerate(WRONG)])
def test_a_mistake_in_the_configuration(
    tmp_path: Path, told: str, sections: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and exit code 1, never a traceback; no socket stays behind."""
    before = open_sockets()
    assert start(tmp_path, **sections) == 1
    assert told in the_line(capsys)
    assert open_sockets() == before


def test_a_socket_somebody_listens_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Unix socket left by the dead is replaced, one of the living is not."""
    path = tmp_path / "forebay.sock"
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(path))
        living.listen()
        assert start(tmp_path, listen={"unix_socket": str(path)}) == 1
        assert "another process does" in the_line(capsys)


def test_another_uvicorn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The fast face is written against one version: with another the portable one is advised."""
    monkeypatch.setattr("uvicorn.__version__", "0.99.0")
    assert start(tmp_path) == 1
    assert "listen.face: asgi" in the_line(capsys)
