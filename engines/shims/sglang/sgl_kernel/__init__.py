"""Stands in for SGLang's package of CPU kernels, as far as a text model without speculative decoding needs it.

It registers no operator of PyTorch's under ``torch.ops.sgl_kernel``: from that SGLang concludes that the processor has
no AMX and takes its plain PyTorch code for every layer. See ``sitecustomize`` beside it for what is real.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

# By name: the gateway's type checker does not have it.
_torch: Any = import_module("torch")


def assign_req_to_token_pool_cpu(
    requests: Any, table: Any, starts: Any, ends: Any, locations: Any, _row_length: int
) -> None:
    """Write each request's new cache locations, which come one request after the other, into its row of the table."""
    taken = 0
    for row, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True):
        table[row, start:end] = locations[taken : taken + end - start].to(table.dtype)
        taken += end - start


def __getattr__(name: str) -> Callable[..., Any]:
    """Return a kernel that is imported but never called; being called it says that it is not here."""
    if not name.endswith("_cpu"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError(f"{name} needs SGLang's own kernels, which are not published for the CPU")

    return missing


def _without_pinned_memory() -> None:
    """Let PyTorch for the CPU, which has no pinned memory, take calls that ask for it: SGLang's LoRA manager does."""
    if _torch.accelerator.is_available():
        return

    def plain(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, pin_memory: bool = False, **options: Any) -> Any:
            return function(*arguments, **options)

        return call

    for name in ("arange", "empty", "full", "ones", "tensor", "zeros"):
        setattr(_torch, name, plain(getattr(_torch, name)))
    _torch.Tensor.pin_memory = lambda tensor, *_, **__: tensor


_without_pinned_memory()
