"""What may be limited, as it is declared, and which limits apply to whom.

Declarations are sections of `forebay.yaml` and rows of the state database alike. A limit a key has not is its tenant's
for each of its keys, then its organisation's, then the default; field by field, so that a key with a token limit of its
own keeps the requests it inherits. `none` says that nothing is inherited.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator

from gateway.policy.limits import FREE, PLAIN, UNIT, Counts, Limit, Rates
from gateway.policy.token_bucket import LARGEST, SECOND, Shape, rate_shape
from gateway.redis_url import Target, read_url
from gateway.values import ConfigError, Count, ModelPattern, Name, PositiveDuration, Section, UserPath, read_secret

_NAMES = {1: ("s", "sec", "second"), 60: ("m", "min", "minute"), 3600: ("h", "hour"), 86_400: ("d", "day")}
_PERIODS = {name: seconds for seconds, names in _NAMES.items() for name in names}
_SAID = {1: ("sec", "S"), 60: ("min", "M"), 3600: ("hour", "H"), 86_400: ("day", "D")}
_RATE = re.compile(r"^(\d[\d_]*)([kKMG]?) ?/ ?([a-z]+)$", re.ASCII)
_SCALES = {"": 1, "k": 1000, "K": 1000, "M": 10**6, "G": 10**9}
_MOST = LARGEST // UNIT
SHORTEST_TIMEOUT = 0.005
LONGEST_TIMEOUT = 5.0
"""Seconds a store of limits may be given to answer."""


# --- declarations ------------------------------------------------------------------------------------------------


def parse_rate(text: str) -> tuple[int, int]:
    """Return (amount, seconds) of `60/m`, `150k/min`, `10/s`; ValueError when it is none."""
    match = _RATE.fullmatch(text.strip())
    if match is None or match[3] not in _PERIODS:
        raise ValueError("should be a rate such as 10/s, 60/m, 150k/min, 1M/h or 5M/day")
    amount = int(match[1]) * _SCALES[match[2]]
    if not 0 < amount <= _MOST:
        raise ValueError(f"should be at least 1 and at most {_MOST} in its period")
    return amount, _PERIODS[match[3]]


def _rate_text(value: str) -> str:
    parse_rate(value)
    return value


def _one_or_many(value: object) -> object:
    """`60/m`, `{rate: 60/m, burst: 10}` or a list of these; `none` for no limit."""
    if value is None or value == "none":
        return ()
    values = value if isinstance(value, list | tuple) else [value]
    return tuple({"rate": one} if isinstance(one, str) else one for one in values)


def _none(value: object) -> object:
    return None if value == "none" else value


class RateLimit(Section):
    """So many in a time, and how many at once."""

    rate: Annotated[str, AfterValidator(_rate_text)]
    """How many come back in which time: 10/s, 60/m, 150k/min, 1M/h, 5M/day."""
    burst: Annotated[int, Field(ge=1, le=_MOST)] | None = None
    """How many may be used at once after a pause; as many as come back in the time when left out."""


class Budget(Section):
    """What may be spent in a longer time, in weighted tokens or in money."""

    tokens: Annotated[int, Field(ge=1, le=_MOST)] | None = None
    """Weighted tokens."""
    usd: Annotated[Decimal, Field(gt=0, le=1_000_000)] | None = None
    """Dollars, by the prices of `limits.models`."""
    per: Literal["day", "week", "month"] | PositiveDuration = "month"
    """`day`, `week` or `month` of the calendar, full again at its begin; or a duration such as 30d in which as much
    comes back evenly."""
    timezone: str = "UTC"
    """Where the calendar's day begins, such as Europe/Berlin."""
    cut: bool = False
    """Whether an answer is cut at the budget's end, with finish_reason length, instead of being refused before."""

    @model_validator(mode="after")
    def _whole(self) -> Budget:
        if (self.tokens is None) == (self.usd is None):
            raise ValueError("should have exactly one of tokens and usd")
        if isinstance(self.per, float) and self.per < 60:
            raise ValueError("per should be at least a minute; for less write a rate")
        try:
            ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(
                f"timezone: there is no {self.timezone!r}; write one such as Europe/Berlin or UTC"
            ) from None
        return self


RateLimits = Annotated[tuple[RateLimit, ...], BeforeValidator(_one_or_many)]
Budgets = Annotated[tuple[Budget, ...], BeforeValidator(_one_or_many)]
Most = Annotated[Annotated[int, Field(ge=1, le=_MOST)] | None, BeforeValidator(_none)]


class LimitSet(Section):
    """What one subject may use. What is left out is inherited; `none` says that there is no limit."""

    requests: RateLimits = ()
    """Requests in a time."""
    tokens: RateLimits = ()
    """Weighted tokens in a time."""
    concurrent: Most = None
    """Requests at once."""
    tokens_in_flight: Most = None
    """Tokens of all requests at once, as they are estimated."""
    budgets: Budgets = ()
    """What may be spent in a longer time."""


class OrganisationLimits(Section):
    """An organisation's own limits, and what its tenants and keys inherit."""

    limits: LimitSet = LimitSet()
    """What all its tenants may use together."""
    tenants: LimitSet = LimitSet()
    """What each of its tenants may use."""
    keys: LimitSet = LimitSet()
    """What each of its keys may use."""


class TenantLimits(Section):
    """A tenant's (a team's) own limits, and what its keys inherit."""

    organisation: Name | None = None
    """The organisation it belongs to."""
    weight: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """What its share weighs where tenants wait for the same engines."""
    limits: LimitSet = LimitSet()
    """What all its keys may use together."""
    keys: LimitSet = LimitSet()
    """What each of its keys may use."""


Money = Annotated[Decimal, Field(ge=0, le=1_000_000)]


class Prices(Section):
    """Dollars for a million tokens of each kind."""

    input: Money = Decimal(0)
    """Of a prompt."""
    cached: Money | None = None
    """Of a prompt the engine had in its cache; as input when left out."""
    output: Money = Decimal(0)
    """Of an answer."""
    reasoning: Money | None = None
    """Of an answer's reasoning; as output when left out."""


Weight = Annotated[Decimal, Field(ge=0, le=1000)]


class Weights(Section):
    """What one token of each kind counts for in limits on tokens."""

    input: Weight = Decimal(1)
    """Of a prompt."""
    cached: Weight | None = None
    """Of a prompt the engine had in its cache; as input when left out."""
    output: Weight = Decimal(1)
    """Of an answer."""
    reasoning: Weight | None = None
    """Of an answer's reasoning; as output when left out."""


class ModelLimits(Section):
    """A model's or adapter's limits, its prices and its weights."""

    limits: LimitSet = LimitSet()
    """What everybody together may use of it."""
    keys: LimitSet = LimitSet()
    """What each key may use of it."""
    price: Prices = Prices()
    """What its tokens cost."""
    weights: Weights = Weights()
    """What its tokens count for."""


class Defaults(Section):
    """What applies where nothing nearer says otherwise; nothing by default."""

    key: LimitSet = LimitSet()
    """Each key."""
    tenant: LimitSet = LimitSet()
    """Each tenant."""
    organisation: LimitSet = LimitSet()
    """Each organisation."""
    model: LimitSet = LimitSet()
    """Each model."""
    pool: LimitSet = LimitSet()
    """Each pool of engines."""
    client: LimitSet = LimitSet()
    """Each client address, of requests without a key (`auth: none`)."""


def _redis_url(value: SecretStr) -> SecretStr:
    read_url(value.get_secret_value())
    return value


def _answers_in(value: float) -> float:
    if not SHORTEST_TIMEOUT <= value <= LONGEST_TIMEOUT:
        raise ValueError(f"should be at least {SHORTEST_TIMEOUT * 1000:.0f}ms and at most {LONGEST_TIMEOUT:.0f}s")
    return value


def _namespace(value: str) -> str:
    if not re.fullmatch(r"[\w.:-]{1,100}", value, re.ASCII):
        raise ValueError("should be 1 to 100 letters, digits or one of _ . : -")
    return value


class LimitStore(Section):
    """Where replicas keep what is used of limits together: a Redis server. Its URL comes from at most one of url,
    url_file and url_env; without any, each gateway keeps it in its own memory."""

    url: Annotated[SecretStr, AfterValidator(_redis_url)] | None = None
    """redis://user:password@host:port/database, rediss:// (TLS), unix:///path/to/socket,
    redis+sentinel://host:port,host:port/service or redis+cluster://host:port,host:port."""
    url_file: UserPath | None = None
    """A file holding the URL, such as a mounted secret."""
    url_env: str | None = None
    """An environment variable holding the URL."""
    mode: Literal["leased", "exact"] = "leased"
    """`leased`: a replica takes a little ahead and lets most requests in by itself. `exact`: the server is asked about
    every request, which costs a round trip."""
    when_lost: Literal["degraded", "open", "closed"] = "degraded"
    """While the server cannot be reached: `degraded`, each replica gives out its share of every limit; `open`, all
    requests are let in; `closed`, no request that is limited is."""
    timeout: Annotated[PositiveDuration, AfterValidator(_answers_in)] = 0.05
    """How long a request waits for the server's answer; then the server counts as lost."""
    namespace: Annotated[str, AfterValidator(_namespace)] = "forebay"
    """What the names of all its keys begin with; gateways that share limits have the same."""
    ca_file: UserPath | None = None
    """Certificates to trust for rediss:// instead of the system's."""
    replicas: Count = 1
    """How many gateways share the limits: what a share is until the server has told how many there are."""

    @model_validator(mode="after")
    def _one_source(self) -> LimitStore:
        given = [name for name in ("url", "url_file", "url_env") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"should have at most one of {', '.join(given)}")
        if not given and self.replicas > 1:
            raise ValueError(
                f"{self.replicas} replicas need a Redis server to share limits: without one each of them allows the"
                " whole of every limit; write its url, or take replicas out"
            )
        return self

    def server(self) -> tuple[str, Target] | None:
        """The URL, read from wherever it is kept, and what it says; None: there is no server. ConfigError when it
        cannot be read."""
        if self.url is None and self.url_file is None and self.url_env is None:
            return None
        url = (
            self.url.get_secret_value()
            if self.url is not None
            else read_secret("limits.store", None, self.url_file, self.url_env)
        )
        try:
            target = read_url(url, str(self.ca_file) if self.ca_file else None)
        except ValueError as error:
            raise ConfigError([f"limits.store: {error}"]) from None
        if target.ca is not None:
            _check_authority(target)
        return url, target


def _check_authority(target: Target) -> None:
    if not target.encrypted:
        raise ConfigError(["limits.store.ca_file: is for rediss:// URLs only; take it out or change the URL"])
    try:
        ssl.create_default_context(cafile=target.ca)
    except OSError as error:
        # What ssl finds wrong in a file of certificates is an OSError too.
        reason = error.strerror or type(error).__name__
        raise ConfigError([f"limits.store.ca_file: {target.ca} cannot be read ({reason})"]) from None


class Limits(Section):
    """What whom may use how much of."""

    store: LimitStore = LimitStore()
    """Where replicas keep it together."""
    defaults: Defaults = Defaults()
    """What applies where nothing nearer says otherwise."""
    organisations: dict[Name, OrganisationLimits] = {}
    """Organisations by name."""
    tenants: dict[Name, TenantLimits] = {}
    """Tenants (teams) by name."""
    models: dict[ModelPattern, ModelLimits] = {}
    """Models and adapters by public name, or the beginning of one and a *; the longest that fits counts."""
    pools: dict[Name, LimitSet] = {}
    """Pools of engines by name."""
    assumed_output: Count = 1024
    """Tokens an answer is taken to have where neither the request nor experience says how many."""


# --- who asks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asker:
    """Whose limits a request falls under. ``key`` is empty for a client without one, whose ``address`` counts."""

    key: str
    tenant: str
    model: str
    pool: str
    address: str = ""
    own: LimitSet | None = None
    """What its key itself declares."""
    own_source: str = ""


@dataclass(frozen=True, slots=True)
class Declared:
    """All declarations, of the file and of the database, as of one moment. The file's win on their names."""

    limits: Limits
    tenants: Mapping[str, TenantLimits]
    organisations: Mapping[str, OrganisationLimits]
    stored: frozenset[str] = frozenset()
    """Which of these the database holds: `tenant:NAME`, `organisation:NAME`."""


def declared(limits: Limits) -> Declared:
    """Return what the file alone declares."""
    return Declared(limits, limits.tenants, limits.organisations)


_Source = tuple[str, LimitSet]
FIELDS = ("requests", "tokens", "concurrent", "tokens_in_flight", "budgets")


def _nearest(sources: Iterable[_Source], field: str) -> tuple[str, Any]:
    """Return where a field is declared nearest, and what; the name of a source with `none` counts too."""
    for where, limit_set in sources:
        if field in limit_set.model_fields_set:
            return where, getattr(limit_set, field)
    return "", None


def applying(asker: Asker, known: Declared, now: int) -> tuple[Limit, ...]:
    """Return every limit that applies to a request, nearest subject first; ``now`` in microseconds."""
    found: list[Limit] = []
    for scope, subject, sources in _scopes(asker, known):
        for field in FIELDS:
            where, value = _nearest(sources, field)
            if value:
                found += _limits(field, value, scope, subject, f"{where}.{field}", now)
    return tuple(found)


def _scopes(asker: Asker, known: Declared) -> Iterator[tuple[str, str, list[_Source]]]:
    limits, defaults = known.limits, known.limits.defaults
    tenant = known.tenants.get(asker.tenant)
    organisation_name = organisation_of(asker.tenant, known)
    organisation = known.organisations.get(organisation_name)
    model_name, model = model_limits(limits, asker.model)
    of_tenant = _place(known, "tenant", asker.tenant)
    of_organisation = _place(known, "organisation", organisation_name)
    if asker.key:
        sources = [(asker.own_source, asker.own)] if asker.own is not None else []
        if tenant is not None:
            sources.append((f"{of_tenant}.keys", tenant.keys))
        if organisation is not None:
            sources.append((f"{of_organisation}.keys", organisation.keys))
        yield "key", asker.key, [*sources, ("limits.defaults.key", defaults.key)]
    elif asker.address:
        yield "client", asker.address, [("limits.defaults.client", defaults.client)]
    if model is not None:
        whose = asker.key or asker.address
        yield "key on model", f"{whose} {asker.model}", [(f"limits.models.{model_name}.keys", model.keys)]
    if asker.key:
        sources = [(f"{of_tenant}.limits", tenant.limits)] if tenant is not None else []
        if organisation is not None:
            sources.append((f"{of_organisation}.tenants", organisation.tenants))
        yield "tenant", asker.tenant, [*sources, ("limits.defaults.tenant", defaults.tenant)]
    if organisation_name:
        sources = [(f"{of_organisation}.limits", organisation.limits)] if organisation is not None else []
        yield "organisation", organisation_name, [*sources, ("limits.defaults.organisation", defaults.organisation)]
    sources = [(f"limits.models.{model_name}.limits", model.limits)] if model is not None else []
    yield "model", asker.model, [*sources, ("limits.defaults.model", defaults.model)]
    if asker.pool:
        pool = limits.pools.get(asker.pool)
        sources = [(f"limits.pools.{asker.pool}", pool)] if pool is not None else []
        yield "pool", asker.pool, [*sources, ("limits.defaults.pool", defaults.pool)]


def _place(known: Declared, kind: str, name: str) -> str:
    return f"database {kind} {name}" if f"{kind}:{name}" in known.stored else f"limits.{kind}s.{name}"


def model_limits(limits: Limits, model: str) -> tuple[str, ModelLimits | None]:
    """Return what is declared for a model: by its whole name, else by the longest beginning."""
    exact = limits.models.get(model)
    if exact is not None:
        return model, exact
    fits = [name for name in limits.models if name.endswith("*") and model.startswith(name[:-1])]
    longest = max(fits, key=len, default="")
    return longest, limits.models.get(longest)


def organisation_of(name: str, known: Declared) -> str:
    """Return the organisation a tenant belongs to, empty for none."""
    tenant = known.tenants.get(name)
    return (tenant.organisation if tenant is not None else None) or ""


def weight_of(name: str, known: Declared) -> float:
    """Return what a tenant's share weighs where tenants wait for the same engines."""
    tenant = known.tenants.get(name)
    return tenant.weight if tenant is not None else 1.0


# --- from what is declared to buckets ----------------------------------------------------------------------------


def _limits(field: str, value: Any, scope: str, subject: str, source: str, now: int) -> Iterator[Limit]:
    name = f"{scope.replace(' ', '-')}:{subject}"
    if field in ("requests", "tokens"):
        counts = Counts.REQUESTS if field == "requests" else Counts.TOKENS
        for rate in value:
            amount, seconds = parse_rate(rate.rate)
            period, letter = _SAID[seconds]
            said = f"{field} per {period} ({'R' if field == 'requests' else 'T'}P{letter})"
            shape = rate_shape(amount, seconds, rate.burst)
            yield Limit(f"{name}:{field}/{seconds}", counts, shape, scope, subject, said, source)
    elif field == "budgets":
        yield from (_budget(budget, name, scope, subject, source, now) for budget in value)
    else:
        counts = Counts.CONCURRENT if field == "concurrent" else Counts.IN_FLIGHT
        said = "requests at once" if field == "concurrent" else "tokens in flight"
        yield Limit(f"{name}:{field}", counts, Shape(value * UNIT, slots=True), scope, subject, said, source)


def _budget(budget: Budget, name: str, scope: str, subject: str, source: str, now: int) -> Limit:
    counts, unit = (Counts.TOKENS, "tokens") if budget.tokens is not None else (Counts.MONEY, "dollars")
    amount = budget.tokens if budget.tokens is not None else int((budget.usd or Decimal(0)) * 1_000_000)
    if isinstance(budget.per, float):
        seconds = int(budget.per)
        shape = rate_shape(amount, seconds)
        said = f"{unit} per {timedelta(seconds=seconds)}"
        bucket = f"{name}:{unit}-budget/{seconds}"
    else:
        starts, ends = calendar(budget.per, ZoneInfo(budget.timezone), now)
        shape = Shape(amount * UNIT, starts=starts, ends=ends)
        said = f"{unit} per {budget.per}"
        bucket = f"{name}:{unit}-budget/{budget.per}"
    return Limit(bucket, counts, shape, scope, subject, said, source, budget=True, cut=budget.cut)


def calendar(period: str, zone: ZoneInfo, now: int) -> tuple[int, int]:
    """Return when the day, week or month of ``now`` begins and when the next does, in microseconds since 1970."""
    today = datetime.fromtimestamp(now / SECOND, zone).replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        begin, following = today, today + timedelta(days=1)
    elif period == "week":
        begin = today - timedelta(days=today.weekday())
        following = begin + timedelta(days=7)
    else:
        begin = today.replace(day=1)
        following = (begin + timedelta(days=32)).replace(day=1)
    # A day that begins twice or not at all, at a change of the clock, begins where its zone says.
    return int(begin.timestamp()) * SECOND, int(following.timestamp()) * SECOND


def weights_of(limits: Limits, model: str) -> Rates:
    """Return what a model's tokens count for."""
    _, found = model_limits(limits, model)
    return PLAIN if found is None else _rates(found.weights, UNIT)


def prices_of(limits: Limits, model: str) -> Rates:
    """Return what a model's tokens cost, in nano-dollars."""
    _, found = model_limits(limits, model)
    return FREE if found is None else _rates(found.price, 1000)


def _rates(kinds: Prices | Weights, scale: int) -> Rates:
    def units(value: Decimal) -> int:
        return int(value * scale)

    cached = kinds.input if kinds.cached is None else kinds.cached
    reasoning = kinds.output if kinds.reasoning is None else kinds.reasoning
    rates = Rates(units(kinds.input), units(cached), units(kinds.output), units(reasoning))
    return next((known for known in (FREE, PLAIN) if known == rates), rates)
