"""A real vLLM, installed and started as ``forebay serve`` does it, does what the rest of Forebay relies on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from engines.devices import Device
from engines.environments import find_environment, recipe_for
from engines.launch import process_environment
from engines.minding import Minder, MinderError
from engines.models import prepare_model
from engines.vllm import Vllm
from tests.support.real_engine import RealEngine, data_directory, engine_port, prepared, spec_for

pytestmark = pytest.mark.real_engine


@pytest.fixture
def client(vllm_engine: RealEngine) -> Any:
    with vllm_engine.client() as client:
        yield client


def chat(vllm_engine: RealEngine, text: str, **more: Any) -> dict[str, Any]:
    return {"model": vllm_engine.model, "messages": [{"role": "user", "content": text}], "temperature": 0, **more}


def test_the_packaged_model_answers(vllm_engine: RealEngine, client: httpx.Client) -> None:
    """Converted weights, tokenizer and chat template together: a wrong one of them would not know this."""
    body = chat(vllm_engine, "What is the capital of France?", max_tokens=20)
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("The capital of France is Paris.", "stop")


def test_logprobs_need_no_compiler_and_hold_nobody_up(vllm_engine: RealEngine, client: httpx.Client) -> None:
    """vLLM compiles a helper for the first of these unless told not to: 16 s, or its end where there is no compiler."""
    body = chat(vllm_engine, "Count to three.", max_tokens=4, logprobs=True, top_logprobs=2)
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    tokens = answer.json()["choices"][0]["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in tokens] == [2, 2, 2, 2]
    assert psutil.Process(vllm_engine.pid).environ()["TORCHDYNAMO_DISABLE"] == "1"


def test_the_tokens_found_in_the_cache_are_told(vllm_engine: RealEngine, client: httpx.Client) -> None:
    body = chat(vllm_engine, "Say nothing. " * 60, max_tokens=1)
    for _ in range(2):
        usage = client.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 100


def test_the_context_is_as_long_as_asked(vllm_engine: RealEngine, client: httpx.Client) -> None:
    [model] = client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("smollm2-135m-instruct", 2048)


def test_all_its_processes_are_in_the_minder_s_reach(vllm_engine: RealEngine) -> None:
    """vLLM is three processes and more; each is a descendant of the agent, which ends them all."""
    leader = psutil.Process(vllm_engine.pid)
    agent, keeper, *_ = leader.parents()
    for one in (agent, keeper):
        assert "minder.py" in " ".join(one.cmdline())
    assert len(leader.children(recursive=True)) >= 2
    assert os.getsid(leader.pid) == keeper.pid


def test_a_prepared_machine_prepares_nothing() -> None:
    environment, model = prepared()
    assert environment.install_seconds is None
    assert model.prepare_seconds is None
    assert find_environment(recipe_for("vllm", Device.CPU), data_directory()) == environment


async def test_a_model_that_does_not_exist_is_told_with_vllm_s_own_words(tmp_path: Path) -> None:
    """Whoever mistypes a model must not have to search a log of a hundred lines."""
    environment, _ = prepared()
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    files = prepare_model(str(tmp_path), data_directory(), environment)
    spec = spec_for(files, engine_port())
    engine = Vllm()
    minder = Minder(
        "vllm",
        engine.command_line(spec, environment.python),
        environment=process_environment(engine, spec),
        address=spec.address,
        log_path=tmp_path / "engine.log",
    )
    await minder.start()
    with pytest.raises(
        MinderError, match=r"vllm ended by itself after \d+ s \(exit code 1\): .* model type `no-such-arch"
    ):
        await minder.wait_ready(300)
    await minder.stop()
