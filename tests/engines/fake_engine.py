"""A process that behaves like an engine towards its minder: it loads, listens, obeys or does not.

    python fake_engine.py [--port N | --unix PATH] [--gate FIFO] [--child] [--stubborn] [--say LINE] [--crash LINE]

Its order: ``--say`` lines, a child (in a session of its own, deaf to SIGTERM), the gate (it waits until somebody opens
the FIFO for writing), then the crash or the port. It tells its steps on standard output.
"""

from __future__ import annotations

import argparse
import signal
import socketserver
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NoReturn

DEAF_CHILD = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"


class Health(BaseHTTPRequestHandler):
    """Answers 200 on /health and 404 elsewhere."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def address_string(self) -> str:
        return "client"

    def log_message(self, format: str, *args: Any) -> None:
        say("asked " + self.path)


class UnixServer(socketserver.UnixStreamServer):
    """An HTTP server on a Unix socket."""


def say(text: str) -> None:
    print(text, flush=True)


def leave(*_: object) -> NoReturn:
    say("bye")
    sys.exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--unix")
    parser.add_argument("--gate")
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--stubborn", action="store_true")
    parser.add_argument("--say", action="append", default=[])
    parser.add_argument("--crash")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.SIG_IGN if options.stubborn else leave)
    for line in options.say:
        say(line)
    if options.child:
        child = subprocess.Popen(
            [sys.executable, "-c", DEAF_CHILD], start_new_session=True, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()
        say(f"child {child.pid}")
    if options.gate:
        say("waiting at the gate")
        Path(options.gate).read_bytes()
    if options.crash:
        say(options.crash)
        sys.exit(3)
    if options.unix:
        UnixServer(options.unix, Health).serve_forever()
    if options.port:
        HTTPServer(("127.0.0.1", options.port), Health).serve_forever()
    say("nothing more to do")


if __name__ == "__main__":
    main()
