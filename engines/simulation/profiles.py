"""What an engine can do on a device, in figures, and where each figure comes from.

Marks in ``sources``: M measured or published by others, D derived from published figures, A assumed, R measured with
this repository on real vLLM. Durations are whole nanoseconds, so that many steps add up exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Self

import msgspec

MILLISECOND = 1_000_000
_TABLE_CONTEXT = 1000
"""Tokens of context of each sequence in the published tables of decode steps."""


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one device.

    A step that decodes ``d`` sequences and prefills ``p`` tokens takes ``max(decode(d), (p + d) * prefill_token)``: it
    is bound by reading the weights or by arithmetic. Reading the KV cache, attention over a long prompt and adapters
    come on top. ``decode_points`` are (sequences, ns) without the KV cache's part, ascending; between them it is
    interpolated, beyond the last one it goes on as before it.

    ``block_tokens`` are the tokens of one KV block, ``hash_tokens`` (a multiple) those that one hash of a request's
    prefix stands for. ``prefill_context_ps`` are picoseconds for each prefilled token and each token before it.
    ``max_loras`` adapters are served in one batch, ``max_cpu_loras`` are kept in memory; ``adapted_sequence`` is added
    to a step for each sequence with an adapter, ``adapter_kind`` for each adapter beyond the first.
    """

    name: str
    model: str
    sources: tuple[str, ...]
    decode_points: tuple[tuple[int, int], ...]
    kv_token: int
    prefill_token: int
    max_model_len: int
    kv_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefill_context_ps: int = 0
    block_tokens: int = 16
    hash_tokens: int = 16
    max_unfinished: int | None = None
    """Sequences that may run and wait together, as vLLM's ``--max-num-queued-reqs`` counts them."""
    by_priority: bool = False
    max_loras: int = 4
    max_cpu_loras: int = 32
    max_lora_rank: int = 64
    adapted_sequence: int = 0
    adapter_kind: int = 0
    adapter_from_disk: int = 0
    adapter_to_device: int = 0

    def __post_init__(self) -> None:
        if self.hash_tokens % self.block_tokens:
            raise ValueError("hash_tokens must be a multiple of block_tokens")
        if self.kv_blocks * self.block_tokens < self.max_model_len:
            raise ValueError("the KV cache must hold at least one request of max_model_len")
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must exceed max_num_seqs, or a prefill could wait for ever")
        if self.max_num_seqs < 1 or not self.decode_points or self.max_cpu_loras < self.max_loras:
            raise ValueError("a profile needs a sequence, a decode step, and memory for its adapter slots")

    def changed(self, **fields: object) -> Self:
        """Return the same with other figures. ValueError when they do not fit together."""
        return msgspec.structs.replace(self, **fields)

    def slowed(self, factor: int) -> Self:
        """Return an engine that takes ``factor`` times as long for everything."""
        return self.changed(
            decode_points=tuple((size, time * factor) for size, time in enumerate(self._steps())),
            **{name: getattr(self, name) * factor for name in _DURATIONS},
        )

    def decode_times(self) -> list[int]:
        """Return the least duration of a step by the number of its sequences, from 0 to ``max_num_seqs``."""
        return [max(time, size * self.prefill_token) for size, time in enumerate(self._steps())]

    def _steps(self) -> list[int]:
        return [_interpolated(self.decode_points, size) for size in range(self.max_num_seqs + 1)]

    def blocks(self, tokens: int) -> int:
        """Return how many KV blocks hold so many tokens."""
        return -(-tokens // self.block_tokens)


_DURATIONS = (
    "kv_token",
    "prefill_token",
    "prefill_context_ps",
    "adapted_sequence",
    "adapter_kind",
    "adapter_from_disk",
    "adapter_to_device",
)


def _interpolated(points: Sequence[tuple[int, int]], size: int) -> int:
    if size <= points[0][0] or len(points) == 1:
        return points[0][1]
    pairs = list(pairwise(points))
    (left, low), (right, high) = next((pair for pair in pairs if size <= pair[1][0]), pairs[-1])
    return max(0, low + (high - low) * (size - left) // (right - left))


def _without_kv(kv_token: int, milliseconds: Mapping[int, float]) -> tuple[tuple[int, int], ...]:
    """Take the KV cache's part out of a published table of steps at 1,000 tokens of context."""
    return tuple(
        (size, round(time * MILLISECOND) - size * _TABLE_CONTEXT * kv_token) for size, time in milliseconds.items()
    )


_VLLM_LARGE = "M: vLLM's defaults for 70 GiB and more, but 256 sequences: the decode table ends there"
_VLLM_SMALL = "M: vLLM's defaults below 70 GiB and on A100: 2,048 batched tokens, 256 sequences"
_KV_8B = "D: 131,072 bytes of KV a token, read at 75 % of the memory's bandwidth"
_LORA_8B = (
    "M: GPULLMAdapterOptimization, 8B on H100: adapters from disk 70-92 ms, to the device 6.4-8.7 ms; a step of 220"
    " sequences 17.1 ms without, 35.4 ms with one adapter, 0.27 ms more for each further one",
    "A: the cost of an adapter grows with the sequences that use one (18.3 ms / 220)",
)
_PREFILL_CONTEXT = "D: attention's 524,288 FLOP for each pair of tokens, at the rate the prefill of the weights has"


def _llama_8b(
    name: str,
    kv_token: int,
    steps: Mapping[int, float],
    prefill: int,
    kv_tokens: int,
    sources: tuple[str, ...],
    *,
    batched: int = 2048,
) -> Profile:
    """Llama-3.1-8B in bf16 with adapters. ``prefill`` is in tokens/s."""
    return Profile(
        name=name,
        model="llama-3.1-8b-instruct",
        sources=(*sources, _KV_8B, _PREFILL_CONTEXT, *_LORA_8B),
        decode_points=_without_kv(kv_token, steps),
        kv_token=kv_token,
        prefill_token=1_000_000_000 // prefill,
        # 16.06 GFLOP a token for the weights: so many pairs of tokens cost as much as one token.
        prefill_context_ps=1_000_000_000_000 // prefill * 524_288 // 16_060_000_000,
        max_model_len=131_072,
        kv_blocks=kv_tokens // 16,
        max_num_seqs=256,
        max_num_batched_tokens=batched,
        adapted_sequence=83_000,
        adapter_kind=270_000,
        adapter_from_disk=80 * MILLISECOND,
        adapter_to_device=7_500_000,
    )


_H100 = _llama_8b(
    "h100-8b",
    52,
    {1: 7.0, 8: 7.3, 32: 8.9, 64: 10.7, 128: 14.6, 256: 24.5},
    30_000,
    430_000,
    (
        "D: decode steps from Vidur's H100 kernels of Llama-2-7b, LM head and KV reads at 1k context; M: vLLM's CI has"
        " 7.8 ms at 8 sequences, InferenceBench 6.5 ms at 1 and 10.9 ms at 16",
        "M: prefill 28-34k tokens/s end to end, 30k used",
        "D: 415-448k KV tokens at 0.9 of the memory, 430k used",
        _VLLM_LARGE,
    ),
    batched=8192,
)
_A100 = _llama_8b(
    "a100-8b",
    86,
    {1: 10.9, 8: 11.9, 32: 14.9, 64: 18.0, 128: 25.6, 256: 43.2},
    12_800,
    430_000,
    (
        "D: decode steps from Vidur's A100-80 kernels at 1k context",
        "D: prefill 12.4-13.3k tokens/s of kernels, 12.8k used",
        "D: 415-448k KV tokens at 0.9 of 80 GB, 430k used",
        _VLLM_SMALL,
    ),
)
_L40S = _llama_8b(
    "l40s-8b",
    202,
    {1: 23.5, 8: 25.6, 32: 33.0, 64: 43.0, 128: 63.0, 256: 102.0},
    7_500,
    172_032,
    (
        "D: decode steps from BLIS' coefficients at 1k context",
        "A: prefill 7.5k tokens/s, between the A40's 6.9k (D) and the A100's",
        "D: 159-191k KV tokens at 0.9 of the memory, 172k used",
        _VLLM_SMALL,
    ),
)
_ASCEND_910B = _A100.changed(
    name="910b-8b",
    model="qwen3-8b",
    decode_points=_without_kv(123, {1: 25.0, 10: 25.9, 64: 33.0, 256: 58.3}),
    kv_token=123,
    prefill_token=1_000_000_000 // 10_000,
    prefill_context_ps=3_265,
    kv_blocks=262_144 // 16,
    sources=(
        "M: vllm-ascend's documentation, Qwen3-8B on a 910B: 25.9 ms a token at up to 10 requests, first token 127 ms",
        "A: steps of more sequences grow as the A100's do",
        "A: prefill 10k tokens/s",
        "D: 247-276k KV tokens of 147,456 bytes on 64 GB, 262k used; A: read at 1.2 TB/s",
        _VLLM_SMALL,
        "A: adapters as on the H100; vLLM's LoRA on Ascend was not run",
    ),
)
_H100_70B = Profile(
    name="h100x4-70b",
    model="llama-3-70b-instruct",
    decode_points=_without_kv(32, {1: 18.7, 8: 19.0, 32: 20.3, 64: 22.1, 128: 25.5, 256: 32.5}),
    kv_token=32,
    prefill_token=1_000_000_000 // 18_000,
    max_model_len=8192,
    kv_blocks=480_000 // 16,
    max_num_seqs=256,
    max_num_batched_tokens=8192,
    adapted_sequence=360_000,
    adapter_kind=1_000_000,
    adapter_from_disk=400 * MILLISECOND,
    adapter_to_device=37 * MILLISECOND,
    sources=(
        "D: decode steps from BLIS' coefficients, four H100 by tensor parallelism, 1k context, 2 ms added to agree with"
        " M: vLLM's CI, 19.1 ms at 8 sequences",
        "D: prefill 18k tokens/s, linear part only",
        "D: 476-489k KV tokens at 0.9 of the memory; 327,680 bytes a token over four devices",
        "A: adapters cost what they do for 8B times the ratio of their sizes (4.9)",
        _VLLM_LARGE,
    ),
)
_CPU = Profile(
    name="cpu-smollm2",
    model="smollm2-135m-instruct",
    decode_points=tuple((size, round(time * MILLISECOND)) for size, time in ((1, 29.4), (8, 37.7), (32, 95.0))),
    kv_token=0,
    prefill_token=1_000_000_000 // 600,
    max_model_len=2048,
    kv_blocks=46_592 // 16,
    max_num_seqs=32,
    max_num_batched_tokens=2048,
    adapter_from_disk=65 * MILLISECOND,
    sources=(
        "R: SmolLM2-135M on two quiet cores as Forebay starts vLLM there: 34 tokens/s for one stream, 212 for eight",
        "A: 32 sequences 2.5 times as long as 8, as in an earlier measurement with other thread settings (39 and 62/s)",
        "A: prefill 600 tokens/s",
        "M: vLLM's log: one GiB of KV cache holds 46,592 tokens; R: an adapter loads in 0.065 s",
    ),
)
_INSTANT = Profile(
    name="instant",
    model="instant",
    decode_points=((1, 1000),),
    kv_token=0,
    prefill_token=1,
    max_model_len=32_768,
    kv_blocks=65_536,
    max_num_seqs=4096,
    max_num_batched_tokens=65_536,
    adapter_from_disk=1000,
    sources=("A: for tests: no time to speak of",),
)

PROFILES: Mapping[str, Profile] = {
    profile.name: profile for profile in (_H100, _A100, _L40S, _ASCEND_910B, _H100_70B, _CPU, _INSTANT)
}
