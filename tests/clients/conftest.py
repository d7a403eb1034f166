"""The servers that the official clients are run against: the same tests, whatever the address."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from functools import partial
from pathlib import Path

import pytest

from gateway.settings import Upstream
from tests.clients.server import Server
from tests.support import node
from tests.support.clock import ManualClock
from tests.support.gateway import ENGINE_MODEL, KEY, MODEL, Face, running, settings_for
from tests.support.real_engine import RealEngine, served, vllm_engine
from tests.support.recordings import load
from tests.support.script import Script, play
from tests.support.upstream import ScriptedUpstream, SeenRequest, answer_as_recorded

__all__ = ["served", "vllm_engine"]

Start = Callable[[Path], AbstractAsyncContextManager[Server]]
StartOnEngine = Callable[[RealEngine, Path], AbstractAsyncContextManager[Server]]

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
    "messages",
    "messages_stream",
    "messages_err",
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
        async with running(settings_for(face, folder, [upstream]), ManualClock(), database=False) as gateway:
            yield Server(f"{gateway.url}/v1", KEY, MODEL, speaks_for_itself=True)


@asynccontextmanager
async def gateway_over_vllm(face: Face, engine: RealEngine, folder: Path) -> AsyncIterator[Server]:
    """The gateway in front of the session's real engine, under a public name that the engine does not know."""
    upstream = Upstream(url=engine.url, models={MODEL: engine.model})
    async with running(settings_for(face, folder, [upstream]), ManualClock(), database=False) as gateway:
        yield Server(f"{gateway.url}/v1", KEY, MODEL, speaks_for_itself=True)


GATEWAYS: dict[str, Start] = {
    "gateway, protocol face": partial(gateway_over_recordings, "protocol"),
    "gateway, asgi face": partial(gateway_over_recordings, "asgi"),
}
# Every way to serve without a real engine; an entry here runs all client tests against one more server.
SERVERS: dict[str, Start] = {"recorded engine": recorded_engine, **GATEWAYS}
ON_ENGINE: dict[str, StartOnEngine] = {
    "gateway, protocol face, real vLLM": partial(gateway_over_vllm, "protocol"),
    "gateway, asgi face, real vLLM": partial(gateway_over_vllm, "asgi"),
}


# What is also asked of a real engine through the asgi face. That face shares all but the way of bytes to the client
# with the other one, and passes the whole suite over recordings: so here stands one test for each way an answer can go,
# whole, streamed with and without types, refused by the gateway, refused by the engine before a stream, left early.
BRIEFLY = frozenset(
    {
        "test_chat",
        "test_stream_with_usage_ends_with_a_chunk_without_choices",
        "test_streamed_responses_end_with_their_typed_event",
        "test_a_streamed_message_is_put_together",
        "test_an_unknown_model_is_not_found",
        "test_too_long_a_prompt_is_a_bad_request",
        "test_an_application_may_leave_a_stream_early",
    }
)
BRIEF_SERVER = "gateway, asgi face, real vLLM"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run against the server named on the command line, else against every one that fits.

    ``server`` is each of them; ``gateway_server`` leaves out the engine alone, which knows keys of one dialect only.
    """
    for name, without_engine in {"server": SERVERS, "gateway_server": GATEWAYS}.items():
        if name in metafunc.fixturenames:
            given = metafunc.config.getoption("--server-url")
            choices = [pytest.param(False, given, id=given)] if given else _choices(metafunc, without_engine)
            metafunc.parametrize(("engine", name), choices, indirect=True)


def _choices(metafunc: pytest.Metafunc, without_engine: Mapping[str, Start]) -> list[object]:
    on_engine = [name for name in ON_ENGINE if name != BRIEF_SERVER or metafunc.function.__name__ in BRIEFLY]
    return [
        *(pytest.param(False, name, id=name) for name in without_engine),
        *(pytest.param(True, name, id=name, marks=pytest.mark.real_engine) for name in on_engine),
    ]


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> RealEngine | None:
    """The session's real engine for servers in front of it, else None: the others must not start one."""
    return request.getfixturevalue("vllm_engine") if request.param else None


@asynccontextmanager
async def _started(request: pytest.FixtureRequest, engine: RealEngine | None, folder: Path) -> AsyncIterator[Server]:
    if engine is not None:
        async with ON_ENGINE[request.param](engine, folder) as started:
            yield started
    elif request.param in SERVERS:
        async with SERVERS[request.param](folder) as started:
            yield started
    else:
        options, url = request.config.getoption, request.param.rstrip("/")
        yield Server(f"{url}/v1", options("--server-key"), options("--server-model"), speaks_for_itself=False)


@pytest.fixture
async def server(request: pytest.FixtureRequest, engine: RealEngine | None, tmp_path: Path) -> AsyncIterator[Server]:
    """A server that speaks OpenAI's dialect."""
    async with _started(request, engine, tmp_path) as started:
        yield started


@pytest.fixture
async def gateway_server(
    request: pytest.FixtureRequest, engine: RealEngine | None, tmp_path: Path
) -> AsyncIterator[Server]:
    """A gateway, which speaks Anthropic's dialect with Anthropic's keys too."""
    async with _started(request, engine, tmp_path) as started:
        yield started


@pytest.fixture(scope="session")
def node_client() -> Iterator[node.Client]:
    """The Node client, installed once into the ignored ``node_modules``; one process for all its tests."""
    try:
        node.install()
    except node.NodeError as error:
        pytest.fail(str(error), pytrace=False)
    with closing(node.Client()) as client:
        yield client
