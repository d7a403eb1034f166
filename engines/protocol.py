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


class Dispatch(msgspec.Struct, frozen=True, gc=False):
    """What the gateway adds to a request for one engine.

    ``model`` is the engine's own name of the model as JSON, ``ask_usage`` tells whether usage must be asked of a
    stream, ``cache_salt`` separates prefix caches of trust domains (None: shared).
    """

    model: msgspec.Raw
    ask_usage: bool
    cache_salt: str | None = None


Fields = MutableMapping[str, msgspec.Raw]
"""A request body: its top-level fields, each still the bytes the client sent."""


class Engine(Protocol):
    """How one kind of engine is spoken to."""

    name: str
    control_fields: frozenset[str]
    """Body fields that steer the engine and are refused from a client."""
    paths: Mapping[str, str]
    """The gateway's path → the engine's own; a path that is not here is not served by this engine."""
    ready_path: str
    """Answers 200 when the engine can work, without making it work."""
    models_path: str
    """Lists the models the engine serves."""

    def prepare(self, path: str, fields: Fields, dispatch: Dispatch) -> bytes:
        """Return the body to send; ``fields`` may be changed."""
        ...

    def read_error(self, status: int, body: bytes) -> EngineError:
        """Read a whole answer whose status was not 200."""
        ...

    def read_stream_error(self, payload: bytes) -> EngineError | None:
        """Read one event's JSON; None when it is not an error."""
        ...
