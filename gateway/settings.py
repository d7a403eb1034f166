"""The frozen configuration tree, and the only reader of `forebay.yaml` and of the environment.

Precedence: overrides given to `load` (the command line) > environment (`FOREBAY_LISTEN__PORT=9000`) > file > defaults.
Durations are floats in seconds, sizes are ints in bytes; files and environment may say `15s` or `10MB` instead.
A reload builds a second tree and swaps the reference: nothing here is ever changed in place.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PlainValidator,
    SecretStr,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from engines.devices import Device, Quantization
from engines.launch import AdapterSlots, LaunchSpec, Parallel
from engines.minder import Address
from engines.registry import ENGINES
from engines.simulation.profiles import PROFILES
from gateway.limits import Limits, LimitSet
from gateway.models import PublicModel, problems_with
from gateway.values import (
    KIB,
    MIB,
    Count,
    Described,
    Duration,
    EngineKind,
    ModelPattern,
    Moment,
    Name,
    Network,
    Port,
    PositiveDuration,
    Section,
    Size,
    UpstreamUrl,
    UserPath,
    is_address,
    is_loopback,
    parse_duration,
    read_secret,
    yaml_off,
)
from gateway.values import ConfigError as ConfigError

ENV_PREFIX = "FOREBAY_"


# --- the tree ----------------------------------------------------------------------------------------------------


class Tls(Section):
    """Certificate and key this gateway shows to its clients (PEM files)."""

    certificate: UserPath
    """Certificate chain, the server's own first."""
    private_key: UserPath
    """Private key of the certificate, without a passphrase."""


class Listen(Section):
    """Where clients reach the gateway."""

    host: str = "127.0.0.1"
    """Address to bind. 0.0.0.0 opens the gateway to the network."""
    port: Port = 8000
    """TCP port; 0 takes any free one."""
    unix_socket: UserPath | None = None
    """Path of a Unix socket to bind instead of host and port."""
    face: Literal["protocol", "asgi"] = "protocol"
    """`protocol` is the fast way through the pinned uvicorn, `asgi` the portable one."""
    keep_alive: PositiveDuration = 75.0
    """How long an idle connection stays open; longer than the load balancer's own time-out."""
    backlog: Count = 2048
    """Connections the kernel may hold before they are accepted."""
    tls: Tls | None = None
    """Serve HTTPS with this certificate."""

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine can connect."""
        return self.unix_socket is not None or is_loopback(self.host)


class AdminListen(Section):
    """Where metrics, documentation and the admin API are served; loopback unless you say otherwise."""

    host: str = "127.0.0.1"
    """Address to bind."""
    port: Port = 8001
    """TCP port; 0 takes any free one."""
    enabled: bool = True
    """Whether to listen at all."""


class Caps(Section):
    """The most a key may ask for in one request; nothing set means no cap of its own."""

    n: Count | None = None
    """Answers per request (`n`, `best_of`)."""
    max_tokens: Count | None = None
    """Output tokens per answer."""
    context: Count | None = None
    """Prompt and output tokens together."""
    body: Size | None = None
    """Bytes of a request body."""
    media: Size | None = None
    """Bytes of one data URL inside a message."""
    tier: Literal["priority", "default", "flex"] | None = None
    """The best class of service it may ask for (`service_tier`), and has where it does not ask; default when left
    out."""


class KeySettings(Section):
    """An API key declared in the file. The key itself comes from exactly one of sha256, key, key_file, key_env."""

    name: Name
    """Who uses it; shown in logs and metrics."""
    tenant: Name | None = None
    """Who is charged and limited for it; its own name when left out."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = Field(default=None, repr=False)
    """SHA-256 of the key, in hexadecimal: the key itself need not be in the file."""
    key: SecretStr | None = None
    """The key itself."""
    key_file: UserPath | None = None
    """A file holding the key, such as a mounted secret."""
    key_env: str | None = None
    """An environment variable holding the key."""
    models: tuple[ModelPattern, ...] | None = None
    """Models it may use, exact or ending in *; all when left out."""
    caps: Caps = Caps()
    """The most it may ask for in one request."""
    expires: Moment | None = None
    """When it stops working; UTC when no zone is given."""
    trust_domain: Name | None = None
    """Keys of one trust domain may share an engine's prefix cache."""
    admin: bool = False
    """Whether it may use the admin API: manage keys and tenants; see, drain and restart engines."""
    limits: LimitSet | None = None
    """What it may use; what is left out is its tenant\'s, its organisation\'s or the default."""

    @model_validator(mode="after")
    def _one_source(self) -> KeySettings:
        given = [name for name in ("sha256", "key", "key_file", "key_env") if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(given) or "none of them"
            raise ValueError(f"should have exactly one of sha256, key, key_file and key_env, but has {said}")
        return self

    def digest(self) -> bytes:
        """SHA-256 of the key (32 bytes), read from wherever it is kept; ConfigError when it cannot be read."""
        if self.sha256 is not None:
            return bytes.fromhex(self.sha256)
        return hashlib.sha256(
            read_secret(f"key {self.name!r}", self.key, self.key_file, self.key_env).encode()
        ).digest()


def _is_control_port(url: str) -> bool:
    return url.startswith("unix:") or (url.startswith("http://") and urlsplit(url).port is not None)


class Upstream(Section):
    """An engine that already runs and is known by its URL."""

    url: UpstreamUrl
    """http://host:port, https://host:port or unix:/path/to/socket."""
    engine: EngineKind = "vllm"
    """What kind of engine answers there."""
    name: Name | None = None
    """Its name in logs and metrics; the URL when left out."""
    pool: Name | None = None
    """The pool of engines it belongs to; a pool can be limited as a whole."""
    api_key: SecretStr | None = None
    """The engine's own key."""
    api_key_file: UserPath | None = None
    """A file holding the engine's own key."""
    api_key_env: str | None = None
    """An environment variable holding the engine's own key."""
    models: dict[Name, Name] | None = None
    """Public model name → the engine's own name; found by asking the engine when left out."""
    ca_file: UserPath | None = None
    """Certificates to trust for https instead of the system's."""
    max_connections: Count = 1024
    """Connections this gateway may hold to it, or to each one that is discovered."""
    max_running: Count | None = None
    """Requests it is given at once at most, by all gateways that share limits, whatever is learnt of it; more wait
    here, or go to another engine."""
    device: Literal["cpu", "cuda", "ascend"] | None = None
    """What it computes on, for routes that name a device (`models`)."""
    max_model_len: Count | None = None
    """Longest context of its models in tokens; an engine that is asked for its models says it itself."""
    wakeable: bool = False
    """Whether its engines are started when requests wait for them, as an autoscaler does by
    `forebay_pool_waiting`: while none is there requests wait, rather than being refused."""
    wake_timeout: PositiveDuration = 300.0
    """How long requests wait for one to be there, unless their clients have less patience."""
    minder: UpstreamUrl | None = None
    """Control port of the agent beside it, unix:/path or http://host:port: it can then be drained and restarted."""
    minder_port: Port | None = None
    """The same for engines that are discovered: a port of each one's own host."""
    minder_token_file: UserPath | None = None
    """A file holding the token that the control port asks for."""
    minder_token_env: str | None = None
    """An environment variable holding that token."""
    discover: Literal["dns", "kubernetes"] | None = None
    """`dns`: every address the URL's host name stands for is an engine. `kubernetes`: every ready endpoint of the
    Service that the URL names as http://SERVICE or http://SERVICE.NAMESPACE; its port is the pods' own."""

    @model_validator(mode="after")
    def _discoverable(self) -> Upstream:
        if self.discover is None:
            return self
        if not self.url.startswith("http://"):
            raise ValueError("discover is for http:// URLs only: a certificate names a host, not its addresses")
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        if parts.port is None:
            raise ValueError("discover needs the engines' port; write http://NAME:PORT")
        if is_address(host):
            raise ValueError(f"discover needs a name to look up, {host} is an address; write the name, or leave it out")
        if self.discover == "kubernetes" and host.count(".") > 1:
            raise ValueError("a Service is written http://SERVICE:PORT or http://SERVICE.NAMESPACE:PORT")
        return self

    @model_validator(mode="after")
    def _wakeable(self) -> Upstream:
        if self.wakeable and self.models is None:
            raise ValueError("wakeable needs models: an engine that is not there cannot be asked what it serves")
        if self.wakeable and self.pool is None:
            raise ValueError("wakeable needs a pool: by its name it is told how many wait")
        if not self.wakeable and "wake_timeout" in self.model_fields_set:
            raise ValueError("wake_timeout has no effect without wakeable: true")
        return self

    @model_validator(mode="after")
    def _minded(self) -> Upstream:
        if self.minder is not None and self.discover is not None:
            raise ValueError("minder is one address; engines that are discovered have a minder_port")
        if self.minder_port is not None and self.discover is None:
            raise ValueError("minder_port is for engines that are discovered; write minder: http://host:port")
        if self.minder is not None and not _is_control_port(self.minder):
            raise ValueError("minder should be unix:/path or http://host:port")
        given = [self.minder_token_file, self.minder_token_env]
        if None not in given:
            raise ValueError("should have at most one of minder_token_file, minder_token_env")
        if given != [None, None] and self.minder is None and self.minder_port is None:
            raise ValueError("a minder's token has no effect without minder or minder_port")
        return self

    @model_validator(mode="after")
    def _usable(self) -> Upstream:
        given = [name for name in ("api_key", "api_key_file", "api_key_env") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"should have at most one of {', '.join(given)}")
        if self.ca_file is not None and not self.url.startswith("https://"):
            raise ValueError("ca_file is for https:// URLs only; take it out or change the URL")
        return self

    def credential(self) -> str | None:
        """The engine's own key, read from wherever it is kept, or None; ConfigError when it cannot be read."""
        if self.api_key is None and self.api_key_file is None and self.api_key_env is None:
            return None
        return read_secret(f"upstream {self.name or self.url!r}", self.api_key, self.api_key_file, self.api_key_env)

    def minder_token(self) -> str | None:
        """The token of its minder's control port, or None; ConfigError when it cannot be read."""
        if self.minder_token_file is None and self.minder_token_env is None:
            return None
        what = f"minder of upstream {self.name or self.url!r}"
        return read_secret(what, None, self.minder_token_file, self.minder_token_env)


class LocalAdapters(Section):
    """Room for LoRA adapters in an engine, and those it has from its start."""

    active: Count = 4
    """Adapters that may be used in one batch."""
    rank: Count = 16
    """Highest rank of an adapter."""
    targets: tuple[str, ...] = AdapterSlots().targets
    """Modules an adapter may change, for engines that must know."""
    at_start: dict[Name, UserPath] = {}
    """Public name → directory of an adapter."""

    def slots(self) -> AdapterSlots:
        """The same for an engine."""
        at_start = tuple((name, str(path.absolute())) for name, path in self.at_start.items())
        return AdapterSlots(self.active, self.rank, self.targets, at_start)


class LocalEngine(Section):
    """An engine that `forebay serve` installs, starts and minds on this machine."""

    name: Name
    """Its name in logs and metrics."""
    kind: EngineKind = "vllm"
    """Which engine to run."""
    device: Literal["cpu", "cuda", "ascend"] = "cpu"
    """What it computes on."""
    model: str = "smollm2-135m-instruct"
    """The packaged model, a Hugging Face model id or a directory; a simulated engine needs none."""
    profile: str | None = None
    """What a simulated engine pretends to be, h100-8b when left out."""
    served_name: Name | None = None
    """The public name of its model; derived from `model` when left out."""
    port: Port | None = None
    """Loopback port of the engine; a Unix socket that only this user can reach when left out."""
    max_model_len: Count | None = None
    """Longest context in tokens; the engine's choice when left out."""
    devices: tuple[str, ...] = ()
    """Which of the machine's devices it may use, by number; all when left out."""
    tensor_parallel: Count = 1
    """Devices that share each layer."""
    pipeline_parallel: Count = 1
    """Devices that share the layers among them."""
    data_parallel: Count = 1
    """Copies of the model within one engine."""
    memory_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Part of a device's memory it may take; the engine's choice when left out."""
    quantization: Quantization | None = None
    """How the weights are stored; what the model's files say when left out."""
    max_running: Count | None = None
    """Requests it works on at once; the engine's choice when left out."""
    pool: Name | None = None
    """The pool of engines it belongs to; a pool can be limited as a whole."""
    max_queued: Count | None = None
    """Requests that may wait in it; more are offered to another engine. Unbounded when left out."""
    adapters: LocalAdapters | None = None
    """Room for LoRA adapters; none when left out."""
    args: tuple[str, ...] = ()
    """More arguments for the engine's own command line."""
    environment: dict[str, str] = Field(default={}, repr=False)
    """More environment variables for the engine."""
    keep: bool = False
    """Whether it goes on when `forebay serve` ends, for the next one to take over; `forebay engines stop` ends it."""

    def asked(self) -> LaunchSpec:
        """What is asked of the engine, before it is known where its model lies and where it will listen."""
        return LaunchSpec(
            name=self.name,
            kind=self.kind,
            device=Device(self.device),
            model=self.model,
            served_name=self.served_name or self.model,
            address=Address(),
            max_model_len=self.max_model_len,
            quantization=self.quantization,
            parallel=Parallel(self.tensor_parallel, self.pipeline_parallel, self.data_parallel),
            memory_share=self.memory_share,
            max_running=self.max_running,
            max_queued=self.max_queued,
            adapters=self.adapters.slots() if self.adapters is not None else None,
            visible_devices=self.devices,
            extra_args=self.args,
            extra_environment=self.environment,
        )

    @model_validator(mode="after")
    def _possible(self) -> LocalEngine:
        obstacles = "; ".join(ENGINES[self.kind].obstacles(self.asked()))
        if obstacles:
            raise ValueError(obstacles)
        return self

    @model_validator(mode="after")
    def _profile_of_a_simulated_one(self) -> LocalEngine:
        if self.profile is None:
            return self
        if self.kind != "simulated":
            raise ValueError("profile is what a simulated engine pretends to be; take it out or write kind: simulated")
        if self.profile not in PROFILES:
            raise ValueError(f"there is no profile {self.profile!r}; write one of {', '.join(PROFILES)}")
        return self


class Timeouts(Section):
    """How long to wait for each step of a request."""

    connect: PositiveDuration = 5.0
    """For a connection to an engine."""
    first_byte: PositiveDuration = 600.0
    """For an engine's first byte of an answer, prefill included."""
    idle: PositiveDuration = 120.0
    """Between two reads of an answer."""
    total: PositiveDuration = 3600.0
    """For a whole request."""
    headers: PositiveDuration = 10.0
    """For a client to send its request headers."""
    body: PositiveDuration = 60.0
    """For a client to send its request body."""
    write: PositiveDuration = 60.0
    """For a client that does not read to take the next bytes."""


class Bounds(Section):
    """The most one client, or all of them together, may make this process hold."""

    body: Size = 10 * MIB
    """Request body."""
    header_bytes: Size = 64 * KIB
    """All headers of a request."""
    header_count: Count = 100
    """Number of headers of a request."""
    response: Size = 64 * MIB
    """An answer that is not a stream."""
    event: Size = 1 * MIB
    """One event of a stream."""
    parse_budget: Size = 256 * MIB
    """Request bodies held at once by the whole process."""
    offload_above: Size = 256 * KIB
    """Bodies larger than this are parsed outside the event loop."""
    connections: Count = 100_000
    """Client connections at once."""
    mirrors: Annotated[int, Field(ge=0)] = 64
    """Copies of requests for another model (`models.*.mirror`) that run at once."""
    mirror_bytes: Size = 64 * MIB
    """Bytes that they may hold together: their bodies, and one `event` each."""


def _hedge_after(value: object) -> float | str:
    if value == "p95":
        return "p95"
    try:
        seconds = parse_duration(value)
    except ValueError:
        seconds = 0.0
    if not seconds:
        raise ValueError("should be p95, or a duration above zero such as 800ms")
    return seconds


class Hedge(Section):
    """Requests that are sent to a second engine while the first is silent."""

    after: Annotated[
        float | Literal["p95"],
        PlainValidator(_hedge_after),
        WithJsonSchema({"anyOf": [{"const": "p95"}, {"type": "number", "exclusiveMinimum": 0}, {"type": "string"}]}),
    ] = "p95"
    """Silence after which they are: a duration, or `p95`, longer than 95 of 100 answers took to begin lately."""
    share: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Share of all requests that may be, at most."""


class StreamResume(Section):
    """Streams that outlive their engine: they go on at another one, from the text that was delivered."""

    enabled: bool = True
    """Without it a stream whose engine breaks off ends with an error event."""
    max_bytes: Size = 256 * KIB
    """Delivered text that is kept of one stream; longer ones do not go on."""
    total_bytes: Size = 256 * MIB
    """Of all streams of this process together, with the bodies of their requests."""
    attempts: Annotated[int, Field(ge=1)] = 3
    """How often one stream goes on."""
    share: Annotated[float, Field(ge=0)] = 1.0
    """Of all requests under way that may go on elsewhere within ten seconds, and 32 more."""


class Stream(Section):
    """How streamed answers are relayed."""

    heartbeat_after: Duration = 15.0
    """Silence after which a comment keeps the connection alive; 0 turns it off."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Other engines to try while nothing has reached the client."""
    retry_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of all requests that may be such tries, and a few a second beside it."""
    hedge: Hedge | None = None
    """When a request is sent to a second engine while the first is silent; never when left out."""
    resume: StreamResume = StreamResume()


class Media(Section):
    """Images, audio and files inside messages."""

    remote: Annotated[Literal["off", "engine"], BeforeValidator(yaml_off)] = "off"
    """Remote URLs: `off` refuses them, `engine` lets the engine fetch from `hosts`."""
    hosts: tuple[str, ...] = ()
    """Host names, exactly as in the URL, that may be fetched from."""
    data_url: Size = 8 * MIB
    """Largest data URL."""
    paths: dict[Annotated[str, Field(pattern="^/")], Size] = {}
    """Largest data URL on one path, such as /v1/embeddings."""


class Shutdown(Section):
    """What happens between SIGTERM and the end."""

    announce: Duration = 5.0
    """Not ready, but still serving, so that load balancers notice; 0 on a laptop."""
    drain: Duration = 30.0
    """How long requests in flight may still run."""


class Log(Section):
    """One line a request, never a prompt or a key in it."""

    format: Literal["json", "console"] = "json"
    """`json` for machines, `console` for people."""
    file: UserPath | None = None
    """File to append to; standard error when left out."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least important lines to write."""


class MetricsSettings(Section):
    """What /metrics shows."""

    max_label_values: Count = 100
    """Tenants and models shown by name; the rest is `other`."""


class State(Section):
    """What survives a restart: keys and the usage ledger."""

    url: str | None = Field(default=None, repr=False)
    """SQLAlchemy URL, postgresql://… for several machines; a SQLite file in data_dir when left out."""
    key_cache: Duration = 3600.0
    """How long known keys keep working while the database cannot be reached."""
    ledger: bool = True
    """Whether every request leaves a row in the database: who, which model, tokens, how it ended; never a prompt."""
    usage_days: Annotated[int, Field(ge=0)] = 400
    """Days after which such a row is deleted; 0: never."""
    spool: Size = 256 * MIB
    """Most bytes of rows that wait in data_dir while the database is away; further ones are lost and counted."""


class Discovery(Section):
    """How the engines behind the gateway are watched."""

    interval: PositiveDuration = 5.0
    """Between two looks at a healthy engine."""
    down_interval: PositiveDuration = 1.0
    """Between two looks at one that is down."""
    dns_interval: PositiveDuration = 5.0
    """Between two questions for the addresses of an upstream with `discover: dns`."""


class Health(Section):
    """When an engine that answers badly is left out, and how one that comes back is let in."""

    failures: Annotated[int, Field(ge=0)] = 5
    """Requests failed in a row after which it is left out for a while; 0: never."""
    eject: PositiveDuration = 2.0
    """How long at first; twice as long each time after that."""
    eject_at_most: PositiveDuration = 30.0
    """How long at most."""
    ramp: Duration = 10.0
    """How long an engine that has just come up gets less than its share."""


class QueueClass(Section):
    """One class of service in the queue."""

    max_wait: PositiveDuration = 60.0
    """How long a request may wait for an engine, unless its client has less patience."""


class QueueClasses(Section):
    """Classes of service, the best first; a client asks for one by `service_tier`, within its key's caps."""

    priority: QueueClass = QueueClass()
    """Goes first."""
    default: QueueClass = QueueClass()
    """Where nothing is asked for."""
    flex: QueueClass = QueueClass(max_wait=600.0)
    """Goes last."""


class Queue(Section):
    """Requests that wait while no engine has room for them."""

    requests: Count = 2048
    """Most that may wait at once in this process."""
    tokens: Count = 16_000_000
    """Most tokens, by estimates, that they may have together."""
    bytes: Size = 256 * MIB
    """Most bytes that they may hold together."""
    aged: Duration = 5.0
    """Wait after which a class that better ones are served before gets one turn in ten."""
    output_weight: Annotated[float, Field(ge=0, le=100)] = 2.0
    """What a token of an answer counts for when tenants share, a token of a prompt being 1."""
    classes: QueueClasses = QueueClasses()
    """Classes of service."""


class Capacity(Section):
    """How much an engine is given at once: learnt from how fast it answers, where a target is set."""

    ttft_p95: PositiveDuration | None = None
    """What 95 of 100 first tokens of an engine should take at most; not looked at when left out."""
    itl_p95: PositiveDuration | None = None
    """What 95 of 100 times between two tokens should take at most; not looked at when left out."""
    start: Count = 16
    """Requests an engine is given at once before anything is known of it, where a target is set."""
    least: Count = 1
    """What it is given at least."""
    most: Count = 1024
    """What it is given at most, and always where no target is set."""


class Routing(Section):
    """How requests are sent to engines."""

    debug: Literal["admin", "everybody"] = "admin"
    """Who may ask by `x-forebay-debug: route` how a request was routed: admin keys, or everybody. The answer's
    `x-forebay-route` names engines."""


def _default_data_dir() -> Path:
    home = os.environ.get("FOREBAY_HOME")
    return Path(home).expanduser() if home else Path.home() / ".local" / "share" / "forebay"


class Settings(Described, BaseSettings):
    """The whole configuration. Built directly it reads nothing but FOREBAY_HOME; `load` reads file and environment."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        validate_default=False,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
    )

    listen: Listen = Listen()
    """Where clients reach the gateway."""
    admin: AdminListen = AdminListen()
    """Where metrics, documentation and the admin API are served."""
    auth: Literal["keys", "none"] = "keys"
    """`none` lets everybody in: for a laptop."""
    keys: tuple[KeySettings, ...] = ()
    """Keys declared here; more are made with `forebay keys create`."""
    trusted_proxies: tuple[Network, ...] = ()
    """Proxies whose X-Forwarded-For is believed."""
    upstreams: tuple[Upstream, ...] = ()
    """Engines that already run."""
    engines: tuple[LocalEngine, ...] = ()
    """Engines to run on this machine."""
    models: dict[Name, PublicModel] = {}
    """What public names stand for beyond the model of that name: shares of several, copies, others to fall back on."""
    timeouts: Timeouts = Timeouts()
    """How long to wait for each step of a request."""
    limits: Limits = Limits()
    """What whom may use how much of."""
    bounds: Bounds = Bounds()
    """The most this process may be made to hold."""
    stream: Stream = Stream()
    """How streamed answers are relayed."""
    media: Media = Media()
    """Images, audio and files inside messages."""
    shutdown: Shutdown = Shutdown()
    """What happens between SIGTERM and the end."""
    log: Log = Log()
    """One line a request."""
    metrics: MetricsSettings = MetricsSettings()
    """What /metrics shows."""
    state: State = State()
    """What survives a restart."""
    data_dir: UserPath = Field(default_factory=_default_data_dir)
    """Engines' environments, models and the SQLite file; $FOREBAY_HOME or ~/.local/share/forebay when left out."""
    discovery: Discovery = Discovery()
    """How the engines behind the gateway are watched."""
    health: Health = Health()
    """When an engine that answers badly is left out."""
    queue: Queue = Queue()
    """Requests that wait while no engine has room for them."""
    capacity: Capacity = Capacity()
    """How much an engine is given at once."""
    routing: Routing = Routing()
    """How requests are sent to engines."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take only what is passed in: `load` merges the sources itself, so that tests see no environment."""
        return (init_settings,)

    @property
    def state_url(self) -> str:
        """SQLAlchemy URL of the state database; may hold a password, never print it."""
        return self.state.url or f"sqlite:///{self.data_dir / 'forebay.db'}"

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        problems = list(_cross_field_problems(self))
        if problems:
            raise PydanticCustomError("forebay_problems", "several parts do not fit together", {"problems": problems})
        return self


# --- checks across sections --------------------------------------------------------------------------------------


def _repeated(values: Iterable[Hashable]) -> set[Hashable]:
    return {value for value, count in Counter(values).items() if count > 1}


def _served_names(settings: Settings) -> list[str] | None:
    """Every model that engines will serve, None where engines are asked which."""
    if settings.engines or not settings.upstreams or any(upstream.models is None for upstream in settings.upstreams):
        return None
    return [name for upstream in settings.upstreams for name in upstream.models or ()]


def _devices(settings: Settings) -> list[str | None]:
    return [*(upstream.device for upstream in settings.upstreams), *(engine.device for engine in settings.engines)]


def _cross_field_problems(settings: Settings) -> Iterator[str]:
    """What no section can see alone. Reads no file: keys kept elsewhere are compared by `_key_problems`."""
    listen, admin = settings.listen, settings.admin
    if admin.enabled and listen.unix_socket is None and listen.port == admin.port != 0:
        yield f"admin.port: is {admin.port} like listen.port; give one of them another port"
    for index, engine in enumerate(settings.engines):
        if engine.port and engine.port in (listen.port, admin.port):
            yield f"engines[{index}].port: is the gateway's own port {engine.port}; leave it out or take another"
    if settings.media.hosts and settings.media.remote == "off":
        yield "media.hosts: has no effect while media.remote is off; take it out or write remote: engine"
    yield from problems_with(settings.models, _served_names(settings), _devices(settings))
    names: dict[str, list[Hashable]] = {
        "keys[{}].name": [key.name for key in settings.keys],
        "keys[{}].sha256": [key.sha256 and key.sha256.lower() for key in settings.keys],
        "upstreams[{}].url": [upstream.url for upstream in settings.upstreams],
        "upstreams[{}].name": [upstream.name for upstream in settings.upstreams],
        "engines[{}].name": [engine.name for engine in settings.engines],
        "engines[{}].port": [engine.port or None for engine in settings.engines],
    }
    for path, values in names.items():
        seen: dict[Hashable, int] = {}
        for index, value in enumerate(values):
            first = seen.setdefault(value, index)
            if value is not None and first != index:
                yield f"{path.format(index)}: is the same as {path.format(first)}; each must be its own"


def _key_problems(settings: Settings) -> Iterator[str]:
    """Keys and credentials that cannot be read, and keys that are the same although kept in different places."""
    seen: dict[bytes, int] = {}
    for index, key in enumerate(settings.keys):
        try:
            first = seen.setdefault(key.digest(), index)
        except ConfigError as error:
            yield from (f"keys[{index}]: {problem}" for problem in error.problems)
            continue
        if first != index and (key.sha256 is None or settings.keys[first].sha256 is None):
            yield f"keys[{index}]: is the same key as keys[{first}]; each must be its own"
    for index, upstream in enumerate(settings.upstreams):
        try:
            upstream.credential()
            upstream.minder_token()
        except ConfigError as error:
            yield from (f"upstreams[{index}]: {problem}" for problem in error.problems)
    try:
        settings.limits.store.server()
    except ConfigError as error:
        yield from error.problems


def warnings_about(settings: Settings) -> list[str]:
    """What is allowed, but should be said loudly."""
    listen = settings.listen
    if settings.auth == "none" and not listen.is_loopback:
        return [
            f"WARNING: auth is none and {listen.host} is no loopback address: everybody who can reach port"
            f" {listen.port} may use your engines; write `auth: keys` unless you want that"
        ]
    return []


# --- reading -----------------------------------------------------------------------------------------------------


class _NoKeyTwice(yaml.constructor.SafeConstructor):
    """Makes a key given twice an error: the parser would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build the mapping after making sure that each key is there once."""
        keys = [(key.value, key.start_mark) for key, _ in node.value]
        twice = _repeated(key for key, _ in keys if isinstance(key, str))
        for key, mark in reversed(keys):
            if key in twice:
                raise yaml.MarkedYAMLError(problem=f"{key!r} is given twice in one mapping", problem_mark=mark)
        return super().construct_mapping(node, deep)


class _Loader(_NoKeyTwice, yaml.SafeLoader):
    """Written in Python: says best what is wrong, and where."""


def _read_yaml(text: str) -> object:
    """Read with libyaml where PyYAML brings it, ten times as fast: a reload must not hold up the streams."""
    if yaml.__with_libyaml__:

        class Fast(_NoKeyTwice, yaml.CSafeLoader):
            """The same in C."""

        with contextlib.suppress(yaml.YAMLError):
            return yaml.load(text, Loader=Fast)  # noqa: S506 - a SafeLoader
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


def read_tree(path: Path) -> dict[str, Any]:
    """The file as a mapping, unchecked; ConfigError when there is no such file or it is not a YAML mapping."""
    try:
        tree = _read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file; start from forebay.example.yaml"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read ({error.strerror})"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{path}: is not UTF-8 text"]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError([f"{path}{where}: {error.problem}"]) from None
    except yaml.YAMLError:
        raise ConfigError([f"{path}: is not YAML (it holds control characters)"]) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: should be a mapping such as `listen: {{port: 8000}}`"])
    return tree


def _environment_tree() -> dict[str, Any]:
    """FOREBAY_… variables as a tree. One whose first part before `__` is no section is refused as an unknown key."""
    try:
        tree: dict[str, Any] = EnvSettingsSource(Settings)()
    except SettingsError as error:
        field = re.search(r'field "(\w+)"', str(error))
        name = f"{ENV_PREFIX}{field[1].upper()}" if field else f"a {ENV_PREFIX}… variable"
        raise ConfigError([f'{name}: should hold JSON, such as \'[{{"name": "a"}}]\'']) from None
    for variable, value in os.environ.items():
        first, delimiter, rest = variable.removeprefix(ENV_PREFIX).lower().partition("__")
        # Without `__` it may be anybody's: Kubernetes sets FOREBAY_PORT and more for a service of that name.
        if variable.startswith(ENV_PREFIX) and delimiter and rest and first not in Settings.model_fields:
            tree[first] = value
    return tree


def to_environment(overrides: Mapping[str, object], prefix: str = ENV_PREFIX) -> dict[str, str]:
    """Variables that say to another process what `overrides` says to `load`; plain values, mappings and lists."""
    variables: dict[str, str] = {}
    for key, value in overrides.items():
        name = prefix + key.upper()
        if isinstance(value, Mapping):
            variables |= to_environment(value, f"{name}__")
        else:
            variables[name] = value if isinstance(value, str) else json.dumps(value)
    return variables


def merge_trees(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`: mappings are merged, everything else (lists too) is replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge_trees(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def load(path: Path | None, overrides: Mapping[str, object] = {}) -> Settings:
    """Read the configuration. `path` None: no file. `overrides` is a tree like the file's and wins over everything.

    Raises ConfigError with every problem found: unknown keys, wrong values, keys that cannot be read or are the same.
    """
    tree = merge_trees(merge_trees(read_tree(path) if path else {}, _environment_tree()), overrides)
    wrong_keys = [repr(key) for key in tree if not isinstance(key, str)]
    if wrong_keys:
        raise ConfigError([f"{key}: unknown key; keys are words" for key in wrong_keys])
    try:
        settings = Settings(**tree)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
    problems = list(_key_problems(settings))
    if problems:
        raise ConfigError(problems)
    return settings


# --- saying what is wrong ----------------------------------------------------------------------------------------


def section_of(annotation: object) -> type[BaseModel] | None:
    """The section inside `Tls | None`, `tuple[Upstream, ...]` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (section_of(argument) for argument in get_args(annotation))
    return next((section for section in found if section is not None), None)


def _items(annotation: object) -> str:
    """How a path goes on from a list of sections, or from a mapping to sections; empty for anything else."""
    kind = str(annotation)
    return "[]" if kind.startswith("tuple") else ".*" if kind.startswith("dict") else ""


def _all_paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of the tree, dotted, with [] for the items of a list and * for those of a mapping."""
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = section_of(field.annotation)
        if inner is not None:
            yield from _all_paths(inner, f"{prefix}{name}{_items(field.annotation)}.")


def _dotted(location: Sequence[str | int], root: type[BaseModel]) -> tuple[str, str]:
    """`upstreams[1].url` for a location, without the names pydantic gives to the arms of a union; and the same as
    `_all_paths` has it, `upstreams[].url`."""
    path = general = items = ""
    section: type[BaseModel] | None = root
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
            general += "[]"
            items = ""
            continue
        path += f".{part}" if path else part
        if items == ".*":
            general += items
            items = ""
            continue
        general += f".{part}" if general else part
        field = section.model_fields.get(part) if section else None
        section = section_of(field.annotation) if field else None
        items = _items(field.annotation) if field else ""
    return path, general


def _nearest(path: str, general: str, root: type[BaseModel]) -> str:
    """`; did you mean …?` for an unknown key, looking beside it first and then in the whole tree; may be empty."""
    parent, _, name = path.rpartition(".")
    known = list(_all_paths(root))
    beside = {p.rpartition(".")[2]: p for p in known if p.rpartition(".")[0] == general.rpartition(".")[0]}
    near = difflib.get_close_matches(name, beside, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {parent + '.' if parent else ''}{near[0]}?"
    elsewhere = [p for p in known if p.rpartition(".")[2] == name]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    return f"; known here: {', '.join(beside)}" if beside else ""


def explain(error: ValidationError, root: type[BaseModel] | None = None) -> list[str]:
    """One line for each thing wrong, with its full path and never with the value, which may be a secret. `root` is the
    model that was read, the whole configuration when left out."""
    return explain_details(error.errors(include_url=False, include_input=False), root or Settings)


def explain_details(details: Iterable[ErrorDetails], root: type[BaseModel]) -> list[str]:
    """The same for errors that somebody else has caught."""
    return [problem for detail in details for problem in _explain_one(detail, root)]


def _explain_one(detail: ErrorDetails, root: type[BaseModel]) -> list[str]:
    if detail["type"] == "forebay_problems":
        return list(detail["ctx"]["problems"])
    path, general = _dotted(detail["loc"], root)
    if detail["type"] == "extra_forbidden":
        return [f"{path}: unknown key{_nearest(path, general, root)}"]
    if detail["type"] == "missing":
        return [f"{path}: is missing"]
    if detail["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return [f"{path}: should be a mapping of keys to values"]
    if detail["type"] == "tuple_type":
        return [f"{path}: should be a list"]
    if detail["type"] == "string_pattern_mismatch" and detail["loc"][-1] == "sha256":
        return [f"{path}: should be 64 hexadecimal digits; type: printf %s 'the-key' | sha256sum"]
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    message = message[0].lower() + message[1:]
    return [f"{path}: {message}" if path else message]


# --- schema, differences, fingerprint ----------------------------------------------------------------------------


def json_schema() -> dict[str, Any]:
    """JSON schema (2020-12) of the file for editors, with the words of this module as descriptions."""
    schema = Settings.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "forebay.yaml"}


# What is bound, opened or started once; everything else is read anew for each request or each look.
NEEDS_RESTART = (
    "listen",
    "admin",
    "state",
    "log.file",
    "data_dir",
    "engines",
    "discovery.dns_interval",
    "limits.store",
)


@dataclass(frozen=True, slots=True)
class Changes:
    """Dotted paths that differ between two trees: those that take effect while running and those that cannot."""

    live: list[str]
    needs_restart: list[str]

    def __bool__(self) -> bool:
        return bool(self.live or self.needs_restart)


def _differing(old: BaseModel, new: BaseModel, prefix: str = "") -> Iterator[str]:
    for name in type(old).model_fields:
        before, after = getattr(old, name), getattr(new, name)
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            yield from _differing(before, after, f"{prefix}{name}.")
        elif before != after:
            yield prefix + name


def diff(old: Settings, new: Settings) -> Changes:
    """What changed from `old` to `new`; a list such as `keys` counts as one thing."""
    paths = list(_differing(old, new))
    fixed = [p for p in paths if any(p == root or p.startswith(f"{root}.") for root in NEEDS_RESTART)]
    return Changes(live=[p for p in paths if p not in fixed], needs_restart=fixed)


def fingerprint(settings: Settings) -> str:
    """SHA-256 (hex) over everything configured, secrets included: replicas that differ notice, nobody learns them."""
    secrets = [key.digest().hex() for key in settings.keys]
    secrets += [hashlib.sha256((u.credential() or "").encode()).hexdigest() for u in settings.upstreams]
    store = settings.limits.store.server()
    if store is not None:
        secrets.append(hashlib.sha256(store[0].encode()).hexdigest())
    canonical = json.dumps([settings.model_dump(mode="json"), secrets], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
