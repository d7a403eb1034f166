"""Who asks: keys in every form they come in, and addresses that only a trusted proxy may tell."""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from gateway.api.auth import ANONYMOUS, MAX_KEY, Authenticator, Networks, client_address, may_use
from gateway.errors import Kind, Refusal
from gateway.state.keys import KeyRecord, new_key, new_public_id
from tests.support.table import each

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
ALICE = replace(ANONYMOUS, name="alice", public_id="0123", tenant="team")


def table(*pairs: tuple[bytes, KeyRecord]) -> dict[bytes, KeyRecord]:
    return {hashlib.sha256(key).digest(): record for key, record in pairs}


def refused(answer: KeyRecord | Refusal) -> str:
    assert isinstance(answer, Refusal)
    assert answer.kind is Kind.NO_KEY
    return answer.message


FOUND = [
    {b"authorization": b"Bearer fb-alice"},
    {b"authorization": b"bearer fb-alice"},
    {b"authorization": b"BEARER   fb-alice  "},
    {b"x-api-key": b"fb-alice"},
    {b"x-api-key": b" fb-alice "},
    {b"authorization": b"Basic YWxpY2U=", b"x-api-key": b"fb-alice"},
    {b"authorization": b"", b"x-api-key": b"fb-alice"},
]


@each("headers", FOUND)
def test_a_key_is_found_in_either_header(headers: dict[bytes, bytes]) -> None:
    assert Authenticator(table((b"fb-alice", ALICE))).identify(headers) is ALICE


def test_the_bearer_goes_before_the_other_header() -> None:
    keys = Authenticator(table((b"fb-alice", ALICE)))
    refused(keys.identify({b"authorization": b"Bearer wrong", b"x-api-key": b"fb-alice"}))


MISSING = [{}, {b"authorization": b"Bearer"}, {b"authorization": b"Bearer "}, {b"authorization": b"Basic x"},
           {b"authorization": b"fb-alice"}, {b"x-api-key": b"  "}]  # fmt: skip


@each("headers", MISSING)
def test_no_key_is_told_how_to_send_one(headers: dict[bytes, bytes]) -> None:
    message = refused(Authenticator(table((b"fb-alice", ALICE))).identify(headers))
    assert "Authorization: Bearer" in message


WRONG = [
    b"fb-alic",
    b"fb-alicee",
    b"FB-ALICE",
    b"fb-alice\x00",
    b"x" * MAX_KEY,
    b"x" * (MAX_KEY + 1),
    b"\xff\xfe",
    b"fb alice",
]


@each("key", WRONG)
def test_a_wrong_key_is_refused_and_not_repeated(key: bytes) -> None:
    message = refused(Authenticator(table((b"fb-alice", ALICE))).identify({b"authorization": b"Bearer " + key}))
    assert "Incorrect" in message
    assert key.decode("latin-1") not in message


def test_a_key_longer_than_any_is_refused_even_when_it_would_be_right() -> None:
    long = b"k" * (MAX_KEY + 1)
    refused(Authenticator(table((long, ALICE))).identify({b"x-api-key": long}))
    assert Authenticator(table((long[:-1], ALICE))).identify({b"x-api-key": long[:-1]}) is ALICE


def test_half_a_digest_is_not_enough() -> None:
    """The table is looked up by half of it, and the other half decides."""
    digest = hashlib.sha256(b"fb-alice").digest()
    keys = Authenticator({digest[:16] + bytes(16): ALICE})
    refused(keys.identify({b"x-api-key": b"fb-alice"}))


@given(key=st.binary(min_size=1, max_size=MAX_KEY).filter(lambda key: key == key.strip()))
def test_any_opaque_key_works_once_imported(key: bytes) -> None:
    """Keys of another gateway stay valid, whatever they look like."""
    keys = Authenticator(table((key, ALICE)))
    assert keys.identify({b"authorization": b"Bearer " + key}) is ALICE
    assert keys.identify({b"x-api-key": key}) is ALICE
    assert isinstance(keys.identify({b"x-api-key": key + b"x"}), Refusal)


def test_our_own_keys_work() -> None:
    key = new_key(new_public_id()).encode()
    assert Authenticator(table((key, ALICE))).identify({b"authorization": b"Bearer " + key}) is ALICE


def test_a_key_expires_at_its_moment() -> None:
    keys = Authenticator(table((b"k", replace(ALICE, expires_at=NOON))))
    assert isinstance(keys.identify({b"x-api-key": b"k"}, NOON - timedelta(microseconds=1)), KeyRecord)
    for later in (NOON, NOON + timedelta(days=1)):
        assert "expired" in refused(keys.identify({b"x-api-key": b"k"}, later))
    long_ago = Authenticator(table((b"k", replace(ALICE, expires_at=datetime(2000, 1, 1, tzinfo=UTC)))))
    refused(long_ago.identify({b"x-api-key": b"k"}))


def test_a_new_table_takes_the_place_of_the_old_one() -> None:
    keys = Authenticator(table((b"a", ALICE)))
    keys.replace(table((b"b", ALICE)))
    refused(keys.identify({b"x-api-key": b"a"}))
    assert keys.identify({b"x-api-key": b"b"}) is ALICE


def test_without_keys_nobody_and_without_a_table_everybody() -> None:
    """Two very different things: no key made yet, and ``auth: none``."""
    refused(Authenticator({}).identify({b"x-api-key": b"a"}))
    assert Authenticator(None).identify({}) is ANONYMOUS


RIGHTS = [
    (None, "anything", True),
    ((), "anything", False),
    (("a",), "a", True),
    (("a",), "ab", False),
    (("a",), "A", False),
    (("org/*",), "org/model", True),
    (("org/*",), "org/", True),
    (("org/*",), "org", False),
    (("*",), "anything", True),
    (("a", "b*"), "bc", True),
    (("a.c",), "abc", False),
    (("a[bc]",), "ab", False),
    (("a*",), "a*", True),
]


@each(("models", "model", "may"), RIGHTS)
def test_the_models_of_a_key_are_names_or_beginnings(models: tuple[str, ...] | None, model: str, may: bool) -> None:
    assert may_use(replace(ALICE, models=models), model) is may


@given(models=st.lists(st.text("ab/", max_size=4)), model=st.text("ab/*", max_size=5))
def test_without_a_star_only_the_name_itself_counts(models: list[str], model: str) -> None:
    assert may_use(replace(ALICE, models=tuple(models)), model) is (model in models)


# --- addresses ---------------------------------------------------------------------------------------------------

PROXIES: Networks = tuple(ipaddress.ip_network(text) for text in ("10.0.0.0/8", "192.168.1.1/32", "fd00::/8"))

FORWARDED: list[tuple[str, list[bytes], str]] = [
    ("10.0.0.1", [b"1.2.3.4"], "1.2.3.4"),
    ("10.0.0.1", [b"6.6.6.6, 1.2.3.4"], "1.2.3.4"),
    ("10.0.0.1", [b"6.6.6.6, 1.2.3.4, 10.9.9.9, 192.168.1.1"], "1.2.3.4"),
    ("10.0.0.1", [b"6.6.6.6", b"1.2.3.4", b"10.9.9.9"], "1.2.3.4"),
    ("10.0.0.1", [b"6.6.6.6,1.2.3.4"], "1.2.3.4"),
    ("10.0.0.1", [b"  1.2.3.4  "], "1.2.3.4"),
    ("10.0.0.1", [b"1.2.3.4:5678"], "1.2.3.4"),
    ("10.0.0.1", [b"[2001:db8::1]:5678"], "2001:db8::1"),
    ("10.0.0.1", [b"[2001:db8::1]"], "2001:db8::1"),
    ("10.0.0.1", [b"2001:DB8::1"], "2001:db8::1"),
    ("fd00::1", [b"2001:db8::1, fd12::3"], "2001:db8::1"),
    ("10.0.0.1", [b"192.168.1.2"], "192.168.1.2"),
    # A socket of both families shows IPv4 inside IPv6.
    ("::ffff:10.0.0.1", [b"1.2.3.4"], "1.2.3.4"),
    ("10.0.0.1", [b"1.2.3.4, ::ffff:10.2.2.2"], "1.2.3.4"),
    ("10.0.0.1", [b"::ffff:1.2.3.4"], "1.2.3.4"),
    ("::ffff:8.8.8.8", [b"1.2.3.4"], "::ffff:8.8.8.8"),
    # All hops are ours: the first one is as far as can be seen.
    ("10.0.0.1", [b"10.1.1.1, 10.2.2.2"], "10.1.1.1"),
    # What cannot be read ends the search at the last hop that was ours.
    ("10.0.0.1", [b"unknown"], "10.0.0.1"),
    ("10.0.0.1", [b"1.2.3.4, _hidden"], "10.0.0.1"),
    ("10.0.0.1", [b"1.2.3.4, unknown, 10.2.2.2"], "10.2.2.2"),
    ("10.0.0.1", [b""], "10.0.0.1"),
    ("10.0.0.1", [b","], "10.0.0.1"),
    ("10.0.0.1", [], "10.0.0.1"),
    ("10.0.0.1", [b"1.2.3.4\xff"], "10.0.0.1"),
    ("10.0.0.1", [b"999.1.1.1"], "10.0.0.1"),
    ("10.0.0.1", [b"1.2.3.4\r\nx: y"], "10.0.0.1"),
    # Strangers are not believed.
    ("8.8.8.8", [b"1.2.3.4"], "8.8.8.8"),
    ("192.168.1.2", [b"1.2.3.4"], "192.168.1.2"),
    ("11.0.0.1", [b"10.0.0.1"], "11.0.0.1"),
    ("::1", [b"1.2.3.4"], "::1"),
    # No address: a Unix socket's peer.
    ("", [b"1.2.3.4"], ""),
    ("unix", [b"1.2.3.4"], "unix"),
]


@each(("peer", "forwarded", "address"), FORWARDED)
def test_the_clients_address(peer: str, forwarded: list[bytes], address: str) -> None:
    assert client_address(peer, forwarded, PROXIES) == address


ADDRESSES = st.ip_addresses().filter(lambda ip: ip.version == 4 or ip.ipv4_mapped is None).map(str)
LINES = st.lists(
    st.binary(max_size=20)
    | st.lists(ADDRESSES | st.sampled_from(["10.0.0.7", "unknown", ""])).map(lambda a: ",".join(a).encode()),
    max_size=3,
)


def trusted(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return any(parsed in network for network in PROXIES if network.version == parsed.version)


@given(peer=ADDRESSES.filter(lambda peer: not trusted(peer)), lines=LINES)
def test_a_stranger_is_never_believed(peer: str, lines: list[bytes]) -> None:
    assert client_address(peer, lines, PROXIES) == peer
    assert client_address("10.0.0.1", lines, ()) == "10.0.0.1"


@given(lines=LINES, client=ADDRESSES.filter(lambda peer: not trusted(peer)))
def test_what_a_client_claims_before_our_proxies_counts_for_nothing(lines: list[bytes], client: str) -> None:
    """Each proxy of ours appends who spoke to it: what the client wrote itself stands further left."""
    ours = [*lines, client.encode(), b"10.3.3.3"]
    assert client_address("10.0.0.1", ours, PROXIES) == client


@given(lines=LINES)
def test_whatever_comes_out_is_an_address(lines: list[bytes]) -> None:
    """It goes into the log."""
    assert ipaddress.ip_address(client_address("10.0.0.1", lines, PROXIES))
