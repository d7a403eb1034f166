"""Hashes of a prompt's blocks, and the index of who holds which, against a model that remembers everything."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.policy.prefix import MOST_HOLDERS, PrefixIndex, block_hashes

SIZE = 4
# Few letters and blocks, so that prompts often begin alike.
PROMPTS = st.lists(st.sampled_from([b"aaaa", b"bbbb"]), max_size=7).map(b"".join)
NAMES = st.sampled_from(["one", "two", "three"])
STEPS = st.lists(st.tuples(NAMES, st.none() | PROMPTS), max_size=40)
"""An endpoint is given a prompt, or is forgotten."""


def blocks_of(prompt: bytes, seed: int = 1) -> tuple[int, ...]:
    return block_hashes(seed, prompt, SIZE)


def played(index: PrefixIndex, steps: Sequence[tuple[str, bytes | None]]) -> dict[str, set[int]]:
    """Play the steps; return what each endpoint was taught since it was last forgotten."""
    taught: dict[str, set[int]] = defaultdict(set)
    for name, prompt in steps:
        if prompt is None:
            index.forget(name)
            taught.pop(name, None)
        else:
            index.learn(name, blocks_of(prompt))
            taught[name].update(blocks_of(prompt))
    return taught


def depth(held: set[int], blocks: Sequence[int]) -> int:
    return next((at for at, block in enumerate(blocks) if block not in held), len(blocks))


@given(prompt=st.binary(max_size=40), other=st.binary(max_size=40), most=st.integers(0, 8))
def test_hashes_agree_exactly_as_far_as_whole_blocks_do(prompt: bytes, other: bytes, most: int) -> None:
    mine, theirs = block_hashes(3, prompt, SIZE, most), block_hashes(3, memoryview(other), SIZE, most)
    assert len(mine) == min(most, len(prompt) // SIZE)
    for at, (one, two) in enumerate(zip(mine, theirs, strict=False), 1):
        assert (one == two) == (prompt[: at * SIZE] == other[: at * SIZE])


@example(prompt=b"aaaa", seeds=[-1, -2])
@example(prompt=b"aaaa", seeds=[0, 2**61 - 1])
@given(prompt=st.binary(min_size=SIZE, max_size=40), seeds=st.lists(st.integers(), min_size=2, max_size=2, unique=True))
def test_different_seeds_share_nothing(prompt: bytes, seeds: list[int]) -> None:
    """What a cache of another model, adapter or trust domain holds is never taken for this one's."""
    mine, theirs = (block_hashes(seed, prompt, SIZE) for seed in seeds)
    assert not set(mine) & set(theirs)
    index = PrefixIndex(100)
    index.learn("one", mine)
    assert index.holders(theirs) == []


@given(steps=STEPS, asked=PROMPTS)
def test_with_room_it_knows_what_a_perfect_memory_knows(steps: list[tuple[str, bytes | None]], asked: bytes) -> None:
    index = PrefixIndex(10_000)
    taught = played(index, steps)
    blocks = blocks_of(asked)
    expected = {name: depth(held, blocks) for name, held in taught.items() if depth(held, blocks)}
    found = index.holders(blocks)
    assert dict(found) == expected
    assert [matched for _, matched in found] == sorted(expected.values(), reverse=True)


@given(steps=STEPS, asked=PROMPTS, capacity=st.integers(2, 12))
def test_without_room_it_claims_no_more_and_keeps_no_more(
    steps: list[tuple[str, bytes | None]], asked: bytes, capacity: int
) -> None:
    index = PrefixIndex(capacity)
    for at in range(len(steps)):
        played(index, steps[at : at + 1])
        assert len(index) <= capacity
    taught = played(PrefixIndex(10_000), steps)
    blocks = blocks_of(asked)
    for name, matched in index.holders(blocks):
        assert matched <= depth(taught[name], blocks)


@given(steps=STEPS, last=PROMPTS, capacity=st.integers(2, 12))
def test_what_was_just_learned_is_known_from_its_beginning(
    steps: list[tuple[str, bytes | None]], last: bytes, capacity: int
) -> None:
    index = PrefixIndex(capacity)
    played(index, steps)
    blocks = blocks_of(last)
    index.learn("new", blocks)
    assert dict(index.holders(blocks)).get("new", 0) >= min(len(blocks), capacity // 2)


def test_what_nobody_uses_is_forgotten_and_what_is_used_stays() -> None:
    index = PrefixIndex(64)
    used, unused = block_hashes(1, b"u" * 16, SIZE), block_hashes(1, b"n" * 16, SIZE)
    index.learn("one", used)
    index.learn("one", unused)
    for at in range(80):
        index.learn("two", block_hashes(1, b"%8d" % at, SIZE))
        index.learn("one", used)
    assert index.holders(used) == [("one", 4)]
    assert index.holders(unused) == []


def test_one_endpoints_use_does_not_keep_anothers_claim() -> None:
    """A session that moved leaves no trace where it was: that engine has long used the memory for something else."""
    index = PrefixIndex(64)
    blocks = block_hashes(1, b"s" * 16, SIZE)
    index.learn("before", blocks)
    for at in range(80):
        index.learn("after", blocks)
        index.learn("other", block_hashes(1, b"%8d" % at, SIZE))
    assert index.holders(blocks) == [("after", 4)]


def test_the_deepest_holders_come_first_and_no_more_than_asked() -> None:
    index = PrefixIndex()
    blocks = block_hashes(1, b"x" * 80, SIZE)
    for at in range(20):
        index.learn(f"e{at}", blocks[: at + 1])
    assert index.holders(blocks) == [(f"e{at}", at + 1) for at in range(19, 19 - MOST_HOLDERS, -1)]
    assert index.holders(blocks[:3], most=2) == [("e2", 3), ("e3", 3)]


def test_holders_of_a_common_beginning_take_turns() -> None:
    """A system prompt that every endpoint holds does not make the first eight of them hot."""
    index = PrefixIndex()
    blocks = block_hashes(1, b"x" * 16, SIZE)
    for at in range(100):
        index.learn(f"e{at}", blocks)
    random = Random(1)
    turns = Counter(name for _ in range(1000) for name, _ in index.holders(blocks, random.getrandbits(32)))
    assert len(turns) == 100
    assert max(turns.values()) < 3 * 1000 * MOST_HOLDERS / 100


def test_endpoints_that_come_and_go_without_end_cost_nothing_lasting() -> None:
    index = PrefixIndex(1000)
    index.learn("stays", blocks_of(b"aaaabbbb"))
    for at in range(5000):
        index.learn(f"e{at}", blocks_of(b"aaaabbbb"))
        index.learn("stays", blocks_of(b"aaaabbbb"))
        index.forget(f"e{at}")
    assert index.holders(blocks_of(b"aaaabbbb")) == [("stays", 2)]
    assert max(mask.bit_length() for mask in index._young.values()) < 300


def test_an_endpoint_that_comes_back_begins_with_nothing() -> None:
    index = PrefixIndex(100)
    index.learn("one", blocks_of(b"aaaabbbb"))
    index.forget("one")
    index.forget("never seen")
    index.learn("one", blocks_of(b"bbbb"))
    assert index.holders(blocks_of(b"aaaabbbb")) == []
    assert index.holders(blocks_of(b"bbbb")) == [("one", 1)]


def test_an_index_that_could_hold_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="two blocks"):
        PrefixIndex(1)
