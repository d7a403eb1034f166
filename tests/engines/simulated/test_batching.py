"""The model of continuous batching: it jumps, and comes to the same as walking."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.simulation.batching import (
    AdapterLoaded,
    EngineModel,
    Finished,
    FirstToken,
    Outcome,
    Preempted,
    Refusal,
    Request,
)
from engines.simulation.profiles import PROFILES, Profile
from tests.engines.simulated.naive import NaiveEngine, times_of
from tests.support.examples import examples
from tests.support.table import each

BLOCK = 4
drawn = settings(max_examples=examples(25))


def small(**changed: Any) -> Profile:
    """A profile with room for little, so that small cases meet every rule."""
    fields: dict[str, Any] = {
        "name": "small",
        "model": "small",
        "sources": ("for tests",),
        "decode_points": ((1, 100), (4, 160)),
        "kv_token": 3,
        "prefill_token": 10,
        "prefill_context_ps": 2000,
        "max_model_len": 40,
        "kv_blocks": 14,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "block_tokens": BLOCK,
        "hash_tokens": BLOCK,
        "max_loras": 2,
        "max_cpu_loras": 3,
        "adapted_sequence": 7,
        "adapter_kind": 11,
        "adapter_from_disk": 500,
        "adapter_to_device": 60,
    }
    return Profile(**fields | changed)


@dataclasses.dataclass(frozen=True)
class Act:
    """One thing done to an engine, ``after`` so many ns."""

    after: int
    request: Request | None = None
    abort: str | None = None
    load: str | None = None


def hashes(stem: int, tokens: int) -> tuple[int, ...]:
    """Hashes of a prompt: those with the same stem share what they have in common."""
    return tuple(stem * 1000 + index for index in range(tokens // BLOCK))


@st.composite
def acts(draw: st.DrawFn, most: int = 14) -> list[Act]:
    """Arrivals, aborts and loads of adapters, mostly arrivals."""
    done: list[Act] = []
    count = draw(st.integers(1, most))
    for number in range(count):
        after = draw(st.sampled_from([0, 0, 1, 100, 130, 400]) | st.integers(0, 3000))
        what = draw(st.integers(0, 9))
        if what == 8 and number:
            done.append(Act(after, abort=f"r{draw(st.integers(0, number - 1))}"))
        elif what == 9:
            done.append(Act(after, load=draw(st.sampled_from("abcd"))))
        else:
            prompt, output = draw(st.integers(1, 25)), draw(st.integers(0, 15))
            stem = draw(st.integers(0, 3))
            known = draw(st.integers(0, (prompt + output) // BLOCK))
            adapter = draw(st.sampled_from([None, None, None, "a", "b", "c"]))
            stem += 0 if adapter is None else 10 * ord(adapter)
            request = Request(
                f"r{number}", prompt, output, hashes(stem, known * BLOCK), adapter, draw(st.integers(0, 2))
            )
            done.append(Act(after, request=request))
    return done


profiles = st.builds(
    small,
    kv_blocks=st.integers(10, 24),
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.integers(8, 40),
    kv_token=st.integers(0, 5),
    by_priority=st.booleans(),
    max_loras=st.integers(1, 3),
)


def flat(model: EngineModel, outcomes: Iterable[Outcome]) -> list[tuple[object, ...]]:
    """Outcomes as the naive engine writes them."""
    events: list[tuple[object, ...]] = []
    for outcome in outcomes:
        match outcome:
            case FirstToken():
                events.append(("first", outcome.id, outcome.at, outcome.started, outcome.cached_tokens))
            case Finished():
                times = tuple(model.token_times(outcome))
                events.append(("finished", outcome.id, outcome.at, outcome.started, outcome.preemptions, times))
            case Preempted():
                events.append(("preempted", outcome.id, outcome.at))
            case AdapterLoaded():
                events.append(("loaded", outcome.adapter, outcome.at))
    return events


def in_order(events: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """What happens at one moment in one order: the engines finish a step's sequences in orders of their own."""
    return sorted(events, key=lambda event: (event[2], event[0], event[1]))


def play(model: EngineModel, script: Iterable[Act], *, check: bool = False) -> list[tuple[object, ...]]:
    """Do all that to the model and let it come to its end."""
    events: list[tuple[object, ...]] = []
    now = 0
    for act in script:
        now += act.after
        events += flat(model, model.advance(now))
        if act.request is not None:
            assert model.arrive(act.request, now) is None
        elif act.abort is not None:
            model.abort(act.abort, now)
        elif act.load is not None:
            model.load_adapter(act.load, now)
        if check:
            held_together(model)
    while (at := model.next_event()) is not None:
        events += flat(model, model.advance(at))
        if check:
            held_together(model)
    return events


def held_together(model: EngineModel) -> None:
    """What holds at any time."""
    cache = model.cache
    assert 0 <= cache.available <= cache.blocks
    assert cache._free >= 0
    held = sum(len(sequence.held) * cache.unit for sequence in model._running.values())
    assert held or cache.available + cache.used == cache.blocks
    assert model.running <= model.profile.max_num_seqs
    assert len(model.running_adapters) <= model.profile.max_loras
    assert len(model._on_device) <= model.profile.max_loras
    # Work conserving: whoever waits does so because a step is under way.
    assert not model.waiting or model.next_step() is not None


@drawn
@given(profiles, acts())
def test_jumping_comes_to_the_same_as_walking(profile: Profile, script: list[Act]) -> None:
    """Every outcome, every token's time, every preemption and cache hit are those of a step-by-step engine."""
    naive, model = NaiveEngine(profile), EngineModel(profile)
    now = 0
    events: list[tuple[object, ...]] = []
    for act in script:
        now += act.after
        if act.request is not None:
            naive.arrive(act.request, now)
            model.arrive(act.request, now)
        elif act.abort is not None:
            assert naive.abort(act.abort, now) == model.abort(act.abort, now)
        elif act.load is not None:
            naive.load_adapter(act.load, now)
            model.load_adapter(act.load, now)
        events += flat(model, model.advance(now))
        assert (naive.used(), len(naive.running), len(naive.waiting)) == (
            model.cache.used,
            model.running,
            model.waiting,
        )
    while (at := model.next_event()) is not None:
        events += flat(model, model.advance(at))
    naive.until(10**12)
    assert naive.step_end is None
    assert in_order(events) == in_order(naive.events)


@drawn
@given(profiles, acts())
def test_nothing_is_overcommitted_or_lost(profile: Profile, script: list[Act]) -> None:
    """KV blocks suffice at every moment, all tokens asked for come, each once, and nothing is held in the end."""
    model = EngineModel(profile)
    events = play(model, script, check=True)
    aborted = {act.abort for act in script if act.abort}
    asked = {act.request.id: act.request.output_tokens for act in script if act.request}
    got = {str(event[1]): event[5] for event in events if event[0] == "finished"}
    assert set(asked) - aborted <= set(got)
    for request_id, times in got.items():
        assert isinstance(times, tuple)
        assert len(times) == asked[request_id]
        assert list(times) == sorted(set(times))
    assert (model.running, model.waiting, model.cache.used) == (0, 0, 0)
    if not aborted:
        assert model.counters.generated_tokens == sum(asked.values())


@drawn
@given(acts())
def test_first_come_first_served(script: list[Act]) -> None:
    """With room for all and no adapters, sequences start in the order they came."""
    model = EngineModel(small(kv_blocks=400))
    plain = [dataclasses.replace(act, request=_without_adapter(act.request)) for act in script if not act.load]
    events = play(model, plain)
    order = [str(event[1]) for event in sorted(events, key=_started) if event[0] == "first"]
    assert order == sorted(order, key=lambda name: int(name[1:]))


def _without_adapter(request: Request | None) -> Request | None:
    if request is None:
        return None
    return Request(request.id, request.prompt_tokens, request.output_tokens)


def _started(event: tuple[object, ...]) -> tuple[int, int]:
    return (int(str(event[3])), int(str(event[1])[1:])) if event[0] == "first" else (0, 0)


@drawn
@given(profiles, acts())
def test_same_calls_same_outcomes_however_often_it_is_looked_at(profile: Profile, script: list[Act]) -> None:
    """Asking at times in between changes nothing."""
    once = play(EngineModel(profile), script)
    model = EngineModel(profile)
    often: list[Act] = []
    for act in script:
        third = act.after // 3
        often += [Act(third), Act(third), dataclasses.replace(act, after=act.after - 2 * third)]
    assert play(model, often) == once


@drawn
@given(profiles, acts(), st.integers(2, 50))
def test_a_slower_engine_does_the_same_later(profile: Profile, script: list[Act], factor: int) -> None:
    """Everything takes exactly so many times as long when all figures and arrivals do."""
    slow = play(EngineModel(profile.slowed(factor)), [dataclasses.replace(a, after=a.after * factor) for a in script])
    fast = play(EngineModel(profile), script)
    assert slow == [tuple(_slowed(event, factor)) for event in fast]


def _slowed(event: tuple[Any, ...], factor: int) -> Iterable[object]:
    kind, name, at, *rest = event
    yield from (kind, name, at * factor)
    if kind == "first":
        yield from (rest[0] * factor, rest[1])
    elif kind == "finished":
        yield from (rest[0] * factor, rest[1], tuple(time * factor for time in rest[2]))


@drawn
@given(profiles, acts(), st.integers(0, 5000))
def test_aborting_all_frees_all(profile: Profile, script: list[Act], after: int) -> None:
    """Whatever a request is doing, its blocks are free the moment it is aborted."""
    model = EngineModel(profile)
    now = 0
    for act in script:
        now += act.after
        if act.request is not None:
            model.arrive(act.request, now)
    for act in script:
        if act.request is not None:
            model.abort(act.request.id, now + after)
    assert (model.running, model.waiting, model.cache.used, model.running_adapters) == (0, 0, 0, [])
    model.advance(now + after + 10**6)
    assert model.next_event() is None


def run(model: EngineModel) -> list[Outcome]:
    outcomes: list[Outcome] = []
    while (at := model.next_event()) is not None:
        outcomes += model.advance(at)
    return outcomes


def finished(outcomes: Iterable[Outcome]) -> dict[str, Finished]:
    return {outcome.id: outcome for outcome in outcomes if isinstance(outcome, Finished)}


def test_the_youngest_is_preempted_and_comes_back() -> None:
    """Two that grow into each other: the younger waits, is computed anew, and gets all its tokens."""
    model = EngineModel(small(kv_blocks=10))
    model.arrive_all([Request("old", 16, 20), Request("young", 16, 20)], 0)
    outcomes = run(model)
    assert [outcome.id for outcome in outcomes if isinstance(outcome, Preempted)] == ["young"]
    through = finished(outcomes)
    assert through["young"].preemptions == 1
    assert through["young"].at > through["old"].at
    assert model.counters.generated_tokens == 40


def test_room_that_a_preemption_makes_is_given_away_in_the_next_step() -> None:
    """A step that preempts admits nobody, the one after it does."""
    model = EngineModel(small(kv_blocks=10, max_num_seqs=2, kv_token=0, by_priority=True))
    model.arrive_all([Request("stays", 19, 4), Request("goes", 16, 2, priority=1)], 0)
    outcomes: list[Outcome] = []
    while not any(isinstance(outcome, Preempted) for outcome in outcomes):
        outcomes += model.advance(model.next_event() or 0)
    preempted = model.now
    model.arrive(Request("next", 1, 0), preempted)
    outcomes += run(model)
    assert finished(outcomes)["next"].started == preempted + 100


def test_an_abort_while_an_adapter_is_loaded_frees_what_was_held() -> None:
    """No step is under way then, and no block was taken for one."""
    model = EngineModel(small())
    model.arrive(Request("r", 4, 5), 0)
    model.load_adapter("a", 0)
    model.advance(model.next_event() or 0)
    assert model.token_times("r") == [model.now]
    assert model.abort("r", model.now + 1) == 1
    assert model.cache.used == 0


def test_a_prefix_is_found_again_and_a_salt_keeps_it_apart() -> None:
    """The second request computes only what the first did not; other hashes find nothing."""
    model = EngineModel(small())
    model.arrive(Request("first", 13, 2, hashes(1, 12)), 0)
    run(model)
    model.arrive(Request("again", 13, 2, hashes(1, 12)), model.now)
    model.arrive(Request("salted", 13, 2, hashes(2, 12)), model.now)
    through = finished(run(model))
    assert through["again"].cached_tokens == 12
    assert through["salted"].cached_tokens == 0


def test_one_token_is_computed_even_if_all_is_cached() -> None:
    """A prompt that is cached to its last token still takes a step for the last block."""
    model = EngineModel(small())
    for name in ("first", "again"):
        model.arrive(Request(name, 12, 1, hashes(1, 12)), model.now)
        through = finished(run(model))
    assert through["again"].cached_tokens == 8


def test_an_answer_is_cached_for_the_next_turn() -> None:
    """Hashes beyond the prompt let the next turn find the answer too."""
    model = EngineModel(small())
    model.arrive(Request("turn 1", 8, 9, hashes(1, 16)), 0)
    run(model)
    model.arrive(Request("turn 2", 20, 1, hashes(1, 20)), model.now)
    assert finished(run(model))["turn 2"].cached_tokens == 16


def test_an_adapter_without_a_slot_is_passed_over() -> None:
    """With both slots taken the third adapter waits, and a request without one goes by."""
    model = EngineModel(small())
    wanted = [("a", 10), ("b", 10), ("c", 2), (None, 2)]
    model.arrive_all([Request(f"r{i}", 2, tokens, (), name) for i, (name, tokens) in enumerate(wanted)], 0)
    through = finished(run(model))
    assert through["r3"].started == 0
    assert through["r2"].started >= through["r0"].at


def test_the_first_use_of_an_adapter_takes_its_loading_time() -> None:
    """From disk when it is nowhere, from memory when it was loaded before, nothing when it is on the device."""
    profile = small()
    model = EngineModel(profile)
    took = []
    for index, adapter in enumerate(("a", "a", "b")):
        if adapter == "b":
            model.load_adapter("b", model.now)
            run(model)
        began = model.now
        model.arrive(Request(f"r{index}", 2, 1, (), adapter), began)
        run(model)
        took.append(model.now - began)
    assert took[0] - took[1] == profile.adapter_from_disk + profile.adapter_to_device
    assert took[2] - took[1] == profile.adapter_to_device


def test_what_cannot_be_taken_is_refused() -> None:
    """A full queue, a request that never fits, an adapter where there are no slots."""
    model = EngineModel(small(max_unfinished=2, max_num_seqs=1))
    assert model.arrive(Request("r0", 1, 5), 0) is None
    assert model.arrive(Request("r1", 1, 5), 0) is None
    assert model.arrive(Request("r2", 1, 5), 0) is Refusal.QUEUE_FULL
    assert EngineModel(small()).arrive(Request("long", 30, 11), 0) is Refusal.TOO_LONG
    assert EngineModel(small(max_loras=0)).arrive(Request("r", 1, 1, (), "a"), 0) is Refusal.NO_ADAPTERS


def test_token_times_are_told_ahead_up_to_the_next_event() -> None:
    """What is told ahead is what comes."""
    model = EngineModel(small(kv_blocks=100))
    model.arrive(Request("r", 4, 12), 0)
    model.advance(model.next_event() or 0)
    ahead = model.token_times("r")
    assert len(ahead) == 12
    assert model.emitted("r") == 1
    for count, at in enumerate(ahead, 1):
        assert model.next_step() == at or count == 1
        outcomes = model.advance(at)
        if not outcomes:
            assert model.emitted("r") == count
    assert finished(outcomes)["r"].at == ahead[-1]


def test_units_of_several_blocks() -> None:
    """One hash may stand for several blocks; capacity is still counted in blocks."""
    model = EngineModel(small(hash_tokens=2 * BLOCK, kv_blocks=20))
    chain = (1, 2, 3)
    for number in range(12):
        model.arrive(Request(f"r{number}", 25, 6, chain if number % 2 else (number * 10, 7 + number * 10)), model.now)
        model.advance(model.now + 700)
        held_together(model)
    run(model)
    assert model.cache.used == 0
    assert model.counters.cached_tokens > 0


@each("name", PROFILES)
def test_every_profile_runs_and_says_where_its_figures_come_from(name: str) -> None:
    profile = PROFILES[name]
    model = EngineModel(profile)
    for number, gap in enumerate(times_of(7, 200, 20_000_000)):
        prompt = min(1000, profile.max_model_len // 2)
        model.arrive(Request(f"r{number}", prompt, 50), model.now + gap)
    run(model)
    assert model.counters.finished == 200
    assert profile.sources
    assert all(source[:2] in ("M:", "D:", "A:", "R:") for source in profile.sources)


def test_one_stream_and_sixty_four_decode_as_published() -> None:
    """The step times that went into the profile come out of the model: 7.0 ms alone, 10.7 ms for 64, at 1k context."""
    for sequences, expected in ((1, 7.0), (64, 10.7)):
        model = EngineModel(PROFILES["h100-8b"])
        model.arrive_all([Request(f"r{i}", 980, 40) for i in range(sequences)], 0)
        while model.counters.finished == 0:
            outcomes = model.advance(model.next_event() or 0)
        last = finished(outcomes)["r0"] if sequences == 1 else f"r{sequences - 1}"
        times = model.token_times(last)
        assert (times[1] - times[0]) / 1e6 == pytest.approx(expected, rel=0.02)


def test_steps_are_forgotten_when_no_request_needs_them() -> None:
    """A long run keeps the past of the requests that are there, no more."""
    model = EngineModel(small(kv_blocks=100))
    for number, gap in enumerate(times_of(3, 6000, 300)):
        at = model.now + gap
        model.advance(at)
        model.arrive(Request(f"r{number}", 3, 3), at)
    run(model)
    assert len(model._past) < 2100
