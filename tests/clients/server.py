"""A server under test, and the requests that are sent to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.support.recordings import load


@dataclass(frozen=True, slots=True)
class Server:
    """Where to send requests. ``base_url`` ends with ``/v1``.

    ``speaks_for_itself`` says that errors are the gateway's own envelope, with codes the engines do not send.
    """

    base_url: str
    api_key: str
    model: str
    speaks_for_itself: bool

    def request(self, recording: str, *, max_tokens: int | None = None) -> dict[str, Any]:
        """Return the body that vLLM was recorded with, for this server's model, with another token limit if given.

        The tests send what was recorded, so that recordings, the gateway over recordings and a real engine all answer
        the same requests. The unknown model of a recording stays unknown.
        """
        body: dict[str, Any] = load("vllm", recording).request_json()
        if body["model"] != "ghost":
            body["model"] = self.model
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        return body
