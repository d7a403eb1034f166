"""Engines that come and go behind a name while the gateway runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from engines import discovery
from gateway import finder
from gateway.serving.pool import MinderAt
from gateway.settings import ConfigError, Upstream
from tests.support.gateway import CHAT, StartGateway, chat, relayed, serving, until
from tests.support.recordings import load
from tests.support.script import play
from tests.support.table import each
from tests.support.upstream import ScriptedUpstream

ANSWER = play(load("vllm", "chat_basic"))


class NameServer:
    """What a name stands for now; ``ask`` may be asked at any time and ``turn`` lets the next question come."""

    def __init__(self) -> None:
        self.addresses = ["127.0.0.1"]
        self.asked = 0
        self.turn = asyncio.Event()

    async def ask(self, name: str, port: int) -> list[str]:
        assert name == "engines.example"
        self.asked += 1
        return self.addresses

    async def sleep(self, seconds: float) -> None:
        await self.turn.wait()
        self.turn.clear()


@pytest.fixture
def name_server(monkeypatch: pytest.MonkeyPatch) -> NameServer:
    server = NameServer()

    def source(name: str, port: int, interval: float, tell: discovery.Tell) -> discovery.DnsSource:
        return discovery.DnsSource(name, port, interval, tell, server.ask, server.sleep)

    monkeypatch.setattr(finder, "DnsSource", source)
    return server


def behind_a_name(upstream: ScriptedUpstream) -> Upstream:
    """The scripted engine as what ``engines.example`` stands for."""
    named = serving(upstream, name="rack", discover=None)
    port = urlsplit(upstream.url).port
    return named.model_copy(update={"url": f"http://engines.example:{port}", "discover": "dns"})


async def test_each_engine_behind_a_name_has_its_own_minder(
    start_gateway: StartGateway, upstream: ScriptedUpstream, name_server: NameServer
) -> None:
    gateway = await start_gateway(behind_a_name(upstream).model_copy(update={"minder_port": 9}))
    await gateway.line("endpoints_found")
    await until(lambda: gateway.replica.pool.endpoints, "what was found never became an endpoint")
    (endpoint,) = gateway.replica.pool.endpoints
    assert endpoint.spec.minder == MinderAt("http://127.0.0.1:9")


async def test_engines_behind_a_name_come_and_go(
    start_gateway: StartGateway, upstream: ScriptedUpstream, name_server: NameServer
) -> None:
    upstream.always(ANSWER, path=CHAT)
    gateway = await start_gateway(behind_a_name(upstream))
    found = await gateway.line("endpoints_found")
    port = urlsplit(upstream.url).port
    assert (found["upstream"], found["came"], found["went"]) == ("rack", [f"127.0.0.1:{port}"], [])
    await until(lambda: gateway.replica.pool.ready, "what was found never became an endpoint")
    assert (await gateway.ask(chat())).status == 200
    assert [endpoint.name for endpoint in gateway.replica.pool.endpoints] == [f"rack/127.0.0.1:{port}"]

    name_server.addresses = []
    name_server.turn.set()
    await until(lambda: not gateway.replica.pool.endpoints, "what is gone stayed an endpoint")
    # The model is known, it is only not served at the moment.
    refused = await gateway.ask(chat())
    assert refused.status == 503
    assert len(relayed(upstream)) == 1

    name_server.addresses = ["127.0.0.1"]
    name_server.turn.set()
    await until(lambda: gateway.replica.pool.ready, "what came back never became an endpoint")
    assert (await gateway.ask(chat())).status == 200


async def test_outside_of_a_cluster_kubernetes_cannot_be_asked(
    start_gateway: StartGateway, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    wanted = behind_a_name(upstream).model_copy(update={"url": "http://vllm.models:8000", "discover": "kubernetes"})
    with pytest.raises(ConfigError, match="works inside a cluster only"):
        await start_gateway(wanted)


@each(
    ("url", "kind", "told"),
    [
        ("https://engines:8000", "dns", "for http:// URLs only"),
        ("unix:/run/engine.sock", "dns", "for http:// URLs only"),
        ("http://10.0.0.1:8000", "dns", "is an address"),
        ("http://engines", "dns", "needs the engines' port"),
        ("http://vllm.models.svc.cluster.local:8000", "kubernetes", "http://SERVICE.NAMESPACE:PORT"),
    ],
)
def test_what_cannot_be_discovered_is_refused_with_the_reason(url: str, kind: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Upstream.model_validate({"url": url, "discover": kind})
