"""Reads the recorded exchanges under ``tests/recordings`` in both of their forms.

The forms are described in ``tests/recordings/README.md``. A recording is a value: bytes as the engine sent them, no
interpretation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

RECORDINGS = Path(__file__).resolve().parent.parent / "recordings"
ENGINES = ("vllm", "sglang", "lmdeploy")

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Recording:
    """One exchange with a real engine.

    ``body`` has no chunk framing. ``reads`` holds, for each read of the recording client's socket, the seconds since
    the request was sent and the bytes it brought; it is empty where they were not recorded (SGLang, LMDeploy).
    """

    engine: str
    name: str
    method: str
    path: str
    request_headers: Headers
    request_body: bytes
    status: int
    reason: str
    response_headers: Headers
    body: bytes
    is_stream: bool
    reads: tuple[tuple[float, int], ...]

    def __str__(self) -> str:
        """Return ``engine/name``, which pytest shows as the parameter's id."""
        return f"{self.engine}/{self.name}"

    def header(self, name: str) -> str | None:
        """Return the first response header of that name, in any case, or None."""
        return next((value for key, value in self.response_headers if key.lower() == name.lower()), None)

    def request_json(self) -> Any:
        """Return the request's body as JSON. Raises ``json.JSONDecodeError`` for the recordings of malformed bodies."""
        return json.loads(self.request_body)

    def json(self) -> Any:
        """Return the answer's body as JSON. Raises ``json.JSONDecodeError`` for streams and plain text."""
        return json.loads(self.body)

    def pieces(self) -> list[bytes]:
        """Cut the body where the engine cut it: at the recorded reads, else after each event, else not at all."""
        if self.reads and sum(size for _, size in self.reads) == len(self.body):
            ends = [sum(size for _, size in self.reads[: index + 1]) for index in range(len(self.reads))]
            return [self.body[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        return self.events() if self.is_stream else [self.body]

    def events(self) -> list[bytes]:
        """Cut a streamed body after each blank line; what follows the last one, if anything, is the last piece."""
        parts = self.body.split(b"\n\n")
        return [part + b"\n\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


@cache
def load(engine: str, name: str) -> Recording:
    """Return one recording, e.g. ``load("vllm", "chat_stream")``. Raises ``FileNotFoundError`` naming those there
    are."""
    folder = RECORDINGS / engine
    if (folder / f"{name}.meta.json").exists():
        return _load_three_files(engine, folder, name)
    if (folder / f"{name}.txt").exists():
        return _load_one_file(engine, name, (folder / f"{name}.txt").read_bytes())
    raise FileNotFoundError(f"no recording {name!r} of {engine}; there are: {', '.join(names(engine))}")


def names(engine: str) -> list[str]:
    """Return the names of every recording of an engine, sorted."""
    return sorted({path.name.split(".")[0] for path in (RECORDINGS / engine).iterdir()})


def all_recordings(engine: str | None = None, *, streams: bool | None = None) -> list[Recording]:
    """Return the recordings of one engine or of all, optionally only the streamed answers or only the others."""
    engines = ENGINES if engine is None else (engine,)
    found = [load(one, name) for one in engines for name in names(one)]
    return [recording for recording in found if streams is None or recording.is_stream is streams]


def _load_three_files(engine: str, folder: Path, name: str) -> Recording:
    request = json.loads((folder / f"{name}.req.json").read_bytes())
    meta = json.loads((folder / f"{name}.meta.json").read_bytes())
    bodies = [
        folder / f"{name}{suffix}" for suffix in (".json", ".sse", ".txt") if (folder / f"{name}{suffix}").exists()
    ]
    if len(bodies) != 1:
        raise ValueError(f"recording {engine}/{name} needs exactly one body file, it has {len(bodies)}")
    raw = request["raw_body"]
    if raw is None and request["body"] is not None:
        raw = json.dumps(request["body"])
    headers = tuple((key, value) for key, value in meta["headers"])
    return Recording(
        engine=engine,
        name=name,
        method=request["method"],
        path=request["path"],
        request_headers=tuple(request["headers"].items()),
        request_body=(raw or "").encode(),
        status=meta["status"],
        reason=meta["reason"],
        response_headers=headers,
        body=bodies[0].read_bytes(),
        is_stream=_is_event_stream(headers),
        reads=tuple((seconds, size) for seconds, size in meta["reads"]),
    )


def _load_one_file(engine: str, name: str, data: bytes) -> Recording:
    head, _, body = data.partition(b"\n\n")
    lines = head.decode().split("\n")
    sent = [line.lstrip(">").strip() for line in lines if line.startswith(">")]
    received = [line.lstrip("<").strip() for line in lines if line.startswith("<")]
    method, _, path = sent[0].partition(" ")
    request_body = sent[1] if len(sent) > 1 and sent[1] != "None" else ""
    status, _, reason = received[0].partition(" ")
    headers = tuple((key, value.strip()) for key, _, value in (line.partition(":") for line in received[1:]))
    return Recording(
        engine=engine,
        name=name,
        method=method,
        path=path,
        request_headers=(("Content-Type", "application/json"),),
        request_body=request_body.encode(),
        status=int(status),
        # SGLang's recorder noted the seconds in brackets where the reason phrase would stand.
        reason="" if reason.startswith("(") else reason,
        response_headers=headers,
        body=body,
        is_stream=_is_event_stream(headers),
        reads=(),
    )


def _is_event_stream(headers: Headers) -> bool:
    return any(key.lower() == "content-type" and value.startswith("text/event-stream") for key, value in headers)
