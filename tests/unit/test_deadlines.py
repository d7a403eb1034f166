"""One sweep for all who wait."""

from __future__ import annotations

from gateway.serving.deadlines import NEVER, Deadlines
from tests.support.clock import ManualClock


class Waiter:
    """Notes when it was told to be late, and does what a test says then."""

    def __init__(self, deadlines: Deadlines, deadline: float) -> None:
        self.deadlines = deadlines
        self.deadline = deadline
        self.told: list[float] = []
        self.then: list[Waiter] = []
        deadlines.watch(self)

    def on_deadline(self, now: float) -> None:
        self.told.append(now)
        self.deadline = NEVER
        for other in self.then:
            self.deadlines.forget(other)


def test_who_is_late_is_told_and_nobody_else() -> None:
    clock = ManualClock(start=100)
    deadlines = Deadlines(clock)
    early, exact, late = (Waiter(deadlines, deadline) for deadline in (100.5, 101, 101.5))
    deadlines.run_due()
    assert early.told == exact.told == late.told == []
    clock.advance(1)
    deadlines.run_due()
    assert (early.told, exact.told, late.told) == ([101], [101], [])
    clock.advance(1)
    deadlines.run_due()
    assert (early.told, exact.told, late.told) == ([101], [101], [102])


def test_a_deadline_that_was_moved_counts_as_it_is_now() -> None:
    clock = ManualClock(start=100)
    deadlines = Deadlines(clock)
    waiter = Waiter(deadlines, 101)
    waiter.deadline = 105
    clock.advance(4)
    deadlines.run_due()
    assert waiter.told == []
    clock.advance(1)
    deadlines.run_due()
    assert waiter.told == [105]


def test_one_that_is_ended_by_another_is_not_told() -> None:
    """Both are late in the same sweep; whoever comes first ends the other."""
    clock = ManualClock(start=100)
    deadlines = Deadlines(clock)
    first, second = Waiter(deadlines, 100), Waiter(deadlines, 100)
    first.then, second.then = [second], [first]
    deadlines.run_due()
    assert len(first.told) + len(second.told) == 1
    assert len(deadlines) == 1


def test_those_who_are_forgotten_are_not_held() -> None:
    deadlines = Deadlines(ManualClock())
    waiter = Waiter(deadlines, 0)
    deadlines.forget(waiter)
    deadlines.forget(waiter)
    assert len(deadlines) == 0
    deadlines.run_due()
    assert waiter.told == []


def test_new_waiters_may_come_in_the_middle_of_a_sweep() -> None:
    clock = ManualClock(start=100)
    deadlines = Deadlines(clock)

    class Breeder(Waiter):
        def on_deadline(self, now: float) -> None:
            super().on_deadline(now)
            Waiter(deadlines, now)

    breeder = Breeder(deadlines, 100)
    deadlines.run_due()
    assert breeder.told == [100]
    assert len(deadlines) == 2


async def test_one_that_fails_costs_the_others_no_deadline() -> None:
    """Neither in its sweep nor in those after it; and it is heard of."""
    import asyncio

    clock = ManualClock(start=100)
    deadlines = Deadlines(clock)
    heard: list[object] = []
    told = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().set_exception_handler(lambda loop, what: heard.append(what.get("exception")))

    class Broken(Waiter):
        def on_deadline(self, now: float) -> None:
            raise ZeroDivisionError

    class Second(Waiter):
        def on_deadline(self, now: float) -> None:
            self.told.append(now)
            if len(self.told) == 2:
                told.set_result(now)

    Broken(deadlines, 100)
    Second(deadlines, 100)
    deadlines.start()
    await told
    await deadlines.stop()
    assert [type(error) for error in heard] == [ZeroDivisionError] * 2


async def test_the_sweep_runs_by_itself_and_stops() -> None:
    clock = ManualClock(start=100)
    deadlines = Deadlines(clock)
    import asyncio

    told = asyncio.get_running_loop().create_future()

    class Once(Waiter):
        def on_deadline(self, now: float) -> None:
            super().on_deadline(now)
            told.set_result(now)

    Once(deadlines, 100)
    deadlines.start()
    assert await told == 100
    await deadlines.stop()
    await deadlines.stop()
