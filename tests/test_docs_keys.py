"""What docs/keys.md tells to type works, in the order it stands there; the calls it lists are those there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from psycopg import pq

from gateway.api.manage import MANAGE
from gateway.state.database import open_database
from tests.support.command import done, forebay, home

__all__ = ["home"]

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "keys.md").read_text()
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_command_of_the_page_works_in_its_order() -> None:
    blocks = _FENCE.findall(PAGE)
    assert [language for language, _ in blocks] == ["sh", "yaml", "sh", "sh"]
    Path("keys.yaml").write_text(blocks[1][1])
    lines = (blocks[0][1] + blocks[2][1]).splitlines()
    for program, *words in filter(None, (shlex.split(line, comments=True) for line in lines)):
        result = forebay(*words)
        assert program == "forebay"
        assert result.exit_code == (2 if words[0] == "diff" else 0), (words, result.output)
    assert "search-frontend" in done("keys", "list", "--state", "live")


def test_its_url_is_one() -> None:
    (url,) = re.findall(r"FOREBAY_STATE__URL='(.*)'", PAGE)
    engine = open_database(url)
    assert {*engine.url.query} <= {known.keyword.decode() for known in pq.Conninfo.get_defaults()}


def test_the_calls_of_the_page_are_those_there_are() -> None:
    told = {(method, path) for method, path in re.findall(r"^\| `([A-Z]+) (/admin[^`?]*)", PAGE, re.MULTILINE)}
    there = {
        (method, path.replace(":path", ""))
        for route in MANAGE.routes
        for method in getattr(route, "methods", ())
        for path in [getattr(route, "path", "")]
    }
    assert told == there


def test_its_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)", PAGE)
    assert targets
    assert all((Path(__file__).resolve().parents[1] / "docs" / target).exists() for target in targets)
