"""The header that tells how a request was routed holds whatever there is to tell, and never more than it may."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import unquote

from hypothesis import given
from hypothesis import strategies as st

from gateway.headers import model_line, to_pairs
from gateway.metrics import Metrics
from gateway.policy.routing import Choice, Scored
from gateway.serving.debug import LONGEST_NAME, MOST, route_line
from gateway.serving.ticket import Attempt, Ticket

NAME = st.text(min_size=1, max_size=200)


@dataclass(frozen=True)
class Named:
    name: str


@given(names=st.lists(NAME, min_size=1, max_size=8), model=NAME, failed=st.lists(NAME, max_size=6))
def test_it_is_one_line_of_ascii_within_its_bound(names: list[str], model: str, failed: list[str]) -> None:
    ticket = Ticket(Metrics(1), lambda *told: None, "req_1", "/", 0.0)
    ticket.waited = 2.5
    ends: list[Any] = [Named(name) for name in names]
    scored = tuple(Scored(end, float(place), 0.1, 0.5, 3, False) for place, end in enumerate(ends))
    choice = cast(Any, Choice(ends[0], 10, 3, 7, True, scored))
    ticket.tried = [Attempt(name, 0.0, 1, None, False, cause="broken") for name in failed]
    ticket.tried.append(Attempt(names[0], 0.0, 1, choice, False))
    ((header, value),) = to_pairs(route_line(ticket, model))
    assert header == b"x-forebay-route"
    assert len(value) <= MOST
    told = json.loads(value)
    assert value.isascii()
    assert (told["model"], told["endpoint"]) == (model[:LONGEST_NAME], names[0][:LONGEST_NAME])
    shown = [one["endpoint"] for one in told["candidates"]]
    assert shown == [name[:LONGEST_NAME] for name in names][: len(shown)]
    assert len(shown) + told.get("left_out", 0) == len(names)


@given(model=NAME)
def test_a_models_name_fits_a_header_whatever_it_is(model: str) -> None:
    ((header, value),) = to_pairs(model_line(model))
    assert header == b"x-forebay-model"
    assert value.isascii()
    assert not set(value) & set(b"\r\n\0 ")
    assert unquote(value.decode()) == model
