"""The same engine as ``engines.simulation.batching``, walked step by step with a block for each block: slow and plain.

Written from vLLM's rules, not from the model: it shares only the figures of the profile.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from engines.simulation.batching import Request
from engines.simulation.profiles import Profile


@dataclass
class Stay:
    """A request in the naive engine."""

    request: Request
    arrived: int
    order: int
    generated: int = 0
    stored: int = 0
    target: int = 0
    chunk: int = 0
    decoding: bool = False
    blocks: list[Block] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    started: int = -1
    cached: int = 0
    published: int = 0
    preemptions: int = 0
    prefilled_at: int = -1

    def key(self, by_priority: bool) -> tuple[int, int]:
        return (self.request.priority if by_priority else 0, self.order)


@dataclass(eq=False)
class Block:
    """A KV block. ``value`` is the hash of a unit of one block."""

    value: int | None = None
    users: int = 0


class NaiveEngine:
    """Profiles with units of one block only."""

    def __init__(self, profile: Profile) -> None:
        assert profile.hash_tokens == profile.block_tokens
        self.profile = profile
        self.decode_times = profile.decode_times()
        self.free: list[Block] = [Block() for _ in range(profile.kv_blocks)]
        """Unused blocks; the first is given out first."""
        self.by_value: dict[int, Block] = {}
        self.waiting: list[Stay] = []
        self.running: list[Stay] = []
        self.step_end: int | None = None
        self.loads: list[str] = []
        self.loading: str | None = None
        self.on_device: list[str] = []
        self.in_memory: list[str] = []
        self.order = 0
        self.events: list[tuple[object, ...]] = []

    # --- what happens to it

    def arrive(self, request: Request, now: int) -> None:
        self.until(now)
        self.waiting.append(Stay(request, now, self.order))
        self.order += 1
        if self.step_end is None:
            self.begin(now)

    def abort(self, request_id: str, now: int) -> int | None:
        self.until(now)
        for place in (self.waiting, self.running):
            for stay in place:
                if stay.request.id == request_id:
                    place.remove(stay)
                    if stay.decoding:
                        self.publish(stay, stay.stored)
                    self.give_back(stay)
                    return stay.generated
        return None

    def load_adapter(self, adapter: str, now: int) -> None:
        self.until(now)
        self.loads.append(adapter)
        if self.step_end is None:
            self.begin(now)

    def until(self, now: int) -> None:
        while self.step_end is not None and self.step_end <= now:
            at, self.step_end = self.step_end, None
            self.end(at)
            self.begin(at)

    # --- blocks

    def give_back(self, stay: Stay) -> None:
        for block in reversed(stay.blocks):
            block.users -= 1
            if block.users == 0:
                self.free.append(block) if block.value is not None else self.free.insert(0, block)
        stay.blocks = []

    def take(self, stay: Stay) -> None:
        plain = next((block for block in self.free if block.value is None), None)
        block = plain or self.free[0]
        self.free.remove(block)
        if block.value is not None:
            del self.by_value[block.value]
            block.value = None
        block.users = 1
        stay.blocks.append(block)

    def publish(self, stay: Stay, tokens: int) -> None:
        """A block is made known when it is filled; where there is one like it then, it never is."""
        full = min(tokens // self.profile.block_tokens, len(stay.request.hashes))
        for index in range(stay.published, full):
            value, block = stay.request.hashes[index], stay.blocks[index]
            if value not in self.by_value:
                block.value = value
                self.by_value[value] = block
        stay.published = max(stay.published, full)

    # --- steps

    def end(self, at: int) -> None:
        if self.loading is not None:
            self.remember(self.loading)
            self.events.append(("loaded", self.loading, at))
            self.loading = None
            return
        through = []
        for stay in self.running:
            stay.stored += stay.chunk
            if stay.stored < stay.target:
                continue
            if stay.generated < stay.request.output_tokens:
                stay.generated += 1
                stay.times.append(at)
            if not stay.decoding:
                stay.decoding = True
                if stay.prefilled_at < 0:
                    stay.prefilled_at = at
                    self.events.append(("first", stay.request.id, at, stay.started, stay.cached))
            stay.target = stay.stored + 1
            if stay.generated >= stay.request.output_tokens:
                through.append(stay)
        for stay in through:
            self.running.remove(stay)
            self.publish(stay, stay.stored)
            self.give_back(stay)
            self.events.append(("finished", stay.request.id, at, stay.started, stay.preemptions, tuple(stay.times)))

    def begin(self, at: int) -> None:
        while self.loads:
            adapter = self.loads.pop(0)
            if adapter not in self.in_memory:
                self.loading = adapter
                self.step_end = at + self.profile.adapter_from_disk
                return
            self.remember(adapter)
            self.events.append(("loaded", adapter, at))
        preempted = self.decode_blocks(at)
        budget = self.profile.max_num_batched_tokens - sum(stay.decoding for stay in self.running)
        for stay in self.running:
            if stay.decoding:
                stay.chunk = 1
            else:
                stay.chunk = min(budget, stay.target - stay.stored)
                self.publish(stay, stay.stored + stay.chunk)
                budget -= stay.chunk
        loading = 0
        while not preempted and budget > 0:
            admitted = self.admit(at, budget)
            if admitted is None:
                break
            budget -= admitted.chunk
            loading += self.use_adapter(admitted.request.adapter)
        if self.running:
            self.step_end = at + self.duration() + loading

    def decode_blocks(self, at: int) -> bool:
        preempted = False
        for stay in list(self.running):
            if stay not in self.running or not stay.decoding:
                continue
            if stay.stored + 1 <= len(stay.blocks) * self.profile.block_tokens:
                continue
            while not self.free and stay in self.running:
                victim = self.running[-1]
                if self.profile.by_priority:
                    victim = max(self.running, key=lambda other: other.key(True))
                self.preempt(victim, at)
                preempted = True
            if stay in self.running:
                self.take(stay)
        return preempted

    def preempt(self, stay: Stay, at: int) -> None:
        self.running.remove(stay)
        if stay.decoding:
            self.publish(stay, stay.stored)
        self.give_back(stay)
        stay.decoding = False
        stay.stored = stay.chunk = 0
        stay.preemptions += 1
        self.waiting.append(stay)
        self.events.append(("preempted", stay.request.id, at))

    def admit(self, at: int, budget: int) -> Stay | None:
        profile = self.profile
        active = {stay.request.adapter for stay in self.running} - {None}
        for stay in sorted(self.waiting, key=lambda other: other.key(profile.by_priority)):
            adapter = stay.request.adapter
            if len(self.running) >= profile.max_num_seqs:
                return None
            if adapter is not None and adapter not in active and len(active) >= profile.max_loras:
                continue
            target = stay.request.prompt_tokens + stay.generated
            found = []
            for value in stay.request.hashes[: (target - 1) // profile.block_tokens]:
                if value not in self.by_value:
                    break
                found.append(self.by_value[value])
            unused = sum(block.users == 0 for block in found)
            needed = profile.blocks(target) - len(found)
            if needed > len(self.free) - unused:
                return None
            self.waiting.remove(stay)
            for block in found:
                if block.users == 0:
                    self.free.remove(block)
                block.users += 1
                stay.blocks.append(block)
            for _ in range(needed):
                self.take(stay)
            stay.published = len(found)
            stay.target, stay.stored = target, len(found) * profile.block_tokens
            if stay.started < 0:
                stay.started, stay.cached = at, stay.stored
            stay.chunk = min(budget, target - stay.stored)
            self.publish(stay, stay.stored + stay.chunk)
            self.running.append(stay)
            return stay
        return None

    def duration(self) -> int:
        profile = self.profile
        decoding = [stay for stay in self.running if stay.decoding]
        filling = [stay for stay in self.running if not stay.decoding]
        tokens = sum(stay.chunk for stay in filling)
        pairs = sum(stay.chunk * (2 * stay.stored + stay.chunk) // 2 for stay in filling)
        time = self.decode_times[len(self.running)]
        if tokens:
            time = max(time, (tokens + len(decoding)) * profile.prefill_token)
            time += pairs * profile.prefill_context_ps // 1000
        time += profile.kv_token * sum(stay.stored for stay in decoding)
        adapted = [stay.request.adapter for stay in self.running if stay.request.adapter is not None]
        if adapted:
            time += len(adapted) * profile.adapted_sequence + (len(set(adapted)) - 1) * profile.adapter_kind
        return max(1, time)

    # --- adapters

    def remember(self, adapter: str) -> None:
        if adapter in self.in_memory:
            self.in_memory.remove(adapter)
        self.in_memory.append(adapter)
        del self.in_memory[: -max(1, self.profile.max_cpu_loras)]

    def use_adapter(self, adapter: str | None) -> int:
        if adapter is None:
            return 0
        if adapter in self.on_device:
            self.on_device.remove(adapter)
            self.on_device.append(adapter)
            return 0
        time = self.profile.adapter_to_device
        time += 0 if adapter in self.in_memory else self.profile.adapter_from_disk
        self.remember(adapter)
        if len(self.on_device) >= self.profile.max_loras:
            active = {stay.request.adapter for stay in self.running}
            self.on_device.remove(next(name for name in self.on_device if name not in active))
        self.on_device.append(adapter)
        return time

    # --- what holds at any time

    def used(self) -> int:
        return self.profile.kv_blocks - len(self.free)


def times_of(seed: int, count: int, mean: int) -> list[int]:
    """Random gaps, for tests that need a long run of arrivals."""
    chance = random.Random(seed)
    return [1 + int(chance.expovariate(1 / mean)) for _ in range(count)]
