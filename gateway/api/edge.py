"""The edge: who is let in, with what body, and the way from there to a relay.

Both faces call the same four things: ``open`` when the headers are read, ``run`` when the body is, ``refuse`` when
something is wrong in between, ``client_gone`` when the client leaves. The steps in between are one generator: a step
that need not wait costs no task, one that must yields ``Pending``.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from engines.protocol import Fields
from gateway.api.auth import Authenticator, Networks, client_address, may_use, network_of
from gateway.api.context import fit_context
from gateway.api.media import MediaRules
from gateway.api.peek import Asked, read_body
from gateway.api.request import Request, Steps
from gateway.api.terms import read_patience, terms_of
from gateway.errors import SHUTTING_DOWN, Kind, Refusal, internal, no_model
from gateway.headers import EXPOSE, JSON, Header
from gateway.log import Log
from gateway.metrics import Metrics
from gateway.models import Published
from gateway.policy.queue import Rejected
from gateway.policy.split import Arm
from gateway.serving.admission import Admission, slow_down
from gateway.serving.deadlines import Deadlines
from gateway.serving.dialect import Route
from gateway.serving.jobs import needs_of, subject_of
from gateway.serving.limiter import Deciding, Facts, Hold, Limiter, Plan, context_of, read_facts, who_asks
from gateway.serving.mirror import MirrorRules, Mirrors
from gateway.serving.pending import Pending
from gateway.serving.pool import Pool
from gateway.serving.relay import OUTCOMES, Client, Order, Relay, RelayLimits
from gateway.serving.ticket import Outcome, Ticket
from gateway.state.keys import KeyRecord

MAX_CLIENT_ID = 512
"""Characters of ``x-client-request-id``, as OpenAI has it."""

RECENT = 4096
"""Requests that are kept in memory to be explained."""

_MOST_TIME = (1 << 48) - 1
_TEXTUAL = frozenset({b"", b"identity"})
_JSON = b"application/json"


@dataclass(frozen=True, slots=True)
class EdgeRules:
    """What may be configured of the edge; swapped as a whole on a reload. Sizes in bytes."""

    body: int = 10 * 1024 * 1024
    offload_above: int = 256 * 1024
    parse_budget: int = 256 * 1024 * 1024
    trusted_proxies: Networks = ()
    media: MediaRules = field(default_factory=MediaRules)
    relay: RelayLimits = field(default_factory=RelayLimits)
    models: Mapping[str, Published] = field(default_factory=dict)
    """The names that something is said of beyond the model of that name."""
    debug_for_all: bool = False
    """Whether keys that are no admin's may ask how a request was routed."""
    mirrors: MirrorRules = field(default_factory=MirrorRules)


@dataclass(frozen=True, slots=True)
class Refused:
    """A request refused on its headers alone."""

    route: Route
    ticket: Ticket
    refusal: Refusal


class Edge:
    """Lets requests in and sends them on their way."""

    def __init__(
        self,
        authenticator: Authenticator,
        admission: Admission,
        deadlines: Deadlines,
        metrics: Metrics,
        log: Log,
        executor: Executor,
        rules: EdgeRules,
        limiter: Limiter,
    ) -> None:
        self.authenticator = authenticator
        self.admission = admission
        self.pool: Pool = admission.pool
        self.deadlines = deadlines
        self.metrics = metrics
        self.log = log
        self.rules = rules
        self.limiter = limiter
        self.closing = False
        """Whether the gateway is about to stop: answers carry ``connection: close``."""
        self.active: set[Request] = set()
        self.recent: deque[Ticket] = deque(maxlen=RECENT)
        """The latest requests that ended."""
        self.account: Callable[[Ticket], None] | None = None
        """Who is told of every request that has ended: the ledger, if there is one."""
        self._executor = executor
        self.mirrors = Mirrors(admission, deadlines, metrics, self.new_ticket)
        self._held = 0
        self._auth_time = metrics.overhead["auth"]
        self._policy_time = metrics.overhead["policy"]
        self._random_bits: Callable[[int], int] = random.SystemRandom().getrandbits
        self._random = random.Random(self._random_bits(128))  # noqa: S311 - ids must not clash, not be unguessable

    # --- headers --------------------------------------------------------------------------------------------------

    def new_id(self, at: float) -> str:
        """Return a request id: its time (Unix, milliseconds), then chance. Ids in the order of time are stored at the
        end of the ledger's index; wherever chance put them, each would cost a page of its own."""
        number = (int(at * 1000) & _MOST_TIME) << 80 | self._random.getrandbits(80)
        return "req_" + number.to_bytes(16, "big").hex()

    def new_ticket(self, path: str) -> Ticket:
        """Open a request's account."""
        at = self.log.wall()
        return Ticket(self.metrics, self._settled, self.new_id(at), path, self.deadlines.clock(), at)

    def _settled(self, ticket: Ticket, outcome: Outcome, status: int, now: float) -> None:
        line = ticket.line(outcome, status, now, self.log.now())
        self.log.write(line, line.level)
        self.recent.append(ticket)
        if self.account is not None:
            self.account(ticket)

    def open(self, route: Route, pairs: Sequence[Header], peer: str) -> Request | Refused:
        """Read a request's headers (names in lower case): a request to run, or the refusal before any body is read."""
        headers = {name: value for name, value in pairs}  # noqa: C416 - dict() takes each pair for any sequence
        ticket = self.new_ticket(route.path)
        ticket.client = peer
        if self.rules.trusted_proxies:
            forwarded = [value for name, value in pairs if name == b"x-forwarded-for"]
            ticket.client = client_address(peer, forwarded, self.rules.trusted_proxies)
        retry = headers.get(b"x-stainless-retry-count")
        if retry is not None and retry.isdigit() and retry != b"0":
            ticket.sdk_retry = int(retry[:4])
            self.metrics.client_retries += 1
        who = self.authenticator.identify(headers)
        if isinstance(who, Refusal):
            return Refused(route, ticket, who)
        ticket.key = who.name
        ticket.key_id = who.public_id
        ticket.tenant = who.tenant
        refusal = _check_headers(headers, ticket)
        limit = self.rules.body if who.caps.body is None else min(self.rules.body, who.caps.body)
        raw_length = headers.get(b"content-length")
        length = int(raw_length) if raw_length is not None and raw_length.isdigit() else None
        if refusal is None and length is not None:
            refusal = self._too_large(length, limit) or self._hold(length)
        if refusal is not None:
            return Refused(route, ticket, refusal)
        request = Request(route, ticket, who, limit, length)
        request.first = retry == b"0"
        request.expects = b"expect" in headers
        if b"x-request-timeout" in headers or b"x-stainless-read-timeout" in headers:
            refusal = read_patience(headers, request)
            if refusal is not None:
                return Refused(route, ticket, refusal)
        if b"x-forebay-debug" in headers:
            refusal = self._debug(headers[b"x-forebay-debug"], request)
            if refusal is not None:
                return Refused(route, ticket, refusal)
        if length is not None and length > self.rules.offload_above:
            request.reserved = length
            self._held += length
        self.active.add(request)
        ticket.let_in_at = now = self.deadlines.clock()
        self._auth_time.observe(now - ticket.started)
        return request

    def _debug(self, asked: bytes, request: Request) -> Refusal | None:
        """Note that a request wants to know how it was routed, if it may."""
        if asked.strip().lower() != b"route":
            return Refusal(Kind.INVALID, "'x-forebay-debug' knows 'route' alone. Leave it out, or write that.")
        if not (request.who.admin or self.rules.debug_for_all):
            told = "Only admin keys may ask how a request was routed. Leave 'x-forebay-debug' out."
            return Refusal(Kind.NO_ADMIN, told)
        request.ticket.debug = True
        return None

    @staticmethod
    def _too_large(size: int, limit: int) -> Refusal | None:
        if size <= limit:
            return None
        return Refusal(Kind.TOO_LARGE, f"The body is larger than the {limit} bytes allowed. Send less at once.")

    def _hold(self, size: int, reserved: int = 0) -> Refusal | None:
        """Refuse a large body when all large bodies together would take more memory than allowed."""
        if size <= self.rules.offload_above or self._held + size - reserved <= self.rules.parse_budget:
            return None
        return Refusal(Kind.BUSY, "Too many large bodies are being read at once. Try again shortly.", retry_after=1.0)

    def grow(self, request: Request, size: int) -> Refusal | None:
        """Take note that a body has grown to ``size`` bytes: the refusal when it may not."""
        refusal = self._too_large(size, request.body_limit)
        if refusal is None and size > self.rules.offload_above and size > request.reserved:
            refusal = self._hold(size, request.reserved)
            if refusal is None:
                self._held += size - request.reserved
                request.reserved = size
        return refusal

    # --- body -----------------------------------------------------------------------------------------------------

    def run(self, request: Request, body: bytes, client: Client) -> None:
        """Send a request whose body is whole on its way."""
        request.ticket.bytes_in = len(body)
        request.interrupt = None
        request.client = client
        request.steps = self._steps(request, body, client)
        self._advance(request, None, client)

    def _steps(self, request: Request, body: bytes, client: Client) -> Steps:
        """The way of a request, as it reads in ARCHITECTURE.md."""
        began = self.deadlines.clock()
        rules, ticket, who = self.rules, request.ticket, request.who
        ticket.read_at = began
        if len(body) > rules.offload_above:
            reading = asyncio.get_running_loop().run_in_executor(
                self._executor, read_body, body, request.route, who.caps, rules.media
            )
            asked = yield Pending(reading)
        else:
            asked = read_body(body, request.route, who.caps, rules.media)
        if isinstance(asked, Refusal):
            self.refuse(request, asked, client)
            return
        refusal = self._resolve(asked, request)
        lineup = self.lineup(asked.model, asked.fields, who, ticket.client) if rules.models else ()
        model = lineup[0].model if lineup else asked.model
        if refusal is None and who.caps.context is not None:
            refusal = yield from fit_context(asked, model, request.route, who.caps, self.pool, len(body))
        if refusal is not None:
            self.refuse(request, refusal, client)
            return
        hold = self._admit(asked, request, body, lineup)
        if not isinstance(hold, Hold) and not isinstance(hold, Refusal):
            hold = yield from hold
        if isinstance(hold, Refusal):
            self.refuse(request, hold, client)
            return
        ticket.hold = hold
        order = Order(
            route=request.route,
            model=asked.model,
            fields=asked.fields,
            stream=asked.stream,
            ask_usage=asked.stream and request.route.asks_usage,
            hide_usage=not asked.wants_usage,
            cache_salt=who.trust_domain,
            terms=terms_of(request, asked),
            lineup=lineup,
        )
        if lineup:
            ticket.served, ticket.via = model, "route" if model != asked.model else ""
        ticket.serve(asked.model, asked.stream)
        relay = Relay(
            order, ticket, client, self.admission, self.deadlines, rules.relay, self.metrics, self._done(request)
        )
        request.relay = relay
        ticket.sent_at = now = self.deadlines.clock()
        self._policy_time.observe(now - began)
        relay.start(now)
        if lineup and not relay.done and not self.closing:
            self._mirror(order, ticket)

    def _mirror(self, order: Order, ticket: Ticket) -> None:
        """Send a copy of a request to another model, where its name says so and its lot."""
        mirror = self.rules.models[order.model].mirror
        if mirror is None or mirror.model == order.lineup[0].model or not order.route.charged:
            return
        if self._random.random() < mirror.share:
            rules = self.rules
            self.mirrors.send(order, ticket, mirror, rules.relay, rules.mirrors)

    def lineup(self, model: str, fields: Fields, who: KeyRecord, client: str) -> tuple[Arm, ...]:
        """Return the models that may serve a name: the one that it stands for, and others to fall back on. Empty: the
        one of that name."""
        public = self.rules.models.get(model)
        if public is None:
            return ()
        arm = public.arms[0]
        if public.split is not None:
            arm = public.pick(subject_of(fields, public.by_session, who.public_id or network_of(client)))
        others = (other for other in public.fallback if other != arm and may_use(who, other.model))
        return (arm, *others)

    def _admit(self, asked: Asked, request: Request, body: bytes, lineup: tuple[Arm, ...]) -> Hold | Refusal | Deciding:
        """Reserve what the request will need of every limit it falls under."""
        plan = self.plan(request.who, asked.model, request.ticket.client, lineup)
        request.ticket.organisation = plan.organisation
        facts = read_facts(
            request.route, asked.model, asked.fields, asked.max_tokens, len(body), asked.media, request.first
        )
        if self.admission.queue.count:
            refusal = self._look(plan, facts, request, asked, lineup)
            if refusal is not None:
                return refusal
        return self.limiter.admit(plan, facts, partial(who_asks, plan, body))

    def _look(
        self, plan: Plan, facts: Facts, request: Request, asked: Asked, lineup: tuple[Arm, ...]
    ) -> Refusal | None:
        """Refuse at once whom the queue would refuse, before anything is reserved."""
        now = self.deadlines.clock()
        size = self.limiter.estimate(plan, facts)
        terms = terms_of(request, asked)
        path, salted = request.route.path, request.who.trust_domain is not None
        first: Rejected | None = None
        for arm in lineup or (Arm(asked.model),):
            group = self.pool.group(arm.model, path, salted, arm.device)
            if arm.model in self.pool.uneven:
                context = context_of(facts, size.prompt)
                group = self.admission.fitting(group, arm.model, needs_of(facts.fields), context)
            if first is not None and not self.admission.hopeful(group, ()):
                continue
            tokens = size.prompt, size.output
            item = self.admission.place(request.ticket, group, terms, plan.weight, tokens, now, None)
            rejected = self.admission.look(group, item, now)
            if rejected is None:
                return None
            first = first or rejected
        return slow_down(first, asked.model, 0.0) if first is not None else None

    def plan(self, who: KeyRecord, model: str, client: str, lineup: Sequence[Arm] = ()) -> Plan:
        """Return what a key falls under on a model; without a key, what its client's address does. ``lineup``: the
        models that may serve a name that stands for others."""
        named = model
        if lineup:
            model = lineup[0].model
            named = self.limiter.counts_as(named, model)
        return self.limiter.plan(who, named, self.pool.pool_of(model), "" if who.public_id else network_of(client))

    def _resolve(self, asked: Asked, request: Request) -> Refusal | None:
        if self.pool.catalogue.resolve(asked.model) is None:
            return no_model(asked.model)
        if not may_use(request.who, asked.model):
            return Refusal(Kind.NO_RIGHT, f"This key may not use the model {asked.model!r}.", "model")
        return None

    def _done(self, request: Request) -> Callable[[Relay], None]:
        return lambda relay: self._release(request)

    def _release(self, request: Request) -> None:
        self.active.discard(request)
        # Relay, client and request hold each other: let go here, and nothing waits for the garbage collector.
        request.relay = None
        request.client = None
        request.interrupt = None
        self._held -= request.reserved
        request.reserved = 0

    # --- waiting --------------------------------------------------------------------------------------------------

    def _advance(self, request: Request, value: object, client: Client) -> None:
        """Drive the steps until they end or must wait."""
        steps = request.steps
        assert steps is not None
        try:
            pending = steps.send(value)
        except StopIteration:
            request.steps = None
        except Exception as error:
            request.steps = None
            self._internal(request, error, client)
        else:
            # The awaitable itself becomes the task: cancelled before its first turn it is closed and not forgotten.
            request.task = task = asyncio.ensure_future(pending.awaitable)
            task.add_done_callback(lambda done: self._resume(request, done, client))

    def _resume(self, request: Request, done: asyncio.Future[Any], client: Client) -> None:
        """Go on with what a step waited for; nothing follows where the request was left in the meantime."""
        error = RuntimeError("what a step waited for was cancelled") if done.cancelled() else done.exception()
        if request.task is not done:
            return
        request.task = None
        if isinstance(error, Exception):
            request.steps = None
            self._internal(request, error, client)
        else:
            self._advance(request, done.result(), client)

    def _internal(self, request: Request, error: Exception, client: Client) -> None:
        self.log.failed("internal_error", error, request_id=request.ticket.request_id)
        refusal = internal(request.ticket.request_id)
        if request.relay is not None:
            request.relay.give_up(refusal)
        else:
            self.refuse(request, refusal, client)

    # --- ends before a relay --------------------------------------------------------------------------------------

    def refuse(self, request: Request, refusal: Refusal, client: Client) -> None:
        """Answer a request that gets no relay."""
        self._release(request)
        client.respond(*self.refusal(request.route, request.ticket, refusal))

    def refusal(self, route: Route, ticket: Ticket, refusal: Refusal) -> tuple[int, bytes, bytes]:
        """Settle a request that gets no relay; return status, headers and body of its answer."""
        status = route.dialect.status(refusal)
        ticket.error = refusal.message
        ticket.refused_by = refusal.limit
        ticket.settle(OUTCOMES.get(refusal.kind, Outcome.REFUSED), status, self.deadlines.clock())
        known = b"x-request-id: %b\r\n" % ticket.request_id.encode("ascii")
        headers = b"".join((JSON, known, EXPOSE, refusal.header_lines()))
        return status, headers, route.dialect.error_body(refusal, ticket.request_id)

    def client_gone(self, request: Request) -> None:
        """Take that the client left, wherever its request is."""
        if request.relay is not None:
            request.relay.client_gone()
            return
        self._leave_steps(request)
        if not request.ticket.settled:
            self._release(request)
            request.ticket.settle(Outcome.CLIENT_GONE, 499, self.deadlines.clock())

    @staticmethod
    def _leave_steps(request: Request) -> None:
        """Stop a request wherever it waits."""
        if request.task is not None:
            request.task.cancel()
            request.task = None
        if request.steps is not None:
            request.steps.close()
            request.steps = None

    def shut_down(self) -> None:
        """End every request that is left with an error the client can read."""
        self.mirrors.close()
        for request in list(self.active):
            if request.relay is not None:
                request.relay.shut_down()
            elif request.interrupt is not None:
                request.interrupt(SHUTTING_DOWN)
            elif request.client is not None:
                self._leave_steps(request)
                self.refuse(request, SHUTTING_DOWN, request.client)


def _check_headers(headers: dict[bytes, bytes], ticket: Ticket) -> Refusal | None:
    encoding = headers.get(b"content-encoding")
    if encoding is not None and (encoding := encoding.strip().lower()) not in _TEXTUAL:
        told = f"Bodies with content-encoding {encoding.decode('latin-1')!r} are not read. Send it uncompressed."
        return Refusal(Kind.CONTENT_TYPE, told)
    content_type = headers.get(b"content-type", _JSON)
    if content_type != _JSON:
        content_type = content_type.split(b";", 1)[0].strip().lower()
        if content_type != _JSON and not content_type.endswith(b"+json"):
            told = f"Bodies of type {content_type.decode('latin-1')!r} are not read. Send application/json."
            return Refusal(Kind.CONTENT_TYPE, told)
    client_id = headers.get(b"x-client-request-id")
    if client_id is not None:
        if len(client_id) > MAX_CLIENT_ID or not client_id.isascii():
            told = f"'x-client-request-id' must be ASCII and have at most {MAX_CLIENT_ID} characters."
            return Refusal(Kind.INVALID, told)
        ticket.client_request_id = client_id.decode("ascii")
    return None
