"""The endpoints: which there are, which can be given work, and what each serves."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import inf

import msgspec

from adapters.catalogue import Catalogue, Model
from engines.protocol import Capability, Engine, EngineLoad, Target
from gateway.policy import concurrency
from gateway.policy.breaker import NEW, Breaker, BreakerRules, Event, State, step
from gateway.policy.capacity import Part
from gateway.policy.concurrency import (
    ConcurrencyRules,
    Told,
    Window,
    bounded,
    can_keep,
    first_limit,
    hear,
    without_old_word,
)
from gateway.policy.fit import able, roomy
from gateway.policy.routing import least_loaded
from gateway.policy.scorers import Slots
from gateway.serving.upstream import Address, Connections

ASKED_FOR = (
    Capability.TOOLS
    | Capability.FORCED_TOOLS
    | Capability.JSON_SCHEMA
    | Capability.LOGPROBS
    | Capability.STOP_WORDS
    | Capability.SEVERAL_ANSWERS
)
"""What a request may need of an engine."""
WHOLE = 32
"""Tokens of a whole answer from which on its time is mostly that between them."""
OLDEST_WORD = 10.0
"""Seconds for which an engine's word about itself counts."""
UNBOUNDED = 1 << 30


@dataclass(frozen=True, slots=True)
class MinderAt:
    """Where the agent beside an engine is spoken to."""

    address: str
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class EndpointSpec:
    """What the configuration says of an endpoint.

    ``models`` maps public names to the engine's own; None: the engine is asked. ``api_key`` is the engine's own key.
    ``minder`` None: nobody but the engine itself can be spoken to.
    """

    name: str
    url: str
    engine: Engine
    address: Address
    api_key: str | None = None
    models: tuple[tuple[str, str], ...] | None = None
    max_connections: int = 1024
    minder: MinderAt | None = None
    pool: str = ""
    device: str = ""
    """What it computes on; empty: not told."""
    max_model_len: int | None = None
    """Longest context of its models in tokens, where it is not asked."""
    max_running: int | None = None
    """Requests it may be given at once, whatever is learnt of it."""


@dataclass(frozen=True, slots=True)
class HealthRules:
    """How endpoints are judged: when one is ejected, and for how many seconds a newcomer gets less than its share."""

    breaker: BreakerRules = field(default_factory=BreakerRules)
    ramp: float = 10.0


class Endpoint:
    """One engine process and what is known of it."""

    def __init__(self, spec: EndpointSpec) -> None:
        self.spec = spec
        self.rules = HealthRules()
        self.breaker: Breaker = NEW
        """What speaks against giving it work, by how its last requests ended."""
        self.ramp_from = 0.0
        self.ramp_until = 0.0
        self.name = spec.name
        self.engine = spec.engine
        self.connections = Connections(spec.address, spec.max_connections)
        self.in_flight = 0
        self.tokens = 0
        """What it has in flight, by estimates: of prompts and answers together."""
        self.prefilling = 0
        """Of these the prompts whose first token has not come."""
        self.prefill_rate = 0.0
        """Tokens of prompts a second, as they were seen; 0: not known yet."""
        self.speed = 0.0
        """The greatest that a prompt was read with, waiting included."""
        self.slots: Slots | None = None
        """Its places for adapters, where they are known."""
        self.gives = _bounded(ConcurrencyRules(), spec)
        """By which rules it is learnt how much it can be given at once."""
        self.limit = first_limit(self.gives)
        self.part = Part(spec.max_running) if spec.max_running is not None else None
        """What of it this gateway may use, where all gateways share what it may be given."""
        self.share = self._usual = UNBOUNDED if spec.max_running is None else spec.max_running
        self.window = Window()
        self.watched = False
        """Whether it is measured how fast it answers."""
        self.holds: set[str] = set()
        """Who keeps new requests from it, by command; those under way finish."""
        # Named models are believed until a connection fails; an engine that must be asked has served nothing yet.
        self.healthy = spec.models is not None and not self.asked
        self.seen = False
        """Whether it ever answered."""
        self.trouble = "" if self.healthy else "not asked yet"
        self.models: dict[str, Target] = {}
        """What it serves: public name, how a request for it names it."""
        self.lengths: dict[str, int] = {}
        """Longest context in tokens of those of its models that tell it, by public name."""
        self.on_trouble: Callable[[], None] | None = None
        """Called when a request finds that it cannot be reached."""
        self._heads: dict[str, bytes] = {}
        self.name_models((public, self.engine.target(own)) for public, own in spec.models or ())

    @property
    def asked(self) -> bool:
        """Whether it must be asked what it serves: nobody says so, or it answers from another model than was named."""
        return self.spec.models is None or Capability.MODELS_CHECKED not in self.engine.capabilities

    @property
    def available(self) -> bool:
        """Whether it can be given a request now."""
        return self.healthy and not self.holds and not self.connections.full

    def room(self, tokens: int) -> bool:
        """Whether it has capacity for one more request of so many tokens."""
        return self.in_flight < self.share and self.limit.room(self.in_flight, self.tokens, tokens)

    def stretches(self, tokens: int) -> bool:
        """Whether it may be given one more request of so many tokens beyond what was learnt, since it holds the
        request's beginning; never beyond what it may have at most, nor beyond this gateway's part of that."""
        limit = self.limit
        if limit.tokens is not None and self.tokens + tokens > limit.tokens:
            return False
        return self.in_flight < self.share and concurrency.stretched(limit, self.in_flight, self.gives)

    @property
    def most(self) -> int:
        """Requests it is given at once: what this gateway does not need now it may have when it does."""
        return min(int(self.limit.sequences), max(self.share, self._usual))

    @property
    def most_now(self) -> int:
        """Requests it is given at once, of what this gateway may use now."""
        return min(int(self.limit.sequences), self.share)

    @property
    def most_tokens(self) -> int:
        """Tokens it is given at once; 0: not known."""
        return int(self.limit.tokens or 0)

    def lease(self, share: int, gateways: int) -> None:
        """Take what of it this gateway may use, of so many that share it."""
        assert self.part is not None
        self.share = share
        self._usual = max(1, self.part.most // gateways)

    def give_at_most(self, rules: ConcurrencyRules) -> None:
        """Take other rules of how much it is given; what was learnt stays while its targets are the same."""
        gives = _bounded(rules, self.spec)
        if gives != self.gives:
            same = bool(gives.targets) and gives.targets == self.gives.targets
            self.limit = bounded(self.limit, gives) if same else first_limit(gives)
            self.gives = gives
            self.window.clear(self.in_flight)
        self.watched = bool(gives.targets)

    def take(self, prompt: int, tokens: int) -> None:
        """Note that a request was given to it."""
        self.in_flight += 1
        self.tokens += tokens
        self.prefilling += prompt
        if self.in_flight > self.window.peak:
            self.window.peak = self.in_flight

    def give_back(self, prompt: int, tokens: int) -> None:
        """Note that a request has ended there; ``prompt`` is 0 once its first token had come."""
        self.in_flight -= 1
        self.tokens -= tokens
        self.prefilling -= prompt

    def first_token(self, seconds: float, prompt: int, ahead: int) -> None:
        """Note how long a first token took, of a prompt that came after so many tokens of others."""
        self.prefilling -= prompt
        if seconds > 0 and prompt:
            rate = (ahead + prompt) / seconds
            self.prefill_rate = self.prefill_rate + (rate - self.prefill_rate) / 8 if self.prefill_rate else rate
            self.speed = max(self.speed, prompt / seconds)
        if self.watched and can_keep(prompt, self.speed, self.gives.targets):
            self.window.first_token(seconds)

    def whole(self, seconds: float, tokens: int) -> None:
        """Note how long an answer took that was not streamed, of so many tokens: on the average, since nobody saw when
        the first one came. Between few and none that tells nothing."""
        if self.watched:
            if tokens >= WHOLE:
                self.window.gap(seconds / tokens)
            elif tokens <= 1:
                self.window.first_token(seconds)

    def adapt(self, now: float) -> None:
        """Learn from how it answered lately how much it can be given."""
        self.limit = without_old_word(self.limit, now, OLDEST_WORD)
        limit = concurrency.step(self.limit, self.window, self.in_flight, now, self.gives)
        if limit is not self.limit:
            self.limit = limit
            self.window.clear(self.in_flight)

    def heard(self, load: EngineLoad, now: float) -> None:
        """Note what the engine says of itself."""
        if self.watched:
            self.limit = hear(self.limit, Told(load.waiting, load.cache_used, self.tokens, now), now, OLDEST_WORD)

    @property
    def cordoned(self) -> bool:
        """Whether somebody keeps new requests from it."""
        return bool(self.holds)

    def offers(self, model: str, path: str, salted: bool) -> bool:
        """Whether its engine serves a model on a path, and as the request needs it."""
        engine = self.engine
        if path not in engine.paths or (salted and path in engine.unsalted_paths):
            return False
        return self.models[model].adapter is None or path not in engine.base_only_paths

    def length(self, model: str) -> int | None:
        """Return the longest context of a model in tokens, None: it is not known."""
        return self.lengths.get(model, self.spec.max_model_len)

    def name_models(self, models: Iterable[tuple[str, Target]]) -> None:
        """Set what it serves."""
        self.models = dict(models)

    def request_head(self, path: str) -> bytes:
        """Return the request line and the headers that are the same for every request to this endpoint."""
        head = self._heads.get(path)
        if head is None:
            lines = [b"POST " + self.engine.paths[path].encode("ascii") + b" HTTP/1.1"]
            lines.append(b"host: " + self.spec.address.authority)
            lines.append(b"content-type: application/json")
            lines.append(b"accept: application/json, text/event-stream")
            if path == "/v1/messages":
                # Part of that dialect: LMDeploy refuses a request without it, the others do not look.
                lines.append(b"anthropic-version: 2023-06-01")
            if self.spec.api_key is not None:
                lines.append(b"authorization: Bearer " + self.spec.api_key.encode("ascii"))
            head = self._heads[path] = b"\r\n".join(lines) + b"\r\nx-request-id: "
        return head

    def trusted(self, now: float) -> bool:
        """Whether its last requests went well enough to give it another."""
        return self.breaker.admits(now)

    def sent(self, now: float) -> None:
        """Note that it is given a request."""
        if self.breaker is not NEW and self.breaker.state is not State.CLOSED:
            self.breaker = step(self.breaker, Event.SENT, now, self.rules.breaker)

    def went_well(self, now: float) -> None:
        """Note that it answered a request."""
        if self.breaker is not NEW:
            self.breaker = step(self.breaker, Event.OK, now, self.rules.breaker)

    def went_wrong(self, now: float) -> bool:
        """Note that it failed a request; tell whether that ejects it."""
        before = self.breaker
        self.breaker = step(before, Event.FAILED, now, self.rules.breaker)
        return self.breaker.state is State.OPEN and self.breaker is not before

    def up(self, now: float = 0.0) -> None:
        """Note that it answered; one that was away, or is new, gets its share little by little."""
        if not self.healthy or not self.seen:
            self.ramp_from, self.ramp_until = now, now + self.rules.ramp
        self.healthy = True
        self.seen = True
        self.trouble = ""

    def down(self, trouble: str) -> None:
        """Note that it cannot be reached; ``trouble`` is for people."""
        was_healthy, self.healthy, self.trouble = self.healthy, False, trouble
        if was_healthy and self.on_trouble is not None:
            self.on_trouble()


def _bounded(rules: ConcurrencyRules, spec: EndpointSpec) -> ConcurrencyRules:
    """Return the rules for one endpoint."""
    most = min(rules.most, spec.max_connections)
    if spec.max_running is not None:
        most = min(most, spec.max_running)
    return replace(rules, most=most, least=min(rules.least, most))


class Wake(msgspec.Struct, frozen=True):
    """Of a pool whose engines are started when somebody waits for them: its name, how many seconds that may take, and
    the paths that they will serve."""

    pool: str
    seconds: float
    paths: frozenset[str]


class Group:
    """Endpoints that can serve the same requests: whoever waits for them stands in one line."""

    __slots__ = ("chosen", "endpoints", "kept", "measured", "wake")

    def __init__(self, endpoints: tuple[Endpoint, ...], wake: Wake | None = None) -> None:
        self.endpoints = endpoints
        self.wake = wake
        """Not None: they are worth waiting for even while none of them is there."""
        self.chosen = len(endpoints) > 1
        """Whether there is a choice."""
        self.measured = self.chosen or any(endpoint.watched for endpoint in endpoints)
        """Whether it matters how large a request is."""
        self.kept = False
        """Whether it is all that serve some model, and not only those that one request has not tried yet."""


class Pool:
    """All endpoints, and by model those that serve it."""

    def __init__(self, catalogue: Catalogue, rules: HealthRules | None = None) -> None:
        self.catalogue = catalogue
        self._rules = rules or HealthRules()
        self.endpoints: list[Endpoint] = []
        self._by_model: dict[str, tuple[Endpoint, ...]] = {}
        self.uneven: frozenset[str] = frozenset()
        """The models whose endpoints are not alike in what they can do, or in their context."""
        self._lengths: dict[str, list[int]] = {}
        self._fitting: dict[tuple[Group, str, Capability, int], Group] = {}
        self._able: dict[tuple[str, str, bool, str], Group] = {}
        self._groups: dict[tuple[tuple[Endpoint, ...], Wake | None], Group] = {}
        self.wakes: Mapping[str, Wake] = {}
        """The models whose engines are started when somebody waits for them."""
        self._turn = 0
        self.gives = ConcurrencyRules()
        self.gateways = 1
        """How many gateways share the endpoints, this one included."""
        self.leased = False
        """Whether a store says what of the endpoints this one may use; else it is an equal part."""
        self.on_index: Callable[[], None] | None = None
        """Called when it has changed who serves what."""
        self.on_return: Callable[[Endpoint], None] | None = None
        """Called when an endpoint is back that was away: what it held before is probably lost."""

    def configure(self, specs: Iterable[EndpointSpec], created: int) -> tuple[list[Endpoint], list[Endpoint]]:
        """Take a new list of endpoints; those that stay keep their connections and load. Returns (new, gone)."""
        specs = list(specs)
        kept = {endpoint.spec: endpoint for endpoint in self.endpoints}
        before = set(self.endpoints)
        self.endpoints = [kept.get(spec) or Endpoint(spec) for spec in specs]
        self.judge_by(self._rules)
        for endpoint in self.endpoints:
            endpoint.give_at_most(self.gives)
            if endpoint not in before and endpoint.part is not None:
                self._share(endpoint)
        after = set(self.endpoints)
        for endpoint in after - before:
            self.catalogue.learn(Model(public, created) for public in endpoint.models)
        self.index()
        return [e for e in self.endpoints if e not in before], list(before - after)

    def judge_by(self, rules: HealthRules) -> None:
        """Take other rules; what endpoints have done so far stays."""
        self._rules = rules
        for endpoint in self.endpoints:
            endpoint.rules = rules

    def give_at_most(self, rules: ConcurrencyRules) -> None:
        """Take other rules of how much endpoints are given at once."""
        self.gives = rules
        for endpoint in self.endpoints:
            endpoint.give_at_most(rules)
        self.index()

    def share_among(self, gateways: int) -> None:
        """Take that so many gateways share the endpoints and nobody tells who may use what: each an equal part."""
        self.gateways, self.leased = gateways, False
        for endpoint in self.endpoints:
            if endpoint.part is not None:
                self._share(endpoint)

    def _share(self, endpoint: Endpoint) -> None:
        part = endpoint.part
        assert part is not None
        if not self.leased:
            part.alone(self.gateways)
        endpoint.lease(part.share, self.gateways)

    def index(self) -> None:
        """Rebuild the table of who serves what, after endpoints or their models changed."""
        table: dict[str, list[Endpoint]] = {}
        for endpoint in self.endpoints:
            for public in endpoint.models:
                table.setdefault(public, []).append(endpoint)
        self._by_model = {public: tuple(endpoints) for public, endpoints in table.items()}
        self.uneven = frozenset(
            public
            for public, endpoints in table.items()
            if len({(one.engine.capabilities & ASKED_FOR, one.length(public)) for one in endpoints}) > 1
        )
        lengths = ((public, [one.length(public) for one in table[public]]) for public in self.uneven)
        self._lengths = {public: sorted({length for length in told if length is not None}) for public, told in lengths}
        self._fitting = {}
        self._able = {}
        self._groups = {}
        if self.on_index is not None:
            self.on_index()

    def capacity(self) -> Iterator[tuple[str, int, int]]:
        """Return of each endpoint how many requests it is given at once, and the tokens it has by estimates."""
        return ((endpoint.name, endpoint.most_now, endpoint.tokens) for endpoint in self.endpoints)

    def serving(self, model: str) -> tuple[Endpoint, ...]:
        """Return every endpoint that serves a public model, healthy or not."""
        return self._by_model.get(model, ())

    def pool_of(self, model: str) -> str:
        """Return the name of the pool of engines that serve a model, as the first of them says it."""
        serving = self._by_model.get(model)
        if serving:
            return serving[0].spec.pool
        wake = self.wakes.get(model)
        return wake.pool if wake is not None else ""

    def choose(
        self, model: str, path: str, tried: Collection[Endpoint], now: float = inf, *, salted: bool = False
    ) -> Endpoint | None:
        """Return the endpoint for the next attempt, None when none of those left can be given work.

        Without ``now`` neither a newcomer nor one that failed is spared: for what costs an engine next to nothing.
        """
        self._turn += 1
        return least_loaded(self.able(model, path, salted), tried, self._turn, now)

    def able(self, model: str, path: str, salted: bool = False) -> tuple[Endpoint, ...]:
        """Return every endpoint that serves a model on a path, healthy or not.

        ``salted`` tells that the request's prefix cache is to be kept apart.
        """
        return self.group(model, path, salted).endpoints

    def group(self, model: str, path: str, salted: bool = False, device: str = "") -> Group:
        """Return the same as a group: one for all models that the same endpoints serve. ``device`` not empty: of those
        on such a device alone."""
        group = self._able.get((model, path, salted, device))
        if group is None:
            serving = self._by_model.get(model, ())
            able = tuple(
                endpoint
                for endpoint in serving
                if endpoint.offers(model, path, salted) and device in ("", endpoint.spec.device)
            )
            wake = self.wakes.get(model)
            if wake is not None and (path not in wake.paths or (serving and not able)):
                wake = None
            group = self._able[model, path, salted, device] = self.group_of(able, wake)
            group.kept = True
        return group

    def group_of(self, endpoints: tuple[Endpoint, ...], wake: Wake | None = None) -> Group:
        """Return the group of these endpoints."""
        group = self._groups.get((endpoints, wake))
        if group is None:
            group = self._groups[endpoints, wake] = Group(endpoints, wake)
        return group

    def fitting(self, group: Group, model: str, needs: Capability, tokens: int) -> Group:
        """Return those of a group that can do what is needed, with a context that holds so many tokens."""
        # All that need more than one length and no more than the next find the same.
        key = group, model, needs, bisect_left(self._lengths[model], tokens)
        found = self._fitting.get(key)
        if found is None:
            endpoints = group.endpoints
            can = [
                endpoints[place] for place in able([one.engine.capabilities.value for one in endpoints], needs.value)
            ]
            fit = tuple(can[place] for place in roomy([one.length(model) for one in can], tokens))
            found = group if len(fit) == len(endpoints) else self.group_of(fit, group.wake)
            found.kept = True
            self._fitting[key] = found
        return found

    def wake_for(self, models: Mapping[str, Wake], created: int) -> None:
        """Take the models whose engines are started when somebody waits for them, all there are."""
        self.catalogue.learn(Model(name, created) for name in models)
        if models != self.wakes:
            self.wakes = dict(models)
            self.index()

    def came_up(self, endpoint: Endpoint) -> None:
        """Take that an endpoint is there that was not: whoever waited for it to start waits anew, for a line's pace
        while nobody was served says nothing."""
        if any(model in self.wakes for model in endpoint.models):
            self.index()

    def drop(self, group: Group) -> None:
        """Forget a group that nobody waits for, unless it is kept."""
        if not group.kept:
            self._groups.pop((group.endpoints, group.wake), None)

    @property
    def ready(self) -> bool:
        """Whether any endpoint can be given work, or may be woken by it."""
        return bool(self.wakes) or any(endpoint.healthy and not endpoint.holds for endpoint in self.endpoints)

    def close(self) -> None:
        """Close every connection to every engine."""
        for endpoint in self.endpoints:
            endpoint.connections.close()
