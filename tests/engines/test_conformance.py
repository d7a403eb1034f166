"""What stands behind the gateway acts alike, whatever its kind: shown on each kind, as a real process.

The simulated engine computes nothing. vLLM is whole. SGLang's and LMDeploy's HTTP servers, schedulers and adapters are
their own, their kernels are plain PyTorch (``engines/shims``). What an engine cannot do is a declared capability, and
the test then shows what happens instead.

An engine is started for all tests of its kind, with room for ten requests of which two run, and with an adapter. A test
that ends it comes last. vLLM is the one that all tests of a real engine share, since loading it takes longest of all.
That one is on a Unix socket, so it has no key, and gets its adapter while it runs; a start on a port, with a key and
with an adapter, is one more test among those of all engines.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import httpx
import msgspec
import psutil
import pytest
from pydantic import SecretStr

from engines.conformance import CHECKS, Verdict, run_check
from engines.protocol import Call, Capability, Dispatch, EngineError, Target
from engines.registry import ENGINES
from gateway.settings import Upstream
from gateway.trial import subject_of
from tests.conftest import Connect
from tests.support import real_engine
from tests.support.adapters import make_adapter
from tests.support.client import RawClient, error_of
from tests.support.gateway import AUTH, CHAT, Face, Gateway, StartGateway, serving, start_gateway
from tests.support.real_engine import (
    ANSWER_WITHIN,
    SLOTS,
    RealEngine,
    busy,
    engine_of,
    free,
    load_of,
    patience,
    running,
)
from tests.support.recordings import load
from tests.support.script import DONE, play
from tests.support.served import Served
from tests.support.upstream import ScriptedUpstream

__all__ = ["patience", "start_gateway"]

ADAPTER = "loud@1"
STREAM = play(load("vllm", "chat_stream"))
QUESTION = "What is the capital of France?"
TURNS = [{"role": "user", "content": QUESTION}]
PROMPT = "Once upon a time there was a gateway. " * 40
"""Longer than the 128 tokens that vLLM caches at once on a CPU."""
JSON = {"content-type": "application/json"}
RUNNING, QUEUED = 2, 8
"""Requests an engine runs, and keeps waiting where it can be told; the shared vLLM has room for as many together."""
LENGTHS = {"simulated": 16384}
"""Tokens of context, where it is not 2048: a simulated engine is quick, so that its endless answers are longer."""
ARGUMENTS = {"simulated": ("--speed", "10")}

KINDS = [
    "simulated",
    pytest.param("vllm", marks=[pytest.mark.real_engine, pytest.mark.all_engines]),
    pytest.param("sglang", marks=pytest.mark.all_engines),
    pytest.param("lmdeploy", marks=pytest.mark.all_engines),
]


class Keeper(Protocol):
    """Holds one kind's engine for all its tests."""

    running: int
    """Requests the engine works on at once."""

    def engine(self) -> RealEngine:
        """Return it, alive."""
        ...

    def close(self) -> None:
        """Have done with it."""
        ...


class Kept:
    """One kind's engine, with a key of its own: started when a test wants it, again after one that ended it."""

    running = RUNNING

    def __init__(self, kind: str, adapter: Path) -> None:
        self._kind = kind
        self._adapters = replace(SLOTS, at_start=((ADAPTER, str(adapter)),))
        self._stack = ExitStack()
        self._engine: RealEngine | None = None

    def engine(self) -> RealEngine:
        """Return it, alive."""
        if self._engine is None or not psutil.pid_exists(self._engine.pid):
            self.close()
            self._engine = self._stack.enter_context(self._run())
        return self._engine

    def _run(self) -> AbstractContextManager[RealEngine]:
        return running(
            self._kind,
            *ARGUMENTS.get(self._kind, ()),
            adapters=self._adapters,
            api_key=secrets.token_hex(32),
            max_model_len=LENGTHS.get(self._kind, 2048),
            max_running=RUNNING,
            max_queued=QUEUED if Capability.BOUNDED_QUEUE in ENGINES[self._kind].capabilities else None,
        )

    def close(self) -> None:
        """End it."""
        self._stack.close()


class Shared:
    """The session's vLLM, which has the adapter meanwhile. Who kills it ends the session for this room."""

    running = real_engine.RUNNING

    def __init__(self, served: Served, adapter: Path) -> None:
        self._vllm, self._engine = ENGINES["vllm"], engine_of(served)
        self._tell(self._vllm.load_adapter(ADAPTER, str(adapter)))

    def _tell(self, call: Call | None) -> None:
        assert call is not None
        with self._engine.client() as client:
            answer = client.request(call.method, call.path, content=call.body, headers=JSON)
        assert self._vllm.read_adapter_answer(answer.status_code, answer.content) is None, answer.text

    def engine(self) -> RealEngine:
        """Return it."""
        return self._engine

    def close(self) -> None:
        """Take the adapter out, unless a test has killed the engine it was in."""
        if psutil.pid_exists(self._engine.pid):
            self._tell(self._vllm.unload_adapter(ADAPTER))


@pytest.fixture(scope="module", params=KINDS)
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keeper]:
    """Each kind in turn."""
    adapter = make_adapter(tmp_path_factory.mktemp("adapters") / "loud", 8, 1)
    shared = request.param == "vllm"
    one: Keeper = Shared(request.getfixturevalue("served"), adapter) if shared else Kept(request.param, adapter)
    with closing(one):
        # Before any test begins: what a test leaves behind is counted from its own beginning.
        one.engine()
        yield one


@pytest.fixture(autouse=True)
def leak_check(request: pytest.FixtureRequest) -> None:
    """The same for what follows a test that ended its engine, in whatever order: it is back before anything counts."""
    if "kept" in request.fixturenames:
        request.getfixturevalue("kept").engine()
    if asyncio.iscoroutinefunction(request.function):
        request.getfixturevalue("leaves_nothing_behind")


@pytest.fixture
def engine(kept: Keeper) -> RealEngine:
    """The kind's engine."""
    return kept.engine()


@pytest.fixture
def face() -> Face:
    """One face: the engine is what is tried here."""
    return "protocol"


@pytest.fixture
async def gateway(start_gateway: StartGateway, engine: RealEngine, patience: None) -> AsyncIterator[Gateway]:
    """A gateway that asks the engine what it serves, in front of an engine that does nothing else."""
    started = await start_gateway(behind(engine))
    await free(engine)
    yield started


def behind(engine: RealEngine) -> Upstream:
    key = SecretStr(engine.api_key) if engine.api_key is not None else None
    return Upstream(url=engine.url, engine=engine.kind, api_key=key)


def ask(engine: RealEngine, **fields: Any) -> dict[str, Any]:
    return {"model": engine.model, "messages": TURNS, "temperature": 0, "max_tokens": 12, **fields}


def endless(engine: RealEngine, **fields: Any) -> dict[str, Any]:
    return ask(engine, max_tokens=LENGTHS.get(engine.kind, 2048) - 500, ignore_eos=True, **fields)


def everywhere(engine: RealEngine) -> dict[str, dict[str, Any]]:
    """Return a short request for each path on which a model speaks."""
    asked = {
        CHAT: ask(engine),
        "/v1/completions": {"model": engine.model, "prompt": QUESTION, "max_tokens": 4},
        "/v1/responses": {"model": engine.model, "input": QUESTION, "max_output_tokens": 4},
        "/v1/messages": {"model": engine.model, "messages": TURNS, "max_tokens": 4},
    }
    return {path: body for path, body in asked.items() if path in ENGINES[engine.kind].paths}


# --- its start ---------------------------------------------------------------------------------------------------


def test_it_starts_as_it_was_told(engine: RealEngine) -> None:
    """It is well, serves what was named, and is for its owner alone."""
    with engine.client() as client:
        kind = ENGINES[engine.kind]
        listed = {model.name for model in kind.read_models(client.get(kind.models_path).content)}
    assert listed == {engine.model, ADAPTER}
    assert load_of(engine) is not None
    if engine.api_key is None:
        folder = Path(engine.url.removeprefix("unix:")).parent
        assert (folder.stat().st_uid, folder.stat().st_mode & 0o777) == (os.geteuid(), 0o700)
    else:
        assert_its_key_is_asked_for(engine, engine.api_key)


def assert_its_key_is_asked_for(engine: RealEngine, key: str) -> None:
    """Everything but its health needs the key, which no other user can read."""
    kind, family = ENGINES[engine.kind], engine.family()
    with httpx.Client(base_url=engine.url) as stranger:
        assert stranger.get(kind.ready_path).status_code == 200
        for method, path in (("POST", CHAT), ("GET", kind.models_path)):
            assert stranger.request(method, path, json={}).status_code == 401, path
    assert family
    assert not any(key in " ".join(process.cmdline()) for process in family)
    assert key not in engine.log_path.read_text()


@pytest.mark.all_engines
def test_vllm_on_a_port_has_a_key_and_its_adapter_from_the_start(tmp_path: Path) -> None:
    """The one that all share has neither. It answers by either name."""
    with closing(Kept("vllm", make_adapter(tmp_path / "loud", 8, 1))) as one:
        engine = one.engine()
        test_it_starts_as_it_was_told(engine)
        with engine.client() as direct:
            answers = [direct.post(CHAT, json=ask(engine, model=name)) for name in (engine.model, ADAPTER)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 2


# --- what a client may rely on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKS)
async def test_conformance(engine: RealEngine, name: str) -> None:
    check, declared = CHECKS[name], ENGINES[engine.kind].capabilities
    async with subject_of(behind(engine), engine.model, ADAPTER, LENGTHS.get(engine.kind, 2048)) as subject:
        result = await run_check(check, subject)
    expected = Verdict.NOT_OFFERED if check.needs & ~declared else Verdict.PASSED
    assert (result.verdict, "" if expected is Verdict.NOT_OFFERED else result.detail) == (expected, "")


async def test_it_says_what_it_cannot_do(engine: RealEngine, gateway: Gateway) -> None:
    """A path that its kind does not have is refused in the words every kind has, and never asked of it."""
    asked: dict[str, dict[str, Any]] = {
        "/v1/embeddings": {"input": QUESTION},
        "/v1/rerank": {"query": QUESTION, "documents": ["a"]},
        "/v1/score": {"text_1": QUESTION, "text_2": "a"},
    }
    for path, body in asked.items():
        answer = await gateway.ask({"model": engine.model, **body}, path)
        assert 400 <= answer.status < 500, (path, answer.body)
        assert error_of(answer)["type"] == "invalid_request_error"
        if path not in ENGINES[engine.kind].paths:
            assert error_of(answer)["code"] == "unsupported_operation"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_client_that_leaves_frees_the_engine(
    engine: RealEngine, gateway: Gateway, connect: Connect, stream: bool
) -> None:
    client = await connect(gateway.url)
    client.post(CHAT, endless(engine, stream=stream), AUTH)
    await busy(engine, running=1, waiting=0)
    await client.close()
    await free(engine)
    assert (await gateway.line())["outcome"] == "client_gone"


# --- adapters and caches, past the gateway ----------------------------------------------------------------------


def test_adapters_come_and_go_while_it_runs(engine: RealEngine, tmp_path: Path) -> None:
    """Loaded, listed, answering as neither its base nor another does, unloaded; each may be said twice."""
    kind = ENGINES[engine.kind]
    directory = make_adapter(tmp_path / "other", 8, 2, dtype="BF16")
    load, unload = kind.load_adapter("other@2", str(directory)), kind.unload_adapter("other@2")
    assert (load is not None and unload is not None) is (Capability.ADAPTER_LOADING in kind.capabilities)
    if load is None or unload is None:
        return
    missing = kind.load_adapter("bad", str(tmp_path / "missing"))
    assert missing is not None
    with engine.client() as direct:

        def told(call: Call) -> EngineError | None:
            answer = direct.request(call.method, call.path, content=call.body, headers=JSON)
            return kind.read_adapter_answer(answer.status_code, answer.content)

        def says(target: Target) -> str | None:
            fields = {name: msgspec.Raw(json.dumps(value).encode()) for name, value in ask(engine).items()}
            answer = direct.post(CHAT, content=kind.prepare(CHAT, fields, Dispatch(target, False)), headers=JSON)
            return str(answer.json()["choices"][0]["message"]["content"]) if answer.status_code == 200 else None

        assert (told(load), told(load)) == (None, None)
        listed = kind.read_models(direct.get(kind.models_path).content)
        assert {(model.name, model.base) for model in listed} == {
            (engine.model, None),
            (ADAPTER, engine.model),
            ("other@2", engine.model),
        }
        answers = [says(kind.target(*names)) for names in ((engine.model,), (ADAPTER, engine.model))]
        answers.append(says(kind.target("other@2", engine.model)))
        assert None not in answers
        assert len(set(answers)) == 3
        assert (told(unload), told(unload)) == (None, None)
        assert told(missing) is not None
        assert says(kind.target("bad", engine.model)) is None


def test_a_model_that_it_does_not_know(engine: RealEngine) -> None:
    """It is refused, or, as is then declared, answered by another model: it is asked only for what it lists."""
    with engine.client() as direct:
        answer = direct.post(CHAT, json=ask(engine, model="no-such-model", max_tokens=1))
    checked = Capability.MODELS_CHECKED in ENGINES[engine.kind].capabilities
    assert (answer.status_code == 200) is not checked


def test_a_salt_keeps_prefix_caches_apart(engine: RealEngine) -> None:
    kind = ENGINES[engine.kind]
    if Capability.CACHE_SALT not in kind.capabilities:
        # Nobody's prompts are cached unless its operator asks for that: nothing is shared.
        assert not kind.unsalted_paths
    with engine.client() as direct:

        def cached(salt: str) -> int:
            fields = {"model": msgspec.Raw(b'""'), "prompt": msgspec.Raw(json.dumps(PROMPT).encode())}
            fields["max_tokens"] = msgspec.Raw(b"1")
            dispatch = Dispatch(kind.target(engine.model), ask_usage=False, cache_salt=salt)
            body = kind.prepare("/v1/completions", fields, dispatch)
            usage = direct.post("/v1/completions", content=body, headers=JSON).json()["usage"]
            return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)

        first, again, other = cached("team a"), cached("team a"), cached("team b")
    assert (first, other) == (0, 0)
    assert (again > 100) is (Capability.CACHE_SALT in kind.capabilities)


# --- overload ----------------------------------------------------------------------------------------------------


async def test_overload(
    kept: Keeper, engine: RealEngine, gateway: Gateway, start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    """A full engine's refusal is a 503 that says when to come again; beside another engine it is not seen at all.

    One whose queue has no bound lets the request wait.
    """
    upstream.always(STREAM, path=CHAT)
    both = await start_gateway(behind(engine), serving(upstream, models={engine.model: engine.model}))
    bounded = Capability.BOUNDED_QUEUE in ENGINES[engine.kind].capabilities
    async with AsyncExitStack() as stack:
        for number in range(RUNNING + QUEUED):
            await keep_busy(engine, gateway, stack)
            if bounded:
                # One after the other: those that come before any is taken up wait too, and would be too many.
                await busy(engine, running=min(number + 1, kept.running), waiting=max(number + 1 - kept.running, 0))
        if bounded:
            await refused_when_alone(engine, gateway)
            answers = [await both.ask(ask(engine, stream=True)) for _ in range(4)]
            assert [(answer.status, answer.complete) for answer in answers] == [(200, True)] * 4
        else:
            await busy(engine, running=kept.running, waiting=0)
            late = asyncio.create_task(gateway.ask(ask(engine)))
    await free(engine)
    if not bounded:
        assert (await late).status == 200


async def keep_busy(engine: RealEngine, gateway: Gateway, stack: AsyncExitStack) -> None:
    """Send a request whose answer does not end before the stack does."""
    client = await stack.enter_async_context(await RawClient.connect(gateway.url))
    client.post(CHAT, endless(engine, stream=True), AUTH)


async def refused_when_alone(engine: RealEngine, gateway: Gateway) -> None:
    for path, body in everywhere(engine).items():
        for stream in (False, True):
            answer = await gateway.ask({**body, "stream": stream}, path)
            told = (answer.status, answer.header("content-type"), answer.header("retry-after"))
            assert told == (529 if path == "/v1/messages" else 503, "application/json", "1"), (path, answer.body)


# --- its end -----------------------------------------------------------------------------------------------------


async def begun(engine: RealEngine, gateway: Gateway, connect: Connect, **fields: Any) -> RawClient:
    """Return a client whose stream has begun."""
    client = await connect(gateway.url)
    client.post(CHAT, ask(engine, stream=True, ignore_eos=True, **fields), AUTH)
    assert (await client.head()).status == 200
    await client.event()
    return client


async def test_drain(engine: RealEngine, gateway: Gateway, connect: Connect) -> None:
    """Told to stop, the gateway lets a stream end and begins nothing new; the engine is then idle."""
    client = await begun(engine, gateway, connect, max_tokens=60)
    gateway.replica.stop()
    stopped = asyncio.create_task(gateway.replica.until_stopped())
    assert (await client.events())[-1] == DONE
    await stopped
    assert gateway.lines("stopped")[0]["cut_off"] == 0
    with pytest.raises(OSError):
        await RawClient.connect(gateway.url)
    await free(engine)


@pytest.mark.ends_the_engine
async def test_killed(engine: RealEngine, gateway: Gateway, connect: Connect) -> None:
    """`kill -9`: a stream that has begun ends with an error event, what comes after is refused, no process is left."""
    family = engine.family()
    client = await begun(engine, gateway, connect, max_tokens=1000)
    psutil.Process(engine.pid).kill()
    error = json.loads((await client.events())[-1].removeprefix(b"data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "engine_failed")
    refused = await gateway.ask(ask(engine))
    assert (refused.status, error_of(refused)["type"]) in ((502, "server_error"), (503, "service_unavailable_error"))
    await asyncio.to_thread(gone, family)


def gone(family: list[psutil.Process]) -> None:
    """Wait until none of these processes lives."""
    _, alive = psutil.wait_procs(family, timeout=ANSWER_WITHIN)
    assert alive == []
