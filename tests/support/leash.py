"""Children that end with whoever started them, whatever ends it."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def leash(number: signal.Signals) -> Callable[[], None] | None:
    """Return what a child runs before its program (``preexec_fn``) to be sent that signal when its parent ends (Linux;
    elsewhere nothing)."""
    if _LIBC is None:
        return None
    libc = _LIBC

    def bind() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, number)

    return bind
