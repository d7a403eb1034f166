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
from typing import NoReturn

ANSWER = {
    "status": "ok",
    "endpoints": [{"name": "fake", "healthy": True, "models": ["fake-model"]}],
    "object": "list",
    "data": [{"id": "fake-model", "object": "model", "created": 1, "owned_by": "nobody", "max_model_len": 2048}],
}


class Handler(socketserver.StreamRequestHandler):
    """Answers everything alike. A library's HTTP server takes longer to load than all of this."""

    def handle(self) -> None:
        line = self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        if b" /exit " in line:
            os._exit(3)
        if line:
            body = json.dumps(ANSWER).encode()
            head = b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
            self.wfile.write(head + body)


class TcpServer(socketserver.TCPServer):
    """On a port that was used a moment ago, too."""

    allow_reuse_address = True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("order")
    parser.add_argument("--port", type=int)
    parser.add_argument("--unix")
    parser.add_argument("--stubborn", action="store_true")
    parser.add_argument("--crash", action="store_true")
    options = parser.parse_args()

    def note(what: str) -> None:
        with open(options.order, "a") as order:  # noqa: PTH123 - pathlib takes its time to load
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
        server = TcpServer(("127.0.0.1", options.port), Handler)
    note("up")
    server.serve_forever()


if __name__ == "__main__":
    main()
