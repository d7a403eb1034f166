"""The seam between the gateway and an engine: what each engine file must say.

An engine is described by facts (paths, fields, needles) and pure functions over bytes; nothing here does I/O.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Protocol

import msgspec


class Fault(enum.Enum):
    """Whose fault an engine's failure is, as far as its answer tells."""

    REQUEST = "request"
    """The client's request is wrong: other engines would say the same."""
    UNKNOWN_MODEL = "unknown_model"
    """The engine does not know the model the gateway asked for: the gateway's own fault."""
    UNSUPPORTED = "unsupported"
    """The engine does not serve this path (a chat model asked for embeddings)."""
    OVERLOADED = "overloaded"
    """The engine took no work: it may be offered elsewhere."""
    CREDENTIALS = "credentials"
    """The engine refused the gateway's own key: the operator's fault."""
    FAILED = "failed"
    """The engine broke while it worked."""


@dataclass(frozen=True, slots=True)
class EngineError:
    """An engine's error, whatever its shape was.

    ``message`` is the engine's own, ``param`` and ``code`` are None where it named none.
    """

    fault: Fault
    message: str
    param: str | None = None
    code: str | None = None


class Target(msgspec.Struct, frozen=True, gc=False):
    """What a request must name to be served by one model of one engine, each as JSON.

    ``adapter`` is there only where an engine wants an adapter named apart from its base model (SGLang's ``lora_path``);
    elsewhere ``model`` is the adapter's name.
    """

    model: msgspec.Raw
    adapter: msgspec.Raw | None = None


def plain_target(name: str) -> Target:
    """Return the target of a model or adapter that is named by ``model`` alone."""
    return Target(msgspec.Raw(msgspec.json.encode(name)))


class Dispatch(msgspec.Struct, frozen=True, gc=False):
    """What the gateway adds to a request for one engine.

    ``ask_usage`` tells whether usage must be asked of a stream, ``cache_salt`` separates prefix caches of trust domains
    (None: shared). ``begun`` is the text with which the answer has begun elsewhere: it goes on from there; a chat's
    only where there is ``Capability.CONTINUE``.
    """

    target: Target
    ask_usage: bool
    cache_salt: str | None = None
    begun: str = ""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One entry of an engine's list of models.

    ``created`` is in Unix seconds, ``max_model_len`` in tokens; ``base`` is the model an adapter was made for, None for
    a base model and where the engine does not tell.
    """

    name: str
    created: int = 0
    max_model_len: int | None = None
    base: str | None = None


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine says of its own load: a slow second opinion, never what the next decision rests on.

    ``running`` and ``waiting`` count requests, ``cache_used`` is the share of its KV cache in use, 0 to 1 (None: not
    told).
    """

    running: int
    waiting: int
    cache_used: float | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One request of the control plane to an engine. ``body`` is JSON."""

    method: str
    path: str
    body: bytes = b""


class Capability(enum.Flag):
    """What an engine can do beyond a plain chat. A gateway asks this, never the engine."""

    TOOLS = enum.auto()
    """It finds tool calls in what the model writes."""
    FORCED_TOOLS = enum.auto()
    """A named or required tool is called, whatever the model would have written."""
    JSON_SCHEMA = enum.auto()
    """``response_format`` with a schema holds."""
    LOGPROBS = enum.auto()
    """It tells the probabilities of tokens, top candidates included."""
    STOP_WORDS = enum.auto()
    """``stop`` ends an answer before any text that is named; without this only before text that is one token."""
    SEVERAL_ANSWERS = enum.auto()
    """``n`` above one."""
    MODELS_CHECKED = enum.auto()
    """It refuses a model that it does not know; without this it is asked only for names that it has listed."""
    LENGTH_CHECKED = enum.auto()
    """It refuses ``max_tokens`` beyond the context; without this it silently gives less."""
    CACHE_SALT = enum.auto()
    """Prefix caches of trust domains can be kept apart."""
    PRIORITY = enum.auto()
    """It can serve some requests before others."""
    BOUNDED_QUEUE = enum.auto()
    """It can be told to refuse work beyond a queue; without this only the gateway's own bound holds."""
    ADAPTERS = enum.auto()
    """It serves LoRA adapters named at its start."""
    ADAPTER_LOADING = enum.auto()
    """It loads and unloads adapters while it runs."""
    UNIX_SOCKET = enum.auto()
    """It can listen on a Unix socket, which only this user can reach."""
    CONTINUE = enum.auto()
    """It goes on with the last message of a chat where it is asked to, so with an answer that another one began."""
    TOKEN_CHUNKS = enum.auto()
    """A chunk of its streams is one token while whoever reads them keeps up."""


Fields = MutableMapping[str, msgspec.Raw]
"""A request body: its top-level fields, each still the bytes the client sent."""


class Engine(Protocol):
    """How one kind of engine is spoken to."""

    name: str
    control_fields: frozenset[str]
    """Body fields that steer the engine and are refused from a client."""
    paths: Mapping[str, str]
    """The gateway's path → the engine's own; a path that is not here is not served by this engine."""
    base_only_paths: frozenset[str]
    """Paths on which the base model answers whichever adapter is named: a request for an adapter is not sent there."""
    unsalted_paths: frozenset[str]
    """Paths on which all share one prefix cache: a request of a trust domain is not sent there."""
    ready_path: str
    """Answers 200 when the engine can work, without making it work."""
    models_path: str
    """Lists the models the engine serves."""
    metrics_path: str
    """Where it tells its load, in Prometheus' format."""
    capabilities: Capability

    def prepare(self, path: str, fields: Fields, dispatch: Dispatch) -> bytes:
        """Return the body to send; ``fields`` may be changed."""
        ...

    def read_error(self, status: int, body: bytes) -> EngineError:
        """Read a whole answer whose status was not 200."""
        ...

    def read_stream_error(self, payload: bytes) -> EngineError | None:
        """Read one event's JSON; None when it is not an error."""
        ...

    def target(self, name: str, base: str | None = None) -> Target:
        """Return how a model or adapter is named; ``base`` is what the engine's list told of it."""
        ...

    def read_models(self, body: bytes) -> tuple[ServedModel, ...]:
        """Read the list of models. ValueError when it is none."""
        ...

    def read_load(self, body: bytes) -> EngineLoad | None:
        """Read the load out of what ``metrics_path`` answers; None when it is not there."""
        ...

    def load_adapter(self, name: str, directory: str) -> Call | None:
        """Return the call that loads an adapter; None where it cannot be done while the engine runs."""
        ...

    def unload_adapter(self, name: str) -> Call | None:
        """Return the call that unloads an adapter; None where it cannot be done while the engine runs."""
        ...

    def read_adapter_answer(self, status: int, body: bytes) -> EngineError | None:
        """Read the answer to either call: None when it is done, or was so already."""
        ...
