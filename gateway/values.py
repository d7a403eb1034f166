"""What a single value of the configuration may be: durations, sizes, names, addresses, secrets.

Each kind says in its error what it should be, and never repeats what it was: that may be a secret.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import ipaddress
import math
import os
import re
import textwrap
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import cache
from ipaddress import IPv4Network, IPv6Network
from itertools import pairwise
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    PlainValidator,
    SecretStr,
    WithJsonSchema,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from engines.registry import ENGINES

KIB = 1024
MIB = 1024 * KIB
MAX_NAME_LENGTH = 200


class ConfigError(Exception):
    """The configuration cannot be used; `problems` holds every reason, one readable line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems: list[str] = list(problems)
        super().__init__("\n".join(self.problems))


class Described(BaseModel):
    """A model whose JSON schema tells what its fields' docstrings say.

    They are read when a schema is asked for: pydantic's own `use_attribute_docstrings` parses every class at every
    start, which took a fifth of `forebay --help`.
    """

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, told in _docstrings(cls).items():
            if name in properties:
                properties[name].setdefault("description", told)
        return schema


@cache
def _docstrings(model: type) -> dict[str, str]:
    """Return what stands below the fields of a model and of those it is made from."""
    found: dict[str, str] = {}
    for one in reversed(model.__mro__):
        if not issubclass(one, Described) or one is Described:
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in pairwise(definition.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(told))):
                    found[name] = inspect.cleandoc(told)
    return found


class Section(Described):
    """One mapping of the file: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=False)


_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
_DURATION = rf"^({_NUMBER}(us|ms|s|m|h|d))+$|^{_NUMBER}$"
_DURATION_PART = re.compile(rf"({_NUMBER})(us|ms|s|m|h|d)")
_SIZE = rf"^({_NUMBER}) ?([kKmMgG]?[iI]?[bB])?$"
_MOST_SECONDS = 1e9
_MOST_BYTES = 2**60
_SECONDS_PER_UNIT = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES_PER_UNIT = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": KIB, "mib": MIB, "gib": 1024 * MIB}


def parse_duration(value: object) -> float:
    """Seconds from a number or from `500ms`, `15s`, `1h30m`; ValueError when it is neither, or negative."""
    seconds = math.nan
    if isinstance(value, str) and re.fullmatch(_DURATION, value.strip(), re.ASCII):
        parts = _DURATION_PART.findall(value)
        seconds = math.fsum(float(n) * _SECONDS_PER_UNIT[unit] for n, unit in parts) if parts else float(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = value
    if not 0 <= seconds <= _MOST_SECONDS:  # also false for a NaN
        raise ValueError("should be a duration such as 500ms, 15s, 2m or 1h, or a number of seconds; not negative")
    return float(seconds)


def parse_moment(text: str, now: datetime) -> datetime:
    """A time in UTC from `2030-01-31`, `2030-01-31T12:00+02:00`, or from a duration after `now` such as `30d`."""
    try:
        return now + timedelta(seconds=parse_duration(text))
    except ValueError:
        pass
    try:
        return _utc(datetime.fromisoformat(text))
    except (ValueError, OverflowError):
        raise ValueError("should be a time such as 2030-01-31 or 2030-01-31T12:00, or a duration such as 30d") from None


def parse_past(text: str, now: datetime) -> datetime:
    """The same, except that a duration lies before ``now``: `7d` is a week ago."""
    try:
        return now - timedelta(seconds=parse_duration(text))
    except ValueError:
        return parse_moment(text, now)


def parse_size(value: object) -> int:
    """Bytes from a whole number or from `10MB` (10⁷), `1MiB` (2²⁰); ValueError when it is neither, or negative."""
    size = math.nan
    if isinstance(value, str):
        match = re.fullmatch(_SIZE, value.strip(), re.ASCII)
        unit = (match[2] or "b").lower() if match else ""
        if match and unit in _BYTES_PER_UNIT:
            size = (float(match[1]) if "." in match[1] else int(match[1])) * _BYTES_PER_UNIT[unit]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        size = value
    if not 0 <= size <= _MOST_BYTES or size != int(size):
        raise ValueError("should be a size such as 256KB, 10MB or 1MiB, or a whole number of bytes; not negative")
    return int(size)


def check_name(value: str) -> str:
    """A name fit for a header, a log line and a metric label; ValueError otherwise."""
    if not value or len(value) > MAX_NAME_LENGTH or not value.isprintable() or value != value.strip():
        raise ValueError(f"should be a name of 1 to {MAX_NAME_LENGTH} printable characters without spaces at its ends")
    return value


def _model_pattern(value: str) -> str:
    if "*" in value.removesuffix("*"):
        raise ValueError("should be a model name, or the beginning of one followed by a single *")
    return check_name(value)


def _network(value: object) -> IPv4Network | IPv6Network:
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    if not isinstance(value, str):
        raise ValueError("should be an address or a network such as 10.0.0.0/8")  # noqa: TRY004 - pydantic needs it
    try:
        return ipaddress.ip_network(value)
    except ValueError as error:
        raise ValueError(f"should be an address or a network such as 10.0.0.0/8 ({error})") from None


def yaml_off(value: object) -> object:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


def _utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _above_zero(value: float) -> float:
    if value <= 0:
        raise ValueError("should be more than zero")
    return value


def _duration_schema(**more: object) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": "number", **more}, {"type": "string", "pattern": _DURATION}]})


def _upstream_url(value: str) -> str:
    """The URL without a trailing slash. The texts never repeat it: it may hold a password."""
    shape = "write http://host:port, https://host:port or unix:/path/to/socket"
    if value.startswith("unix:"):
        if not value.startswith("unix:/") or len(value) < len("unix:/x"):
            raise ValueError(f"names no absolute path of a socket; {shape}")
        return value
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise ValueError(f"is not a URL; {shape}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"has no scheme the gateway speaks; {shape}")
    if "@" in parts.netloc:
        raise ValueError("holds credentials; take them out and put the engine's key into api_key_file or api_key_env")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    plain = f"{parts.scheme}://{host}" + ("" if port is None else f":{port}")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError(f"has something after host and port; write {plain}, the gateway adds the paths itself")
    return plain


def is_address(host: str) -> bool:
    """Whether it is an IP address and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether an address is reached by programs of this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_secret(owner: str, given: SecretStr | None, file: Path | None, variable: str | None) -> str:
    """The one secret of the three places; ConfigError says what is wrong with the place, never what it holds."""
    if file is not None:
        place = f"{owner}: file {file}"
        try:
            value = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            raise ConfigError([f"{place} cannot be read ({reason})"]) from None
    elif variable is not None:
        place = f"{owner}: environment variable {variable}"
        value = os.environ.get(variable, "").strip()
    else:
        place = f"{owner}: the key in the configuration"
        value = given.get_secret_value() if given is not None else ""
    if not value:
        raise ConfigError([f"{place} is empty or not set"])
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ConfigError([f"{place} holds characters that cannot travel in a header (spaces, line ends, non-ASCII)"])
    return value


def _engine_kind(value: str) -> str:
    if value not in ENGINES:
        near = difflib.get_close_matches(value, ENGINES, n=1)
        advice = f"did you mean {near[0]}?" if near else f"write {' or '.join(ENGINES)}"
        raise ValueError(f"is no engine; {advice}")
    return value


Duration = Annotated[float, BeforeValidator(parse_duration), _duration_schema(minimum=0)]
PositiveDuration = Annotated[
    float, BeforeValidator(parse_duration), AfterValidator(_above_zero), _duration_schema(exclusiveMinimum=0)
]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": _SIZE}]}),
]
Count = Annotated[int, Field(gt=0)]
Port = Annotated[int, Field(ge=0, le=65535)]
Name = Annotated[str, AfterValidator(check_name)]
EngineKind = Annotated[str, AfterValidator(_engine_kind)]
UpstreamUrl = Annotated[str, AfterValidator(_upstream_url)]
ModelPattern = Annotated[str, AfterValidator(_model_pattern)]
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
Moment = Annotated[datetime, AfterValidator(_utc)]
Network = Annotated[
    IPv4Network | IPv6Network,
    PlainValidator(_network),
    PlainSerializer(str, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "examples": ["10.0.0.0/8"]}),
]
