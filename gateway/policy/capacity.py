"""How much of an endpoint each of several gateways may use: what it may have at once is shared by who needs it.

An endpoint is given ``most`` requests at once, by all gateways together. Each gateway holds a part of that, as the
store of limits recorded it; it says how many it wants, and hears the same of the others. What it wants beyond its fair
share it gives up, and what it wants within it is the store's to give: nobody can be given what another still holds. So
all together never use more than ``most``, whatever each of them believes of the others.

Whole numbers; who is who among gateways is by a name that all of them order alike.
"""

from __future__ import annotations

from collections.abc import Sequence


def fair(most: int, wants: Sequence[int], turn: int = 0) -> list[int]:
    """Return what each of several gateways is to hold, by what each wants: the least is given first, so that nobody is
    short while another has more than he (max-min), and all is used when so much is wanted.

    Each keeps one where that is possible, so that it can answer at once. What cannot be divided goes round with
    ``turn``. Of what nobody wants half is handed out ahead of need; the rest stays with the store, to be had at once.
    """
    count = len(wants)
    least = 1 if most >= count else 0
    needs = [max(least, min(most, want)) for want in wants]
    parts, left = [0] * count, most
    order = sorted(range(count), key=needs.__getitem__)
    for done, at in enumerate(order):
        share = left // (count - done)
        if needs[at] > share:
            hungry = sorted(order[done:])
            begin = turn % len(hungry)
            over = left - share * len(hungry)
            for position, one in enumerate(hungry[begin:] + hungry[:begin]):
                parts[one] = share + (position < over)
            return parts
        parts[at] = needs[at]
        left -= needs[at]
    spare = left if count == 1 else left // 2 // count
    return [part + spare for part in parts]


class Part:
    """One gateway's part of one endpoint. ``held``: what the store has recorded for it, or less; ``share``: what it may
    use, never more than that."""

    __slots__ = ("_target", "dry", "held", "most", "others", "share", "want")

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0
        self.share = 0
        self.want = 0
        self._target = 0
        self.others: tuple[tuple[str, int], ...] = ()
        """What the others want, by name."""
        self.dry = False
        """Whether it was given less than it wants, and asking again before others have spoken is of no use."""

    def alone(self, gateways: int) -> None:
        """Use an equal part, one at least: nobody can be asked."""
        self.held = self.share = max(1, self.most // gateways)
        self.dry = True

    def target(self, me: str, live: int, turn: int) -> int:
        """Return what is fair to hold, of ``live`` gateways that there are."""
        wants = sorted((*self.others, (me, self.want)))
        # Those that have not spoken yet are somewhere: they want nothing so far.
        silent = [0] * (live - len(wants))
        return fair(self.most, [*(want for _, want in wants), *silent], turn)[wants.index((me, self.want))]

    def ask(self, in_flight: int, waiting: int, me: str, live: int, turn: int) -> int:
        """Return what the store is to be asked for. What is not fair any more is not used from now on."""
        wanted = min(self.most, in_flight + waiting)
        # What was wanted a moment ago is wanted again in a moment.
        self.want = max(wanted, self.want - 1 - (self.want - wanted) // 4)
        self._target = self.target(me, live, turn)
        asked = max(in_flight, self._target)
        self.held = min(self.held, asked)
        self.share = min(self.held, self._target)
        return asked

    def granted(self, held: int, others: tuple[tuple[str, int], ...]) -> None:
        """Take what the store has recorded, and what the others want."""
        self.held = held
        self.share = min(held, self._target)
        self.others = others
        self.dry = self.share < self.want
