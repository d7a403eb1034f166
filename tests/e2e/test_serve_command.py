"""`forebay serve` with a real engine, as ``make serve`` runs it: what it says, what can be pasted, how it ends.

Its engine is the session's engine: loading one takes as long as half the tests of it, and a second start would show
nothing more. So the command that is looked at here is the one whose engine all other tests of a real engine speak to
(``tests/support/real_engine.py``), and the test that presses Ctrl-C is the last of the session, wherever it stands.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.conftest import Measure
from tests.e2e.forwarder import forwarding
from tests.support.real_engine import ANSWER_WITHIN, RealEngine, data_directory, engine_leader, serves_again
from tests.support.real_engine import START_WITHIN as COMES_BACK_WITHIN
from tests.support.served import PROGRAM, Served
from tests.support.sockets import free_port

real_engine = pytest.mark.real_engine

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"
START_WITHIN = 60.0
"""Seconds for a gateway in front of engines that run; what it really takes is reported."""


def paste(served: Served) -> dict[str, object]:
    """Run the command that it tells to paste, and return the answer."""
    done = subprocess.run(
        ["bash", "-c", served.curl], capture_output=True, text=True, timeout=ANSWER_WITHIN, check=True
    )
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_it_is_what_make_serve_runs() -> None:
    """The same program with the same data directory; ports, log, keys and the engine's sizes are the tests' own."""
    outer = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    dry = subprocess.run(["make", "-n", "serve"], cwd=ROOT, env=outer, capture_output=True, text=True, check=True)
    assert dry.stdout.splitlines()[-1] == "exec .venv/bin/forebay serve"
    assert "\nexport FOREBAY_HOME ?= $(CURDIR)/.forebay\n" in (ROOT / "Makefile").read_text()


@real_engine
def test_it_says_what_it_does_and_then_how_to_begin(served: Served, measure: Measure) -> None:
    measure("forebay serve was ready", served.start_seconds)
    start = f"start local (vllm on cpu, {MODEL}): "
    phases = [line.removeprefix(start) for line in served.err.splitlines() if line.startswith(start)]
    assert phases[0] == "starting its program"
    assert {"reading the model's configuration", "starting the engine process", "loading weights"} < set(phases)
    assert re.fullmatch(r"done in \d+ s", phases[-1])
    assert f"Models: {MODEL}\n" in served.out
    assert re.search(r"^Started in \d+ s\. Ctrl-C stops everything\.$", served.out, re.MULTILINE)
    assert re.search(
        r"^Metrics and documentation: http://127\.0\.0\.1:\d+/metrics and /docs$", served.out, re.MULTILINE
    )


@real_engine
def test_the_pasted_command_works(served: Served) -> None:
    answer = paste(served)
    assert answer["model"] == MODEL
    assert answer["choices"]
    assert served.url in served.curl
    assert served.key in served.curl


@real_engine
def test_a_key_made_beside_it_is_known_without_a_restart(served: Served, tmp_path: Path, measure: Measure) -> None:
    command = [PROGRAM, "keys", "create", "--name", "later"]
    made = subprocess.run(
        command, cwd=tmp_path, env=served.environment, capture_output=True, text=True, timeout=START_WITHIN, check=True
    )
    began = time.monotonic()
    headers = {"authorization": f"Bearer {made.stdout.strip()}"}
    with httpx.Client(base_url=served.url) as client:
        while client.get("/v1/models", headers=headers).status_code == 401:
            assert time.monotonic() - began < START_WITHIN, "the key is not known"
    measure("forebay serve knew a new key", time.monotonic() - began)


@real_engine
def test_a_second_one_on_the_same_port_is_one_line(served: Served, tmp_path: Path) -> None:
    """Whoever types it twice is told so before anything is started."""
    port = int(served.url.rpartition(":")[2])
    with Served((), tmp_path, (port, free_port()), FOREBAY_HOME=str(data_directory())) as second:
        assert second.process.wait(START_WITHIN) == 1
    assert second.out == ""
    assert second.err == (
        f"forebay: port {port} of 127.0.0.1 is in use; stop the program that uses it or choose another port,"
        f" for example: forebay serve --port {port + 10}\n"
    )


@real_engine
def test_in_front_of_a_running_engine_an_address_is_all_it_needs(
    vllm_engine: RealEngine, tmp_path: Path, measure: Measure
) -> None:
    """Nothing is installed, the model is found by asking, and the first answer comes within a minute."""
    home = tmp_path / "home"
    with forwarding(vllm_engine) as (url, _):
        began = time.monotonic()
        command = Served(("--upstream", url), tmp_path, (free_port(), free_port()), FOREBAY_HOME=str(home))
        with command as served:
            served.wait_ready(START_WITHIN)
            answer = paste(served)
            measure("forebay serve --upstream gave its first answer", time.monotonic() - began)
            assert served.family() == [psutil.Process(served.process.pid)]
            assert served.interrupt() == 0
    assert f"Models: {MODEL}\n" in served.out
    assert answer["model"] == MODEL
    assert not (home / "engines").exists()


@pytest.mark.ends_the_engine
@real_engine
def test_an_engine_whose_worker_is_killed_comes_back(served: Served, vllm_engine: RealEngine, measure: Measure) -> None:
    """Near the end of the session, by its mark: this engine is another one afterwards."""
    leader = psutil.Process(vllm_engine.pid)
    before = [leader, *leader.children(recursive=True)]
    [core] = [process for process in before if process.cmdline()[0].startswith("VLLM::EngineCore")]
    question = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    began, refused_after, codes = time.monotonic(), None, set()
    core.kill()
    with httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {served.key}"}) as client:
        while True:
            answer = client.post("/v1/chat/completions", json=question, timeout=ANSWER_WITHIN)
            if answer.status_code != 200:
                refused_after = refused_after or time.monotonic() - began
                codes.add((answer.status_code, answer.json()["error"]["code"]))
            elif refused_after is not None:
                break
            assert time.monotonic() - began < COMES_BACK_WITHIN, (codes, served.err)
            time.sleep(0.2)
    measure("the gateway refused after a kill of vLLM's worker", refused_after)
    measure("vLLM served again after a kill of its worker", time.monotonic() - began)
    assert codes <= {(503, "server_is_overloaded"), (502, "engine_failed")}, codes
    told = [line for line in served.err.splitlines() if "local ended by itself after" in line]
    assert len(told) == 1
    assert "starting it again in 1 s" in told[0]
    assert engine_leader(served).pid != vllm_engine.pid
    assert [process for process in before if process.is_running()] == []
    [listed] = json.loads(
        subprocess.run(
            [PROGRAM, "engines", "list", "--json"],
            env=served.environment, capture_output=True, timeout=START_WITHIN, check=True,
        ).stdout
    )  # fmt: skip
    assert (listed["state"], listed["minder"]["restarts"]) == ("serving", 1)


@pytest.mark.ends_the_session
@real_engine
def test_ctrl_c_stops_everything_and_leaves_nothing(served: Served, vllm_engine: RealEngine, measure: Measure) -> None:
    """The last test of the session, by its mark: afterwards there is no engine any more."""
    serves_again(served)
    socket = Path(vllm_engine.url.removeprefix("unix:"))
    assert socket.exists()
    names = [" ".join(process.cmdline()) for process in served.family()]
    for what in ("forebay serve", "gateway.app", "minder.py", "vllm serve"):
        assert any(what in name for name in names), (what, names)
    began = time.monotonic()
    assert served.interrupt() == 0
    measure("forebay serve ended after Ctrl-C", time.monotonic() - began)
    assert [process.cmdline() for process in served.family()] == []
    assert not socket.exists()
    served.stop()
    said = served.err.splitlines()
    assert said[-2:] == ["forebay: stopping in order; Ctrl-C again ends it now", "forebay: stopped"]
    log = served.log_file.read_text()
    assert json.loads(log.splitlines()[-1])["event"] == "stopped"
    assert served.key not in log
