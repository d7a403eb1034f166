"""What a step of a request returns when it must wait: the only thing that costs a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Pending:
    """A step that must wait for ``awaitable``, and is sent what came of it."""

    awaitable: Any
