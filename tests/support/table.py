"""One test over a table: what a case costs is the case, not a test of its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
from _pytest.mark import ParameterSet

_LONG = 200


Test = Callable[..., Any]


def each(names: str | tuple[str, ...], cases: Iterable[object]) -> Callable[[Test], Test]:
    """Call a test with every case in turn: ``@each(("text", "number"), [("1", 1), …])``, as ``parametrize`` is told.

    For tests of what has no state, of which there are thousands: pytest takes longer to collect, announce and report a
    test than most of them to run, and a gateway to start than to answer. Every case is tried, with the same fixtures;
    those that fail are named in what is raised.
    """
    given = tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else names
    table = [dict(zip(given, _values(case, len(given)), strict=True)) for case in cases]
    assert table, "a table without a case shows nothing"

    def over(test: Test) -> Test:
        @functools.wraps(test)
        def all_of_them(**fixtures: Any) -> None:
            failed = Failed(len(table))
            for case in table:
                with failed.kept(), named(**case):
                    test(**case, **fixtures)
            failed.tell()

        @functools.wraps(test)
        async def all_of_them_awaited(**fixtures: Any) -> None:
            failed = Failed(len(table))
            for case in table:
                with failed.kept(), named(**case):
                    await test(**case, **fixtures)
            failed.tell()

        chosen: Any = all_of_them_awaited if inspect.iscoroutinefunction(test) else all_of_them
        signature = inspect.signature(test)
        rest = [parameter for name, parameter in signature.parameters.items() if name not in given]
        chosen.__signature__ = signature.replace(parameters=rest)
        return cast(Test, chosen)

    return over


class Failed:
    """What failed of so many cases."""

    def __init__(self, cases: int) -> None:
        self._cases = cases
        self._errors: list[BaseException] = []

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep a failure for later."""
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:
            self._errors.append(error)

    def tell(self) -> None:
        """Raise what was kept, if anything."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            raise BaseExceptionGroup(f"{len(self._errors)} of {self._cases} cases failed", self._errors)


@contextmanager
def named(**case: object) -> Iterator[None]:
    """Name the case of a loop in what it raises."""
    try:
        yield
    except BaseException as error:
        error.add_note("in the case " + ", ".join(f"{name}={_shown(value)}" for name, value in case.items()))
        raise


def _values(case: object, count: int) -> tuple[object, ...]:
    if isinstance(case, ParameterSet):
        assert not case.marks, "cases of one test have no marks of their own"
        return tuple(case.values)
    if count == 1:
        return (case,)
    assert isinstance(case, tuple | list)
    assert len(case) == count
    return tuple(case)


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, str | bytes) else str(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}…"
