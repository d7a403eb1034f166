"""The gateways that are measured, and how each is started in front of the mock engine.

A subject is asked for the model name its clients would use: Forebay and the naive gateway publish `bench-model` for the
engine's `mock-model`; nginx and the Rust routers cannot rename a model, so their clients name the engine's own.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from loadtests.bench.native import ENGINE_MODEL, BenchError
from loadtests.bench.processes import Server, free_port

PUBLIC_MODEL = "bench-model"
PEERS = {"sglang-router": "sglang-router==0.3.2", "smg": "smg==1.13.0"}
"""Routers that can be installed beside: name → what to install, without its declared dependencies."""
_PEER_NEEDS = ("setproctitle", "aiohttp", "orjson", "requests", "uvicorn", "fastapi")
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a subject runs: a directory of its own, the engine's port, the keys its clients use."""

    directory: Path
    engine_port: int
    keys: Sequence[str]

    @property
    def engine_url(self) -> str:
        """The mock engine."""
        return f"http://127.0.0.1:{self.engine_port}"


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a subject on `port` and what can be asked of it."""

    port: int
    command: Sequence[str]
    ready: str = "/health"
    metrics: tuple[int, str] | None = None
    reload: Callable[[Server], None] | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """One gateway. `model` is what its clients ask for; `version` what is printed below the table."""

    name: str
    model: str
    version: Callable[[], str]
    prepare: Callable[[Place], Launch]


# --- nginx -------------------------------------------------------------------------------------------------------

_NGINX = """\
{user}worker_processes 1;
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
worker_rlimit_nofile 16384;
events {{ worker_connections 8000; }}
http {{
    access_log {directory}/access.log;
    client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
    client_body_buffer_size 2m; client_max_body_size 16m;
    keepalive_timeout 75s; keepalive_requests 100000000;
    upstream engine {{
        server 127.0.0.1:{engine_port};
        keepalive 1024; keepalive_requests 100000000; keepalive_timeout 75s;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://engine;
            proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_buffering off;
            proxy_connect_timeout 5s; proxy_read_timeout 120s; proxy_send_timeout 60s;
        }}
    }}
}}
"""


def _nginx_program() -> str:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise BenchError("nginx is not installed, and every figure is a ratio to it (Debian: apt-get install nginx)")
    return program


def _nginx_version() -> str:
    done = subprocess.run([_nginx_program(), "-v"], capture_output=True, text=True, check=True)
    return done.stderr.strip().removeprefix("nginx version: nginx/")


def _nginx(place: Place) -> Launch:
    port = free_port()
    config = place.directory / "nginx.conf"
    user = "user root;\n" if os.geteuid() == 0 else ""
    config.write_text(
        _NGINX.format(user=user, directory=place.directory, engine_port=place.engine_port, port=port), encoding="utf-8"
    )
    command = [_nginx_program(), "-e", f"{place.directory}/error.log", "-p", str(place.directory), "-c", str(config)]
    return Launch(port, command, reload=lambda server: server.send(signal.SIGHUP))


# --- the naive gateway and this one ------------------------------------------------------------------------------


def _naive(place: Place) -> Launch:
    port = free_port()
    keys = place.directory / "keys.txt"
    keys.write_text("\n".join(place.keys), encoding="utf-8")
    models = ["--public-model", PUBLIC_MODEL, "--engine-model", ENGINE_MODEL]
    command = [sys.executable, "-m", "loadtests.bench.naive", "--port", str(port), "--upstream", place.engine_url]
    return Launch(port, [*command, *models, "--keys", str(keys)])


def _floor(place: Place) -> Launch:
    port = free_port()
    command = [sys.executable, "-m", "loadtests.bench.floor", "--port", str(port)]
    return Launch(port, [*command, "--engine-port", str(place.engine_port)])


_PLENTY = {"rate": "1000M/s"}
FIVE_LIMITS = {
    "defaults": {
        "key": {"requests": _PLENTY, "tokens": _PLENTY, "concurrent": 100_000},
        "tenant": {"requests": _PLENTY, "tokens": _PLENTY},
    }
}
"""Five buckets that a request draws on and none that refuses it: what limits cost, not what they keep out."""


def forebay_config(
    place: Place, face: str, port: int, admin_port: int, extra_keys: int = 0, limits: Mapping[str, object] | None = None
) -> str:
    """The configuration under test: everything on. `extra_keys` makes a reload change something."""
    keys = [*place.keys, *(f"sk-bench-extra-{number}" for number in range(extra_keys))]
    return yaml.safe_dump(
        {
            "listen": {"host": "127.0.0.1", "port": port, "face": face},
            "admin": {"host": "127.0.0.1", "port": admin_port},
            "auth": "keys",
            "keys": [
                {"name": f"tenant-{number}", "sha256": hashlib.sha256(key.encode()).hexdigest()}
                for number, key in enumerate(keys)
            ],
            "upstreams": [
                {
                    "url": place.engine_url,
                    "engine": "vllm",
                    "models": {PUBLIC_MODEL: ENGINE_MODEL},
                    "max_connections": 4096,
                }
            ],
            "shutdown": {"announce": 0, "drain": 1},
            "log": {"format": "json", "file": str(place.directory / "forebay.log")},
            "metrics": {"max_label_values": 1000},
            "data_dir": str(place.directory / "data"),
            "limits": dict(limits or {}),
        },
        sort_keys=False,
    )


def _forebay(face: str, limits: Mapping[str, object] | None = None) -> Callable[[Place], Launch]:
    def prepare(place: Place) -> Launch:
        port = free_port()
        admin_port = free_port(port + 1)
        config = place.directory / "forebay.yaml"
        config.write_text(forebay_config(place, face, port, admin_port, limits=limits), encoding="utf-8")
        # Made beforehand: writing so much YAML in the middle of a run would hold up the generator, not the gateway.
        changed = forebay_config(place, face, port, admin_port, 1, limits)

        def reload(server: Server) -> None:
            config.write_text(changed, encoding="utf-8")
            server.send(signal.SIGHUP)

        return Launch(
            port,
            [sys.executable, "-m", "gateway.cli", "serve", "--config", str(config)],
            ready="/health/ready",
            metrics=(admin_port, "/metrics"),
            reload=reload,
        )

    return prepare


def limited(mode: str, url: str) -> Subject:
    """This gateway with five limits, kept in its memory or in the store at ``url`` (`leased`, `exact`)."""
    store: dict[str, object] = {} if mode == "memory" else {"url": url, "mode": mode, "namespace": f"bench-{mode}"}
    limits: dict[str, object] = {**FIVE_LIMITS, "store": store}
    return Subject(f"limits-{mode}", PUBLIC_MODEL, _this_version, _forebay("protocol", limits))


def _this_version() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    commit = f", commit {done.stdout.strip()}" if done.returncode == 0 else ""
    return importlib.metadata.version("forebay") + commit


# --- routers installed beside ------------------------------------------------------------------------------------


def peers_directory() -> Path:
    """The environment of the peers, apart from the project's own."""
    return ROOT / ".cache" / "bench-peers"


def install_peers(names: Sequence[str], directory: Path | None = None) -> None:
    """Install peers that are missing into an environment of their own; BenchError when a name or the install fails."""
    directory = directory or peers_directory()
    for name in names:
        if name not in PEERS:
            raise BenchError(f"no peer named {name!r}; there are {', '.join(PEERS)}")
    missing = [PEERS[name] for name in names if not (directory / "bin" / name).exists()]
    if not missing:
        return
    steps = [
        [sys.executable, "-m", "venv", str(directory)],
        [str(directory / "bin" / "pip"), "install", "--quiet", *_PEER_NEEDS],
        [str(directory / "bin" / "pip"), "install", "--quiet", "--no-deps", *missing],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"cannot install {' '.join(missing)}:\n{done.stderr[-1500:]}")


def _peer(name: str) -> Subject:
    def prepare(place: Place) -> Launch:
        port = free_port()
        metrics = free_port(port + 1)
        command = [
            *(str(peers_directory() / "bin" / name), "launch", "--host", "127.0.0.1", "--port", str(port)),
            *("--worker-urls", place.engine_url, "--policy", "round_robin", "--prometheus-port", str(metrics)),
            *("--log-dir", str(place.directory)),
        ]
        return Launch(port, command, metrics=(metrics, "/metrics"))

    return Subject(name, ENGINE_MODEL, lambda: PEERS[name].partition("==")[2], prepare)


# --- the list ----------------------------------------------------------------------------------------------------


def attached(text: str) -> tuple[str, int, int, str]:
    """Read `NAME=PORT,PID[,MODEL]`: a gateway that somebody else has started; BenchError when it is written wrong."""
    name, _, rest = text.partition("=")
    parts = rest.split(",")
    if not name or len(parts) not in (2, 3) or not (parts[0].isdigit() and parts[1].isdigit()):
        raise BenchError(f"--attach wants NAME=PORT,PID[,MODEL], not {text!r}")
    return name, int(parts[0]), int(parts[1]), parts[2] if len(parts) == 3 else PUBLIC_MODEL


SUBJECTS: Mapping[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject("nginx", ENGINE_MODEL, _nginx_version, _nginx),
        Subject("naive", PUBLIC_MODEL, lambda: f"FastAPI {importlib.metadata.version('fastapi')}", _naive),
        Subject("floor", ENGINE_MODEL, lambda: f"uvloop {importlib.metadata.version('uvloop')}", _floor),
        Subject("forebay-protocol", PUBLIC_MODEL, _this_version, _forebay("protocol")),
        Subject("forebay-asgi", PUBLIC_MODEL, _this_version, _forebay("asgi")),
        Subject("forebay-limits", PUBLIC_MODEL, _this_version, _forebay("protocol", FIVE_LIMITS)),
        *(_peer(name) for name in PEERS),
    )
}
