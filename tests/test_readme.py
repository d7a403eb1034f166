"""What README.md tells to type works as it stands there: every block, every command in the text, every link."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from gateway.app import endpoint_specs
from gateway.cli import app
from gateway.settings import Caps, KeySettings, Upstream, load
from tests.support import node
from tests.support.clock import ManualClock
from tests.support.command import CliRunner
from tests.support.gateway import ENGINE_MODEL, KEY, Gateway, running, serving, settings_for
from tests.support.real_engine import ANSWER_WITHIN, RealEngine, served, vllm_engine
from tests.support.recordings import load as load_recording
from tests.support.table import each
from tests.support.upstream import ScriptedUpstream, answer_as_recorded

__all__ = ["served", "vllm_engine"]

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"
"""Where the README's gateway listens; the test's own stands in for it, nothing else is changed."""
MODEL = "smollm2-135m-instruct"

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS: list[tuple[str, str]] = [(language, text) for language, text in _FENCE.findall(README)]
PROSE = _FENCE.sub("", README)


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCKS if found == language]


def commands() -> list[list[str]]:
    """Return every command of the ``sh`` blocks and of the text, as the shell would split it."""
    lines = [line for text in blocks("sh") for line in text.replace("\\\n", " ").splitlines()]
    spans = [span for span in re.findall(r"`([^`\n]+)`", PROSE) if span.startswith(("forebay ", "make "))]
    return [words for line in [*lines, *spans] if (words := shlex.split(line, comments=True))]


def test_every_block_is_of_a_kind_that_is_tried_here() -> None:
    assert {language for language, _ in BLOCKS} == {"sh", "yaml", "python", "js"}
    programs = {Path(words[0]).name for words in commands()}
    assert programs == {"make", "forebay", "curl"}


# --- commands ----------------------------------------------------------------------------------------------------


def parse(command: TyperGroup | TyperCommand, name: str, arguments: list[str]) -> None:
    """Take a command line apart as the command itself would, and stop before anything is done."""
    with command.make_context(name, arguments) as context:
        if isinstance(command, TyperGroup):
            rest = [*context._protected_args, *context.args]
            found_name, found, rest = command.resolve_command(context, rest)
            assert found_name is not None
            assert isinstance(found, TyperGroup | TyperCommand)
            parse(found, found_name, rest)


@cache
def whole_command() -> TyperGroup:
    command = get_command(app)
    assert isinstance(command, TyperGroup)
    return command


FOREBAY = [words for words in commands() if Path(words[0]).name == "forebay"]
MAKE = [words for words in commands() if words[0] == "make"]


@each("words", FOREBAY)
def test_a_forebay_command_exists(words: list[str]) -> None:
    parse(whole_command(), "forebay", words[1:])


def test_a_command_that_does_not_exist_would_be_noticed() -> None:
    for wrong in (
        ["srve"],
        ["serve", "--upstrem", "http://a"],
        ["keys", "make"],
        ["engines", "install", "--device", "x"],
    ):
        with pytest.raises(Exception, match=r"No such|is not one of"):
            parse(whole_command(), "forebay", wrong)


@each("words", MAKE)
def test_a_make_target_exists(words: list[str]) -> None:
    outer = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    dry = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, env=outer, capture_output=True, text=True, check=False)
    assert dry.returncode == 0, dry.stderr


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)", PROSE)
    assert targets
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []


# --- configuration -----------------------------------------------------------------------------------------------


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory with nothing in it, and no configuration from outside."""
    for name in [name for name in os.environ if name.startswith("FOREBAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FOREBAY_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", blocks("yaml"), ids=lambda text: text.partition("\n")[0])
def test_a_configuration_is_one(clean: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Accepted whole, with whatever it leads to: secrets in the environment, addresses, a key beside it."""
    file = clean / "forebay.yaml"
    file.write_text(text)
    for name in re.findall(r"_env: (\w+)", text):
        monkeypatch.setenv(name, f"value-of-{name.lower()}")
    settings = load(file)
    assert len(endpoint_specs(settings)) == len(settings.upstreams)
    assert all(len(key.digest()) == 32 for key in settings.keys)
    assert CliRunner().invoke(app, ["config", "check"]).output.endswith("forebay.yaml: fine\n")
    create, *_ = [words for words in FOREBAY if words[1:3] == ["keys", "create"]]
    made = CliRunner().invoke(app, create[1:])
    assert made.exit_code == 0, made.output
    assert made.stdout.startswith("fb-")


def test_the_variable_in_the_text_is_read(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [(name, value)] = re.findall(r"`(FOREBAY_\w+)=(\w+)`", PROSE)
    monkeypatch.setenv(name, value)
    assert str(load(None).listen.port) == value


# --- first requests ----------------------------------------------------------------------------------------------


async def said_by(command: list[str], *, stdin: str = "", cwd: Path | None = None) -> str:
    """Run a program with the test's key in ``$KEY`` and return what it printed."""
    program = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "KEY": KEY},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(ANSWER_WITHIN):
            output, complaints = await program.communicate(stdin.encode())
    except TimeoutError:
        program.kill()
        await program.wait()
        raise
    assert program.returncode == 0, complaints.decode()
    return output.decode()


async def run_curl(text: str) -> str:
    answer: dict[str, Any] = json.loads(await said_by(["bash", "-c", text]))
    assert answer["model"] == MODEL
    content: str = answer["choices"][0]["message"]["content"]
    return content


async def run_python(text: str) -> str:
    return await said_by([sys.executable, "-c", text])


async def run_js(text: str) -> str:
    await asyncio.to_thread(node.install)
    return await said_by(["node", "--input-type=module", "-"], stdin=text, cwd=node.PROGRAM)


[CURL] = [text for text in blocks("sh") if text.startswith("curl ")]
FIRST_REQUESTS = {
    "curl": (run_curl, [CURL]),
    "python": (run_python, blocks("python")),
    "js": (run_js, blocks("js")),
}


async def first_answers(gateway: Gateway, how: str) -> list[str]:
    """Run the README's first requests of one kind against a gateway that stands where it says."""
    run, texts = FIRST_REQUESTS[how]
    assert texts
    assert all(ADDRESS in text for text in texts)
    return [await run(text.replace(ADDRESS, gateway.url)) for text in texts]


@pytest.mark.parametrize("how", FIRST_REQUESTS)
async def test_the_first_request(how: str, tmp_path: Path) -> None:
    recorded = [load_recording("vllm", name) for name in ("chat_basic", "chat_stream_usage")]
    differs = {"model", "max_tokens", "temperature", "stream_options"}
    async with ScriptedUpstream() as upstream:
        upstream.always(answer_as_recorded(recorded, ignoring=differs))
        settings = settings_for("protocol", tmp_path, [serving(upstream, models={MODEL: ENGINE_MODEL})])
        async with running(settings, ManualClock()) as gateway:
            answers = await first_answers(gateway, how)
    assert all("Paris" in answer for answer in answers)


@pytest.mark.real_engine
@pytest.mark.parametrize("how", FIRST_REQUESTS)
async def test_the_first_request_on_a_real_engine(how: str, vllm_engine: RealEngine, tmp_path: Path) -> None:
    """The model's name is found by asking; what it says without a temperature is its own affair."""
    key = KeySettings(name="reader", key=SecretStr(KEY), caps=Caps(max_tokens=16))
    settings = settings_for("protocol", tmp_path, [Upstream(url=vllm_engine.url)], keys=(key,))
    async with running(settings, ManualClock()) as gateway:
        assert all(await first_answers(gateway, how))
