"""The servers that the official clients are run against: the same tests, whatever the address."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.clients.server import Server
from tests.support import node
from tests.support.clock import ManualClock
from tests.support.gateway import ENGINE_MODEL, KEY, MODEL, Face, running, settings_for
from tests.support.recordings import load
from tests.support.script import Script, play
from tests.support.upstream import ScriptedUpstream, SeenRequest, answer_as_recorded

Start = Callable[[Path], AbstractAsyncContextManager[Server]]

ENGINE_KEY = "sk-engine"

# Some recorded answers just fitted the recorded limit; tests give a real engine more room.
MAY_DIFFER = frozenset({"max_tokens"})

# One recording for each request the client tests send; see Server.request. The gateway asks for usage in every stream,
# so a recording with it comes before the one without.
PLAYED = (
    "chat_basic",
    "chat_stream_usage",
    "chat_stream",
    "chat_n2",
    "chat_stream_n2",
    "chat_logprobs",
    "chat_stream_logprobs",
    "chat_json_schema",
    "chat_stream_json_schema",
    "chat_tool_required_strict",
    "chat_stream_tool_required",
    "chat_tool_named",
    "comp_basic",
    "comp_stream_usage",
    "get_models",
    "lora_unknown_model",
    "lora_unknown_model_stream",
    "err_temperature_neg",
    "err_prompt_too_long",
    "err_prompt_too_long_stream",
    "responses",
    "responses_stream",
)


@asynccontextmanager
async def recorded_engine(folder: Path) -> AsyncIterator[Server]:
    """vLLM's recorded answers without a gateway: what the clients make of the engine itself."""
    answer = answer_as_recorded([load("vllm", name) for name in PLAYED], ignoring=MAY_DIFFER)

    def guarded(request: SeenRequest) -> Script:
        if request.header("authorization") != f"Bearer {ENGINE_KEY}":
            return play(load("vllm", "auth_wrong"))
        return answer(request)

    async with ScriptedUpstream() as upstream:
        upstream.always(guarded)
        yield Server(f"{upstream.url}/v1", ENGINE_KEY, ENGINE_MODEL, speaks_for_itself=False)


@asynccontextmanager
async def gateway_over_recordings(face: Face, folder: Path) -> AsyncIterator[Server]:
    """The gateway in front of the same recorded answers: it renames the model and asks for usage."""
    answers = answer_as_recorded(
        [load("vllm", name) for name in PLAYED], ignoring=MAY_DIFFER | {"model", "stream_options"}
    )
    async with ScriptedUpstream() as upstream:
        upstream.always(answers)
        async with running(settings_for(face, folder, [upstream]), ManualClock()) as gateway:
            yield Server(f"{gateway.url}/v1", KEY, MODEL, speaks_for_itself=True)


# Every way to serve; an entry here runs all client tests against one more server.
SERVERS: dict[str, Start] = {
    "recorded engine": recorded_engine,
    "gateway, protocol face": partial(gateway_over_recordings, "protocol"),
    "gateway, asgi face": partial(gateway_over_recordings, "asgi"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run against the server named on the command line, else against each of ``SERVERS``."""
    if "server" in metafunc.fixturenames:
        given = metafunc.config.getoption("--server-url")
        metafunc.parametrize("server", [given] if given else list(SERVERS), indirect=True)


@pytest.fixture
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Server]:
    """A server that speaks OpenAI's dialect."""
    if request.param in SERVERS:
        async with SERVERS[request.param](tmp_path) as started:
            yield started
        return
    options = request.config.getoption
    yield Server(
        f"{request.param.rstrip('/')}/v1", options("--server-key"), options("--server-model"), speaks_for_itself=False
    )


@pytest.fixture(scope="session")
def node_client() -> None:
    """Make the Node client ready, installing it once into the ignored ``node_modules``."""
    try:
        node.install()
    except node.NodeError as error:
        pytest.fail(str(error), pytrace=False)
