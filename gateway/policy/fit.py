"""Which endpoints can serve a request, where those of a model are not alike: what they can do, how long a context.

Rule 1: an endpoint that cannot do what a request needs is left out, as long as another can.
Rule 2: one whose context is too short for a request is left out likewise.
Rule 3: where nobody can, nobody is left out: an engine says best what is wrong with a request.
"""

from __future__ import annotations

from collections.abc import Sequence


def able(powers: Sequence[int], needs: int) -> list[int]:
    """Return the places of those that have every power that is needed, as sets of bits; a power that none has, or none
    of those that are left, does not count."""
    left = list(range(len(powers)))
    while needs:
        need = needs & -needs
        needs ^= need
        left = [place for place in left if powers[place] & need] or left
    return left


def roomy(lengths: Sequence[int | None], tokens: int) -> list[int]:
    """Return the places of those whose context holds so many tokens; all where none does. None: it is not known how
    long one is, and it is not left out."""
    fit = [place for place, length in enumerate(lengths) if length is None or length >= tokens]
    return fit or list(range(len(lengths)))
