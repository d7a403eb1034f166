"""Discovery: names that stand for several addresses, and EndpointSlices told by a real HTTP server that plays one."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.discovery import (
    Cluster,
    DnsSource,
    Found,
    KubernetesSource,
    SliceError,
    Slices,
    Source,
    in_cluster,
    resolve,
)

PATIENCE = 10.0


async def no_pause(_seconds: float) -> None:
    await asyncio.sleep(0)


async def first(source: Source, count: int) -> list[frozenset[Found]]:
    """The first things a source yields."""
    seen: list[frozenset[Found]] = []
    async with asyncio.timeout(PATIENCE), contextlib.aclosing(source.changes()) as changes:
        async for found in changes:
            seen.append(found)
            if len(seen) == count:
                break
    return seen


# --- DNS -------------------------------------------------------------------------------------------------------------


def dns(answers: Iterable[list[str] | OSError], told: list[str]) -> DnsSource:
    rest = iter(answers)

    async def ask(name: str, port: int) -> list[str]:
        assert (name, port) == ("engines", 8000)
        answer = next(rest)
        if isinstance(answer, OSError):
            raise answer
        return answer

    return DnsSource("engines", 8000, 5.0, told.append, ask, no_pause)


async def test_a_name_is_told_each_time_its_addresses_change() -> None:
    a, b = "10.0.0.1", "10.0.0.2"
    seen = await first(dns([[a], [a], [b, a], [b]], []), 3)
    assert seen == [{Found(a, 8000)}, {Found(a, 8000), Found(b, 8000)}, {Found(b, 8000)}]


async def test_a_name_server_that_is_away_takes_nobody_away_and_is_told_once() -> None:
    told: list[str] = []
    gone = OSError(-3, "Temporary failure in name resolution")
    seen = await first(dns([["10.0.0.1"], gone, gone, gone, ["10.0.0.1"], gone, ["10.0.0.2"]], told), 2)
    assert seen == [{Found("10.0.0.1", 8000)}, {Found("10.0.0.2", 8000)}]
    assert len(told) == 2
    assert "what was found before stays" in told[0]


async def test_the_systems_resolver_is_asked() -> None:
    assert await resolve("localhost", 80) in (["127.0.0.1"], ["127.0.0.1", "::1"], ["::1"])


def test_addresses_as_they_stand_in_urls() -> None:
    assert Found("10.0.0.1", 80).authority == "10.0.0.1:80"
    assert Found("fd00::1", 80).authority == "[fd00::1]:80"


# --- slices ----------------------------------------------------------------------------------------------------------


def slice_of(
    name: str, addresses: dict[str, bool | None], version: str = "5", port: int = 8000, port_name: str = "http"
) -> dict[str, Any]:
    """An EndpointSlice: address → whether it is ready, None where that is not told."""
    return {
        "metadata": {"name": name, "resourceVersion": version},
        "addressType": "IPv4",
        "endpoints": [
            {"addresses": [address], "conditions": {} if ready is None else {"ready": ready}}
            for address, ready in addresses.items()
        ],
        "ports": [{"name": "metrics", "port": 9000}, {"name": port_name, "port": port}],
    }


def listing(*items: dict[str, Any], version: str = "10") -> dict[str, Any]:
    return {"kind": "EndpointSliceList", "metadata": {"resourceVersion": version}, "items": list(items)}


@pytest.mark.parametrize("port", ["8000", "http"])
def test_ready_endpoints_count_unknown_ones_too(port: str) -> None:
    slices = Slices(port)
    slices.take_list(listing(slice_of("a", {"10.0.0.1": True, "10.0.0.2": False, "10.0.0.3": None})))
    assert slices.all == {Found("10.0.0.1", 8000), Found("10.0.0.3", 8000)}
    assert slices.version == "10"


def test_a_port_that_is_not_there_is_no_engine() -> None:
    slices = Slices("grpc")
    slices.take_list(listing(slice_of("a", {"10.0.0.1": True}), {"metadata": {"name": "b"}, "ports": None}))
    assert slices.all == frozenset()


def test_events_add_change_and_remove_and_bookmarks_move_on() -> None:
    slices = Slices("http")
    slices.take_list(listing())
    slices.take_event({"type": "ADDED", "object": slice_of("a", {"10.0.0.1": True}, "11")})
    slices.take_event({"type": "ADDED", "object": slice_of("b", {"10.0.0.1": True, "10.0.0.2": True}, "12")})
    assert slices.all == {Found("10.0.0.1", 8000), Found("10.0.0.2", 8000)}
    slices.take_event({"type": "MODIFIED", "object": slice_of("b", {"10.0.0.2": True}, "13")})
    slices.take_event({"type": "DELETED", "object": slice_of("a", {}, "14")})
    slices.take_event({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "20"}}})
    assert slices.all == {Found("10.0.0.2", 8000)}
    assert slices.version == "20"
    with pytest.raises(SliceError, match="too old"):
        slices.take_event({"type": "ERROR", "object": {"code": 410, "message": "too old resource version"}})


ADDRESSES = st.dictionaries(st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3"]), st.booleans(), max_size=3)


@given(states=st.lists(st.dictionaries(st.sampled_from("abc"), ADDRESSES, max_size=3), min_size=1, max_size=8))
def test_a_list_and_the_events_after_it_come_to_the_same(states: list[dict[str, dict[str, bool]]]) -> None:
    """Whatever slices there are one after the other: following them is as good as asking anew."""
    followed = Slices("http")
    followed.take_list(listing())
    before: dict[str, dict[str, bool]] = {}
    for number, state in enumerate(states):
        for name in before.keys() - state.keys():
            followed.take_event({"type": "DELETED", "object": slice_of(name, {}, str(number))})
        for name, addresses in state.items():
            kind = "MODIFIED" if name in before else "ADDED"
            followed.take_event({"type": kind, "object": slice_of(name, dict(addresses), str(number))})
        before = state
        asked = Slices("http")
        asked.take_list(listing(*(slice_of(name, dict(addresses)) for name, addresses in state.items())))
        assert followed.all == asked.all


# --- the API server --------------------------------------------------------------------------------------------------


Script = list[tuple[int, list[dict[str, Any]] | dict[str, Any] | None]]
"""Answers of the API server: status, and one JSON value or several lines of them."""


class ApiServer:
    """Plays the API server: answers requests in the order of its script, and keeps what it was asked."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: list[dict[str, str]] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                line, *headers = head.split("\r\n")
                parts = urlsplit(line.split()[1])
                query = {name: value[0] for name, value in parse_qs(parts.query).items()}
                fields = dict(header.lower().split(": ", 1) for header in headers if header)
                self.asked.append({"path": parts.path, "token": fields.get("authorization", ""), **query})
                if not self.script:
                    # Nothing more to tell: a watch that stays silent.
                    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                    await reader.read()
                    return
                status, body = self.script.pop(0)
                lines = body if isinstance(body, list) else [body]
                text = b"".join(json.dumps(one).encode() + b"\n" for one in lines if one is not None)
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(text), text))
                await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def api_server(server: ApiServer) -> AsyncIterator[ApiServer]:
    listener = await asyncio.start_server(server.serve, "127.0.0.1")
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()


def watched(server: ApiServer, folder: Path, told: list[str]) -> KubernetesSource:
    token = folder / "token"
    token.write_text("first-token\n")
    cluster = Cluster(f"http://127.0.0.1:{server.port}", token, None, "models")
    return KubernetesSource(cluster, "vllm", "http", told.append, None, no_pause)


async def test_a_watch_that_ends_goes_on_where_it_was(tmp_path: Path) -> None:
    a, b = slice_of("a", {"10.0.0.1": True}, "9"), slice_of("b", {"10.0.0.2": True}, "11")
    gone = {"type": "DELETED", "object": slice_of("a", {}, "12")}
    script: Script = [(200, listing(a)), (200, [{"type": "ADDED", "object": b}]), (200, [gone])]
    told: list[str] = []
    async with api_server(ApiServer(script)) as server:
        seen = await first(watched(server, tmp_path, told), 3)
    one, two = Found("10.0.0.1", 8000), Found("10.0.0.2", 8000)
    assert seen == [{one}, {one, two}, {two}]
    assert [request.get("resourceVersion") for request in server.asked[:3]] == [None, "10", "11"]
    assert all(request["labelSelector"] == "kubernetes.io/service-name=vllm" for request in server.asked)
    assert {request["path"] for request in server.asked} == {
        "/apis/discovery.k8s.io/v1/namespaces/models/endpointslices"
    }
    assert {request["token"] for request in server.asked} == {"bearer first-token"}
    assert told == []


@pytest.mark.parametrize(
    "too_old", [(410, {"code": 410}), (200, [{"type": "ERROR", "object": {"code": 410, "message": "too old"}}])]
)
async def test_a_version_that_is_too_old_means_asking_anew(
    tmp_path: Path, too_old: tuple[int, list[dict[str, Any]] | dict[str, Any] | None]
) -> None:
    script: Script = [
        (200, listing(slice_of("a", {"10.0.0.1": True}))),
        too_old,
        (200, listing(slice_of("a", {"10.0.0.2": True}), version="30")),
    ]
    async with api_server(ApiServer(script)) as server:
        seen = await first(watched(server, tmp_path, []), 2)
    assert seen == [{Found("10.0.0.1", 8000)}, {Found("10.0.0.2", 8000)}]
    assert [request.get("watch") for request in server.asked[:3]] == [None, "1", None]


async def test_an_api_server_in_trouble_takes_nobody_away_and_is_told_once(tmp_path: Path) -> None:
    script: Script = [
        (200, listing(slice_of("a", {"10.0.0.1": True}))),
        (500, None),
        (503, None),
        (200, [{"type": "MODIFIED", "object": slice_of("a", {"10.0.0.3": True}, "12")}]),
    ]
    told: list[str] = []
    async with api_server(ApiServer(script)) as server:
        seen = await first(watched(server, tmp_path, told), 2)
    assert seen == [{Found("10.0.0.1", 8000)}, {Found("10.0.0.3", 8000)}]
    assert told == ["Service vllm: the API server answered 500; what was found before stays"]


async def test_who_may_not_watch_is_told_what_is_missing(tmp_path: Path) -> None:
    told: list[str] = []
    async with api_server(ApiServer([(403, {"kind": "Status"}), (200, listing())])) as server:
        assert await first(watched(server, tmp_path, told), 1) == [frozenset()]
    assert "may not list and watch endpointslices" in told[0]


async def test_a_token_that_was_rotated_is_used(tmp_path: Path) -> None:
    script: Script = [
        (200, listing(slice_of("a", {"10.0.0.1": True}))),
        (200, [{"type": "MODIFIED", "object": slice_of("a", {"10.0.0.2": True}, "12")}]),
        (200, [{"type": "MODIFIED", "object": slice_of("a", {"10.0.0.3": True}, "13")}]),
    ]
    async with api_server(ApiServer(script)) as server:
        source = watched(server, tmp_path, [])
        async with asyncio.timeout(PATIENCE), contextlib.aclosing(source.changes()) as changes:
            async for found in changes:
                if found == {Found("10.0.0.2", 8000)}:
                    (tmp_path / "token").write_text("second-token")
                if found == {Found("10.0.0.3", 8000)}:
                    break
    assert server.asked[-1]["token"] == "bearer second-token"


def test_inside_and_outside_of_a_cluster(tmp_path: Path) -> None:
    environment = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    assert in_cluster(environment, tmp_path) is None
    for name, text in (("token", "t"), ("namespace", "models\n"), ("ca.crt", "")):
        (tmp_path / name).write_text(text)
    assert in_cluster({}, tmp_path) is None
    cluster = in_cluster(environment, tmp_path)
    assert cluster == Cluster("https://10.96.0.1:443", tmp_path / "token", tmp_path / "ca.crt", "models")
    six = in_cluster({**environment, "KUBERNETES_SERVICE_HOST": "fd00::1"}, tmp_path)
    assert six is not None and six.url == "https://[fd00::1]:443"
