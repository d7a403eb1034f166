"""A model's files: the packaged model is converted once and completely, others are taken as they are."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from engines import models
from engines.environments import EngineEnvironment
from engines.models import PACKAGED, ModelFiles, PackagedModel, prepare_model
from engines.steps import EngineSetupError, Step
from tests.engines.conftest import FakeUv

GGUF = "the weights"
TOY = PackagedModel(
    name="toy-model",
    requirement="toy-package==1",
    file="toy/toy.gguf",
    sha256=hashlib.sha256(GGUF.encode()).hexdigest(),
    license_file="toy-1.dist-info/LICENSE",
    needed_bytes=1000,
)
CONVERT = """#!/bin/sh
# $1 is the script, $2 the source, $3 the target.
echo "reading the weights"
echo "a warning of some library"
mkdir "$3" && cp "$2" "$3/model.safetensors" && echo '{}' > "$3/config.json"
"""


class _Usage:
    """A disk with less room than the toy model needs."""

    free = 999


@pytest.fixture
def environment(tmp_path: Path) -> EngineEnvironment:
    """An engine's environment whose Python is a script that converts by copying."""
    made = EngineEnvironment(tmp_path / "environment")
    made.python.parent.mkdir(parents=True)
    made.python.write_text(CONVERT)
    made.python.chmod(0o755)
    return made


@pytest.fixture
def toy(fake_uv: FakeUv, monkeypatch: pytest.MonkeyPatch) -> FakeUv:
    """The toy model is a packaged one, and the index has its package."""
    monkeypatch.setattr(models, "PACKAGED", {TOY.name: TOY})
    monkeypatch.setattr("engines.environments.find_uv", lambda _: fake_uv.path)
    fake_uv.content(**{TOY.file: GGUF, TOY.license_file: "Apache"})
    return fake_uv


@pytest.mark.usefixtures("watched")
def test_the_packaged_model_is_converted_once_and_then_reused(
    toy: FakeUv, environment: EngineEnvironment, tmp_path: Path
) -> None:
    steps: list[Step] = []
    files = prepare_model("toy-model", tmp_path, environment, steps.append)
    directory = tmp_path / "models" / "toy-model"
    assert (files.path, files.served_name, files.is_local) == (str(directory), "toy-model", True)
    assert files.prepare_seconds is not None
    assert (directory / "model.safetensors").read_text() == GGUF
    assert (directory / "LICENSE").read_text() == "Apache"
    assert [call[-1] for call in toy.calls()] == ["toy-package==1"]
    assert Step("prepare toy-model", "reading the weights") in steps
    assert all("warning" not in step.text for step in steps)
    assert sorted(path.name for path in directory.parent.iterdir()) == ["toy-model", "toy-model.lock", "toy-model.log"]

    assert prepare_model("toy-model", tmp_path, environment) == ModelFiles(str(directory), "toy-model")
    assert len(toy.calls()) == 1


@pytest.mark.parametrize("stamp", [None, "{", json.dumps({"source": "another", "converter": "one"})])
def test_a_model_without_a_stamp_that_fits_is_converted_again(
    toy: FakeUv, environment: EngineEnvironment, tmp_path: Path, stamp: str | None
) -> None:
    """It may be half a model, or one that an older converter made."""
    directory = tmp_path / "models" / "toy-model"
    (directory.parent / "toy-model.partial" / "model").mkdir(parents=True)
    directory.mkdir()
    (directory / "half").touch()
    if stamp is not None:
        (directory / "forebay.json").write_text(stamp)
    prepare_model("toy-model", tmp_path, environment)
    assert not (directory / "half").exists()
    assert (directory / "model.safetensors").read_text() == GGUF


@pytest.mark.usefixtures("watched")
def test_a_failed_conversion_leaves_the_model_that_was_there(
    toy: FakeUv, environment: EngineEnvironment, tmp_path: Path
) -> None:
    directory = tmp_path / "models" / "toy-model"
    directory.mkdir(parents=True)
    (directory / "old").touch()
    environment.python.write_text("#!/bin/sh\nmkdir $3\necho 'ImportError: no gguf'\nexit 1\n")
    log_path = tmp_path / "models" / "toy-model.log"
    expected = f"converting toy.gguf failed (exit code 1): ImportError: no gguf (the whole log: {log_path})"
    with pytest.raises(EngineSetupError, match=re.escape(expected)):
        prepare_model("toy-model", tmp_path, environment)
    assert [path.name for path in directory.iterdir()] == ["old"]


@pytest.mark.parametrize("content", ["other weights", None])
def test_weights_that_are_not_the_expected_ones_are_refused(
    toy: FakeUv, environment: EngineEnvironment, tmp_path: Path, content: str | None
) -> None:
    """Whoever controls an index that pip was told of must not choose what is served."""
    toy.content(**({TOY.file: content} if content else {"toy/else": ""}))
    with pytest.raises(EngineSetupError, match=r"another toy-package==1 than the one expected \(toy/toy\.gguf is "):
        prepare_model("toy-model", tmp_path, environment)
    assert not (tmp_path / "models" / "toy-model").exists()


def test_no_index_is_said_in_one_line(toy: FakeUv, environment: EngineEnvironment, tmp_path: Path) -> None:
    toy.plan(install=["error: no such package"])
    with pytest.raises(EngineSetupError, match=r"prepare toy-model failed: no such package \(the whole log: "):
        prepare_model("toy-model", tmp_path, environment)


def test_no_space_is_said_before_anything_is_fetched(
    toy: FakeUv, environment: EngineEnvironment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage())
    with pytest.raises(EngineSetupError, match="no room for toy-model"):
        prepare_model("toy-model", tmp_path, environment)
    assert toy.calls() == []


def test_a_directory_is_served_as_it_is(
    environment: EngineEnvironment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also through a link: it is the owner's way to say which one is current."""
    (tmp_path / "v7").mkdir()
    (tmp_path / "v7" / "config.json").write_text("{}")
    (tmp_path / "current").symlink_to("v7")
    monkeypatch.chdir(tmp_path)
    for named in ("current", "./current", str(tmp_path / "current")):
        assert prepare_model(named, tmp_path, environment) == ModelFiles(str(tmp_path / "current"), "current")


def test_a_directory_without_a_model_is_refused(environment: EngineEnvironment, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(EngineSetupError, match=r"empty holds no model: config\.json is missing"):
        prepare_model(str(tmp_path / "empty"), tmp_path, environment)


@pytest.mark.parametrize("path", ["/no/such/model", "./model", "~/model", "../model"])
def test_a_path_to_nowhere_is_not_taken_for_a_model_id(
    environment: EngineEnvironment, tmp_path: Path, path: str
) -> None:
    with pytest.raises(EngineSetupError, match="there is no model in"):
        prepare_model(path, tmp_path, environment)


def test_anything_else_is_an_id_of_the_model_hub(environment: EngineEnvironment, tmp_path: Path) -> None:
    files = prepare_model("Qwen/Qwen3-8B", tmp_path, environment)
    assert files == ModelFiles("Qwen/Qwen3-8B", "qwen3-8b")
    assert not files.is_local


def test_the_packaged_model_is_pinned() -> None:
    """By version and by what must be in it."""
    assert set(PACKAGED) == {"smollm2-135m-instruct"}
    for name, model in PACKAGED.items():
        assert name == model.name
        assert re.fullmatch(r"[a-z0-9-]+==[\d.]+", model.requirement)
        assert re.fullmatch(r"[0-9a-f]{64}", model.sha256)
