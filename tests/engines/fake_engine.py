"""A process that behaves like an engine towards its minder: it loads, listens, obeys or does not.

    python fake_engine.py [--port N | --unix PATH] [--gate FIFO] [--child] [--worker | --fragile] [--stubborn]
                   [--say LINE] [--model PATH] [--hungry] [--crash LINE]

With ``--worker`` it answers 503 on /health once its worker is gone, as engines do that outlive their own workers; with
``--fragile`` it ends itself then, as others do. Its order: ``--say`` lines, a child and a worker (each in a session of
its own, deaf to SIGTERM), the gate (it waits until somebody opens the FIFO for writing), the model's file is read,
memory is taken beyond a limit of its own (``--hungry``), then the crash or the port. It tells its steps on standard
output.
"""

from __future__ import annotations

import argparse
import os
import signal
import socketserver
import subprocess
import sys
from typing import NoReturn

DEAF_CHILD = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"


class Health(socketserver.StreamRequestHandler):
    """Answers 200 on /health, 503 without its worker, and 404 elsewhere. A library's HTTP server takes longer to load
    than all of this."""

    worker: subprocess.Popen[str] | None = None

    def handle(self) -> None:
        path = self.rfile.readline().split()[1:2]
        while self.rfile.readline().strip():
            pass
        if path:
            say("asked " + path[0].decode())
            well = self.worker is None or self.worker.poll() is None
            status = (200 if well else 503) if path == [b"/health"] else 404
            self.wfile.write(b"HTTP/1.0 %d Told\r\n\r\n" % status)


class TcpServer(socketserver.TCPServer):
    """On a port that was used a moment ago, too."""

    allow_reuse_address = True


def say(text: str) -> None:
    # In one call: SIGTERM may come in the middle of another line, and a stream refuses to be written to from inside.
    os.write(1, f"{text}\n".encode())


def leave(*_: object) -> NoReturn:
    say("bye")
    sys.exit(0)


def start_child() -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", DEAF_CHILD], start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.readline()
    say(f"child {child.pid}")
    return child


def read(path: str) -> None:
    with open(path, "rb") as file:  # noqa: PTH123 - pathlib takes its time to load
        file.read()


def despair(*_: object) -> NoReturn:
    os.write(1, b"RuntimeError: the worker has died\n")
    os._exit(1)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    for name in ("unix", "gate", "crash", "model"):
        parser.add_argument(f"--{name}")
    for name in ("child", "worker", "fragile", "stubborn", "hungry"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--say", action="append", default=[])
    return parser.parse_args()


def load(options: argparse.Namespace) -> None:
    """Everything before it listens."""
    for line in options.say:
        say(line)
    if options.child:
        start_child()
    if options.worker or options.fragile:
        Health.worker = start_child()
    if options.gate:
        say("waiting at the gate")
        read(options.gate)
    if options.model:
        read(options.model)
    if options.hungry:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
        bytearray(1 << 30)
    if options.crash:
        say(options.crash)
        sys.exit(3)


def main() -> None:
    options = parsed()
    signal.signal(signal.SIGTERM, signal.SIG_IGN if options.stubborn else leave)
    load(options)
    if options.fragile:
        signal.signal(signal.SIGCHLD, despair)
    if options.unix:
        socketserver.UnixStreamServer(options.unix, Health).serve_forever()
    if options.port:
        TcpServer(("127.0.0.1", options.port), Health).serve_forever()
    say("nothing more to do")


if __name__ == "__main__":
    main()
