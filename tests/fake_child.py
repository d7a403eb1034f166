"""A process that stands for an engine or for the gateway towards the command that starts it.

    python fake_child.py NAME ORDER_FILE (--port N | --unix PATH) [--stubborn] [--crash]

It answers every GET as an engine and a replica would, with one model; GET /exit ends it with code 3. Its life goes line
by line to the order file: ``NAME up``, ``NAME reload`` (SIGHUP), ``NAME down`` (SIGTERM).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socketserver
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NoReturn

ANSWER = {
    "status": "ok",
    "endpoints": [{"name": "fake", "healthy": True, "models": ["fake-model"]}],
    "object": "list",
    "data": [{"id": "fake-model", "object": "model", "created": 1, "owned_by": "nobody", "max_model_len": 2048}],
}


class Handler(BaseHTTPRequestHandler):
    """Answers everything alike."""

    def do_GET(self) -> None:
        if self.path == "/exit":
            os._exit(3)
        body = json.dumps(ANSWER).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "client"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("order", type=Path)
    parser.add_argument("--port", type=int)
    parser.add_argument("--unix")
    parser.add_argument("--stubborn", action="store_true")
    parser.add_argument("--crash", action="store_true")
    options = parser.parse_args()

    def note(what: str) -> None:
        with options.order.open("a") as order:
            order.write(f"{options.name} {what}\n")

    def leave(*_: object) -> NoReturn:
        note("down")
        sys.exit(0)

    if options.crash:
        sys.exit("RuntimeError: no memory for the weights")
    signal.signal(signal.SIGTERM, signal.SIG_IGN if options.stubborn else leave)
    signal.signal(signal.SIGHUP, lambda *_: note("reload"))
    server: socketserver.BaseServer
    if options.unix:
        server = socketserver.UnixStreamServer(options.unix, Handler)
    else:
        server = HTTPServer(("127.0.0.1", options.port), Handler)
    note("up")
    server.serve_forever()


if __name__ == "__main__":
    main()
