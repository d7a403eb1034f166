"""The gateway most people write first: FastAPI, a pydantic model of the request, httpx, json in and out.

It does on every request what such code does: checks a key in a dependency, validates the body, translates the public
model name to the engine's, and on the way back parses every chunk to put the public name in again. It is kinder to
itself than many: one shared client without a connection limit, uvloop and httptools, no access log.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import uvicorn
from fastapi import Depends, FastAPI, Header, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict


class Message(BaseModel):
    """One message of a chat."""

    role: str
    content: str


class ChatRequest(BaseModel):
    """The body of a chat completion; fields nobody named pass through."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[Message]
    stream: bool = False


def create_app(upstream: str, public_model: str, engine_model: str, keys: set[str]) -> FastAPI:
    """A gateway to one engine under another model name."""
    client = httpx.AsyncClient(base_url=upstream, timeout=None, limits=httpx.Limits(max_connections=None))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await client.aclose()

    app = FastAPI(lifespan=lifespan)

    def check_key(authorization: Annotated[str, Header()] = "") -> None:
        if authorization.removeprefix("Bearer ") not in keys:
            raise HTTPException(401, "unknown key")

    async def rename_lines(body: dict[str, Any]) -> AsyncIterator[str]:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    chunk["model"] = public_model
                    line = "data: " + json.dumps(chunk)
                if line:
                    yield line + "\n\n"

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/chat/completions", dependencies=[Depends(check_key)], response_model=None)
    async def chat(request: ChatRequest) -> dict[str, Any] | StreamingResponse:
        if request.model != public_model:
            raise HTTPException(404, f"there is no model {request.model}; write {public_model}")
        body = request.model_dump()
        body["model"] = engine_model
        if request.stream:
            return StreamingResponse(rename_lines(body), media_type="text/event-stream")
        response = await client.post("/v1/chat/completions", json=body)
        answer: dict[str, Any] = response.json()
        answer["model"] = public_model
        return answer

    return app


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True, help="base URL of the engine")
    parser.add_argument("--public-model", required=True)
    parser.add_argument("--engine-model", required=True)
    parser.add_argument("--keys", type=Path, required=True, help="a file of keys, one a line")
    options = parser.parse_args()
    keys = set(options.keys.read_text().split())
    app = create_app(options.upstream, options.public_model, options.engine_model, keys)
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
