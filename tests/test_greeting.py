"""A person sees that something happens, and gets a first request that works as pasted."""

from __future__ import annotations

import io
import json
import shlex

import pytest

from engines.steps import Step
from gateway.greeting import Display, Greeting, base_url
from gateway.settings import Settings
from tests.support.clock import ManualClock
from tests.support.table import each


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def settings(**listen: object) -> Settings:
    return Settings.model_validate({"listen": listen})


@each(
    ("listen", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"host": "0.0.0.0", "port": 80}, "http://127.0.0.1:80"),
        ({"host": "::"}, "http://[::1]:8000"),
        ({"host": "gateway.example"}, "http://gateway.example:8000"),
        ({"unix_socket": "/run/a b.sock"}, "http://localhost"),
        ({"tls": {"certificate": "/c", "private_key": "/k"}}, "https://127.0.0.1:8000"),
    ],
)
def test_the_address_is_one_that_works_from_here(listen: dict[str, object], url: str) -> None:
    assert base_url(settings(**listen)) == url


def words(greeting: Greeting) -> list[str]:
    """The command as the shell would read it."""
    return shlex.split(greeting.command().replace("\\\n", " "))


def test_the_command_names_key_and_model() -> None:
    greeting = Greeting(settings(), "fb-key", ("it's", "other"), ("A note.",))
    assert words(greeting)[:6] == [
        "curl",
        "http://127.0.0.1:8000/v1/chat/completions",
        "-H",
        "Authorization: Bearer fb-key",
        "-H",
        "Content-Type: application/json",
    ]
    body = json.loads(words(greeting)[-1])
    assert body["model"] == "it's"
    text = greeting.text()
    for said in ("http://127.0.0.1:8000/v1\n", "http://127.0.0.1:8001/metrics", "it's, other", "fb-key", "A note.\n"):
        assert said in text


def test_without_a_fresh_key_the_command_takes_the_one_of_the_environment() -> None:
    greeting = Greeting(settings(), None, ())
    assert '"Authorization: Bearer $OPENAI_API_KEY"' in greeting.command()
    assert json.loads(words(greeting)[-1])["model"] == "MODEL"
    assert "API key" not in greeting.text()


def test_where_everybody_is_let_in_there_is_no_key() -> None:
    assert "Authorization" not in Greeting(Settings(auth="none"), None, ("m",)).command()


def test_a_unix_socket_and_an_own_certificate_have_their_options() -> None:
    assert "--unix-socket '/run/a b.sock'" in Greeting(settings(unix_socket="/run/a b.sock"), None, ()).command()
    tls = {"certificate": "/c", "private_key": "/k"}
    assert "--insecure" in Greeting(settings(tls=tls), None, ()).command()
    assert "--insecure" not in Greeting(settings(), None, ()).command()


def test_elsewhere_than_on_a_terminal_each_new_thing_is_a_line(clock: ManualClock) -> None:
    said = io.StringIO()
    with Display(said, clock) as display:
        display.report(Step("install x", "looking up [packages]"))
        display.report(Step("install x", "looking up [packages]"))
        display.report(Step("install x", "installed", 3, 4))
        clock.advance(42)
        display.report(Step("start y", "loading"))
        clock.advance(7)
        display.done()
        display.say("something [else]")
        display.done()
    assert said.getvalue().splitlines() == [
        "install x: looking up [packages]",
        "install x: installed (3 of 4)",
        "install x: done in 42 s",
        "start y: loading",
        "start y: done in 7 s",
        "forebay: something [else]",
    ]


def test_what_was_interrupted_is_not_called_done(clock: ManualClock) -> None:
    said = io.StringIO()
    with Display(said, clock) as display:
        display.report(Step("install x", "downloading"))
        display.say("stopped")
    assert said.getvalue().splitlines() == ["install x: downloading", "forebay: stopped"]


def test_on_a_terminal_the_line_lives_and_leaves_only_its_end(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    said = Terminal()
    with Display(said, clock) as display:
        display.report(Step("install x", "downloading [torch]", 1, 2))
        clock.advance(3)
        display.done()
    text = said.getvalue()
    assert "install x: downloading [torch]" in text
    assert text.endswith("install x: done in 3 s\n")
