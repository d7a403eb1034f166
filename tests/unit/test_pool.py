"""The endpoints: who serves what, who can be given work, and what stays when the configuration changes."""

from __future__ import annotations

import ssl
from dataclasses import replace
from functools import partial

import pytest

from adapters.catalogue import Catalogue, Model
from engines.protocol import plain_target
from engines.vllm import Vllm
from gateway.policy.concurrency import ConcurrencyRules, Targets
from gateway.serving.pool import EndpointSpec, Pool
from gateway.serving.upstream import Address, parse_address
from tests.support.table import each
from tests.support.tls import AUTHORITY

CHAT = "/v1/chat/completions"


VLLM = Vllm()


class Half(Vllm):
    """An engine that offers chat alone."""

    def __init__(self) -> None:
        self.paths = {CHAT: "/own/chat"}


def spec(name: str, *models: str, asked: bool = False, **more: object) -> EndpointSpec:
    told = None if asked else tuple((model, f"own {model}") for model in models)
    base = EndpointSpec(name, f"http://{name}:80", VLLM, Address(name, 80), models=told)
    return replace(base, **more)  # type: ignore[arg-type]


def pool_of(*specs: EndpointSpec) -> Pool:
    pool = Pool(Catalogue())
    pool.configure(specs, created=7)
    return pool


def test_endpoints_are_found_by_model_and_path() -> None:
    pool = pool_of(spec("a", "m"), spec("b", "m", "n"), spec("c", "m", engine=Half()))
    a, b, c = pool.endpoints
    assert pool.serving("m") == (a, b, c)
    assert pool.serving("n") == (b,)
    assert pool.serving("o") == ()
    assert pool.able("m", CHAT) == (a, b, c)
    assert pool.able("m", "/v1/embeddings") == (a, b)
    assert pool.choose("n", CHAT, ()) is b
    assert pool.choose("n", CHAT, [b]) is None
    assert pool.choose("o", CHAT, ()) is None
    assert pool.catalogue.list() == [Model("m", 7), Model("n", 7)]


def test_work_goes_round_among_equals() -> None:
    pool = pool_of(spec("a", "m"), spec("b", "m"), spec("c", "m"))
    assert {pool.choose("m", CHAT, ()) for _ in range(3)} == set(pool.endpoints)


def test_an_endpoint_can_be_given_work_while_it_is_healthy_and_not_full() -> None:
    pool = pool_of(spec("a", "m", max_connections=1))
    (endpoint,) = pool.endpoints
    assert endpoint.available
    assert pool.ready
    states = []
    for change in (partial(endpoint.down, "gone"), endpoint.up, partial(setattr, endpoint.connections, "open", 1)):
        change()
        states.append((endpoint.available, pool.ready, endpoint.trouble))
    assert states == [(False, False, "gone"), (True, True, ""), (False, True, "")]


def test_an_engine_that_must_be_asked_serves_nothing_yet() -> None:
    pool = pool_of(spec("a", asked=True))
    (endpoint,) = pool.endpoints
    assert not endpoint.healthy
    assert endpoint.trouble == "not asked yet"
    endpoint.up()
    endpoint.name_models([("m", plain_target("m"))])
    assert pool.choose("m", CHAT, ()) is None
    pool.index()
    assert pool.choose("m", CHAT, ()) is endpoint


def test_trouble_is_told_once() -> None:
    pool = pool_of(spec("a", "m"))
    (endpoint,) = pool.endpoints
    told: list[str] = []
    endpoint.on_trouble = lambda: told.append(endpoint.trouble)
    endpoint.down("first")
    endpoint.down("second")
    assert told == ["first"]
    assert endpoint.trouble == "second"
    endpoint.up()
    endpoint.down("third")
    assert told == ["first", "third"]


def test_what_stays_the_same_keeps_its_connections_and_load() -> None:
    pool = pool_of(spec("a", "m"), spec("b", "m"))
    a, b = pool.endpoints
    a.in_flight = 3
    new, gone = pool.configure([spec("a", "m"), spec("b", "m", "n"), spec("c", "o")], created=9)
    assert pool.endpoints[0] is a
    assert a.in_flight == 3
    assert gone == [b]
    assert [endpoint.name for endpoint in new] == ["b", "c"]
    assert pool.serving("n") == (pool.endpoints[1],)
    assert pool.serving("m") == (a, pool.endpoints[1])
    # The name is as old as it was.
    assert pool.catalogue.resolve("m") == Model("m", 7)
    assert pool.catalogue.resolve("o") == Model("o", 9)


ADDRESSES = [
    ("http://engine", Address("engine", 80)),
    ("http://engine:8000", Address("engine", 8000)),
    ("http://[::1]:8000", Address("::1", 8000)),
    ("https://engine", Address("engine", 443)),
    ("unix:/run/x.sock", Address("", 0, unix="/run/x.sock")),
    ("unix:///run/x.sock", Address("", 0, unix="/run/x.sock")),
]


@each(("url", "address"), ADDRESSES)
def test_where_an_engine_is(url: str, address: Address) -> None:
    parsed = parse_address(url)
    assert parsed == address
    assert isinstance(parsed.tls, ssl.SSLContext) is url.startswith("https")


def test_a_reload_does_not_part_with_an_engine_behind_tls() -> None:
    """The same address is the same endpoint, though each reading makes a context of its own; another CA is not."""
    pool = pool_of(spec("a", "m", address=parse_address("https://engine")))
    assert pool.configure([spec("a", "m", address=parse_address("https://engine"))], created=8) == ([], [])
    new, gone = pool.configure([spec("a", "m", address=parse_address("https://engine", str(AUTHORITY)))], created=8)
    assert (len(new), len(gone)) == (1, 1)


@pytest.mark.parametrize("url", ["engine:8000", "ftp://engine", "http://", ""])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match="write http"):
        parse_address(url)


def test_nobody_left() -> None:
    pool = pool_of(spec("a", "m"))
    _, gone = pool.configure([], created=9)
    assert [endpoint.name for endpoint in gone] == ["a"]
    assert not pool.ready
    assert pool.choose("m", CHAT, ()) is None
    assert pool.able("m", CHAT) == ()


@pytest.mark.parametrize(
    ("address", "host"),
    [
        (Address("engine", 8000), b"host: engine:8000"),
        (Address("::1", 80), b"host: [::1]:80"),
        (Address("", 0, unix="/run/x.sock"), b"host: localhost"),
    ],
)
def test_the_head_of_a_request(address: Address, host: bytes) -> None:
    """The gateway's own headers and nobody else's; the engine's key is the engine's."""
    (endpoint,) = pool_of(spec("a", "m", address=address, api_key="secret", engine=Half())).endpoints
    head = endpoint.request_head(CHAT)
    assert head.split(b"\r\n") == [
        b"POST /own/chat HTTP/1.1",
        host,
        b"content-type: application/json",
        b"accept: application/json, text/event-stream",
        b"authorization: Bearer secret",
        b"x-request-id: ",
    ]
    assert endpoint.request_head(CHAT) is head


def test_anthropic_s_dialect_has_its_version() -> None:
    """LMDeploy refuses a message without it."""
    (endpoint,) = pool_of(spec("a", "m")).endpoints
    assert b"\r\nanthropic-version: 2023-06-01\r\n" in endpoint.request_head("/v1/messages")
    assert b"anthropic" not in endpoint.request_head(CHAT)


def test_without_a_key_none_is_sent() -> None:
    (endpoint,) = pool_of(spec("a", "m")).endpoints
    assert b"authorization" not in endpoint.request_head(CHAT)


def test_the_engines_own_names_are_json() -> None:
    (endpoint,) = pool_of(spec("a", 'quo"te')).endpoints
    assert bytes(endpoint.models['quo"te'].model) == b'"own quo\\"te"'


def test_an_engine_is_stretched_for_whose_beginning_it_holds_and_never_beyond_what_it_may_have() -> None:
    pool = pool_of(spec("a", "m", max_running=9))
    (endpoint,) = pool.endpoints
    pool.give_at_most(ConcurrencyRules(targets=Targets(ttft=1.0), start=8))
    for _ in range(8):
        endpoint.take(1, 10)
    assert not endpoint.room(10)
    assert endpoint.stretches(10)
    endpoint.take(1, 10)
    assert not endpoint.stretches(10), "a quarter of eight would be ten, and nine is all it may have"
    endpoint.give_back(1, 10)
    endpoint.limit = replace(endpoint.limit, tokens=85.0)
    assert not endpoint.stretches(10)
    assert endpoint.stretches(5)
