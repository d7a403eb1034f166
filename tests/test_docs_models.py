"""What docs/models.md tells, and docs/queue.md to configure, is taken by the gateway and does what it says of it."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from gateway.metrics import Metrics
from gateway.models import published
from gateway.policy.split import Arm
from gateway.settings import Settings
from gateway.state.usage import read_by
from tests.support.command import forebay
from tests.support.table import each

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "models.md").read_text()
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUEUE = (DOCS / "queue.md").read_text()
TREES = [yaml.safe_load(text) for language, text in _FENCE.findall(PAGE + QUEUE) if language == "yaml"]


@each("tree", TREES)
def test_every_example_is_a_configuration(tree: dict[str, object]) -> None:
    assert Settings.model_validate(tree) != Settings()


def test_the_first_is_what_the_page_says() -> None:
    names = published(Settings.model_validate(TREES[0]).models)
    support = names["support"]
    assert {support.pick(subject).model for subject in range(100)} == {"qwen3-8b", "qwen3-8b-next"}
    assert 5 <= sum(support.pick(subject).model == "qwen3-8b-next" for subject in range(100)) <= 20
    assert support.fallback == (Arm("qwen3-8b"), Arm("qwen3-4b"))
    assert names["qwen3-8b"].arms == (Arm("qwen3-8b"),)


def test_what_it_says_can_be_seen_is_there() -> None:
    metrics = Metrics(10)
    metrics.served("a", "b", "route", "ok", 1.0)
    metrics.mirror("b").outcomes["ok"] = 1
    metrics.mirror_shed("busy")
    families = {one.name: one for one in metrics.collect()}
    told = re.findall(r"`(forebay_\w+)\{([\w,]+)\}`", PAGE)
    assert told
    for name, labels in told:
        family = families[name]
        shown = [sample.labels.keys() - {"le"} for sample in family.samples]
        assert all(keys == {*labels.split(",")} for keys in shown), name
    asked = [read_by(by) for by in re.findall(r"usage --by ([\w,]+)", PAGE)]
    assert asked == [("settlement",), ("model", "served")]


def test_its_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)", PAGE)
    assert [target for target in targets if not (DOCS / target).exists()] == []


def test_its_command_is_one() -> None:
    (words,) = re.findall(r"`forebay (route explain[^`]*)`", PAGE)
    assert forebay(*words.split(), "--help").exit_code == 0
    assert forebay(*words.split(), "--keys", "--help").exit_code == 2
