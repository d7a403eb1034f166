"""How large a request will be, learned from how large those before it were.

Rule 1: an estimate is a high quantile of what was seen, so that few requests take more than was reserved for them.
Rule 2: it is never more than what was stated.
Rule 3: what is learned is bounded: so many subjects, each of a fixed size, and what is old counts for less.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

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


class Sketch(msgspec.Struct):
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
            self.stale_in = int(self.total) // 16

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


class Estimator:
    """What was learned of prompts by model, and of answers by key and model."""

    def __init__(self, most: int = MOST_SUBJECTS) -> None:
        self._most = most
        self._sketches: OrderedDict[tuple[str, str], Sketch] = OrderedDict()
        self._draw = 1

    def __len__(self) -> int:
        return len(self._sketches)

    def prompt(self, model: str, size: int, parts: int = 0) -> int:
        """Return the tokens a prompt of ``size`` bytes and ``parts`` images or the like probably has at most."""
        tokens = self._text(model, size)
        if parts:
            tokens += parts * self._learned(("parts", model), TOKENS_PER_PART)
        return round(tokens)

    def _text(self, model: str, size: int) -> float:
        """Bodies of about one size are alike: what is not text in them, and what a template adds, weighs the same."""
        learned = self._learned((f"bytes {size.bit_length()}", model), -1.0)
        return TEMPLATE + size * TOKENS_PER_BYTE if learned < 0 else size * learned

    def output(self, key: str, model: str, stated: int | None, assumed: int) -> int:
        """Return the tokens one answer probably has at most; ``assumed`` where nothing is stated or learned."""
        learned = self._learned((key, model), -1.0)
        if learned < 0:
            learned = self._learned(("", model), -1.0)
        if learned < 0:
            return assumed if stated is None else stated
        likely = max(1, round(learned))
        return likely if stated is None else min(stated, likely)

    def per_event(self, stream: str) -> float:
        """Return the tokens an event stands for; ``stream`` is a model in one dialect."""
        return self._learned(("events", stream), 1.0)

    def learn_events(self, stream: str, tokens: float) -> None:
        """Take what an event of a whole stream stood for."""
        self._sketch(("events", stream)).add(tokens)

    def passes(self, key: str, model: str, *, limited: bool) -> bool:
        """Tell whether a request need not be learned from: of a key on a model that is well known one in four is
        enough, and of one that nothing limits one in sixteen. Which one is drawn, so that no pattern of requests hides
        another."""
        if limited:
            known = self._sketches.get((key, model))
            if known is None or known.total < WELL_KNOWN:
                return False
        self._draw = (self._draw * 1_103_515_245 + 12_345) & 0x7FFFFFFF
        return bool(self._draw & (0x600000 if limited else 0x1E00000))

    def learn(self, key: str, model: str, size: int, parts: int, prompt: int, output: int, answers: int) -> None:
        """Take what a request really used; ``size`` 0 where its prompt was given in tokens."""
        if size and not parts:
            self._sketch((f"bytes {size.bit_length()}", model)).add(prompt / size)
        elif parts:
            self._sketch(("parts", model)).add(max(0.0, prompt - self._text(model, size)) / parts)
        if output:
            each = output / max(1, answers)
            self._sketch((key, model)).add(each)
            self._sketch(("", model)).add(each)

    def _learned(self, subject: tuple[str, str], otherwise: float) -> float:
        sketch = self._sketches.get(subject)
        return otherwise if sketch is None or sketch.known < 0 else sketch.known

    def _sketch(self, subject: tuple[str, str]) -> Sketch:
        sketch = self._sketches.get(subject)
        if sketch is None:
            if len(self._sketches) >= self._most:
                self._sketches.popitem(last=False)
            sketch = self._sketches[subject] = empty()
        else:
            self._sketches.move_to_end(subject)
        return sketch
