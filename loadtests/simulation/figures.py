"""What a run came to, in figures. Pure.

Service is counted as virtual token counters count it: a token of a prompt 1, one of an answer ``OUTPUT``. The time
between tokens is of each request its mean, as MLPerf's TPOT is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loadtests.scenarios.goodput import percentile
from loadtests.scenarios.schema import Slo
from loadtests.simulation.flight import End, Flight

OUTPUT = 2.0


def well(flight: Flight, slo: Slo) -> bool:
    """Whether a request counts as served well: all its tokens, the first in time, the others in the mean."""
    if flight.end is not End.SERVED or flight.first - flight.arrived > slo.ttft:
        return False
    return slo.itl is None or between(flight) <= slo.itl


def between(flight: Flight) -> float:
    """Return the mean seconds between two tokens of a request that was served."""
    return (flight.ended - flight.first) / max(1, flight.ask.output - 1)


@dataclass
class Tally:
    """Sums over the requests that came from ``begin`` to ``end``."""

    slo: Slo
    begin: float
    end: float
    ends: Counter[End] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    well: int = 0
    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)
    prompt: int = 0
    cached: int = 0
    computed: int = 0
    wasted: int = 0
    asked: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    got: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    ttft_of: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    all: int = 0
    """Requests, those outside of that time too."""

    def add(self, flight: Flight) -> None:
        """Count a request that has ended."""
        self.all += 1
        if not self.begin <= flight.arrived < self.end:
            return
        ask = flight.ask
        assert flight.end is not None
        self.requests += 1
        self.ends[flight.end] += 1
        if flight.refused:
            self.refusals[flight.refused] += 1
        cost = ask.prompt + OUTPUT * ask.output
        self.asked[ask.tenant] += cost
        good = well(flight, self.slo)
        self.well += good
        tokens = flight.computed
        if flight.first >= 0:
            self.ttft.append(flight.first - flight.arrived)
            self.ttft_of[ask.tenant].append(flight.first - flight.arrived)
        if flight.end is End.SERVED:
            self.itl.append(between(flight))
            self.prompt += ask.prompt
            self.cached += flight.cached
            self.got[ask.tenant] += cost
            served = ask.prompt - flight.cached + ask.output
            tokens += served
            self.wasted += 0 if good else served
        self.computed += tokens
        self.wasted += flight.computed

    def figures(self) -> dict[str, float]:
        """Return them all; times in seconds, shares from 0 to 1."""
        ttft, itl = sorted(self.ttft), sorted(self.itl)
        counts = {f"share_{end.value}": _share(self.ends[end], self.requests) for end in End}
        return {
            "requests": self.requests,
            "goodput": _share(self.well, self.requests),
            **counts,
            "ttft_p50": percentile(ttft, 0.5) or 0.0,
            "ttft_p99": percentile(ttft, 0.99) or 0.0,
            "itl_p50": percentile(itl, 0.5) or 0.0,
            "itl_p99": percentile(itl, 0.99) or 0.0,
            "prefix_hits": _share(self.cached, self.prompt),
            "jain": jain(self.asked, self.got),
            "wasted": _share(self.wasted, self.computed),
        }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def fair_shares(asked: Mapping[str, float], whole: float) -> dict[str, float]:
    """Share out as much as was given to all, max-min fair: nobody gets more than he asked for, and whoever gets less
    than that gets as much as any other."""
    left, shares = whole, {}
    ordered = sorted(asked.items(), key=lambda one: one[1])
    for place, (who, wanted) in enumerate(ordered):
        shares[who] = min(wanted, left / (len(ordered) - place))
        left -= shares[who]
    return shares


def jain(asked: Mapping[str, float], got: Mapping[str, float]) -> float:
    """Return Jain's index of what each got for its fair share: 1 is fair, 1 / n is all to one of n."""
    shares = fair_shares(asked, sum(got.values()))
    parts = [got.get(who, 0.0) / share for who, share in shares.items() if share > 0]
    squares = sum(part * part for part in parts)
    return sum(parts) ** 2 / (len(parts) * squares) if squares else 0.0


def widest(differences: Iterable[float | None]) -> float:
    """Return the greatest change of a difference of service within any time in which both waited; None: not both."""
    gap = 0.0
    low = high = None
    for difference in differences:
        if difference is None:
            low = high = None
            continue
        low = difference if low is None else min(low, difference)
        high = difference if high is None else max(high, difference)
        gap = max(gap, high - low)
    return gap


def vtc_bound(longest_prompt: int, tokens_in_batches: int) -> float:
    """Return what VTC bounds the gap between two backlogged tenants by: 2 max(w_in L_in, w_out M)."""
    return 2 * max(longest_prompt, OUTPUT * tokens_in_batches)


def median(values: Sequence[float]) -> float:
    """Return the middle one, of an even number the mean of the middle two."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
