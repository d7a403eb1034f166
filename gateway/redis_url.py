"""The URL of a Redis server: what it says, and what of it may be shown."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
_FORM = re.compile(r"(?P<scheme>[a-z+]+)://(?:(?P<login>.*)@)?(?P<place>[^@/?]*)(?P<path>/[^@?]*)?(?:\?(?P<query>.*))?")

Address = tuple[str, int]


class Target(msgspec.Struct, frozen=True):
    """Where the server is and how to log in; without the passwords it may be shown (``str``)."""

    scheme: str
    addresses: tuple[Address, ...]
    path: str = ""
    service: str = ""
    database: int = 0
    username: str | None = None
    password: str | None = None
    sentinel_password: str | None = None
    ca: str | None = None

    @property
    def encrypted(self) -> bool:
        """Whether TLS is spoken: with all servers, and Sentinels too."""
        return self.scheme.startswith("rediss")

    def __str__(self) -> str:
        places = ",".join(f"{host}:{port}" for host, port in self.addresses)
        return f"{self.scheme}://{self.path or places}{f'/{self.service}' if self.service else ''}"

    __repr__ = __str__


def read_url(url: str, ca: str | None = None) -> Target:
    """Return what a URL says. A ``ValueError`` repeats nothing of it, for there may be a password anywhere."""
    found = _FORM.fullmatch(url)
    if found is None or found["scheme"] not in SCHEMES:
        raise ValueError(f"not the URL of a Redis server ({', '.join(f'{scheme}://' for scheme in SCHEMES)})")
    scheme, path = found["scheme"], unquote(found["path"] or "")
    options = {name: values[-1] for name, values in parse_qs(found["query"] or "").items()}
    username, _, password = (found["login"] or "").partition(":")
    service = ""
    if scheme.endswith("+sentinel"):
        service, _, path = path.strip("/").partition("/")
        if not service:
            raise ValueError("the URL of a Sentinel names no service: redis+sentinel://host:port,host:port/service")
    database = path.strip("/") if scheme != "unix" else options.get("db", "")
    if database and not database.isdigit():
        raise ValueError("the URL of a Redis server has something else than a number for its database")
    try:
        addresses = tuple(_address(part, scheme) for part in found["place"].split(",")) if scheme != "unix" else ()
    except ValueError:
        raise ValueError("the URL of a Redis server has no valid host and port") from None
    return Target(
        scheme=scheme,
        addresses=addresses,
        path=path if scheme == "unix" else "",
        service=service,
        database=int(database or 0),
        username=unquote(username) or None,
        password=unquote(password) or None,
        sentinel_password=options.get("sentinel_password"),
        ca=ca or options.get("ssl_ca_certs"),
    )


def _address(place: str, scheme: str) -> Address:
    parts = urlsplit(f"//{place}")
    return parts.hostname or "localhost", parts.port or (26379 if scheme.endswith("+sentinel") else 6379)
