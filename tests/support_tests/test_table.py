"""A table tries every case, and names those that fail."""

from __future__ import annotations

import asyncio
import inspect

import pytest

from tests.support.table import each


def test_every_case_is_tried_beside_fixtures() -> None:
    seen = []

    @each("letter", ["a", pytest.param("b", id="second")])
    @each(("number", "word"), [(1, "one"), (2, "two")])
    def tried(letter: str, number: int, word: str, fixture: str) -> None:
        """What it shows."""
        seen.append((letter, number, word, fixture))

    assert list(inspect.signature(tried).parameters) == ["fixture"]
    assert tried.__doc__ == "What it shows."
    tried(fixture="f")
    assert seen == [("a", 1, "one", "f"), ("a", 2, "two", "f"), ("b", 1, "one", "f"), ("b", 2, "two", "f")]


async def test_of_a_test_that_waits_too() -> None:
    seen = []

    @each("number", [1, 2, 3])
    async def tried(number: int, fixture: str) -> None:
        await asyncio.sleep(0)
        seen.append((number, fixture))
        assert number != 2

    assert inspect.iscoroutinefunction(tried)
    with pytest.raises(AssertionError) as caught:
        await tried(fixture="f")
    assert caught.value.__notes__ == ["in the case number=2"]
    assert seen == [(1, "f"), (2, "f"), (3, "f")]


def test_the_one_that_fails_is_named() -> None:
    @each("left, right", [(1, 1), (1, "2"), (3, 3)])
    def equal(left: object, right: object) -> None:
        assert left == right

    with pytest.raises(AssertionError) as caught:
        equal()
    assert caught.value.__notes__ == ["in the case left=1, right='2'"]


def test_all_that_fail_are_named() -> None:
    """That nothing was raised is a failure like another."""

    @each("text", ["1", "x", "2"])
    def refused(text: str) -> None:
        with pytest.raises(ValueError, match="invalid"):
            int(text)

    with pytest.raises(BaseExceptionGroup, match="2 of 3 cases failed") as caught:
        refused()
    assert [error.__notes__ for error in caught.value.exceptions] == [
        ["in the case text='1'"],
        ["in the case text='2'"],
    ]


def test_a_table_that_shows_nothing_is_refused() -> None:
    with pytest.raises(AssertionError, match="shows nothing"):
        each("text", [])
    with pytest.raises(AssertionError):
        each(("one", "two"), [(1,)])


def test_a_long_value_is_told_by_its_beginning() -> None:
    @each("text", ["x" * 1000])
    def never(text: str) -> None:
        assert not text

    with pytest.raises(AssertionError) as caught:
        never()
    assert len(caught.value.__notes__[0]) < 250
