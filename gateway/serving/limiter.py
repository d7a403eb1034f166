"""Limits around one request: which apply, what is reserved before an engine sees it, what is settled afterwards.

Rule 1: all buckets or none; a refusal takes nothing.
Rule 2: whoever was granted a ``Hold`` settles it, once, on every way out; that never waits.
Rule 3: what a request used is charged by what is known of it, and how it is known is said (``Settlement``).
"""

from __future__ import annotations

import asyncio
import enum
import zlib
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from operator import itemgetter

import msgspec

from engines.protocol import Fields
from gateway.errors import Refusal
from gateway.limits import Asker, Declared, applying, model_limits, organisation_of, prices_of, weight_of, weights_of
from gateway.metrics import Metrics
from gateway.policy.estimate import Estimator, Learned
from gateway.policy.limits import FREE, UNIT, Counts, Limit, Rates, Size, amounts
from gateway.policy.token_bucket import NEVER, Bucket, Shape, spare
from gateway.serving.dialect import OPENAI, Route
from gateway.serving.meter import Usage
from gateway.serving.pending import Pending
from gateway.serving.rates import Family, families, never_fits, rate_headers, refusal
from gateway.serving.tokens import count_prompts
from gateway.state.keys import KeyRecord
from gateway.store.protocol import Buckets, Granted, Known, Levels, Refused, Standing, Store, Verdict

MOST_PLANS = 50_000
"""Kept at once; beyond that they are worked out anew."""
MOST_ANSWERS = 100_000
"""Of one request that are reckoned with; no engine takes as many."""
LEAST_CUT = 16
"""Tokens of an answer below which cutting it is no use."""
LONGEST_TOKEN = 128
"""Bytes that the tokens of a prompt do not have on the average: the bound on what can never fit."""
_NOT_ZERO = 1 << 32


class Settlement(enum.StrEnum):
    """How it is known what a request used."""

    EXACT = "exact"
    """The engine said so."""
    COUNTED = "counted"
    """By the events of its stream."""
    KEPT = "kept"
    """Nothing is known: what was reserved stays."""
    VOID = "void"
    """No engine accepted it: all comes back, the request itself too."""
    MIRROR = "mirror"
    """A copy that nobody asked for: nobody is charged."""


# Under names of their own: looked up in its class each costs a call of the enum's.
EXACT, COUNTED, KEPT, VOID, MIRROR = Settlement
_NOTHING = (0,) * len(Counts)
_, _TOKENS, _MONEY, _CONCURRENT, _IN_FLIGHT = Counts


Deciding = Generator[Pending, Verdict, "Hold | Refusal"]
"""Yields the store's answers where they are not known here, and is sent them."""


class Plan(msgspec.Struct, frozen=True):
    """What applies to one key (or address) on one model, worked out once."""

    who: KeyRecord
    organisation: str
    limits: tuple[Limit, ...]
    buckets: Buckets
    """Those of the limits, in their order."""
    spread: Callable[[Sequence[int]], tuple[int, ...]]
    """Makes of a request's amounts, one a kind, what each limit is drawn on."""
    said: tuple[str, ...]
    """What each limit counts, in a word."""
    named: msgspec.Raw
    """Bucket and word of each limit as the ledger has them: every request's row says them again."""
    learned: Learned
    seed: int
    """Of what stands for a request: the same body of another key is another one."""
    about: tuple[Family, ...]
    weights: Rates
    prices: Rates
    cuts: tuple[int, ...]
    roomy: int
    """Tokens so few that no limit is too small for them."""
    until: int
    """When a calendar turns its page, in microseconds since 1970."""
    weight: float
    """Of its tenant's share where tenants wait for the same engines."""


class Facts(msgspec.Struct, gc=False):
    """What a body says of its size. ``counted``: the prompt's tokens where it is given as such."""

    route: Route
    model: str
    fields: Fields
    size: int
    parts: int
    answers: int
    stated: int | None
    counted: int | None
    first: bool
    least: int
    """Tokens it has at the very least: those of its prompt, and what it says of its answers."""


class Charges(msgspec.Struct, frozen=True, gc=False):
    """What was reserved of each bucket of a plan, and what was charged by kind; both in 1/1000."""

    plan: Plan
    reserved: Sequence[int]
    used: Sequence[int]
    kept: bool
    """Whether what was reserved stays, where it is neither slots nor in flight."""

    @property
    def charged(self) -> tuple[int, ...]:
        """What was charged of each bucket."""
        if not self.kept:
            return self.plan.spread(self.used)
        held = zip(self.plan.limits, self.reserved, strict=True)
        return tuple(0 if limit.counts >= _CONCURRENT else amount for limit, amount in held)


class Hold:
    """What a request holds of its limits, from the reservation to the settlement."""

    __slots__ = ("_amounts", "_facts", "_granted", "_limiter", "_needs", "_plan", "_size", "settled", "used")

    def __init__(
        self,
        limiter: Limiter,
        plan: Plan,
        facts: Facts,
        size: Size | None,
        needs: Sequence[int] | None,
        amounts: Sequence[int],
        granted: Granted | None,
    ) -> None:
        self._limiter = limiter
        self._plan = plan
        self._facts = facts
        self._size = size
        """As it was estimated; not at all where there is no limit to reserve it of."""
        self._needs = needs
        """What was reserved by kind, where of each limit it is that."""
        self._amounts = amounts
        """What was reserved of each limit."""
        self._granted = granted
        self.settled: Settlement | None = None
        self.used: Usage | None = None
        """What was counted, where the engine did not say it."""

    @property
    def headers(self) -> bytes:
        """What the client is told of its limits, in whole lines."""
        granted = self._granted
        if granted is None:
            return b""
        plan = self._plan
        return rate_headers(plan.about, granted.levels, granted.standing)

    @property
    def weight(self) -> float:
        """What its tenant's share weighs where tenants wait for the same."""
        return self._plan.weight

    def context(self) -> tuple[int, int]:
        """Return the tokens of context that it needs for one answer: at the very least, and probably."""
        prompt, _ = self.expected()
        return context_of(self._facts, prompt)

    def copied(self) -> Unbilled:
        """Return what a copy of the request holds."""
        return Unbilled(self._limiter, self._plan, self._facts, self._size, None, (), None)

    def expected(self) -> tuple[int, int]:
        """Return the tokens of its prompt and of its answers, as they are estimated."""
        size = self._size
        if size is None:
            size = self._size = self._limiter.estimate(self._plan, self._facts)
        return size.prompt, size.output

    def counted(self, chunks: int) -> int:
        """Return the tokens that so many chunks of its stream probably are."""
        return self._tokens(chunks)

    def settle(
        self, usage: Usage | None, events: int, *, whole: bool, accepted: bool, counted: bool = False
    ) -> tuple[Settlement, int, Charges | None]:
        """Give back what was not used. Returns how, the cost in nano-dollars, and what each limit was charged.

        ``whole``: the answer came to its end, so a usage is all of it. ``accepted``: an engine may have worked on it.
        ``counted``: a part of the usage was counted rather than told.
        """
        if self.settled is not None:
            raise RuntimeError("a hold was settled twice")
        kind, used = self._used(usage, events, whole, accepted)
        if counted and kind is EXACT:
            kind = COUNTED
        self.settled = kind
        if kind is COUNTED:
            self.used = Usage(used.prompt, used.output, used.cached)
        plan = self._plan
        cost = 0
        charges = None
        if self._granted is not None:
            # Taken apart: an index that is an enum's costs as much as a call.
            _, tokens, cost, _, _ = amounts(used, plan.weights, plan.prices)
            charges = self._give_back(kind, tokens, cost)
        elif plan.prices is not FREE:
            cost = plan.prices.cost(used.prompt, used.cached, used.output, used.reasoning)
        if kind is EXACT and not plan.learned.passes():
            _learn(self._facts, plan, used, events)
        return kind, 0 if kind is VOID else cost, charges

    def _give_back(self, kind: Settlement, tokens: int, money: int) -> Charges:
        plan, reserved, needs = self._plan, self._amounts, self._needs
        # What is counted at once comes back whole.
        if kind is EXACT and needs is not None:
            _, held_tokens, held_money, slots, in_flight = needs
            back = (0, held_tokens - tokens, held_money - money, slots, in_flight)
            self._limiter.store.settle(plan.buckets, plan.spread(back))
            return Charges(plan, reserved, (UNIT, tokens, money, 0, 0), False)
        charges = Charges(plan, reserved, _NOTHING if kind is VOID else (UNIT, tokens, money, 0, 0), kind is KEPT)
        kept = zip(reserved, charges.charged, strict=True)
        self._limiter.store.settle(plan.buckets, [held - charged for held, charged in kept])
        return charges

    def _used(self, usage: Usage | None, events: int, whole: bool, accepted: bool) -> tuple[Settlement, Size]:
        facts = self._facts
        writes = bool(facts.route.token_fields)
        if not facts.route.charged:
            return (EXACT if whole else VOID), Size(0, 0)
        if usage is not None and usage.prompt is not None:
            known = Size(usage.prompt, usage.completion or 0, usage.cached or 0, usage.reasoning or 0)
            # Usage comes last in OpenAI's dialect; in the others what comes first is not all.
            if (whole or facts.route.dialect is OPENAI) and (usage.completion is not None or not writes):
                return EXACT, known
            counted = max(known.output, self._tokens(events))
            return COUNTED, Size(known.prompt, counted, known.cached, known.reasoning)
        # An answer that is no stream is one event, which says nothing of its length.
        size = self._size or self._limiter.estimate(self._plan, facts)
        if (events > 1 and writes and usage is None) if whole else events:
            return COUNTED, Size(size.prompt, self._tokens(events))
        return (KEPT if accepted or whole else VOID), size

    def _tokens(self, events: int) -> int:
        """Return the tokens that so many events of its stream probably are."""
        return round(events * self._plan.learned.per_event(self._facts.route.dialect.name))


class Unbilled(Hold):
    """What a copy of a request holds of its limits: nothing. What it uses is charged to nobody and teaches nothing."""

    __slots__ = ()

    def settle(
        self, usage: Usage | None, events: int, *, whole: bool, accepted: bool, counted: bool = False
    ) -> tuple[Settlement, int, Charges | None]:
        """Note that it is over."""
        if self.settled is not None:
            raise RuntimeError("a hold was settled twice")
        self.settled = MIRROR
        return MIRROR, 0, None


class Limiter:
    """The limits of one replica. ``clock`` returns microseconds since 1970."""

    def __init__(self, store: Store, known: Declared, metrics: Metrics, clock: Callable[[], int]) -> None:
        self.store = store
        self.known = known
        self._metrics = metrics
        self._clock = clock
        self._plans: dict[tuple[str, str, str, str], Plan] = {}
        self._shapes: dict[Shape, Shape] = {}
        self._declared_for: dict[str, bool] = {}
        self._estimator = Estimator()

    def configure(self, known: Declared) -> None:
        """Take other declarations. What is in the buckets stays, by their names."""
        self.known = known
        self._declared_for.clear()
        self._plans.clear()
        self._shapes.clear()

    # --- before -----------------------------------------------------------------------------------------------------

    def counts_as(self, name: str, model: str) -> str:
        """Return which model's limits and prices hold for a name that stands for others: its own, where anything is
        said of it, else those of the ``model`` it stands for."""
        declared = self._declared_for.get(name)
        if declared is None:
            # Names of the configuration: bounded.
            declared = self._declared_for[name] = model_limits(self.known.limits, name)[1] is not None
        return name if declared else model

    def plan(self, who: KeyRecord, model: str, pool: str, address: str) -> Plan:
        """Return what applies to a request."""
        named = (who.public_id, address, model, pool)
        plan = self._plans.get(named)
        if plan is not None and plan.who is who and (plan.until == 0 or self._clock() < plan.until):
            return plan
        if len(self._plans) >= MOST_PLANS:
            self._plans.clear()
            self._shapes.clear()
        plan = self._plans[named] = self._make_plan(who, model, pool, address)
        return plan

    def _make_plan(self, who: KeyRecord, model: str, pool: str, address: str) -> Plan:
        known = self.known
        source = f"keys.{who.name}.limits" if who.source == "file" else f"database key {who.name}"
        asker = Asker(who.public_id, who.tenant, model, pool, address, who.limits, source)
        limits = applying(asker, known, self._clock())
        # One shape for all that are alike: a bucket that many keys share knows it again at a glance.
        shapes = tuple(self._shapes.setdefault(limit.shape, limit.shape) for limit in limits)
        buckets = Buckets(tuple(limit.bucket for limit in limits), shapes)
        said = tuple(limit.counts.name.lower() for limit in limits)
        weights, prices = weights_of(known.limits, model), prices_of(known.limits, model)
        return Plan(
            who=who,
            organisation=organisation_of(who.tenant, known) if who.public_id else "",
            limits=limits,
            buckets=buckets,
            spread=_spread(tuple(int(limit.counts) for limit in limits)),
            said=said,
            named=msgspec.Raw(msgspec.json.encode(list(zip(buckets.names, said, strict=True)))),
            learned=self._estimator.of(who.public_id, model),
            seed=zlib.crc32(who.public_id.encode()),
            about=families(limits),
            weights=weights,
            prices=prices,
            cuts=tuple(at for at, limit in enumerate(limits) if limit.cut),
            roomy=min((_roomy(limit, weights, prices) for limit in limits if not limit.cut), default=NEVER),
            until=min((shape.ends for shape in buckets.shapes if shape.ends), default=0),
            weight=weight_of(who.tenant, known),
        )

    def admit(self, plan: Plan, facts: Facts, who: Callable[[], int]) -> Hold | Refusal | Deciding:
        """Reserve what a request will need, or say why not; or return the steps to that, where there is more to it.
        ``who`` stands for the request and its repetitions."""
        if not plan.limits:
            return Hold(self, plan, facts, None, None, (), None)
        size = self.estimate(plan, facts)
        if facts.least > plan.roomy:
            too_large = self._never_fits(plan, facts)
            if too_large is not None:
                return too_large
        for at in plan.cuts:
            limit = plan.limits[at]
            most = self._affordable(plan, facts, size, limit.shape.capacity, limit.counts)
            size = Size(size.prompt, min(size.output, max(0, most) * facts.answers))
        needs, wanted = self._wanted(plan, size)
        verdict = self.store.reserve(plan.buckets, wanted, who, first=facts.first)
        if isinstance(verdict, Granted) and not plan.cuts:
            return Hold(self, plan, facts, size, needs, wanted, verdict)
        return self._decide(plan, facts, who, size, needs, wanted, verdict)

    def _decide(
        self,
        plan: Plan,
        facts: Facts,
        who: Callable[[], int],
        size: Size,
        needs: Sequence[int] | None,
        wanted: Sequence[int],
        first: Verdict | asyncio.Future[Verdict],
    ) -> Deciding:
        """Go on from the store's ``first`` answer, which may be still to come and need not be its last."""
        verdict = yield from self._decided(plan, wanted, first)
        if isinstance(verdict, Refused) and verdict.index in plan.cuts:
            shorter = self._shortened(plan, facts, size, verdict.buckets[verdict.index], verdict.index)
            if shorter is not None:
                size = shorter
                needs, wanted = self._wanted(plan, size)
                again = self.store.reserve(plan.buckets, wanted, who, first=facts.first)
                verdict = yield from self._decided(plan, wanted, again)
        if isinstance(verdict, Refused):
            return self._refuse(plan, facts, wanted, verdict)
        if plan.cuts:
            self._cut(plan, facts, size, verdict.levels)
        return Hold(self, plan, facts, size, needs, wanted, verdict)

    def _decided(
        self, plan: Plan, wanted: Sequence[int], verdict: Verdict | asyncio.Future[Verdict]
    ) -> Generator[Pending, Verdict, Verdict]:
        if not isinstance(verdict, asyncio.Future):
            return verdict
        try:
            return (yield Pending(verdict))
        except GeneratorExit:
            # The client left. What is still to be answered the store takes back by itself; an answer that came in the
            # meantime nobody else will see.
            if not verdict.cancel() and not verdict.cancelled() and isinstance(verdict.result(), Granted):
                self.store.settle(plan.buckets, wanted)
            raise

    def estimate(self, plan: Plan, facts: Facts) -> Size:
        """Return what a request will probably use at most."""
        route, learned = facts.route, plan.learned
        if not route.charged:
            return Size(0, 0)
        prompt = facts.counted if facts.counted is not None else learned.prompt(facts.size, facts.parts)
        if not route.token_fields:
            return Size(prompt, 0)
        stated = facts.stated if facts.stated is not None else route.implied_tokens
        return Size(prompt, facts.answers * learned.output(stated, self.known.limits.assumed_output))

    def _never_fits(self, plan: Plan, facts: Facts) -> Refusal | None:
        """Refuse what is larger than a whole bucket by what the client stated, or at the very least."""
        if not facts.route.charged:
            return None
        output = (facts.stated or 0) * facts.answers
        least = Size(facts.least - output, output)
        needs = amounts(least, plan.weights, plan.prices)
        for limit in plan.limits:
            asked = needs[limit.counts]
            if asked > limit.shape.capacity and not limit.cut:
                return never_fits(limit, asked, facts.model)
        return None

    @staticmethod
    def _wanted(plan: Plan, size: Size) -> tuple[Sequence[int] | None, Sequence[int]]:
        """Return what is wanted by kind and of each bucket; None by kind where one does not hold as much."""
        needs = amounts(size, plan.weights, plan.prices)
        wanted = plan.spread(needs)
        if plan.cuts or size.prompt + size.output > plan.roomy:
            # An estimate that is more than a bucket holds takes all of it: what can never fit is refused on facts only.
            return None, [min(want, shape.capacity) for want, shape in zip(wanted, plan.buckets.shapes, strict=True)]
        return needs, wanted

    def _refuse(self, plan: Plan, facts: Facts, wanted: Sequence[int], refused: Refused) -> Refusal:
        limit = plan.limits[refused.index]
        if refused.early:
            self._metrics.early_retries += 1
        if refused.standing is not Standing.CLOSED:
            self._metrics.limited(limit.scope, plan.said[refused.index])
        levels = Known(plan.buckets.shapes, refused.buckets)
        headers = rate_headers(plan.about, levels, refused.standing)
        hold_time = self._expected_slot(limit, refused.buckets[refused.index])
        return refusal(limit, refused, wanted[refused.index], facts.model, hold_time, headers)

    # --- budgets that cut -------------------------------------------------------------------------------------------

    def _affordable(self, plan: Plan, facts: Facts, size: Size, left: int, counts: Counts) -> int:
        """Return the output tokens of each answer that what is left of a budget pays for, after the prompt."""
        rates = plan.weights if counts is _TOKENS else plan.prices
        each = max(rates.output, rates.reasoning)
        if not each or not facts.route.token_fields:
            return 0
        return (left - rates.cost(size.prompt, 0, 0, 0)) // each // facts.answers

    def _shortened(self, plan: Plan, facts: Facts, size: Size, bucket: Bucket, at: int) -> Size | None:
        limit = plan.limits[at]
        output = self._affordable(plan, facts, size, spare(limit.shape, bucket), limit.counts)
        return Size(size.prompt, output * facts.answers) if output >= LEAST_CUT else None

    def _cut(self, plan: Plan, facts: Facts, size: Size, levels: Levels) -> None:
        """Bound the answer by what is reserved and what is left beside it: the engine ends it with `length`."""
        most = NEVER
        for at in plan.cuts:
            limit = plan.limits[at]
            more = self._affordable(plan, facts, Size(0, 0), max(0, levels.left(at)), limit.counts)
            most = min(most, size.output // facts.answers + more)
        names = [name for name in facts.route.token_fields if name in facts.fields]
        if facts.stated is None or facts.stated > most:
            for name in names or facts.route.token_fields[-1:]:
                facts.fields[name] = msgspec.Raw(b"%d" % most)

    # --- afterwards -------------------------------------------------------------------------------------------------

    def _expected_slot(self, limit: Limit, bucket: Bucket) -> float:
        """Return the seconds after which one of the slots in use may be expected to come free."""
        at_once = max(1, -bucket.level // UNIT) if limit.counts is _CONCURRENT else 1
        return min(30.0, max(0.25, self._metrics.mean_duration() / at_once))

    async def explain(self, plan: Plan) -> list[tuple[Limit, Bucket]]:
        """Return what applies and what is left of it, for people."""
        return list(zip(plan.limits, await self.store.look(plan.buckets), strict=True))

    @property
    def standing(self) -> Standing:
        """By whose word requests are let in."""
        return self.store.standing


def _roomy(limit: Limit, weights: Rates, prices: Rates) -> int:
    """Return how many tokens, of whatever kind, a whole bucket is enough for."""
    if limit.counts is _IN_FLIGHT:
        return limit.shape.capacity // UNIT
    if limit.counts not in (_TOKENS, _MONEY):
        return NEVER
    rates = weights if limit.counts is _TOKENS else prices
    return limit.shape.capacity // max(1, rates.input, rates.cached, rates.output, rates.reasoning)


def read_facts(
    route: Route, model: str, fields: Fields, stated: int | None, size: int, media: tuple[int, int], first: bool
) -> Facts:
    """Read off a body what its size can be estimated by. ``media``: how many images and the like are in it, and their
    bytes."""
    parts, text = media[0], size - media[1]
    answers, counted = _answers(route, fields), _counted(fields)
    least = (text // LONGEST_TOKEN if counted is None else counted) + (stated or 0) * answers
    return Facts(route, model, fields, text, parts, answers, stated, counted, first, least)


def context_of(facts: Facts, prompt: int) -> tuple[int, int]:
    """Return the tokens of context that a request needs for one answer: at the very least, and probably, with a prompt
    estimated at so many tokens."""
    if not facts.route.token_fields:
        return 0, 0
    stated = facts.stated or 0
    # Of several prompts each is by itself, and one of them at least as long as the mean.
    prompts = count_prompts(facts.fields.get("prompt"))
    least = (facts.least - stated * facts.answers) // prompts
    return least + stated, max(least, prompt // prompts) + stated


def who_asks(plan: Plan, body: bytes) -> int:
    """Return what stands for a request and its repetitions: never 0."""
    return zlib.crc32(body, plan.seed) + _NOT_ZERO


@lru_cache(4096)
def _spread(counts: tuple[int, ...]) -> Callable[[Sequence[int]], tuple[int, ...]]:
    if len(counts) > 1:
        return itemgetter(*counts)
    return lambda amounts: tuple(amounts[at] for at in counts)


def _learn(facts: Facts, plan: Plan, used: Size, events: int) -> None:
    size = 0 if facts.counted is not None else facts.size
    plan.learned.learn(size, facts.parts, used.prompt, used.output, facts.answers, limited=bool(plan.limits))
    if events > 1 and used.output:
        plan.learned.learn_events(facts.route.dialect.name, used.output / events)


def _answers(route: Route, fields: Fields) -> int:
    most = 1
    for name in route.n_fields:
        raw = fields.get(name)
        if raw is not None and bytes(raw).isdigit():
            most = max(most, min(int(bytes(raw)[:9]), MOST_ANSWERS))
    prompt = fields.get("prompt")
    return most if prompt is None or not route.n_fields else most * min(count_prompts(prompt), MOST_ANSWERS)


def _counted(fields: Fields) -> int | None:
    """Return the tokens of a prompt that is given as numbers."""
    prompt = fields.get("prompt", fields.get("input"))
    if prompt is None:
        return None
    text = bytes(prompt)
    if text[:1] != b"[" or not text[1:].lstrip(b" \n\t[")[:1].isdigit():
        return None
    return text.count(b",") + 1
