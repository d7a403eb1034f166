"""How large a request will be, learned from how large those before it were.

Rule 1: an estimate is a high quantile of what was seen, so that few requests take more than was reserved for them.
Rule 2: it is never more than what was stated.
Rule 3: what is learned is bounded: so many subjects, each of a fixed size, and what is old counts for less.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

QUANTILE = 0.9
ENOUGH = 8
"""Observations before what was learned counts."""
WELL_KNOWN = 64
"""Observations after which not every further one is taken."""
HALVED_AT = 256
"""Observations after which what is old counts half."""
MOST_SUBJECTS = 20_000

TOKENS_PER_BYTE = 0.35
"""Of a prompt in a model nobody has used yet: more than any usual text has."""
TOKENS_PER_PART = 1500
"""Of an image or the like in a model nobody has shown one."""
TEMPLATE = 64
"""Tokens a chat template is taken to add, as long as nothing is known."""
_BINS = 56
_SIZES = 48
_LARGEST = 1 << (_SIZES - 2)
"""Doublings of a body's size that are told apart, and bytes beyond which they are not."""


@dataclass(slots=True, eq=False)
class Sketch:
    """How often values of each size were seen: bins of half a doubling, with the largest value of each.

    Owned by one ``Estimator``; a value object would be a hundred numbers copied for each request.
    """

    counts: list[float]
    largest: list[float]
    total: float = 0.0
    top: int = 0
    """The highest bin that ever held a value."""
    known: float = -1.0
    """The estimate as it was last worked out, below 0 where too little was seen."""
    stale_in: int = 0
    """Values after which it is worked out anew: the more were seen, the less another one changes it."""

    def add(self, value: float) -> None:
        """Count a value of at least 0."""
        at = _bin(value)
        self.counts[at] += 1
        if at > self.top:
            self.top = at
        self.largest[at] = max(value, self.largest[at])
        self.total += 1
        if self.total >= HALVED_AT:
            self._halve()
        self.stale_in -= 1
        if self.stale_in <= 0 and self.total >= ENOUGH:
            self.known = self.quantile(QUANTILE)
            self.stale_in = max(4, int(self.total) // 16)

    def _halve(self) -> None:
        self.total = 0.0
        for at, count in enumerate(self.counts):
            left = count / 2 if count >= 1 else 0.0
            self.counts[at] = left
            self.total += left
            if not left:
                self.largest[at] = 0.0

    def quantile(self, part: float) -> float:
        """Return a value that ``part`` of what was seen does not exceed."""
        # From the top, where a high one is found soon.
        above = self.total - self.total * part
        for at in range(self.top, -1, -1):
            above -= self.counts[at]
            if above < 0:
                return self.largest[at]
        return max(self.largest)


def _bin(value: float) -> int:
    # Twice the exponent of its 64ths, and one more in the upper half of a doubling.
    whole = int(value * 64)
    bits = whole.bit_length()
    upper = bits > 1 and (whole >> (bits - 2)) & 1
    return min(_BINS - 1, 2 * bits + int(upper))


def empty() -> Sketch:
    """Return a sketch of nothing."""
    return Sketch([0.0] * _BINS, [0.0] * _BINS)


class OfModel:
    """What was learned of one model: tokens of prompts by the size of their bodies, of images and the like, of
    answers, and of the events of its streams in each dialect."""

    __slots__ = ("answers", "events", "parts", "prompts")

    def __init__(self) -> None:
        self.prompts: list[Sketch | None] = [None] * _SIZES
        """Tokens a byte. Bodies of about one size are alike: what is not text in them, and what a template adds, weighs
        the same."""
        self.parts = empty()
        self.answers = empty()
        self.events: dict[str, Sketch] = {}

    def text(self, size: int) -> float:
        """Return the tokens of a prompt of ``size`` bytes without images."""
        learned = self.prompts[size.bit_length() if size < _LARGEST else -1]
        if learned is None or learned.known < 0:
            return TEMPLATE + size * TOKENS_PER_BYTE
        return size * learned.known

    def of_size(self, size: int) -> Sketch:
        """Return what is learned of prompts of about ``size`` bytes."""
        at = size.bit_length() if size < _LARGEST else -1
        learned = self.prompts[at]
        if learned is None:
            learned = self.prompts[at] = empty()
        return learned


class Learned:
    """What was learned of one key's answers from one model, beside what everybody's say of that."""

    __slots__ = ("_everybody", "_lots", "_own", "_passes")

    def __init__(self, everybody: OfModel, lots: Lots, own: Sketch | None) -> None:
        self._everybody = everybody
        self._lots = lots
        self._own = own
        self._passes = 0

    def passes(self) -> bool:
        """Return whether the request that just ended need not be learned from: of a key that is new on a model
        that is well known one in three is enough, of one that is well known itself one in eight, and of what nothing
        limits one in sixteen."""
        if self._passes:
            self._passes -= 1
            return True
        return False

    def prompt(self, size: int, parts: int = 0) -> int:
        """Return the tokens a prompt of ``size`` bytes and ``parts`` images or the like probably has at most."""
        everybody = self._everybody
        learned = everybody.prompts[size.bit_length() if size < _LARGEST else -1]
        # OfModel.text, written out.
        known = -1.0 if learned is None else learned.known
        tokens = TEMPLATE + size * TOKENS_PER_BYTE if known < 0 else size * known
        if parts:
            each = everybody.parts.known
            tokens += parts * (TOKENS_PER_PART if each < 0 else each)
        return round(tokens)

    def output(self, stated: int | None, assumed: int) -> int:
        """Return the tokens one answer probably has at most; ``assumed`` where nothing is stated or learned."""
        own = self._own
        known = self._everybody.answers.known if own is None or own.known < 0 else own.known
        if known < 0:
            return assumed if stated is None else stated
        likely = round(known) or 1
        return likely if stated is None or likely < stated else stated

    def per_event(self, dialect: str) -> float:
        """Return the tokens an event of a stream stands for."""
        learned = self._everybody.events.get(dialect)
        return 1.0 if learned is None or learned.known < 0 else learned.known

    def learn(self, size: int, parts: int, prompt: int, output: int, answers: int, *, limited: bool) -> None:
        """Take what a request really used; ``size`` 0 where its prompt was given in tokens."""
        everybody, own = self._everybody, self._own
        known = everybody.answers.total >= WELL_KNOWN
        new = own is not None and own.total < WELL_KNOWN
        if not limited:
            self._passes = self._lots.draw(31)
        elif known:
            self._passes = self._lots.draw(5 if new else 15)
        # What is new of a key is nothing new of its model.
        seldom = known and new and self._lots.draw(3) > 0
        if size or parts:
            sketch = everybody.parts if parts else everybody.of_size(size)
            if not seldom or sketch.total < WELL_KNOWN:
                sketch.add(max(0.0, prompt - everybody.text(size)) / parts if parts else prompt / size)
        if output:
            each = output / answers if answers > 1 else output
            if own is not None:
                own.add(each)
            if not seldom or everybody.answers.total < WELL_KNOWN:
                everybody.answers.add(each)

    def learn_events(self, dialect: str, tokens: float) -> None:
        """Take what an event of a whole stream stood for."""
        events = self._everybody.events
        learned = events.get(dialect)
        if learned is None:
            learned = events[dialect] = empty()
        learned.add(tokens)


class Lots:
    """Which of many requests are learned from is drawn, so that no pattern of requests hides another."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = 1

    def draw(self, most: int) -> int:
        """Return a number from 0 to below ``most``."""
        self._last = (self._last * 1_103_515_245 + 12_345) & 0x7FFFFFFF
        # The upper bits are as good as random.
        return (self._last >> 16) % most


class Estimator:
    """Everything that was learned, by model and by key and model. What nobody has asked for in a while is forgotten
    first; who holds it keeps it."""

    def __init__(self, most: int = MOST_SUBJECTS) -> None:
        self._most = most
        self._models: OrderedDict[str, OfModel] = OrderedDict()
        self._keys: OrderedDict[tuple[str, str], Learned] = OrderedDict()
        self._lots = Lots()

    def __len__(self) -> int:
        return len(self._models) + len(self._keys)

    def of(self, key: str, model: str) -> Learned:
        """Return what is learned of a key on a model; without a key, of everybody."""
        learned = self._keys.get((key, model))
        if learned is None:
            self._bound(self._keys)
            own = empty() if key else None
            learned = self._keys[key, model] = Learned(self._model(model), self._lots, own)
        self._keys.move_to_end((key, model))
        return learned

    def _model(self, model: str) -> OfModel:
        found = self._models.get(model)
        if found is None:
            self._bound(self._models)
            found = self._models[model] = OfModel()
        self._models.move_to_end(model)
        return found

    def _bound(self, kept: OrderedDict[Any, Any]) -> None:
        if len(kept) >= self._most:
            kept.popitem(last=False)
