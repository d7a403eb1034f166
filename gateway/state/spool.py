"""What is not in the database yet, on disk: a journal of rows in files that are deleted once their rows are stored.

Rule 1: a row goes here first, and its file is deleted only after the database has committed it. Storing a row twice
counts once, so whatever moment a process is killed in, nothing counts twice, and lost is what was not written yet.
Rule 2: each process writes into a directory of its own and holds a lock in it. Whoever can take that lock knows that
the owner is dead, and stores what it left.
Rule 3: everything is bounded: bytes on disk, rows in memory. What does not fit is counted.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from gateway.state.usage import UsageRow

SEGMENT_ROWS = 2000
"""Rows of one file, and of one transaction."""
MEMORY_ROWS = 20_000
"""Rows kept in memory so that they need not be read back."""
FULL, TORN, REFUSED, FAULTY = "full", "torn", "refused", "faulty"
"""Why a row is lost: no room, half written when a process was killed, not storable, not even a row."""
STALE = 3600.0
"""Seconds after which a directory that was never finished is nobody's."""
_NEW = ".new-"

_encode_lines = msgspec.json.Encoder().encode_lines
_decode = msgspec.json.Decoder(UsageRow).decode


class Owner:
    """A directory of segments and the lock that says whose it is."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self.lock = lock
        self.left = 0
        """Segments in it that are not stored yet."""

    @classmethod
    def create(cls, spool: Path) -> Owner:
        """Make a directory of our own. It bears its name only once its lock is held."""
        spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"{os.getpid()}-{secrets.token_hex(4)}"
        new = spool / f"{_NEW}{name}"
        new.mkdir(mode=0o700)
        lock = os.open(new / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return cls(new.rename(spool / name), lock)

    @classmethod
    def adopt(cls, folder: Path) -> Owner | None:
        """Take over the directory of a dead process; None when its owner lives, or somebody else was faster."""
        try:
            lock = os.open(folder / "lock", os.O_RDWR)
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return None
        return cls(folder, lock)

    def release(self) -> None:
        """Let go: of the directory too, when nothing is left in it."""
        if not self.left:
            with suppress(OSError):
                (self.folder / "lock").unlink()
                self.folder.rmdir()
        os.close(self.lock)


class Segment:
    """Some rows in order: in a file, in memory, or both."""

    def __init__(self, since: float, owner: Owner | None = None, path: Path | None = None) -> None:
        self.owner = owner
        self.path = path
        self.since = since
        """Unix time of its first row's coming."""
        self.rows: list[UsageRow] | None = []
        self.count = 0
        self.size = 0
        self.synced = True


class Spool:
    """The segments of one process, those it has taken over first. One thread at a time, whoever it is."""

    def __init__(self, folder: Path, most: int, wall: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._most = most
        self._wall = wall
        self._own: Owner | None = None
        self._serial = 0
        self._file: int | None = None
        self._current: Segment | None = None
        self._sealed: deque[Segment] = deque()
        self._adopted: list[Owner] = []
        self._in_memory = 0
        self.bytes = 0
        """On disk, of all segments that are not stored yet."""
        self.trouble: str | None = None
        """Why the last rows could not be written to disk."""

    # --- rows in ------------------------------------------------------------------------------------------------------

    def append(self, rows: list[UsageRow], *, sync: bool = False) -> Counter[str]:
        """Take rows; ``sync``: they are on the disk itself when this returns. Returns how many are lost, and why."""
        lost: Counter[str] = Counter()
        for start in range(0, len(rows), SEGMENT_ROWS):
            self._append(rows[start : start + SEGMENT_ROWS], lost)
        if sync:
            self.sync()
        return lost

    def _append(self, rows: list[UsageRow], lost: Counter[str]) -> None:
        try:
            text = _encode_lines(rows)
        except UnicodeEncodeError:
            # A name with half a character in it: the others are none the worse.
            whole = [row for row in rows if _is_text(row)]
            lost[REFUSED] += len(rows) - len(whole)
            rows, text = whole, _encode_lines(whole)
        written = self._write(text)
        segment = self._current
        if not written or segment is None:
            # Neither disk nor room on it: memory has to do.
            if self._in_memory + len(rows) > MEMORY_ROWS:
                lost[FULL] += len(rows)
                return
            segment = Segment(self._wall())
            self._sealed.append(segment)
        segment.count += len(rows)
        if segment.rows is not None and self._in_memory + len(rows) <= MEMORY_ROWS:
            segment.rows += rows
            self._in_memory += len(rows)
        elif segment.rows is not None:
            self._forget(segment)
        if segment.count >= SEGMENT_ROWS:
            self.seal()

    def _write(self, text: bytes) -> bool:
        """Put lines behind the current segment's others."""
        if self.bytes + len(text) > self._most:
            self.trouble = f"the spool is full ({self._most} bytes)"
            self.seal()
            return False
        try:
            file, segment = self._open()
            written = os.write(file, text)
        except OSError as error:
            self.trouble = f"{self._folder}: {error.strerror}"
            self.seal()
            return False
        segment.size += written
        segment.synced = False
        self.bytes += written
        if written < len(text):
            # Half a line is at its end: nothing may come behind it.
            self.trouble = f"{self._folder}: No space left on device"
            self.seal()
            return False
        self.trouble = None
        return True

    def _open(self) -> tuple[int, Segment]:
        if self._file is None or self._current is None:
            if self._own is None:
                self._own = Owner.create(self._folder)
            self._serial += 1
            path = self._own.folder / f"{self._serial:08d}.jsonl"
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._current = Segment(self._wall(), self._own, path)
            self._own.left += 1
        return self._file, self._current

    def seal(self) -> None:
        """End the current segment: nothing is written to it any more."""
        if self._current is not None:
            self._sealed.append(self._current)
            self._current = None
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def sync(self) -> None:
        """Have everything on the disk itself: for a while these files are all there is."""
        if self._current is not None and self._file is not None and not self._current.synced:
            with suppress(OSError):
                os.fdatasync(self._file)
                self._current.synced = True
        for segment in self._sealed:
            if segment.path is not None and not segment.synced:
                with suppress(OSError):
                    _sync(segment.path)
                    _sync(segment.path.parent)
                    segment.synced = True

    # --- rows out -----------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """How many rows are here, as far as known: what was left by others is counted when it is read."""
        current = self._current.count if self._current is not None else 0
        return current + sum(segment.count for segment in self._sealed)

    @property
    def since(self) -> float | None:
        """Since when (Unix time) the oldest of them has been waiting; None when there is none."""
        oldest = [segment.since for segment in [*list(self._sealed)[:1], self._current] if segment is not None]
        return min(oldest, default=None)

    def first(self) -> Segment | None:
        """The oldest sealed segment."""
        return self._sealed[0] if self._sealed else None

    def read(self, segment: Segment) -> tuple[list[UsageRow], int]:
        """Its rows, and how many lines cannot be read: the last one, where a process was killed while it wrote."""
        if segment.rows is not None:
            return segment.rows, 0
        assert segment.path is not None
        try:
            lines = segment.path.read_bytes().split(b"\n")
        except OSError:
            return [], segment.count
        rows, torn = [], 0
        for line in lines:
            if line:
                try:
                    rows.append(_decode(line))
                except (msgspec.DecodeError, UnicodeDecodeError):
                    torn += 1
        return rows, torn

    def done(self, segment: Segment) -> None:
        """Its rows are stored: let go of it."""
        if segment not in self._sealed:
            # Closed meanwhile: it may be somebody else's by now, who stores it again, and it counts once.
            return
        self._sealed.remove(segment)
        self._forget(segment)
        self.bytes -= segment.size
        if segment.path is not None and segment.owner is not None:
            with suppress(OSError):
                segment.path.unlink()
            segment.owner.left -= 1
            if segment.owner in self._adopted and not segment.owner.left:
                self._adopted.remove(segment.owner)
                segment.owner.release()

    def forget_rows(self) -> None:
        """Keep in memory only what is nowhere else."""
        for segment in self._sealed:
            if segment.path is not None:
                self._forget(segment)

    def _forget(self, segment: Segment) -> None:
        if segment.rows is not None:
            self._in_memory -= len(segment.rows)
            segment.rows = None

    # --- what others left ---------------------------------------------------------------------------------------------

    def adopt(self) -> int:
        """Take over what dead processes left, before everything of our own. Returns how many files."""
        found: list[Segment] = []
        for folder in self._others():
            owner = Owner.adopt(folder)
            if owner is None:
                continue
            for path in sorted(folder.glob("*.jsonl")):
                facts = path.stat()
                segment = Segment(facts.st_mtime, owner, path)
                segment.rows, segment.size = None, facts.st_size
                self.bytes += segment.size
                owner.left += 1
                found.append(segment)
            if owner.left:
                self._adopted.append(owner)
            else:
                owner.release()
        self._sealed.extendleft(reversed(found))
        return len(found)

    def _others(self) -> Iterator[Path]:
        ours = {owner.folder for owner in [*self._adopted, self._own] if owner is not None}
        if not self._folder.is_dir():
            return
        for folder in sorted(self._folder.iterdir()):
            if folder.name.startswith(_NEW):
                with suppress(OSError):
                    if self._wall() - folder.stat().st_mtime > STALE:
                        (folder / "lock").unlink(missing_ok=True)
                        folder.rmdir()
            elif folder not in ours:
                yield folder

    def close(self) -> int:
        """Let go of everything; what is on disk waits for the next one. Returns how many rows were only in memory."""
        self.seal()
        self.sync()
        lost = sum(segment.count for segment in self._sealed if segment.path is None)
        for owner in [*self._adopted, self._own]:
            if owner is not None:
                owner.release()
        self._sealed.clear()
        self._adopted, self._own, self._in_memory = [], None, 0
        return lost


def _is_text(row: UsageRow) -> bool:
    try:
        _encode_lines([row])
    except UnicodeEncodeError:
        return False
    return True


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
