"""Two teams, each with an adapter of its own on the same engines: neither ever reads a word of the other's.

A simulated engine's answer begins with who gave it, adapter and version of its files: the mark that is looked for.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from engines.simulation.speech import read_identity
from gateway.settings import KeySettings, Upstream
from tests.engines.simulated.conftest import RunningEngine, Start, make_adapter
from tests.support.client import Response
from tests.support.gateway import CHAT, Gateway, StartGateway, face

__all__ = ["face"]

TEAMS = ("red", "blue")
OTHER = {"red": "blue", "blue": "red"}
COMPLETIONS, RESPONSES, MESSAGES = "/v1/completions", "/v1/responses", "/v1/messages"
PATHS = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)
QUESTIONS = tuple(f"Question {number} of everybody" for number in range(10))


def own(team: str) -> str:
    """Return the name the engines know a team's adapter by."""
    return f"{team}@1"


@dataclass(frozen=True, slots=True)
class House:
    """Two engines that serve both adapters, and the gateway in front of them."""

    engines: list[RunningEngine]
    gateway: Gateway


@pytest.fixture
async def house(start: Start, start_gateway: StartGateway, tmp_path: Path) -> AsyncIterator[House]:
    """Engines that batch a few requests at a time; a key for each team that may use its adapter only."""
    folders = {team: make_adapter(tmp_path / team, team) for team in TEAMS}
    named = [f"{own(team)}={folder}" for team, folder in folders.items()]
    arguments = ("--profile", "h100-8b", "--speed", "200", "--max-num-seqs", "16", "--faults", "--lora-modules", *named)
    engines = [await start(*arguments) for _ in range(2)]
    keys = tuple(KeySettings(name=team, key=SecretStr(f"fb-{team}"), models=(team,)) for team in TEAMS)
    models = {"base": "smollm2", **{team: own(team) for team in TEAMS}}
    upstreams = [Upstream(url=engine.url, engine="simulated", models=models) for engine in engines]
    yield House(engines, await start_gateway(*upstreams, keys=keys))


async def ask(gateway: Gateway, team: str, body: Any, path: str = CHAT) -> Response:
    return await gateway.ask(body, path, [("authorization", f"Bearer fb-{team}")])


def question(path: str, text: str, model: str, **more: Any) -> dict[str, Any]:
    """Return a request on a path; of forty tokens, so that all of the mark is in the answer."""
    messages = [{"role": "user", "content": text}]
    asked: dict[str, dict[str, Any]] = {
        CHAT: {"messages": messages, "max_tokens": 40},
        COMPLETIONS: {"prompt": text, "max_tokens": 40},
        RESPONSES: {"input": text, "max_output_tokens": 40},
        MESSAGES: {"messages": messages, "max_tokens": 40},
    }
    return {"model": model, **asked[path], **more}


def texts(value: Any) -> str:
    """Return every text in an answer, or in an event of a stream, one after the other."""
    if isinstance(value, list):
        return "".join(map(texts, value))
    if not isinstance(value, dict):
        return ""
    found = [one if isinstance(one, str) and name in ("content", "text", "delta") else texts(one)
             for name, one in value.items()]  # fmt: skip
    return "".join(found)


def said(answer: Response, path: str, stream: bool) -> str:
    """Return the text of an answer; of a stream what its parts make together."""
    assert (answer.status, answer.complete) == (200, True), answer.body
    if not stream:
        return texts(answer.json())
    lines = (line for event in answer.events() for line in event.splitlines() if line.startswith(b"data: {"))
    events = [json.loads(line.removeprefix(b"data: ")) for line in lines]
    if path == RESPONSES:
        # Its last events say the whole once more.
        events = [event for event in events if event["type"] == "response.output_text.delta"]
    return texts(events)


async def marks_in_a_crowd(gateway: Gateway) -> dict[str, list[str | None]]:
    """Ask everything for both teams at once, the same questions; return whose adapter each team was answered by."""
    crowd = list(product(TEAMS, PATHS, (False, True), QUESTIONS))
    # Teams that took turns would each have an engine for itself.
    random.Random(3).shuffle(crowd)
    answers = await asyncio.gather(
        *(ask(gateway, team, question(path, text, team, stream=stream), path) for team, path, stream, text in crowd)
    )
    marks: dict[str, list[str | None]] = {team: [] for team in TEAMS}
    for (team, path, stream, _), answer in zip(crowd, answers, strict=True):
        identity = read_identity(said(answer, path, stream))
        assert identity is not None, answer.body
        # The version is of the files: a name alone could be right and the weights another's.
        marks[team].append(identity.adapter and f"{identity.adapter} {identity.version}")
    return marks


async def test_nobody_is_answered_by_another_teams_adapter(house: House) -> None:
    """On every path that answers, whole and streamed, on both engines."""
    marks = await marks_in_a_crowd(house.gateway)
    asked = len(QUESTIONS) * len(PATHS) * 2
    for team in TEAMS:
        [only] = set(marks[team])
        assert only is not None
        assert only.startswith(f"{own(team)} ")
        assert marks[team].count(only) == asked
        assert not set(marks[team]) & set(marks[OTHER[team]])
    assert len({only.split()[1] for [only] in map(set, marks.values()) if only}) == len(TEAMS)
    await house.gateway.idle()
    served = {(line["tenant"], line["endpoint"]) for line in house.gateway.lines("request")}
    assert len(served) == len(TEAMS) * len(house.engines), "each team was served by each engine"


async def test_an_answer_by_another_teams_adapter_would_be_noticed(house: House) -> None:
    """Where one of two engines mixes adapters up, what is looked for above is there."""
    fault = {"kind": "impostor", "adapter": own("blue"), "match": own("red"), "rate": 1}
    assert (await house.engines[0].client.post("/faults", json=fault)).status_code == 200
    marks = await marks_in_a_crowd(house.gateway)
    assert set(marks["red"]) & set(marks["blue"])
    assert [len(set(marks[team])) for team in TEAMS] == [2, 1]


def spelt(other: str, mine: str) -> dict[str, Any]:
    """Return ways to name another team's adapter, as a value of ``model``."""
    return {
        "its public name": other,
        "the engine's own name": own(other),
        "with its base": f"smollm2:{own(other)}",
        "with its public base": f"base:{other}",
        "after one's own": f"{mine}:{other}",
        "the engine's after one's own": f"{mine}:{own(other)}",
        "another version of it": f"{other}@2",
        "capitals": other.upper(),
        "a space after it": f"{other} ",
        "a space before it": f" {other}",
        "a zero after it": f"{other}\0",
        "a zero before it": f"{mine}\0{other}",
        "a line end": f"{other}\n",
        "nothing wide": f"{other}\u200b",
        "wide letters": "".join(chr(ord(letter) + 0xFEE0) for letter in other),
        "as a path": f"../{other}",
        "as a path below": f"{mine}/../{other}",
        "percent": "".join(f"%{ord(letter):02x}" for letter in other),
        "any": "*",
        "both": f"{mine},{other}",
        "a list": [other],
        "an object": {"name": other},
    }


async def test_however_it_is_named_another_teams_adapter_stays_out_of_reach(house: House) -> None:
    """By any spelling, whole and streamed: refused, and in the refusal is no word of the other's adapter."""
    marks = (f"adapter={own('blue')}".encode(), b"version=")
    for model in spelt("blue", "red").values():
        for stream in (False, True):
            answer = await ask(house.gateway, "red", question(CHAT, "Hi", model, stream=stream))
            assert answer.status in (400, 403, 404), (model, answer.body)
            assert not any(mark in answer.body for mark in marks)
    assert [endpoint.connections.accepted for endpoint in house.gateway.replica.pool.endpoints] == [0, 0]


TWO_NAMES: dict[str, str | None] = {
    '"model":"red","model":"blue"': None,
    '"model":"red","mod\\u0065l":"blue"': None,
    '"model":"bl\\u0075e"': None,
    '"model":"red","lora_path":"blue@1"': None,
    '"model":"red","adapter_name":"blue@1"': None,
    '"model":"blue","model":"red"': "red",
    '"mod\\u0065l":"blue","model":"red"': "red",
    '"model":"red","lora_request":{"lora_name":"blue@1"},"adapter":"blue@1"': "red",
}
"""What a body says of models and adapters, and by whose adapter it is answered to team red; None: not at all."""


async def test_of_two_names_one_is_meant_and_that_one_is_checked(house: House) -> None:
    """What is authorised is what is sent: the last of two, whatever the first one was."""
    for names, meant in TWO_NAMES.items():
        body = f'{{{names},"messages":[{{"role":"user","content":"Hi"}}],"max_tokens":40}}'.encode()
        answer = await ask(house.gateway, "red", body)
        if meant is None:
            assert answer.status in (400, 403, 404), names
            assert b"version=" not in answer.body
            continue
        identity = read_identity(said(answer, CHAT, stream=False))
        assert identity is not None
        assert identity.adapter == own(meant), names
