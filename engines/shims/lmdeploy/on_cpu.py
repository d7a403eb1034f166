"""LMDeploy's PyTorch engine where there is no accelerator: to try it out, and to test what stands in front of it.

    python on_cpu.py serve api_server MODEL --backend pytorch ...

Real is all of LMDeploy but its kernels: the HTTP server and what it refuses, chat templates and parsers, the engine's
own process and the messages to it, scheduling, paging of the KV cache, loading of weights and of adapters, sampling,
constrained decoding, metrics. Not real are the operations on a device: attention over pages, LoRA and the drawing of a
token are written here in plain torch, streams and events do nothing since everything is done as soon as it is asked
for, and the device's memory is a number. So answers are a model's true answers, and figures of speed and memory say
nothing of LMDeploy on a GPU.

LMDeploy builds its operations through one class and asks ``torch.cuda`` for everything else, so three things are
replaced before it is imported: ``torch.cuda``, the device in torch's factories, and that class. Its engine is spawned,
and a spawned process runs this file again (not as ``__main__``), which replaces them there too.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

CACHE_BYTES = int(os.environ.get("LMDEPLOY_CPU_CACHE_BYTES") or 1 << 30)
"""What LMDeploy is told the device has free; it takes a share of that for its KV cache."""


# --- torch.cuda --------------------------------------------------------------------------------------------------


class Idle:
    """A stream, or an event: all work is done by the time anybody asks for it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cpu")

    def query(self) -> bool:
        """Everything is done."""
        return True

    def record_event(self, event: Idle | None = None) -> Idle:
        """Return an event that has happened."""
        return event or Idle()

    def nothing(self, *_: Any, **__: Any) -> None:
        """There is nothing to wait for."""

    record = wait = synchronize = wait_stream = wait_event = nothing


class Device:
    """What the only device is asked about itself."""

    name = "cpu"
    uuid = "cpu"
    major, minor = 8, 0
    multi_processor_count = 1
    warp_size = 32
    total_memory = CACHE_BYTES


def replace_cuda() -> None:
    """Let ``torch.cuda`` speak of one device that never has anything left to do."""
    cuda: Any = torch.cuda
    current = Idle()
    cuda.Stream = cuda.Event = Idle
    cuda.stream = contextlib.nullcontext
    told = {
        "current_stream": current,
        "default_stream": current,
        "current_device": 0,
        "device_count": 1,
        "is_available": True,
        "is_bf16_supported": True,
        "get_device_name": Device.name,
        "get_device_properties": Device,
        "get_device_capability": (Device.major, Device.minor),
        "mem_get_info": (CACHE_BYTES, CACHE_BYTES),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
    }
    done = ("synchronize", "empty_cache", "set_device", "init", "ipc_collect", "reset_peak_memory_stats")
    for name, value in {**told, **dict.fromkeys(done), "manual_seed": None, "manual_seed_all": None}.items():
        setattr(cuda, name, always(value))


def always(value: Any) -> Callable[..., Any]:
    """Return a function that returns this, whatever it is called with."""
    return lambda *_, **__: value


# --- where tensors are made --------------------------------------------------------------------------------------

MAKES = (
    *("empty", "zeros", "ones", "full", "arange", "tensor", "as_tensor", "rand", "randn", "randint", "eye", "linspace"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "empty_strided", "randperm"),
)
MAKES_FROM_ANOTHER = ("to", "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")


def replace_devices() -> None:
    """Let a CUDA device mean the CPU wherever a tensor is made or moved."""
    for owner, names in ((torch, MAKES), (torch.Tensor, MAKES_FROM_ANOTHER), (torch.nn.Module, ("to",))):
        for name in names:
            setattr(owner, name, here(getattr(owner, name)))
    tensor: Any = torch.Tensor
    # A copy, as on a real device: the original is a buffer that is filled anew.
    tensor.cuda = lambda self, *_, **__: self.clone()
    tensor.pin_memory = lambda self, *_, **__: self
    tensor.record_stream = always(None)
    module: Any = torch.nn.Module
    module.cuda = lambda self, *_, **__: self


def here(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes or moves tensors on the CPU when it is told to on CUDA."""

    @functools.wraps(make)
    def made_here(*positional: Any, **named: Any) -> Any:
        if is_cuda(named.get("device")):
            named["device"] = "cpu"
        if named.get("pin_memory"):
            named["pin_memory"] = False
        return make(*("cpu" if is_cuda(value) else value for value in positional), **named)

    return made_here


def is_cuda(value: Any) -> bool:
    """Tell whether a value names a CUDA device."""
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")


# --- operations --------------------------------------------------------------------------------------------------


def operations() -> type:
    """Return the class through which LMDeploy builds its operations, those that need a device in plain torch."""
    from lmdeploy.pytorch.backends.attention import AttentionImpl, AttentionMetadata, PagedAttentionBuildSpec
    from lmdeploy.pytorch.backends.default import DefaultOpsBackend
    from lmdeploy.pytorch.backends.lora import LoRABuildSpec, LoRAImpl
    from lmdeploy.pytorch.backends.multinomial_sampling import MultinomialSamplingBuildSpec, MultinomialSamplingImpl

    class Attention(AttentionImpl):
        """Causal attention over the pages of a KV cache, one sequence after the other."""

        def forward(
            self, query: Any, key: Any, value: Any, k_cache: Any, v_cache: Any, attn_metadata: Any, *_: Any, **__: Any
        ) -> Any:
            counts = attn_metadata.q_seqlens.tolist()
            heads = [part.split(counts) for part in (query, key, value)]
            lengths = attn_metadata.kv_seqlens.tolist()
            answers = []
            for q, k, v, length, pages in zip(*heads, lengths, attn_metadata.block_offsets, strict=False):
                position = torch.arange(length)
                new = position[length - len(q) :]
                page, slot = pages[position // k_cache.size(1)].long(), position % k_cache.size(1)
                k_cache[page[new], slot[new]] = k
                v_cache[page[new], slot[new]] = v
                answers.append(self.attend(q, k_cache[page, slot], v_cache[page, slot], new[:, None] >= position))
            return torch.cat(answers)

        def attend(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
            """One sequence: each is (tokens, heads, size)."""
            q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
            shared = q.size(1) != k.size(1)
            answer = functional.scaled_dot_product_attention(q, k, v, mask, scale=self.scale, enable_gqa=shared)
            return answer[0].transpose(0, 1)

    class Lora(LoRAImpl):
        """Each sequence's own adapter, added to what the base model made."""

        def forward(
            self,
            x: Any,
            lora_A: Any,  # noqa: N803
            lora_B: Any,  # noqa: N803
            base_output: Any,
            adapter_info: Any,
            ctx_mgr: Any,
            *_: Any,
            **__: Any,
        ) -> Any:
            context = ctx_mgr.current_context()
            counts = context.q_seqlens.tolist()
            rows = x.flatten(0, -2).split(counts)
            # A view: what is added here is added to the output.
            target = base_output[..., adapter_info.base_slice]
            added = target.view(-1, target.size(-1)).split(counts)
            for row, sum_, adapter in zip(rows, added, context.local_adapter_ids.tolist(), strict=False):
                first = int(adapter_info.rank_offsets[adapter])
                part = slice(first, first + int(adapter_info.ranks[adapter]))
                sum_ += (row @ lora_A[part].t() @ lora_B[part]) * adapter_info.scalings[adapter]
            return base_output

    class Drawing(MultinomialSamplingImpl):
        """Draws each token by the seed of its request."""

        def forward(self, scores: Any, seeds: Any, offsets: Any, indices: Any = None) -> Any:
            drawn = []
            for row, seed, offset in zip(scores, seeds.tolist(), offsets.tolist(), strict=True):
                generator = torch.Generator().manual_seed(hash((seed, offset)))
                drawn.append(torch.multinomial(row, 1, generator=generator))
            picked = torch.stack(drawn)
            return (picked if indices is None else indices.gather(1, picked)).view(-1)

    class Operations(DefaultOpsBackend):
        """LMDeploy's own operations in torch, and these."""

        @staticmethod
        def get_name() -> str:
            return "cpu"

        @classmethod
        def build_op(cls, spec: Any, **options: Any) -> Any:
            if isinstance(spec, PagedAttentionBuildSpec):
                return Attention(num_heads=spec.num_heads, head_size=spec.head_dim, scale=spec.scale)
            if isinstance(spec, LoRABuildSpec):
                return Lora()
            if isinstance(spec, MultinomialSamplingBuildSpec):
                return Drawing()
            return super().build_op(spec, **options)

        @staticmethod
        def get_attention_metadata_cls() -> type:
            return AttentionMetadata

        @classmethod
        def update_step_context(cls, step_context: Any) -> Any:
            ends = torch.stack([step_context.q_seqlens, step_context.kv_seqlens]).cumsum(1, dtype=torch.int32)
            of_queries, of_keys = functional.pad(ends, (1, 0))
            step_context.attn_metadata = AttentionMetadata(
                is_decoding=step_context.is_decoding,
                block_offsets=step_context.block_offsets,
                q_start_loc=step_context.q_start_loc,
                q_seqlens=step_context.q_seqlens,
                kv_seqlens=step_context.kv_seqlens,
                cu_seqlens_q=of_queries,
                cu_seqlens_k=of_keys,
                quant_policy=step_context.kv_quant_policy,
            )
            return step_context

        @staticmethod
        def device_count() -> int:
            return 1

    return Operations


def replace_operations() -> None:
    """Have LMDeploy build its operations as above, whatever device it was given."""
    from lmdeploy.pytorch.backends import selector

    selector._get_backend = always(operations())


replace_cuda()
replace_devices()
replace_operations()

if __name__ == "__main__":
    from lmdeploy.cli.entrypoint import run

    # A command line can be read by every user of a machine, so a key comes another way.
    key = os.environ.pop("LMDEPLOY_API_KEY", None)
    sys.argv[0] = "lmdeploy"
    sys.argv += ["--api-keys", key] if key else []
    run()
