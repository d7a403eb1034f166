"""What is asked in a simulation: seeded, drawn one request at a time, the same whatever becomes of it. Pure.

Every length is drawn from a fit to a published trace (``scenarios.lengths.FITS``, BURST here); figures without such a
source are marked A, assumed. A request comes at its own time: also the next turn of a session whose last one was
refused, so that a policy that refuses much is not given less to do.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import msgspec

from loadtests.scenarios.arrivals import gaps
from loadtests.scenarios.lengths import FITS, Fit, lognormal
from loadtests.scenarios.schema import Slo

BYTES = 4
"""Of a prompt's text for each token: what a block of 256 bytes is taken for in ``gateway.policy.prefix``."""
LEAST = 4
"""Tokens of the shortest prompt, and of a part of one."""
LONGEST = 16_000
"""Tokens after which a session has no further turn."""
BEFORE = 180.0
"""Seconds before the beginning from which on sessions are drawn, so that at the beginning some are under way."""

BURST_OUTPUT = (150.0, 200.0, 0.477, 0.8)
"""BurstGPT (HPMLL/BurstGPT, M): answers grow from about 150 to 450 tokens as prompts do from 200 to 2,000: 150 (input /
200) ^ 0.477; the deviation of the logarithm is A."""


@dataclass(frozen=True, slots=True)
class Turns:
    """Sessions: ``mean`` turns (geometric, at most ``most``), each with all that was said before; between two of them a
    log-normal time of ``median`` seconds and deviation ``sigma``."""

    mean: float
    most: int = 20
    median: float = 10.0
    sigma: float = 1.2


ONE_TURN = Turns(1.0, 1)


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests of one sort. ``share``: of all sessions; ``output`` None: as BurstGPT has it; ``systems``: so many
    system prompts of ``system`` tokens, each tenant has one; ``tenant``: whose they are, None: anybody's."""

    share: float
    input: Fit
    output: Fit | None
    turns: Turns = ONE_TURN
    systems: int = 0
    system: int = 0
    tenant: str | None = None


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong: ``every`` seconds one endpoint is killed (0: none), and is back after ``away``; ``slow``
    endpoints are ``times`` times slower."""

    every: float = 0.0
    away: float = 20.0
    slow: int = 0
    times: int = 3


@dataclass(frozen=True, slots=True)
class Workload:
    """``cv``: of the times between arrivals of sessions, 1 is Poisson; ``tenants`` share by a Zipf law of exponent
    ``zipf``; ``abuser``: one more tenant that asks so many times as often as each of the others, who then ask equally
    often; ``adapters``: so many, by a Zipf law of ``adapter_zipf``; ``leaves``: seconds after which a client whose
    first token has not come is gone; ``watched``: whether the service of tenants is compared all the time."""

    name: str
    about: str
    kinds: tuple[Kind, ...]
    slo: Slo
    cv: float = 1.0
    tenants: int = 200
    zipf: float = 1.12
    abuser: float = 0.0
    adapters: int = 0
    adapter_zipf: float = 1.0
    faults: Faults = Faults()
    leaves: float = 30.0
    watched: bool = False
    patience: float | None = None
    """Seconds that requests may wait in a queue; None: half of the SLO's first token."""


class Ask(msgspec.Struct, gc=False):
    """A request. ``parts``: what its prompt and then its answer consist of, as (content, tokens); the same content is
    the same text. Times in seconds from the beginning of the run."""

    number: int
    at: float
    tenant: str
    prompt: int
    output: int
    parts: tuple[tuple[int, int], ...]
    session: int
    adapter: str | None = None


def text_of(parts: tuple[tuple[int, int], ...]) -> bytes:
    """Return the text of a prompt and its answer, ``BYTES`` for each token."""
    return b"".join((b"%016x" % content * (tokens // 4 + 1))[: tokens * BYTES] for content, tokens in parts)


def draw(workload: Workload, rate: float, seconds: float, seed: int) -> Iterator[Ask]:
    """Yield the requests of a run in the order they come: ``rate`` a second in the mean, until ``seconds``."""
    chance = random.Random(f"{seed}/{workload.name}")
    starts = _starts(workload, rate, seconds, chance)
    start = next(starts, math.inf)
    coming: list[tuple[float, int, _Session]] = []
    order = number = 0
    while coming or start < seconds:
        if start < seconds and (not coming or start <= coming[0][0]):
            order += 1
            heapq.heappush(coming, (start, order, _Session(workload, order, chance)))
            start = next(starts, math.inf)
            continue
        at, _, session = heapq.heappop(coming)
        ask = session.turn(number, at)
        if at >= 0:
            number += 1
            yield ask
        after = session.pause(at)
        if after < seconds:
            order += 1
            heapq.heappush(coming, (after, order, session))


def _starts(workload: Workload, rate: float, seconds: float, chance: random.Random) -> Iterator[float]:
    turns = sum(kind.share * _turns(kind.turns) for kind in workload.kinds) / sum(kind.share for kind in workload.kinds)
    at = -BEFORE if any(kind.turns is not ONE_TURN for kind in workload.kinds) else 0.0
    for gap in gaps(rate / turns, workload.cv, chance):
        at += gap
        if at >= seconds:
            return
        yield at


def _turns(turns: Turns) -> float:
    """Return the mean of a geometric number that is cut off at the most."""
    stay = 1.0 - 1.0 / turns.mean
    return (1.0 - stay**turns.most) / (1.0 - stay)


class _Session:
    """One client's turns. Content is numbered so that nobody else has the same: system prompts count down from -1."""

    def __init__(self, workload: Workload, number: int, chance: random.Random) -> None:
        self._chance = chance
        self._content = number << 10
        self._number = number
        self._kind = kind = _picked(workload.kinds, chance)
        self._tenant = kind.tenant or _tenant(workload, chance)
        self._adapter = f"a{_zipf(workload.adapters, workload.adapter_zipf, chance)}" if workload.adapters else None
        self._history: list[tuple[int, int]] = []
        self._tokens = 0
        self._left = 1
        while self._left < kind.turns.most and chance.random() < 1.0 - 1.0 / kind.turns.mean:
            self._left += 1
        if kind.systems:
            self._say(_SYSTEM - self._tenant_number() % kind.systems, kind.system)

    def _tenant_number(self) -> int:
        digits = self._tenant.lstrip("t")
        return int(digits) if digits.isdigit() else 0

    def _say(self, content: int, tokens: int) -> None:
        self._history.append((content, tokens))
        self._tokens += tokens

    def turn(self, number: int, at: float) -> Ask:
        """Return the next request, and go on as if it were answered."""
        kind, chance = self._kind, self._chance
        asked = max(LEAST, min(lognormal(kind.input.mu, kind.input.sigma, chance), kind.input.most))
        answer = max(2, _output(kind, asked, chance))
        self._content += 2
        self._say(self._content, asked)
        prompt = self._tokens
        self._say(self._content + 1, answer)
        self._left -= 1
        parts = tuple(self._history)
        return Ask(number, at, self._tenant, prompt, answer, parts, self._number, self._adapter)

    def pause(self, at: float) -> float:
        """Return when the next turn comes, infinity if there is none."""
        if not self._left or self._tokens > LONGEST:
            return math.inf
        turns = self._kind.turns
        return at + self._chance.lognormvariate(math.log(turns.median), turns.sigma)


_SYSTEM = (1 << 60) - 1
"""The first system prompt's content: no session's number comes near it."""


def _output(kind: Kind, asked: int, chance: random.Random) -> int:
    if kind.output is not None:
        return min(lognormal(kind.output.mu, kind.output.sigma, chance), kind.output.most)
    base, at, power, sigma = BURST_OUTPUT
    # The mean of a log-normal is above its median.
    mu = math.log(base * (asked / at) ** power) - sigma * sigma / 2
    return min(lognormal(mu, sigma, chance), FITS["azure-conversation-output"].most)


def _picked(kinds: tuple[Kind, ...], chance: random.Random) -> Kind:
    left = chance.random() * sum(kind.share for kind in kinds)
    for kind in kinds[:-1]:
        left -= kind.share
        if left < 0:
            return kind
    return kinds[-1]


def _tenant(workload: Workload, chance: random.Random) -> str:
    if workload.abuser:
        if chance.random() * (workload.tenants + workload.abuser) < workload.abuser:
            return ABUSER
        return f"t{chance.randrange(workload.tenants)}"
    return f"t{_zipf(workload.tenants, workload.zipf, chance)}"


ABUSER = "abuser"
_ZIPF: dict[tuple[int, float], list[float]] = {}


def _zipf(count: int, power: float, chance: random.Random) -> int:
    """Return a number below ``count``: 0 the likeliest."""
    weights = _ZIPF.get((count, power))
    if weights is None:
        weights = _ZIPF[count, power] = list(accumulate((rank + 1) ** -power for rank in range(count)))
    return bisect_right(weights, chance.random() * weights[-1], hi=count - 1)


_CHAT = Slo(ttft=2.0, itl=0.1)
_CODE = Slo(ttft=0.5, itl=0.05)
_SESSION = Turns(3.0)
_TALK = Kind(0.75, FITS["lmsys-input"], FITS["lmsys-output"], _SESSION, systems=50, system=800)
_ONCE = Kind(0.25, FITS["azure-conversation-input"], FITS["azure-conversation-output"])
_MIX = (_TALK, _ONCE)


def _chat(name: str, about: str, **changed: object) -> Workload:
    return replace(Workload(name, about, _MIX, _CHAT), **changed)  # type: ignore[arg-type]


WORKLOADS: Mapping[str, Workload] = {
    one.name: one
    for one in (
        _chat("chat", "three in four sessions of some turns with a system prompt, one in four a long prompt, Poisson"),
        _chat("bursty", "the same, in bursts: Gamma of shape 1/4, BurstGPT's generator", cv=2.0),
        Workload(
            "plain",
            "Azure's conversations of 2023, prompts of which nobody knows anything: no reuse",
            (Kind(1.0, FITS["azure-conversation-input"], FITS["azure-conversation-output"]),),
            _CHAT,
        ),
        Workload(
            "burstgpt",
            "prompts of ServeGen's large model, answers that grow with them as BurstGPT's, Gamma of shape 1/4",
            (Kind(1.0, FITS["servegen-input"], None),),
            _CHAT,
            cv=2.0,
        ),
        Workload(
            "code",
            "Azure's code completions of 2023 in sessions of some turns on a system prompt, in bursts",
            (Kind(1.0, FITS["azure-code-input"], FITS["azure-code-output"], Turns(3.0, 8), systems=50, system=400),),
            _CODE,
            cv=2.0,
        ),
        _chat("adapters", "chat with 32 adapters by a Zipf law, engines with four slots", adapters=32),
        _chat("deaths", "chat while every ten seconds an engine is killed, for twenty", faults=Faults(10.0)),
        _chat("slow", "chat while one engine is three times slower", faults=Faults(slow=1)),
        _chat("abuser", "nine tenants and one that asks a hundred times as often as each", tenants=9, abuser=100.0),
        _chat("victims", "the nine tenants of abuser alone", tenants=9, zipf=0.0),
        Workload(
            "backlog",
            "two tenants who always wait: one with long prompts, one with long answers",
            (
                Kind(0.5, FITS["azure-code-input"], FITS["azure-code-output"], tenant="prompts"),
                Kind(0.5, FITS["lmsys-input"], FITS["lmsys-output"], tenant="answers"),
            ),
            _CHAT,
            leaves=600.0,
            watched=True,
            patience=60.0,
        ),
    )
}
"""By name."""
