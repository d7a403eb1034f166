"""Who asks: from a key to the record of what it may do, and from a connection to the client's address."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from gateway.errors import Kind, Refusal
from gateway.settings import Caps
from gateway.state.keys import KeyRecord

Networks = tuple[IPv4Network | IPv6Network, ...]

ANONYMOUS = KeyRecord(
    name="anonymous",
    public_id="",
    tenant="anonymous",
    models=None,
    caps=Caps(),
    trust_domain=None,
    expires_at=None,
    source="file",
)
"""Everybody, where the operator chose ``auth: none``."""

MAX_KEY = 512
"""Characters of a key; ours have 61."""

_MISSING = Refusal(
    Kind.NO_KEY,
    "You didn't provide an API key. Send it as 'Authorization: Bearer KEY'"
    " (or 'x-api-key: KEY' on /v1/messages). Whoever runs the gateway makes keys with 'forebay keys create'.",
)
_WRONG = Refusal(
    Kind.NO_KEY,
    "Incorrect API key provided. Check it, or ask whoever runs the gateway for one ('forebay keys create').",
)
_EXPIRED = Refusal(Kind.NO_KEY, "This API key has expired. Ask whoever runs the gateway for a new one.")


_NO_ADMIN_KEY = Refusal(
    Kind.NO_KEY,
    "The admin API needs an admin key, sent as 'Authorization: Bearer KEY'. Make one on the gateway's machine:"
    " forebay keys create --admin --name NAME",
)
_NO_ADMIN = Refusal(
    Kind.NO_ADMIN, "This key may not use the admin API. Make one that may: forebay keys create --admin --name NAME"
)

_FOUND_BY = 16
"""Bytes of the digest a key is found by."""

_NOBODY = (bytes(32), ANONYMOUS)


class Authenticator:
    """All keys by SHA-256. ``None`` as table: everybody is let in."""

    def __init__(self, table: Mapping[bytes, KeyRecord] | None) -> None:
        self._table: dict[bytes, tuple[bytes, KeyRecord]] | None = None
        self._admins: dict[bytes, tuple[bytes, KeyRecord]] = {}
        self.replace(table)

    def replace(self, table: Mapping[bytes, KeyRecord] | None, known: Mapping[bytes, KeyRecord] | None = None) -> None:
        """Swap the whole table at once. ``known`` are the keys there are even where everybody is let in: the admin API
        is never open."""
        # Found by half the digest, decided by a comparison of the whole in constant time.
        self._table = None if table is None else {d[:_FOUND_BY]: (d, record) for d, record in table.items()}
        keys = (table or {}) if known is None else known
        self._admins = {d[:_FOUND_BY]: (d, record) for d, record in keys.items() if record.admin}

    def named(self, name: str) -> list[KeyRecord]:
        """Return the key of this public id, or those of this name."""
        records = [record for _, record in (self._table or {}).values()]
        return [one for one in records if one.public_id == name] or [one for one in records if one.name == name]

    def identify(self, headers: Mapping[bytes, bytes], now: datetime | None = None) -> KeyRecord | Refusal:
        """Return whose key the headers carry (names in lower case)."""
        if self._table is None:
            return ANONYMOUS
        return self._find(self._table, headers, now)

    def identify_admin(self, headers: Mapping[bytes, bytes], now: datetime | None = None) -> KeyRecord | Refusal:
        """Return whose admin key the headers carry; another key is refused."""
        who = self._find(self._admins, headers, now)
        if who is _WRONG and self._table is not None and not isinstance(self._find(self._table, headers, now), Refusal):
            return _NO_ADMIN
        return _NO_ADMIN_KEY if who is _MISSING or who is _WRONG else who

    def _find(
        self, table: Mapping[bytes, tuple[bytes, KeyRecord]], headers: Mapping[bytes, bytes], now: datetime | None
    ) -> KeyRecord | Refusal:
        key = _bearer(headers)
        if not key:
            return _MISSING
        if len(key) > MAX_KEY:
            return _WRONG
        digest = hashlib.sha256(key).digest()
        whole, record = table.get(digest[:_FOUND_BY], _NOBODY)
        if not hmac.compare_digest(digest, whole):
            return _WRONG
        if record.expires_at is not None and (now or datetime.now(UTC)) >= record.expires_at:
            return _EXPIRED
        return record


def _bearer(headers: Mapping[bytes, bytes]) -> bytes:
    value = headers.get(b"authorization")
    if value is not None:
        scheme, _, key = value.partition(b" ")
        if scheme.lower() == b"bearer":
            return key.strip()
    return headers.get(b"x-api-key", b"").strip()


def may_use(record: KeyRecord, model: str) -> bool:
    """Tell whether a key may use a model; a name ending in ``*`` stands for all that begin so."""
    if record.models is None:
        return True
    for allowed in record.models:
        if allowed == model or (allowed.endswith("*") and model.startswith(allowed[:-1])):
            return True
    return False


def client_address(peer: str, forwarded: Iterable[bytes], trusted: Networks) -> str:
    """Return the client's address: the last hop of ``x-forwarded-for`` that is no proxy of ours.

    The header counts only when the peer itself is a trusted proxy; what cannot be read ends the search.
    """
    if not trusted or not _is_trusted(peer, trusted):
        return peer
    hops = [hop.strip() for line in forwarded for hop in line.decode("latin-1").split(",")]
    address = peer
    for hop in reversed(hops):
        parsed = _parse(hop)
        if parsed is None:
            break
        address = str(parsed)
        if not any(parsed in network for network in trusted if network.version == parsed.version):
            break
    return address


def network_of(address: str) -> str:
    """Return what stands for a client without a key: its address, of IPv6 the network one customer has (/64)."""
    parsed = _parse(address)
    if parsed is None or parsed.version == 4:
        return address
    return str(IPv6Network((int(parsed) >> 64 << 64, 64)))


def _parse(text: str) -> IPv4Address | IPv6Address | None:
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    # A socket that serves both families shows IPv4 peers so.
    return address if address.version == 4 or address.ipv4_mapped is None else address.ipv4_mapped


def _is_trusted(peer: str, trusted: Networks) -> bool:
    parsed = _parse(peer)
    return parsed is not None and any(parsed in n for n in trusted if n.version == parsed.version)
