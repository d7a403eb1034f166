"""`forebay keys`, `tenants`, `organisations` and `audit`: what is typed and what comes out."""

from __future__ import annotations

import gc
import json
import os
import pwd
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import done, forebay, home, refused
from tests.support.databases import Postgresql

__all__ = ["home"]


def shown(key: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done("keys", "show", key, "--json"))
    return found


def test_a_key_is_rotated_by_name_and_each_key_is_told_once() -> None:
    old = done("keys", "create", "--name", "alice", "--team", "research", "--max-tokens", "5")
    result = forebay("keys", "rotate", "alice", "--overlap", "1h")
    new = result.stdout.strip()
    assert re.fullmatch(r"fb-[0-9a-f]{12}-\w{43}", new)
    old_id, new_id = old.split("-")[1], new.split("-")[1]
    assert f"{old_id} works until 20" in result.stderr
    assert (shown(new_id)["tenant"], shown(new_id)["caps"], shown(new_id)["replaces"]) == (
        "research", {"max_tokens": 5}, old_id,
    )  # fmt: skip
    assert refused("keys", "rotate", "alice").startswith("several keys are named 'alice': ")
    assert refused("keys", "rotate", new_id, "--overlap", "soon").startswith("--overlap soon: should be a duration")
    for text in (done("keys", "list"), done("keys", "show", old_id), done("audit", "--json")):
        assert old.rpartition("-")[2] not in text
        assert new.rpartition("-")[2] not in text


def test_an_update_changes_what_is_given_alone() -> None:
    done("keys", "create", "--name", "alice", "--model", "m", "--max-tokens", "5", "--n", "2", "--trust-domain", "d")
    changed = done(
        "keys", "update", "alice", "--tenant", "t", "--n", "0", "--context", "9", "--limits", "{requests: 60/m}"
    )
    now = shown("alice")
    assert changed == f"{now['id']} (alice) is changed"
    assert (now["tenant"], now["models"], now["caps"], now["limits"], now["trust_domain"]) == (
        "t", ["m"], {"max_tokens": 5, "context": 9}, {"requests": [{"rate": "60/m"}]}, "d",
    )  # fmt: skip
    done("keys", "update", "alice", "--tenant", "", "--limits", "none", "--trust-domain", "", "--expires", "2030-01-31")
    now = shown("alice")
    assert (now["tenant"], now["limits"], now["trust_domain"]) == ("alice", None, None)
    assert now["expires"] == "2030-01-31T00:00:00+00:00"
    assert done("keys", "update", "alice", "--model", "m") == f"{now['id']} (alice) was so already"
    assert refused("keys", "update", "alice").startswith("nothing to change: say what")
    assert refused("keys", "update", "alice", "--limits", "60").startswith("--limits: should be a mapping")
    assert refused("keys", "update", "alice", "--limits", "{request: 60/m}").startswith(
        "limits.request: unknown key; did you mean limits.requests?"
    )


def test_a_key_ends_when_it_is_told_to() -> None:
    public_id = done("keys", "create", "--name", "alice").split("-")[1]
    before = datetime.now(UTC)
    assert done("keys", "expire", "alice", "30d").startswith(f"{public_id} (alice) ends 20")
    end = datetime.fromisoformat(shown("alice")["expires"])
    assert before + timedelta(days=30) <= end <= datetime.now(UTC) + timedelta(days=30)
    done("keys", "expire", "alice", "now")
    assert shown("alice")["state"] == "expired"
    assert done("keys", "expire", "alice", "never") == f"{public_id} (alice) never ends"
    assert shown("alice")["state"] == "live"
    assert refused("keys", "expire", "alice", "soon").startswith("WHEN soon: should be a time such as")


def test_a_key_is_shown_line_by_line_with_what_is_said_of_it() -> None:
    Path("forebay.yaml").write_text("keys: [{name: alice, key: k, models: [a, b*]}]\n")
    lines = [line.split(None, 1) for line in done("keys", "show", "alice").splitlines()]
    assert lines == [
        ["name:", "alice"], ["tenant:", "alice"], ["models:", "a, b*"], ["admin:", "False"], ["state:", "live"],
        ["source:", "file"],
    ]  # fmt: skip
    for words in (
        ("rotate", "alice"),
        ("update", "alice", "--n", "1"),
        ("expire", "alice", "now"),
        ("revoke", "alice"),
    ):
        assert refused("keys", *words).startswith("key 'alice' is declared in the configuration file, which wins")


def test_lists_are_cut_by_tenant_and_state() -> None:
    done("keys", "create", "--name", "a", "--tenant", "t")
    done("keys", "create", "--name", "b")
    done("keys", "revoke", "b")

    def names(*options: str) -> list[str]:
        return [row["name"] for row in json.loads(done("keys", "list", "--json", *options))]

    assert (names(), names("--team", "t"), names("--state", "revoked")) == (["a", "b"], ["a"], ["b"])
    assert forebay("keys", "list", "--state", "dead").exit_code == 2


def test_tenants_and_organisations() -> None:
    assert refused("tenants", "set", "search", "--organisation", "acme").startswith("no organisation 'acme'")
    assert done("organisations", "set", "acme", "--tenants", "{tokens: 1M/m}") == "organisation acme is set"
    done("tenants", "set", "search", "--organisation", "acme", "--keys", "{concurrent: 4}")
    done("tenants", "set", "search", "--limits", "{requests: 60/m}")
    (row,) = json.loads(done("tenants", "list", "--json"))
    assert (row["organisation"], row["limits"], row["keys"]) == (
        "acme", {"requests": [{"rate": "60/m"}]}, {"concurrent": 4},
    )  # fmt: skip
    assert done("tenants", "list").splitlines()[1].split(None, 2) == [
        "search", "acme", '{"limits": {"requests": [{"rate": "60/m"}]}, "keys": {"concurrent": 4}}  database',
    ]  # fmt: skip
    assert refused("tenants", "set", "search", "--keys", "{concurent: 4}").startswith(
        "keys.concurent: unknown key; did you mean keys.concurrent?"
    )
    assert refused("organisations", "delete", "acme").endswith("while tenants belong to it: search")
    done("tenants", "set", "search", "--organisation", "", "--keys", "none")
    assert json.loads(done("tenants", "list", "--json"))[0]["keys"] == {}
    assert done("organisations", "delete", "acme") == "organisation acme is deleted"
    assert done("tenants", "delete", "search") == "tenant search is deleted"
    assert done("organisations", "list").split() == ["name", "limits", "from"]


def test_the_audit_names_the_user_and_what_changed() -> None:
    public_id = done("keys", "create", "--name", "alice").split("-")[1]
    done("keys", "update", "alice", "--n", "2")
    done("organisations", "set", "acme")
    head, *rows = [re.split(r" {2,}", line.strip()) for line in done("audit").splitlines()]
    who = f"local command ({pwd.getpwuid(os.getuid()).pw_name})"
    assert head == ["time (UTC)", "who", "did", "name", "what"]
    assert [row[1:] for row in rows] == [
        [who, "create organisation", "acme"],
        [who, "update key", "alice", 'caps: {} → {"n": 2}'],
        [who, "create key", "alice", public_id],
    ]
    entries = json.loads(done("audit", "--json", "--kind", "key", "--name", "alice", "--since", "1h", "--limit", "1"))
    assert [entry["action"] for entry in entries] == ["update"]
    assert json.loads(done("audit", "--json", "--since", "2099-01-01")) == []


def test_commands_work_on_a_server_s_database(postgresql: Postgresql, monkeypatch: pytest.MonkeyPatch) -> None:
    postgresql.empty()
    monkeypatch.setenv("FOREBAY_STATE__URL", postgresql.url)
    public_id = done("keys", "create", "--name", "alice", "--expires", "9999-12-31").split("-")[1]
    assert [row["id"] for row in json.loads(done("keys", "list", "--json"))] == [public_id]
    assert done("keys", "revoke", "alice") == f"revoked {public_id} (alice)"
    assert [row["action"] for row in json.loads(done("audit", "--json"))] == ["revoke", "create"]
    assert done("usage", "--rows", "--csv", "-").startswith("request_id,at,day,")
    gc.collect(1)  # a connection left open says so now
    postgresql.go_away()
    try:
        assert "check that it is running" in refused("keys", "list")
    finally:
        postgresql.come_back()
