from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml

from gateway.settings import load as load_settings
from loadtests.scenarios.fleet import configuration
from loadtests.scenarios.lengths import FITS
from loadtests.scenarios.schedule import plan, share
from loadtests.scenarios.schema import BadScenarioError, Length, Scenario, find, gateway_part, load, names

README = (Path(__file__).parents[2] / "loadtests" / "scenarios" / "README.md").read_text()


@pytest.mark.parametrize("name", names())
def test_every_scenario_is_one_and_its_gateway_starts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREBAY_HOME", str(tmp_path))
    scenario = load(find(name))
    planned = plan(scenario)
    assert {one.klass for one in planned} == set(scenario.classes)
    assert {one.tenant for one in planned} == set(scenario.tenants)
    assert [one.at for one in planned] == sorted(one.at for one in planned)
    assert planned[-1].at < scenario.seconds
    file = tmp_path / "forebay.yaml"
    file.write_text(configuration(scenario, tmp_path, [20001, 20002]))
    settings = load_settings(file)
    assert {key.digest() for key in settings.keys} == {
        hashlib.sha256(secret.encode()).digest() for _, _, secret in scenario.secrets()
    }


def test_the_page_about_scenarios_names_all_and_shows_true_ones(tmp_path: Path) -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == set(names())
    blocks = re.findall(r"^```yaml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        file = tmp_path / "scenario.yaml"
        file.write_text(block)
        (tmp_path / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,10,20\n")
        assert plan(load(file))
    assert set(re.findall(r"`([a-z-]+-(?:input|output))`", README)) == set(FITS)


def told(**more: Any) -> dict[str, Any]:
    klass = {
        "arrivals": {"kind": "poisson", "rate": 5},
        "input": {"tokens": 5},
        "output": {"tokens": 5},
        "slo": {"ttft": "1s"},
        "tenants": {"shop": 3, "desk": 1},
    }
    base = {"name": "n", "about": "a", "seconds": "1m", "tenants": {"shop": {"keys": 2}, "desk": {}}}
    return {**base, "classes": {"chat": {**klass, **more}}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tenants": {"nobody": 1}}, "'nobody' is not one of tenants"),
        ({"input": {"tokens": 5, "fit": "lmsys-input"}}, "classes.chat.input: .*exactly one of"),
        ({"input": {"fit": "lmsys"}}, "there is no fit 'lmsys'; there are azure"),
        ({"speed": 3}, "classes.chat.speed: Extra inputs"),
        ({"path": "/v1/completions", "session": {"adds": {"tokens": 3}}}, "a session is a chat"),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(told(**change)))
    with pytest.raises(BadScenarioError, match=said):
        load(file)


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "classes: 3\n"])
def test_what_is_no_scenario_at_all(tmp_path: Path, text: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(BadScenarioError, match=r"wrong\.yaml"):
        load(file)
    with pytest.raises(BadScenarioError, match="there is no scenario 'nowhere'; there are abuser, chat"):
        find("nowhere")


def test_requests_are_shared_out_by_weight_and_the_same_each_time() -> None:
    scenario = Scenario.model_validate(told(arrivals={"kind": "poisson", "rate": 50}))
    planned = plan(scenario)
    assert planned == plan(scenario)
    counts = Counter(one.tenant for one in planned)
    assert counts["shop"] / counts["desk"] == pytest.approx(3, rel=0.15)
    assert len({one.key for one in planned if one.tenant == "shop"}) == 2
    parts = [share(planned, number, 3) for number in (1, 2, 3)]
    assert sorted((one for part in parts for one in part), key=lambda one: one.at) == planned


def test_a_class_is_drawn_the_same_whatever_else_there_is() -> None:
    alone = plan(Scenario.model_validate(told()))
    both = told()
    both["classes"]["code"] = both["classes"]["chat"]
    assert [one for one in plan(Scenario.model_validate(both)) if one.klass == "chat"] == alone


def test_lengths() -> None:
    import random

    chance = random.Random(1)
    fit = Length(fit="azure-conversation-input", least=10)
    drawn = [fit.draw(chance) for _ in range(4000)]
    assert median(drawn) == pytest.approx(757, rel=0.05)  # exp(6.63)
    assert min(drawn) >= 10
    assert max(drawn) == FITS["azure-conversation-input"].most
    assert {Length(uniform=(3, 5)).draw(chance) for _ in range(100)} == {3, 4, 5}
    assert Length(lognormal=(9.0, 0.1), most=100).draw(chance) == 100
    assert Length(tokens=7).draw(chance) == 7


def test_keys_are_the_scenarios_own_or_somebodys(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = Scenario.model_validate(told())
    before = list(scenario.secrets())
    assert [(tenant, number) for tenant, number, _ in before] == [("shop", 0), ("shop", 1), ("desk", 0)]
    monkeypatch.setenv("FOREBAY_LOAD_SECRET", "mine")
    assert not {secret for *_, secret in before} & {secret for *_, secret in scenario.secrets()}
    printed = yaml.safe_dump(gateway_part(scenario, plain_keys=False))
    assert not any(secret in printed for *_, secret in scenario.secrets())
    with_variable = Scenario.model_validate({**told(), "tenants": {"shop": {"key_env": "MINE"}, "desk": {}}})
    with pytest.raises(BadScenarioError, match="the variable MINE is not set"):
        list(with_variable.secrets())
    monkeypatch.setenv("MINE", "sk-own")
    assert next(with_variable.secrets()) == ("shop", 0, "sk-own")
