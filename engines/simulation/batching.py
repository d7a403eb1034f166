"""A model of one engine's continuous batching that jumps from event to event.

Law of this file: time is an argument, in whole nanoseconds; nothing here does I/O, reads a clock or draws a random
number. The same calls with the same times give the same outcomes.

What is modelled is vLLM's scheduler, one step at a time: every running sequence decodes one token, waiting ones are
admitted in order while sequences, tokens of the step and KV blocks are left, long prompts are prefilled in chunks, and
when a decoding sequence finds no block the youngest is preempted and recomputed later. Between two events every step
has the same sequences, so that the length of a run of steps is a closed form and nobody walks through them.

Rules where times meet: what arrives exactly when a step ends waits for the end of the next one; in an idle engine the
first arrival starts a step alone, unless several arrive in one call.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from enum import Enum

import msgspec

from engines.simulation.cache import KvCache
from engines.simulation.profiles import Profile
from engines.simulation.waiting import WaitingQueue

_KEPT_STEPS = 1024
"""Runs of steps after which those that no request needs any more are dropped."""


class Request(msgspec.Struct, frozen=True, gc=False):
    """One sequence to generate. ``id`` is unique among those that are there.

    ``hashes`` stand for the tokens of prompt and answer, ``hash_tokens`` of the profile each and each for everything
    before it too (adapter and cache salt included); those beyond the prompt let a later turn find the answer cached.
    Fewer than there are tokens will do. ``priority``: smaller goes first, where the profile schedules by it.
    """

    id: str
    prompt_tokens: int
    output_tokens: int
    hashes: Sequence[int] = ()
    adapter: str | None = None
    priority: int = 0


class Refusal(Enum):
    """Why a request is not taken."""

    QUEUE_FULL = "queue_full"
    TOO_LONG = "too_long"
    NO_ADAPTERS = "no_adapters"


class FirstToken(msgspec.Struct, frozen=True):
    """A prompt was computed for the first time and its first token is there."""

    id: str
    at: int
    started: int
    cached_tokens: int


class Finished(msgspec.Struct, frozen=True):
    """All tokens are there. Times are those of its arrival, of its (first) admission and of its first token; ``spans``
    is what ``EngineModel.token_times`` reads."""

    id: str
    at: int
    arrived: int
    started: int
    first_token: int
    tokens: int
    cached_tokens: int
    preemptions: int
    spans: Sequence[tuple[int, int]] = ()


class Preempted(msgspec.Struct, frozen=True):
    """A sequence lost its blocks and waits again; what it generated stays."""

    id: str
    at: int


class AdapterLoaded(msgspec.Struct, frozen=True):
    """An adapter that ``load_adapter`` asked for is in memory."""

    adapter: str
    at: int


Outcome = FirstToken | Finished | Preempted | AdapterLoaded


class _Sequence:
    """A request on its way through the engine."""

    __slots__ = (
        "adapter",
        "admission",
        "arrived",
        "cached",
        "chunk",
        "computed",
        "decoding",
        "finish_step",
        "first_token",
        "generated",
        "held",
        "key",
        "length0",
        "preemptions",
        "published",
        "queued",
        "request",
        "spans",
        "started",
        "step0",
        "target",
    )

    def __init__(self, request: Request, arrived: int, key: tuple[int, int]) -> None:
        self.request = request
        self.adapter = request.adapter
        self.arrived = arrived
        self.key = key
        self.queued = False
        self.decoding = False
        self.started = self.first_token = -1
        self.cached = self.preemptions = 0
        self.generated = 0
        """Tokens when it began to decode; those since then are counted in steps."""
        self.target = self.computed = self.chunk = 0
        """Tokens to prefill, done, and in the step under way."""
        self.step0 = self.length0 = 0
        """The engine's count of steps when it began to decode, and the tokens in its KV blocks then."""
        self.finish_step = 0
        self.admission = 0
        """Its place in the order in which sequences were admitted: those that are through together leave in it."""
        self.held: list[int] = []
        self.published = 0
        self.spans: list[tuple[int, int]] = []
        """(index of a token, step at whose end it came): from there on one token a step."""


class _Run(msgspec.Struct):
    """Steps of one composition, the first of them under way: it takes ``first``, each later one ``growth`` more."""

    start: int
    first: int
    growth: int
    steps: int

    def end(self, steps: int) -> int:
        """When so many of them are over."""
        return self.start + steps * self.first + self.growth * (steps * (steps - 1) // 2)

    def over(self, at: int) -> int:
        """How many of them are over by ``at``, at most all."""
        if at >= self.end(self.steps):
            return self.steps
        return max(0, _steps_within(at - self.start, self.first, self.growth))


def _steps_within(time: int, first: int, growth: int) -> int:
    """Return the most steps n with ``n first + growth n (n - 1) / 2 <= time``."""
    if time < first:
        return 0
    if not growth:
        return time // first
    slope = 2 * first - growth
    steps = (math.isqrt(slope * slope + 8 * growth * time) - slope) // (2 * growth)
    while steps * first + growth * (steps * (steps - 1) // 2) > time:
        steps -= 1
    while (steps + 1) * first + growth * ((steps + 1) * steps // 2) <= time:
        steps += 1
    return steps


class Counters(msgspec.Struct):
    """Sums since the start."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    aborted: int = 0
    adapter_loads: int = 0
    steps: int = 0


class EngineModel:
    """One engine. Times given to it never go back."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.counters = Counters()
        self.cache = KvCache(profile.kv_blocks, profile.hash_tokens // profile.block_tokens)
        self._decode_times = profile.decode_times()
        self._now = 0
        self._outcomes: list[Outcome] = []
        self._sequences: dict[str, _Sequence] = {}
        self._order = 0
        self._waiting: WaitingQueue[_Sequence] = WaitingQueue()
        self._running: dict[str, _Sequence] = {}
        self._prefilling: list[_Sequence] = []
        self._run: _Run | None = None
        # Of the decoding sequences: how many, their tokens in the cache, how many need a block in which step (by the
        # remainder of their length less the step count), and when each is through.
        self._decoding = 0
        self._context = 0
        self._phases = [0] * profile.block_tokens
        self._finishing: list[tuple[int, int, _Sequence]] = []
        self._admissions = 0
        # Adapters: running sequences by adapter, those on the device and those in memory (least recently used first).
        self._adapted: dict[str, int] = {}
        self._on_device: OrderedDict[str, None] = OrderedDict()
        self._in_memory: OrderedDict[str, None] = OrderedDict()
        self._loads: list[str] = []
        self._loading: str | None = None
        self._past: list[tuple[int, _Run]] = []
        self._past_limit = _KEPT_STEPS

    # --- what happens to it ------------------------------------------------------------------------------------

    def arrive(self, request: Request, now: int) -> Refusal | None:
        """Take a request, or say why not."""
        return self.arrive_all((request,), now)

    def arrive_all(self, requests: Sequence[Request], now: int) -> Refusal | None:
        """Take requests that arrive together, all or none."""
        self._run_to(now)
        refusal = self._refusal(requests)
        if refusal is not None:
            return refusal
        added = []
        for request in requests:
            priority = request.priority if self.profile.by_priority else 0
            sequence = _Sequence(request, now, (priority, self._order))
            self._order += 1
            self._sequences[request.id] = sequence
            self._waiting.push(sequence)
            added.append(sequence)
        if self._run is None:
            self._begin(now)
        elif self._run.steps > 1 and len(self._running) < self.profile.max_num_seqs:
            first = self._waiting.first(self._eligible())
            if any(sequence is first for sequence in added):
                self._run.steps = 1
        return None

    def abort(self, request_id: str, now: int) -> int | None:
        """End a request; return how many tokens it got, None when it is not there. All it held is free at once, the
        step under way takes its time."""
        self._run_to(now)
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return None
        tokens = self._emitted(sequence)
        if sequence.queued:
            self._waiting.forget(sequence)
        else:
            # While an adapter is loaded no step is under way.
            self._leave(sequence, int(sequence.decoding and self._loading is None))
        self.counters.aborted += 1
        if self._run is not None:
            self._run.steps = 1
        return tokens

    def load_adapter(self, adapter: str, now: int) -> None:
        """Load an adapter into memory when the step under way is over; nothing else is done meanwhile."""
        self._run_to(now)
        self._loads.append(adapter)
        if self._run is None:
            self._begin(now)
        else:
            self._run.steps = 1

    def unload_adapter(self, adapter: str) -> None:
        """Forget an adapter; requests that use it are served to their end."""
        self._in_memory.pop(adapter, None)
        if adapter not in self._adapted:
            self._on_device.pop(adapter, None)

    def next_event(self) -> int | None:
        """Return when something will happen if nothing arrives, None when nothing will."""
        if self._outcomes:
            return self._now
        return self._run.end(self._run.steps) if self._run is not None else None

    def next_step(self) -> int | None:
        """Return when the step under way will be over, None when there is none."""
        return self._run.end(1) if self._run is not None else None

    def advance(self, to: int) -> list[Outcome]:
        """Let time pass; return what happened since the last call, in order."""
        self._forget_steps()
        self._run_to(to)
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    # --- what it can tell --------------------------------------------------------------------------------------

    @property
    def now(self) -> int:
        """The latest time it was told."""
        return self._now

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    @property
    def cache_used(self) -> float:
        """Share of the KV blocks that requests hold."""
        return self.cache.used / self.cache.blocks

    @property
    def running_adapters(self) -> list[str]:
        """Adapters in the batch."""
        return list(self._adapted)

    @property
    def waiting_adapters(self) -> list[str]:
        """Adapters that somebody in the queue needs."""
        return self._waiting.adapters()

    def emitted(self, request_id: str) -> int:
        """Return how many tokens a request that is there has by now."""
        return self._emitted(self._sequences[request_id])

    def token_times(self, request: str | Finished) -> list[int]:
        """Return when each token of a request came; of one that is there, also those that will come up to the next
        event. One that is through must be asked for before ``advance`` is called again."""
        if isinstance(request, Finished):
            return list(self._token_times(request.spans, request.tokens))
        sequence = self._sequences[request]
        run = self._run if sequence.decoding and self._loading is None else None
        ahead = run.steps if run is not None else 0
        return list(self._token_times(sequence.spans, self._emitted(sequence) + ahead))

    # --- time --------------------------------------------------------------------------------------------------

    def _run_to(self, now: int) -> None:
        assert now >= self._now, "time does not go back"
        while (run := self._run) is not None:
            steps = run.over(now)
            if steps:
                at = run.end(steps)
                done = steps == run.steps
                self._pass(run, steps)
                if done:
                    self._boundary(at)
                    continue
            break
        self._now = now

    def _pass(self, run: _Run, steps: int) -> None:
        """Account for steps that are over, and for the blocks of the step that is under way then."""
        if self._loading is None:
            self._note(run, steps)
            begun = steps if steps < run.steps else steps - 1
            step = self.counters.steps
            if begun:
                self.cache.take(self._blocks_needed(step + 1, begun))
            self.counters.steps = step + steps
            self.counters.generated_tokens += steps * self._decoding
            self._context += steps * self._decoding
        run.start = run.end(steps)
        run.first += steps * run.growth
        run.steps -= steps

    def _boundary(self, at: int) -> None:
        """A run of steps is over: finish what is through, and begin the next."""
        if self._loading is not None:
            self._loaded(self._loading, at)
            self._loading = None
        step = self.counters.steps
        finishing = self._finishing
        while finishing and finishing[0][0] <= step:
            finish_step, _, sequence = heapq.heappop(finishing)
            if sequence.decoding and sequence.finish_step == finish_step:
                self._finish(sequence, at)
        prefilled, self._prefilling = self._prefilling, []
        for sequence in prefilled:
            sequence.computed += sequence.chunk
            sequence.chunk = 0
            if sequence.computed < sequence.target:
                self._prefilling.append(sequence)
            else:
                self._prefilled(sequence, at)
        self._begin(at)

    def _prefilled(self, sequence: _Sequence, at: int) -> None:
        """The whole prompt is computed, and a token with it."""
        request, step = sequence.request, self.counters.steps
        if sequence.generated < request.output_tokens:
            sequence.spans.append((sequence.generated, step))
            sequence.generated += 1
            self.counters.generated_tokens += 1
        if sequence.first_token < 0:
            sequence.first_token = at
            self._outcomes.append(FirstToken(request.id, at, sequence.started, sequence.cached))
        sequence.decoding = True
        sequence.length0, sequence.step0 = sequence.target, step
        sequence.finish_step = step + request.output_tokens - sequence.generated
        self._decoding += 1
        self._context += sequence.target
        self._phases[(sequence.target - step) % self.profile.block_tokens] += 1
        if sequence.finish_step <= step:
            self._finish(sequence, at)
        else:
            heapq.heappush(self._finishing, (sequence.finish_step, sequence.admission, sequence))

    def _finish(self, sequence: _Sequence, at: int) -> None:
        request = sequence.request
        del self._sequences[request.id]
        self._leave(sequence, 0)
        self.counters.finished += 1
        self._outcomes.append(
            Finished(
                request.id,
                at,
                sequence.arrived,
                sequence.started,
                sequence.first_token,
                request.output_tokens,
                sequence.cached,
                sequence.preemptions,
                sequence.spans,
            )
        )

    def _leave(self, sequence: _Sequence, begun: int) -> None:
        """Take a sequence out of the batch. ``begun`` is 1 when its next token has a place in its blocks already."""
        del self._running[sequence.request.id]
        if sequence.decoding:
            length = self._length(sequence)
            stored = length + begun
            self._decoding -= 1
            self._context -= length
            self._phases[(length - self.counters.steps) % self.profile.block_tokens] -= 1
            sequence.generated += self.counters.steps - sequence.step0
            sequence.decoding = False
            self._publish(sequence, length)
        else:
            stored = sequence.target
            self._prefilling.remove(sequence)
        self.cache.release(sequence.held, self.profile.blocks(stored) - len(sequence.held) * self.cache.unit)
        sequence.held = []
        adapter = sequence.adapter
        if adapter is not None:
            self._adapted[adapter] -= 1
            if not self._adapted[adapter]:
                del self._adapted[adapter]

    # --- the scheduler -----------------------------------------------------------------------------------------

    def _begin(self, at: int) -> None:
        """Decide the next run of steps, which starts at ``at``."""
        if self._begin_load(at):
            return
        preempted = self._give_blocks(at)
        decoding = self._decoding
        budget = self.profile.max_num_batched_tokens - decoding
        prefilled, reads = 0, 0
        for sequence in self._prefilling:
            budget -= self._schedule_chunk(sequence, budget)
        loading = 0
        if not preempted:
            while budget > 0 and (admitted := self._admit(at)) is not None:
                budget -= self._schedule_chunk(admitted, budget)
                loading += self._use_adapter(admitted.adapter)
        for sequence in self._prefilling:
            prefilled += sequence.chunk
            reads += sequence.chunk * (2 * sequence.computed + sequence.chunk) // 2
        if not self._running:
            self._run = None
            return
        first = self._step_time(prefilled, reads) + loading
        if self._prefilling or preempted:
            # Nobody is admitted in a step that preempts: the next one may admit again.
            self._run = _Run(at, first, 0, 1)
        else:
            self._run = _Run(at, first, self.profile.kv_token * decoding, self._steps_ahead())

    def _step_time(self, prefilled: int, reads: int) -> int:
        """Return how long a step takes, see ``Profile``."""
        profile = self.profile
        sequences = self._decoding + len(self._prefilling)
        time = self._decode_times[sequences]
        if prefilled:
            time = max(time, (prefilled + self._decoding) * profile.prefill_token)
            time += reads * profile.prefill_context_ps // 1000
        time += profile.kv_token * self._context
        if self._adapted:
            time += sum(self._adapted.values()) * profile.adapted_sequence
            time += (len(self._adapted) - 1) * profile.adapter_kind
        return max(1, time)

    def _steps_ahead(self) -> int:
        """Return how many steps there are until a sequence is through or finds no block."""
        step = self.counters.steps
        finishing = self._finishing
        while not ((first := finishing[0][2]).decoding and first.finish_step == finishing[0][0]):
            heapq.heappop(finishing)
        steps = finishing[0][0] - step
        available, decoding, size = self.cache.available, self._decoding, self.profile.block_tokens
        if decoding * ((steps - 1) // size + 1) <= available:
            return steps
        # Every sequence takes one block in each round of block_tokens steps; the first step has its blocks.
        rounds = available // decoding
        possible = 1 + rounds * size
        left = available - rounds * decoding
        while possible < steps and (needed := self._phases[-(step + possible) % size]) <= left:
            left -= needed
            possible += 1
        return min(steps, possible)

    def _blocks_needed(self, step: int, steps: int) -> int:
        """Return how many blocks the decoding sequences take for so many steps from ``step`` on."""
        size = self.profile.block_tokens
        rounds, rest = divmod(steps, size)
        return rounds * self._decoding + sum(self._phases[-(step + i) % size] for i in range(rest))

    def _give_blocks(self, at: int) -> bool:
        """Give the decoding sequences their blocks for one step; True when one had to be preempted for that."""
        needed = self._phases[-self.counters.steps % self.profile.block_tokens]
        if needed <= self.cache.available:
            self.cache.take(needed)
            return False
        given: set[str] = set()
        for sequence in list(self._running.values()):
            if not sequence.decoding or self._length(sequence) % self.profile.block_tokens:
                continue
            while not self.cache.available:
                victim = self._victim()
                self._preempt(victim, at, victim.request.id in given)
                if victim is sequence:
                    break
            if sequence.decoding:
                self.cache.take(1)
                given.add(sequence.request.id)
        return True

    def _victim(self) -> _Sequence:
        if self.profile.by_priority:
            return max(self._running.values(), key=lambda sequence: sequence.key)
        return next(reversed(self._running.values()))

    def _preempt(self, sequence: _Sequence, at: int, given: bool) -> None:
        self._leave(sequence, int(given))
        sequence.preemptions += 1
        self.counters.preemptions += 1
        self._waiting.push(sequence)
        self._outcomes.append(Preempted(sequence.request.id, at))

    def _eligible(self) -> list[str | None] | None:
        """Return the adapters a sequence may have to be admitted now; None for any."""
        if len(self._adapted) < self.profile.max_loras or not self.profile.max_loras:
            return None
        return [None, *self._adapted]

    def _admit(self, at: int) -> _Sequence | None:
        """Move the first of those who wait into the batch, if it fits."""
        if not self._waiting or len(self._running) >= self.profile.max_num_seqs:
            return None
        sequence = self._waiting.first(self._eligible())
        if sequence is None:
            return None
        request = sequence.request
        target = request.prompt_tokens + sequence.generated
        unit = self.profile.hash_tokens
        found, idle = self.cache.hits(request.hashes, (target - 1) // unit)
        needed = self.profile.blocks(target) - found * self.cache.unit
        if needed > self.cache.available - idle * self.cache.unit:
            return None
        self._waiting.pop(sequence)
        self._admissions += 1
        sequence.admission = self._admissions
        sequence.held = list(request.hashes[:found])
        self.cache.share(sequence.held)
        self.cache.take(needed)
        sequence.published = found
        sequence.target, sequence.computed = target, found * unit
        if sequence.started < 0:
            sequence.started, sequence.cached = at, found * unit
            self.counters.prompt_tokens += target
            self.counters.cached_tokens += found * unit
        self._running[request.id] = sequence
        self._prefilling.append(sequence)
        if sequence.adapter is not None:
            self._adapted[sequence.adapter] = self._adapted.get(sequence.adapter, 0) + 1
        return sequence

    def _schedule_chunk(self, sequence: _Sequence, budget: int) -> int:
        sequence.chunk = min(budget, sequence.target - sequence.computed)
        self._publish(sequence, sequence.computed + sequence.chunk)
        return sequence.chunk

    def _publish(self, sequence: _Sequence, tokens: int) -> None:
        """Let others find the units that its first ``tokens`` fill."""
        hashes = sequence.request.hashes
        full = min(tokens // self.profile.hash_tokens, len(hashes))
        for index in range(sequence.published, full):
            if self.cache.publish(hashes[index]):
                sequence.held.append(hashes[index])
        sequence.published = max(sequence.published, full)

    def _refusal(self, requests: Sequence[Request]) -> Refusal | None:
        profile = self.profile
        unfinished = self.running + self.waiting + len(requests)
        if profile.max_unfinished is not None and unfinished > profile.max_unfinished:
            return Refusal.QUEUE_FULL
        for request in requests:
            assert request.id not in self._sequences, f"{request.id} is there already"
            assert request.prompt_tokens > 0 <= request.output_tokens
            if request.prompt_tokens + request.output_tokens > profile.max_model_len:
                return Refusal.TOO_LONG
            if request.adapter is not None and not profile.max_loras:
                return Refusal.NO_ADAPTERS
        return None

    # --- adapters ----------------------------------------------------------------------------------------------

    def _begin_load(self, at: int) -> bool:
        """Begin to load the next adapter that was asked for; False when none takes time."""
        while self._loads:
            adapter = self._loads.pop(0)
            if adapter not in self._in_memory and self.profile.adapter_from_disk:
                self._loading = adapter
                self._run = _Run(at, self.profile.adapter_from_disk, 0, 1)
                return True
            self._loaded(adapter, at)
        return False

    def _loaded(self, adapter: str, at: int) -> None:
        self._keep_in_memory(adapter)
        self.counters.adapter_loads += 1
        self._outcomes.append(AdapterLoaded(adapter, at))

    def _use_adapter(self, adapter: str | None) -> int:
        """Bring an adapter onto the device; return how long that holds up the step."""
        if adapter is None:
            return 0
        if adapter in self._on_device:
            self._on_device.move_to_end(adapter)
            return 0
        time = self.profile.adapter_to_device
        if adapter not in self._in_memory:
            time += self.profile.adapter_from_disk
        self._keep_in_memory(adapter)
        if len(self._on_device) >= self.profile.max_loras:
            del self._on_device[next(name for name in self._on_device if name not in self._adapted)]
        self._on_device[adapter] = None
        return time

    def _keep_in_memory(self, adapter: str) -> None:
        self._in_memory[adapter] = None
        self._in_memory.move_to_end(adapter)
        if len(self._in_memory) > max(self.profile.max_cpu_loras, 1):
            self._in_memory.popitem(last=False)

    # --- tokens ------------------------------------------------------------------------------------------------

    def _length(self, sequence: _Sequence) -> int:
        """Tokens of a decoding sequence that are in its blocks."""
        return sequence.length0 + self.counters.steps - sequence.step0

    def _emitted(self, sequence: _Sequence) -> int:
        return sequence.generated + (self.counters.steps - sequence.step0 if sequence.decoding else 0)

    def _note(self, run: _Run, steps: int) -> None:
        """Remember when steps ended, as long as somebody may ask."""
        step = self.counters.steps
        if self._past:
            since, last = self._past[-1]
            follows = since + last.steps == step and last.end(last.steps) == run.start
            if follows and last.growth == run.growth and last.first + last.steps * last.growth == run.first:
                last.steps += steps
                return
        self._past.append((step, _Run(run.start, run.first, run.growth, steps)))

    def _forget_steps(self) -> None:
        if len(self._past) > self._past_limit:
            needed = min((s.spans[0][1] for s in self._sequences.values() if s.spans), default=self.counters.steps)
            del self._past[: max(0, bisect_right(self._past, needed - 1, key=lambda entry: entry[0]) - 1)]
            self._past_limit = 2 * len(self._past) + _KEPT_STEPS

    def _token_times(self, spans: Sequence[tuple[int, int]], count: int) -> Iterator[int]:
        for position, (index, step) in enumerate(spans):
            until = spans[position + 1][0] if position + 1 < len(spans) else count
            for token in range(index, until):
                yield self._end_of(step + token - index)

    def _end_of(self, step: int) -> int:
        """When the step with that number (from 1) was or will be over."""
        if step > self.counters.steps:
            assert self._run is not None
            return self._run.end(step - self.counters.steps)
        since, run = self._past[bisect_right(self._past, step - 1, key=lambda entry: entry[0]) - 1]
        return run.end(step - since)
