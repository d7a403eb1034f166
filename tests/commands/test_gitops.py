"""`forebay diff` and `forebay apply`: exit codes, what is told, and that nothing is done unasked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command import done, forebay, home, refused

__all__ = ["home"]

HASH = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"
FILE = f"""
tenants: {{search: {{limits: {{tokens: 3M/m}}}}}}
keys: [{{name: alice, tenant: search, sha256: {HASH}}}]
"""


@pytest.fixture(autouse=True)
def file(home: Path) -> Path:
    Path("keys.yaml").write_text(FILE)
    return Path("keys.yaml")


def names() -> list[str]:
    return [row["name"] for row in json.loads(done("keys", "list", "--json", "--state", "live"))]


def test_the_exit_code_of_diff_tells_a_pipeline() -> None:
    result = forebay("diff", "keys.yaml")
    assert (result.exit_code, result.stdout.splitlines()) == (2, [
        "+ tenant search", "    weight: 1.0", "    limits: {tokens: [{rate: 3M/m}]}",
        "+ key alice", "    tenant: search",
    ])  # fmt: skip
    assert names() == []
    done("apply", "keys.yaml", "--yes")
    result = forebay("diff", "keys.yaml")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no difference\n")
    for wrong in (("diff", "nowhere.yaml"), ("diff",), ("diff", "keys.yaml", "--prnue")):
        assert forebay(*wrong).exit_code == 1
    assert forebay("diff", "--help").exit_code == 0


def test_apply_asks_first_and_doing_it_twice_changes_nothing() -> None:
    result = forebay("apply", "keys.yaml", stdin="n\n")
    assert (result.exit_code, names()) == (1, [])
    assert result.stderr.endswith("forebay: nothing was changed\n")
    result = forebay("apply", "keys.yaml", stdin="y\n")
    assert (result.exit_code, names()) == (0, ["alice"])
    assert result.stderr.endswith("done: 2 changed\n")
    before = done("audit", "--json")
    assert forebay("apply", "keys.yaml").stderr == "no difference\n"
    assert done("audit", "--json") == before


def test_prune_removes_what_the_file_does_not_name(file: Path) -> None:
    done("keys", "create", "--name", "bob")
    done("apply", "keys.yaml", "--yes")
    assert names() == ["bob", "alice"]
    assert forebay("diff", "keys.yaml").exit_code == 0
    assert forebay("diff", "keys.yaml", "--prune").stdout.startswith("- key bob (")
    done("apply", "keys.yaml", "--prune", "--yes")
    assert names() == ["alice"]


def test_what_the_gateway_declares_itself_is_not_for_this_file() -> None:
    Path("forebay.yaml").write_text("keys: [{name: alice, key: k}]\n")
    for words in (("diff", "keys.yaml"), ("apply", "keys.yaml", "--yes")):
        assert refused(*words) == (
            "key 'alice' is declared in the gateway's configuration, which wins; take it out of one"
        )
