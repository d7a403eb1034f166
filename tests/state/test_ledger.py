"""The ledger loses nothing and counts nothing twice: database away and back, disk full, processes killed."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.state import ledger as ledger_module
from gateway.state import spool as spool_module
from gateway.state.database import StateError
from gateway.state.ledger import ADOPT_EVERY, PRUNE_FIRST, Ledger
from gateway.state.spool import FAULTY, FULL, REFUSED, TORN
from gateway.state.usage import UsageRow, UsageStore, Wanted
from tests.support.clock import ManualClock
from tests.support.databases import Database, Postgresql, Sqlite, execute
from tests.support.examples import examples

WALL = 1_795_521_600.0
on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
"""What is said of the spool needs no other database."""
on_postgresql = pytest.mark.parametrize("database", ["postgresql"], indirect=True)


def row(number: int) -> UsageRow:
    return UsageRow(request_id=f"req_{number}", at=WALL + number, outcome="ok", status=200, tokens_in=number)


class House:
    """A data directory, its database, and the ledgers of the processes that share them."""

    def __init__(self, database: Database, folder: Path, clock: ManualClock) -> None:
        self.database = database
        self.spool = folder / "spool"
        self.clock = clock
        self.wall = WALL
        self._open: list[Ledger[int]] = []
        self.url = database.url

    def ledger(self, make: Callable[[int], UsageRow] = row, **more: Any) -> Ledger[int]:
        made: Ledger[int] = Ledger(self.url, self.spool, make, clock=self.clock, wall=lambda: self.wall, **more)
        self._open.append(made)
        return made

    def kill(self, ledger: Ledger[int]) -> None:
        """What the kernel does for a process that is killed: its locks go, its files stay."""
        ledger._spool.seal()
        for owner in [*ledger._spool._adopted, ledger._spool._own]:
            if owner is not None:
                os.close(owner.lock)
        ledger.store.close()
        self._open.remove(ledger)

    def stored(self) -> list[int]:
        """The numbers of the rows in the table."""
        store = UsageStore(self.url)
        try:
            return [int(one["tokens_in"]) for one in store.rows(Wanted())]
        finally:
            store.close()

    def files(self) -> list[Path]:
        return sorted(self.spool.glob("*/*.jsonl"))

    def close(self) -> None:
        for ledger in self._open:
            ledger.close(1.0)


@pytest.fixture
def house(database: Database, tmp_path: Path, clock: ManualClock) -> Iterator[House]:
    made = House(database, tmp_path, clock)
    yield made
    made.close()


def add(ledger: Ledger[int], *numbers: int) -> None:
    for number in numbers:
        ledger.add(number)
    ledger.journal()


# --- all well --------------------------------------------------------------------------------------------------------


def test_rows_wait_on_disk_and_then_are_in_the_table_alone(house: House) -> None:
    """In batches: one file and one transaction for many."""
    ledger = house.ledger()
    ledger.add(1)
    ledger.add(2)
    assert ledger.added
    assert house.files() == []
    ledger.journal()
    add(ledger, 3)
    assert len(house.files()) == 1
    assert house.stored() == []
    house.wall += 7
    assert ledger.waiting()[:2] == (3, 7.0)
    done = ledger.commit()
    assert (done.stored, done.away, dict(done.lost)) == (3, None, {})
    assert house.stored() == [1, 2, 3]
    assert house.files() == []
    assert ledger.waiting() == (0, 0.0, 0)


@on_sqlite
def test_nothing_to_do_costs_no_thread(house: House) -> None:
    """And makes no directory, for whoever never asks a model."""
    ledger = house.ledger(days=1)
    assert ledger.due  # what dead processes left is looked for first
    ledger.commit()
    assert (ledger.added, ledger.due) == (False, False)
    assert not house.spool.exists()
    house.clock.advance(min(ADOPT_EVERY, PRUNE_FIRST))
    assert ledger.due


def test_files_and_transactions_are_bounded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "SEGMENT_ROWS", 10)
    ledger = house.ledger()
    add(ledger, *range(25))
    add(ledger, *range(25, 35))
    assert [len(file.read_bytes().splitlines()) for file in house.files()] == [10, 10, 15]
    assert ledger.commit().stored == 35
    assert house.stored() == [*range(35)]


@on_sqlite
def test_memory_is_bounded_and_files_are_read_back(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "MEMORY_ROWS", 5)
    ledger = house.ledger()
    add(ledger, 1, 2, 3)
    add(ledger, 4, 5, 6)
    assert ledger._spool._in_memory <= 5
    assert ledger.commit().stored == 6
    assert house.stored() == [1, 2, 3, 4, 5, 6]
    assert ledger._spool._in_memory == 0


@on_sqlite
def test_what_is_added_faster_than_a_disk_takes_it_is_counted(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MOST_ADDED", 3)
    ledger = house.ledger()
    for number in range(5):
        ledger.add(number)
    assert dict(ledger.journal().lost) == {FULL: 2}
    ledger.commit()
    assert house.stored() == [0, 1, 2]


@on_sqlite
def test_an_entry_that_makes_no_row_costs_no_other(house: House) -> None:
    def make(number: int) -> UsageRow:
        if number == 2:
            raise ValueError("no row")
        return row(number)

    ledger = house.ledger(make)
    for number in (1, 2, 3):
        ledger.add(number)
    done = ledger.journal()
    assert dict(done.lost) == {FAULTY: 1}
    assert str(done.fault) == "no row"
    ledger.commit()
    assert house.stored() == [1, 3]


@on_sqlite
def test_half_a_character_costs_one_row(house: House) -> None:
    ledger = house.ledger(
        lambda n: UsageRow(request_id="\ud800" if n == 2 else f"{n}", at=WALL, outcome="", status=0, tokens_in=n)
    )
    for number in (1, 2, 3):
        ledger.add(number)
    assert dict(ledger.journal().lost) == {REFUSED: 1}
    ledger.commit()
    assert house.stored() == [1, 3]


def test_old_rows_go_as_time_passes(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch with every commit, until there are none."""
    monkeypatch.setattr(ledger_module, "PRUNE_BATCH", 2)
    ledger = house.ledger(days=1)
    add(ledger, *range(5), 86_400)
    ledger.commit()
    house.wall += 86_400 + 100
    house.clock.advance(PRUNE_FIRST)
    left = []
    while ledger.due:
        ledger.commit()
        left.append(len(house.stored()))
    assert left == [4, 2, 1]
    assert house.stored() == [86_400]


# --- the database away -----------------------------------------------------------------------------------------------


def test_the_database_away_and_back(house: House) -> None:
    """Rows wait on disk, in order, and those of before are not counted again."""
    ledger = house.ledger()
    add(ledger, 1)
    ledger.commit()
    if isinstance(house.database, Sqlite):
        ledger.store.close()  # a file that is open stays what it is
    house.database.go_away()
    add(ledger, 2, 3)
    done = ledger.commit()
    assert done.away is not None
    said = {Sqlite: "unable to open database file", Postgresql: "connection failed"}[type(house.database)]
    assert f"failed: {said}" in done.away
    add(ledger, 4)
    assert ledger.commit().away is not None
    assert ledger._spool._in_memory == 0
    assert ledger.waiting()[0] == 3
    house.database.come_back()
    done = ledger.commit()
    assert (done.away, done.stored) == (None, 3)
    assert house.stored() == [1, 2, 3, 4]
    assert house.files() == []


@on_sqlite
def test_while_it_is_away_rows_are_on_the_disk_itself(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not while it is there: then the next second stores them, and a disk has better things to do."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    ledger = house.ledger()
    add(ledger, 1)
    assert synced == []
    house.database.go_away()
    ledger.commit()
    add(ledger, 2)
    assert len(synced) == 1
    house.database.come_back()


def test_a_commit_that_was_not_heard_of_counts_once(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection broke after the commit and before its answer: the rows are sent again."""
    ledger = house.ledger()
    insert = ledger.store.insert

    def break_after(rows: Any) -> int:
        insert(rows)
        raise StateError("the connection broke")

    add(ledger, 1, 2)
    monkeypatch.setattr(ledger.store, "insert", break_after)
    assert ledger.commit().away == "the connection broke"
    monkeypatch.undo()
    assert ledger.commit().stored == 2
    assert house.stored() == [1, 2]


@on_sqlite
def test_a_full_spool_loses_what_comes_and_says_so(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what is there: the oldest rows are the ones nobody else remembers."""
    monkeypatch.setattr(spool_module, "MEMORY_ROWS", 2)
    ledger = house.ledger(spool_bytes=1000)
    house.database.go_away()
    lost = 0
    for number in range(20):
        ledger.add(number)
        done = ledger.journal()
        lost += done.lost[FULL]
        ledger.commit()
    assert done.disk == "the spool is full (1000 bytes)"
    assert 0 < lost < 20
    assert ledger.waiting()[2] <= 1000
    house.database.come_back()
    assert ledger.commit().stored == 20 - lost
    assert house.stored() == [*range(20 - lost)]
    add(ledger, 100)
    assert ledger.commit().stored == 1


@on_sqlite
@pytest.mark.parametrize("trouble", ["no directory", "half a line"])
def test_a_disk_that_cannot_be_written_needs_a_database(
    house: House, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """A container whose file system is read-only, or full, still accounts into its PostgreSQL."""
    ledger = house.ledger()
    if trouble == "no directory":
        house.spool.touch()
    else:
        write = os.write
        monkeypatch.setattr(os, "write", lambda file, text: write(file, text[: len(text) // 2]))
    ledger.add(1)
    ledger.add(2)
    done = ledger.journal()
    assert done.lost[FULL] == 0
    assert done.disk is not None
    monkeypatch.undo()
    assert ledger.commit().stored >= 2
    assert house.stored() == [1, 2]


@on_sqlite
def test_rows_in_memory_alone_are_lost_with_the_process_and_counted(house: House) -> None:
    house.spool.touch()
    ledger = house.ledger()
    house.database.go_away()
    add(ledger, 1, 2)
    assert dict(ledger.close(1.0).lost) == {FULL: 2}
    house.database.come_back()


@on_postgresql
def test_a_server_that_crashes_and_starts_again(house: House, database: Postgresql) -> None:
    ledger = house.ledger()
    add(ledger, 1)
    ledger.commit()
    database.server.kill()
    add(ledger, 2)
    done = ledger.commit()
    assert done.away is not None
    assert "No such file or directory" in done.away
    add(ledger, 3)
    database.server.start()
    assert ledger.commit().stored == 2
    assert house.stored() == [1, 2, 3]


@on_postgresql
@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")  # one that hung when it closed
def test_a_server_that_hangs_delays_neither_requests_nor_the_end(house: House, database: Postgresql) -> None:
    """What was begun when it froze is done when it thaws; the rest waits on disk for the next start."""
    ledger = house.ledger()
    add(ledger, 1)
    ledger.commit()
    add(ledger, 2)
    database.server.freeze()
    try:
        hanging = threading.Thread(target=ledger.commit)
        hanging.start()
        add(ledger, 3)
        assert ledger.waiting()[0] == 2
        assert ledger.close(0.02).left == 2
    finally:
        database.server.thaw()
    hanging.join()
    gc.collect(1)
    assert house.ledger().commit().stored == 2
    assert house.stored() == [1, 2, 3]


# --- ends and starts -------------------------------------------------------------------------------------------------


def test_the_end_writes_everything_and_leaves_nothing(house: House) -> None:
    ledger = house.ledger()
    add(ledger, 1)
    ledger.add(2)
    assert ledger.close(1.0).stored == 2
    assert house.stored() == [1, 2]
    assert list(house.spool.iterdir()) == []


def test_an_end_without_a_database_leaves_it_to_the_next_start(house: House) -> None:
    ledger = house.ledger()
    house.database.go_away()
    add(ledger, 1)
    ledger.add(2)
    assert ledger.close(1.0).away is not None
    house.database.come_back()
    assert house.ledger().commit().stored == 2
    assert house.stored() == [1, 2]
    assert list(house.spool.iterdir()) == []


@on_sqlite
def test_an_end_waits_for_no_database_that_hangs(house: House) -> None:
    ledger = house.ledger()
    add(ledger, 1)
    ledger._committing.acquire()
    assert ledger.close(0.01).stored == 0
    ledger._committing.release()
    assert house.ledger().commit().stored == 1


def test_what_a_dead_process_left_is_stored_first_and_by_one_alone(house: House) -> None:
    """A living one's files are its own, whoever looks."""
    dead, living = house.ledger(), house.ledger()
    add(dead, 1, 2)
    add(living, 3)
    first, second = house.ledger(), house.ledger()
    assert first.commit().stored == 0
    house.kill(dead)
    house.clock.advance(ADOPT_EVERY)
    add(first, 4)
    assert (first.commit().stored, second.commit().stored) == (3, 0)
    assert house.stored() == [1, 2, 4]
    assert living.commit().stored == 1
    assert house.stored() == [1, 2, 3, 4]


def test_a_replay_that_is_killed_is_replayed(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the commit and the file's end: the rows are in the table and in the file."""
    dead = house.ledger()
    add(dead, 1, 2)
    house.kill(dead)
    next_one = house.ledger()
    with monkeypatch.context() as killed:
        killed.setattr(next_one._spool, "done", lambda segment: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next_one.commit()
    house.kill(next_one)
    assert house.stored() == [1, 2]
    assert len(house.files()) == 1
    assert house.ledger().commit().stored == 2
    assert house.stored() == [1, 2]
    assert house.files() == []


@on_sqlite
@given(st.integers(0, 400))
@settings(max_examples=examples(15))
def test_a_torn_line_costs_itself_alone(house: House, cut: int) -> None:
    """Wherever a process was killed in the middle of a line, or a disk lost a piece."""
    execute(house.database, "DELETE FROM usage")
    dead = house.ledger()
    add(dead, 1)
    add(dead, 2)
    house.kill(dead)
    (file,) = house.files()
    text = file.read_bytes()
    file.write_bytes(text[: max(0, len(text) - cut)])
    left = text[: max(0, len(text) - cut)]
    # A brace at the end may be one of those inside.
    whole = sum(left.startswith(text[: end - 1]) for end in (text.index(b"\n") + 1, len(text)))
    done = house.ledger().commit()
    assert done.away is None
    assert house.stored() == [1, 2][:whole]
    assert done.lost[TORN] <= 1
    assert house.files() == []


@on_sqlite
def test_what_is_no_row_in_the_middle_of_a_file_is_passed_over(house: House) -> None:
    dead = house.ledger()
    add(dead, 1, 2, 3)
    house.kill(dead)
    (file,) = house.files()
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([lines[0], b"\xff\xfe nonsense", b'{"request_id": 5}', lines[2]]))
    done = house.ledger().commit()
    assert (done.stored, dict(done.lost)) == (2, {TORN: 2})
    assert house.stored() == [1, 3]


@on_sqlite
def test_a_row_of_another_release_is_read(house: House) -> None:
    """One that knew fewer fields, or more: what is spooled outlives an update, and a way back."""
    dead = house.ledger()
    add(dead, 1)
    house.kill(dead)
    (file,) = house.files()
    file.write_bytes(
        b'{"request_id":"req_old","at":1795521600.0,"outcome":"ok","status":200,"tokens_in":7}\n'
        b'{"request_id":"req_new","at":1795521601.0,"outcome":"ok","status":200,"tokens_in":8,"colour":"red"}\n'
    )
    assert house.ledger().commit().stored == 2
    assert house.stored() == [7, 8]


@on_sqlite
def test_what_was_never_finished_is_cleared_away(house: House) -> None:
    """A process killed while it made its directory; one that makes it now is left alone."""
    for name in (".new-1-dead", ".new-2-young"):
        (house.spool / name).mkdir(parents=True)
        (house.spool / name / "lock").touch()
    long_ago = house.wall - 2 * spool_module.STALE
    os.utime(house.spool / ".new-1-dead", (long_ago, long_ago))
    os.utime(house.spool / ".new-2-young", (house.wall, house.wall))
    house.ledger().commit()
    assert [folder.name for folder in house.spool.iterdir()] == [".new-2-young"]


def test_rows_the_database_refuses_are_counted_and_gone(house: House) -> None:
    ledger = house.ledger(lambda n: UsageRow(request_id=f"{n}", at=1e30 if n == 2 else WALL, outcome="", status=0))
    add(ledger, 1, 2, 3)
    done = ledger.commit()
    assert (done.stored, dict(done.lost)) == (2, {REFUSED: 1})
    assert ledger.waiting() == (0, 0.0, 0)


KILLED = """
import os, signal, sys, time
from pathlib import Path
from gateway.state.ledger import Ledger
from gateway.state.usage import UsageRow

def row(number):
    return UsageRow(request_id=f"req_{number}", at=1795521600.0 + number, outcome="ok", status=200, tokens_in=number)

folder = Path(sys.argv[1])
ledger = Ledger(sys.argv[2], folder / "spool", row)
for number in range(50):
    ledger.add(number)
ledger.journal()
ledger.commit()
for number in range(50, 100):
    ledger.add(number)
ledger.journal()
ledger.add(100)  # of the last tenth of a second
os.kill(os.getpid(), signal.SIGKILL)
"""


@on_sqlite
def test_a_killed_process_loses_what_was_not_journalled(house: House) -> None:
    """For real: SIGKILL between journal and commit."""
    ended = subprocess.run([sys.executable, "-c", KILLED, str(house.spool.parent), house.url], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert house.stored() == [*range(50)]
    assert house.ledger().commit().stored == 50
    assert house.stored() == [*range(100)]
    assert list(house.spool.iterdir()) == []


@on_sqlite
def test_requests_go_on_being_added_while_threads_work(house: House) -> None:
    """Nothing falls between two turns of the journal."""
    ledger = house.ledger()
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            ledger.journal()
            ledger.commit()

    worker = threading.Thread(target=work)
    worker.start()
    for number in range(5000):
        ledger.add(number)
    over.set()
    worker.join()
    ledger.close(5.0)
    assert house.stored() == [*range(5000)]


def test_a_database_without_a_table_gets_one(no_tables: Database, tmp_path: Path, clock: ManualClock) -> None:
    """One that was deleted, or where nobody needs keys: what comes is accounted for."""
    house = House(no_tables, tmp_path, clock)
    ledger = house.ledger()
    add(ledger, 1)
    assert ledger.commit().stored == 1
    assert house.stored() == [1]
    house.close()
