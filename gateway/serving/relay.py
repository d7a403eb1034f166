"""One request between its client and an engine: a state machine whose every input is a method and whose ports are
given to it. It does no I/O, reads no clock but the one handed in, and never waits.

Rule 1: until the first event has reached the client, another engine may still be asked.
Rule 2: a stream that fails after that goes on at another engine where nobody can tell (``resume``); elsewhere it ends
with an error event, never silently.
Rule 3: whoever leaves first, the other side is told at once, and the ticket is settled exactly once.

    WAITING ──first event──▶ STREAMING ──end mark──▶ DONE
     ▲ │  └──heartbeat──▶ WAITING (status sent)         ▲
     │ ├──whole answer───────────────────────────────────┤
     │ └──failure──▶ another attempt, or an error ───────┤
     └──goes on elsewhere── STREAMING ──failure──────────┘

While no engine has room it is WAITING too, in the queue, and keeps the same deadlines; ``on_turn`` begins the attempt.
A stream on its way to another engine is WAITING once more: what it has said is kept (``_kept``), and its client gets
heartbeats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from engines.protocol import Capability, Dispatch, EngineError, Fault, Fields
from gateway.errors import SHUTTING_DOWN, Kind, Refusal, internal
from gateway.headers import EXPOSE, JSON, model_line
from gateway.metrics import Metrics
from gateway.policy.hedge import Hedging
from gateway.policy.queue import Rejected, Waiting, Why
from gateway.policy.resume import Finish, Reason, Resume, ResumeRules
from gateway.policy.retry import Cause, Next, decide
from gateway.policy.routing import Job
from gateway.policy.split import Arm
from gateway.serving.admission import USUAL, Admission, Terms, slow_down
from gateway.serving.answer import AnswerError, read_answer
from gateway.serving.deadlines import NEVER, Deadlines
from gateway.serving.debug import route_line
from gateway.serving.dialect import Route
from gateway.serving.hedge import Rival
from gateway.serving.jobs import NOTHING_TOLD, job_of, needs_of
from gateway.serving.meter import Meter, Usage
from gateway.serving.pool import Endpoint, Group, Pool
from gateway.serving.redact import redact
from gateway.serving.resume import Kept, keep
from gateway.serving.ticket import OK, Attempt, Outcome, Ticket
from gateway.serving.upstream import Connection, Loss

HEARTBEAT = b": keep-alive\n\n"
MAX_ERROR_BODY = 1 << 20
"""Bytes of an engine's error answer that are read."""

WAITING, STREAMING, DONE = range(3)
OUTRUN = "outrun"
"""How an attempt ended whose answer another one was faster with."""

_PAYLOAD = b"%b%b\r\ncontent-length: %d\r\n\r\n%b"

_COMMON = b"x-request-id: %b\r\nopenai-processing-ms: %d\r\n" + EXPOSE + b"%b"
_STREAM_HEAD = (
    b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n" + _COMMON
)
_WHOLE_HEAD = JSON + _COMMON


class Client(Protocol):
    """Who asked, through whichever face. ``headers`` are whole lines."""

    def respond(self, status: int, headers: bytes, body: bytes) -> None:
        """Send a whole answer."""
        ...

    def start_stream(self, headers: bytes, data: bytes) -> None:
        """Send status 200 and the first bytes of a stream."""
        ...

    def send(self, data: bytes) -> None:
        """Send more of a stream."""
        ...

    def end_stream(self, data: bytes, *, close: bool) -> None:
        """Send the last bytes of a stream; ``close`` says that the connection must not be used again."""
        ...

    def abort(self) -> None:
        """Cut the connection: the client takes nothing any more."""
        ...


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """Seconds, bytes and counts a relay keeps to; the names are those of the configuration."""

    connect: float = 5.0
    first_byte: float = 600.0
    idle: float = 120.0
    total: float = 3600.0
    write: float = 60.0
    heartbeat_after: float = 15.0
    retries: int = 2
    response: int = 64 * 1024 * 1024
    event: int = 1024 * 1024
    resume: ResumeRules = field(default_factory=ResumeRules)


class Order(msgspec.Struct, frozen=True, gc=False):
    """What a client asked for, checked and resolved.

    ``fields`` are the body's top-level fields; ``hide_usage`` tells that usage is asked for the gateway's sake only.
    """

    route: Route
    model: str
    fields: Fields
    stream: bool
    ask_usage: bool
    hide_usage: bool
    cache_salt: str | None = None
    terms: Terms = USUAL
    """On what terms it waits, where it must."""
    mirror: bool = False
    """Whether it is a copy that nobody waits for: it does not wait either."""
    lineup: tuple[Arm, ...] = ()
    """The models that may serve it, the first one first; none: the one it names, and no other."""


class Relay:
    """Carries one order to an engine and its answer back."""

    __slots__ = (
        "_admission",
        "_answer",
        "_answer_bytes",
        "_charged",
        "_client",
        "_clock",
        "_committed",
        "_connected",
        "_connection",
        "_deadlines",
        "_device",
        "_endpoint",
        "_failure",
        "_hedge_at",
        "_job",
        "_kept",
        "_last",
        "_limits",
        "_meter",
        "_metrics",
        "_model",
        "_on_done",
        "_order",
        "_paused",
        "_paused_at",
        "_pool",
        "_prefill",
        "_prompt",
        "_replayed",
        "_rest",
        "_rival",
        "_sse",
        "_state",
        "_status",
        "_ticket",
        "_tokens",
        "_total_at",
        "_tried",
        "_turn",
        "_wrote",
        "deadline",
    )

    def __init__(
        self,
        order: Order,
        ticket: Ticket,
        client: Client,
        admission: Admission,
        deadlines: Deadlines,
        limits: RelayLimits,
        metrics: Metrics,
        on_done: Callable[[Relay], None],
    ) -> None:
        self._order = order
        self._ticket = ticket
        self._client = client
        self._admission = admission
        self._pool: Pool = admission.pool
        self._deadlines = deadlines
        self._clock = deadlines.clock
        self._limits = limits
        self._metrics = metrics
        self._on_done = on_done
        lineup = order.lineup
        if lineup:
            self._model, self._device = lineup[0].model, lineup[0].device
        else:
            self._model, self._device = order.model, ""
        self._rest = lineup[1:] if lineup else lineup
        """The models to fall back on that are left."""
        self._state = WAITING
        self._committed = False
        self._endpoint: Endpoint | None = None
        # What it was counted as at its endpoint: tokens, those of its prompt while there is no first token, and what
        # stood before them.
        self._tokens = self._prompt = self._prefill = 0
        self._turn: Waiting | None = None
        """Its latest place in the queue."""
        self._charged: Waiting | None = None
        """The place whose turn its tenant was charged for."""
        self._failure: Refusal | None = None
        self._job: Job | None = None
        self._kept: Kept | Reason | None = None
        """What is kept of a stream that has begun, or why nothing is."""
        self._connection: Connection | None = None
        self._rival: Rival | None = None
        """The second attempt, while neither it nor the first has begun an answer."""
        self._hedge_at = NEVER
        """When a second attempt begins."""
        self._meter: Meter | None = None
        self._tried: list[Endpoint] = []
        self._replayed = False
        self._status = 0
        self._sse = False
        self._answer: list[bytes] = []
        self._answer_bytes = 0
        self._connected = False
        self._paused = False
        self._paused_at = 0.0
        self._last = 0.0
        self._wrote = 0.0
        self._total_at = 0.0
        self.deadline = NEVER

    @property
    def done(self) -> bool:
        """Whether the client has its answer, or is gone."""
        return self._state == DONE

    @property
    def endpoint(self) -> Endpoint | None:
        """Where it is being served."""
        return self._endpoint

    # --- attempts -------------------------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """Send the order to an engine."""
        self._wrote = now
        self._total_at = self._ticket.started + self._limits.total
        self._deadlines.watch(self)
        if not self._order.mirror:
            self._admission.asked()
            if self._admission.hedging is not None:
                self._admission.hedging.asked()
                self._hedge_at = 0.0
        self._attempt(now, None)

    def _attempt(self, now: float, failure: Refusal | None, *, turn: bool = False) -> None:
        """Try the next endpoint; ``failure`` is what the last one brought and what the client gets if none is left.
        ``turn``: it has waited for it."""
        group = self._group()
        if self._rest and not self._admission.sound(group, self._tried, now) and self._fall_back(now, sound=True):
            self._attempt(now, failure)
            return
        job = self._measured(group)
        moves = self._moves(group)
        choice = self._admission.choose(group, self._tried, job, now, turn=turn)
        if choice is not None:
            endpoint = choice.endpoint
            self._ticket.tried.append(Attempt(endpoint.name, now, endpoint.in_flight, choice, False, resumes=moves))
            self._tried.append(endpoint)
            self._ticket.endpoint = endpoint.name
            self._replayed = False
            self._take(endpoint, choice.uncached, job.prompt + job.output)
            endpoint.sent(now)
            self._send(endpoint, now, fresh=False)
        elif not self._order.mirror and self._admission.hopeful(group, self._tried):
            self._wait(group, now, failure)
        elif self._rest and self._fall_back(now):
            self._attempt(now, failure)
        else:
            self._fail(failure or self._no_engine(), now)

    def _group(self) -> Group:
        order = self._order
        group = self._pool.group(self._model, order.route.path, order.cache_salt is not None, self._device)
        if self._model in self._pool.uneven:
            hold = self._ticket.hold
            context = hold.context() if hold is not None else (0, 0)
            return self._admission.fitting(group, self._model, needs_of(order.fields), context)
        return group

    def _fall_back(self, now: float, *, sound: bool = False) -> bool:
        """Go on with the next model that an engine may serve now (``sound``: one that nothing speaks against); tell
        whether there is one."""
        before = self._model, self._device, self._rest
        while self._rest:
            self._model, self._device, self._rest = self._rest[0].model, self._rest[0].device, self._rest[1:]
            group = self._group()
            able = self._admission.sound(group, self._tried, now) if sound else None
            if able or (able is None and self._admission.hopeful(group, self._tried)):
                self._job = None
                self._ticket.served, self._ticket.via = self._model, "fallback"
                return True
        self._model, self._device, self._rest = before
        return False

    def _moves(self, group: Group) -> bool:
        """Tell whether it is a stream on its way to another engine, and then leave out whoever cannot take it."""
        kept = self._kept
        if not isinstance(kept, Kept) or kept.cause is None:
            return False
        self._tried += [endpoint for endpoint in kept.closed_to(group.endpoints) if endpoint not in self._tried]
        return True

    def _size(self) -> tuple[int, int]:
        """Return the tokens that its prompt and its answers are estimated at."""
        hold = self._ticket.hold
        return hold.expected() if hold is not None else (0, 0)

    def _measured(self, group: Group) -> Job:
        """Return what the router is told: nothing where there is neither a choice nor a limit to learn."""
        if not group.measured:
            return NOTHING_TOLD
        job = self._job
        if job is None:
            order = self._order
            job = job_of(order.fields, self._model, order.cache_salt, self._size(), chosen=group.chosen)
            self._job = job
        return job

    def _take(self, endpoint: Endpoint, prompt: int, tokens: int) -> None:
        self._endpoint = endpoint
        self._prefill = endpoint.prefilling
        self._prompt = prompt
        self._tokens = tokens
        endpoint.take(prompt, tokens)

    def _give_back(self) -> None:
        endpoint = self._endpoint
        if endpoint is not None:
            self._endpoint = None
            endpoint.give_back(self._prompt, self._tokens)
            self._admission.freed(endpoint)

    def _began(self, endpoint: Endpoint, now: float) -> None:
        """Note that its first token is there."""
        endpoint.first_token(now - self._ticket.tried[-1].began, self._prompt, self._prefill)
        self._prompt = 0
        if self._admission.hedging is not None:
            self._told(self._admission.hedging, now)

    def _told(self, hedging: Hedging, now: float) -> None:
        """Note how long the answer took to begin: a second attempt has lost."""
        self._hedge_at = NEVER
        hedging.took(self._kind(), now - self._ticket.tried[-1].began)
        if self._rival is not None:
            self._drop_rival("lost", OUTRUN, now)

    # --- in the queue ---------------------------------------------------------------------------------------------

    def _wait(self, group: Group, now: float, failure: Refusal | None) -> None:
        """Wait for an endpoint to have room; ``failure`` is what the last attempt brought."""
        # One that was tried already and has room is none that it waits for.
        left = tuple(endpoint for endpoint in group.endpoints if endpoint not in self._tried)
        waits_for = group if len(left) == len(group.endpoints) else self._pool.group_of(left, group.wake)
        self._failure = failure
        hold = self._ticket.hold
        weight = hold.weight if hold is not None else 1.0
        item = self._admission.place(self._ticket, group, self._order.terms, weight, self._size(), now, self)
        if self._turn is not None and self._turn.deadline > item.deadline:
            # What it was granted before stays, such as for engines to start.
            item.deadline = self._turn.deadline
        if failure is not None or self._charged is not None:
            # What it costs its tenant was charged with its first turn.
            item.cost = 0.0
        if self._moves(group):
            # It has as long as a request that has just come.
            item.deadline += now - self._ticket.started
        item.deadline = min(item.deadline, self._total_at)
        # Before it enters: whoever makes room for it may set off that it has to make room itself.
        before, self._turn = self._turn, item
        rejected = self._admission.enter(waits_for, item, now)
        if rejected is not None:
            self._turn = before
            if self._rest and self._fall_back(now):
                self._attempt(now, failure)
            else:
                self._fail(failure or slow_down(rejected, self._order.model, 0.0), now)
            return
        self._rearm()

    @property
    def _queued(self) -> bool:
        return self._turn is not None and not self._turn.gone

    def on_turn(self, now: float) -> None:
        """Take that an endpoint has room for it."""
        turn = self._turn
        assert turn is not None
        self._waited(now)
        if turn.cost:
            self._charged = turn
        try:
            self._attempt(now, self._failure, turn=True)
        except Exception:
            # Nobody else would: it is called by whoever made room.
            self.give_up(internal(self._ticket.request_id))
            raise

    def on_displaced(self, rejected: Rejected, now: float) -> None:
        """Take that it has to make room for another."""
        if self._rest and self._fall_back(now):
            assert self._turn is not None
            self._ticket.waited += now - self._turn.arrived
            self._attempt(now, self._failure)
        else:
            self._refuse_turn(rejected, now)

    def on_regroup(self, now: float) -> None:
        """Take that other endpoints serve its model: it is in no line any more."""
        self._waited(now)
        group = self._group()
        self._moves(group)
        if self._admission.hopeful(group, self._tried):
            self._wait(group, now, self._failure)
        elif self._rest and self._fall_back(now):
            self._attempt(now, self._failure)
        else:
            self._fail(self._failure or self._no_engine(), now)

    def _refuse_turn(self, rejected: Rejected, now: float) -> None:
        waited = self._waited(now)
        if self._failure is None and self._admission.asleep(self._group()):
            self._failure = self._no_engine()
        self._fail(self._failure or slow_down(rejected, self._order.model, waited), now)

    def _waited(self, now: float) -> float:
        """Return how long it has waited for its turn; that it did before its first event is said of the request."""
        assert self._turn is not None
        waited = now - self._turn.arrived
        if not self._ticket.first_at:
            self._ticket.waited += waited
        return waited

    def _send(self, endpoint: Endpoint, now: float, *, fresh: bool) -> None:
        self._ticket.attempts += 1
        payload = self._request(endpoint)
        self._meter = None
        self._sse = False
        self._answer = []
        self._answer_bytes = 0
        self._last = now
        self._paused = False
        self._connection = connection = endpoint.connections.send(payload, self, fresh=fresh)
        self._connected = connection.reused
        hedging = self._admission.hedging
        if hedging is not None and self._hedge_at < NEVER:
            self._hedge_at = now + hedging.after(self._kind())
        self._rearm()

    def _request(self, endpoint: Endpoint) -> bytes:
        """Return the request as an endpoint is sent it: that for the rest, where a beginning was delivered."""
        order, kept = self._order, self._kept
        if isinstance(kept, Kept):
            fields, begun = kept.fields(), kept.begun
        else:
            fields, begun = dict(order.fields), ""
        dispatch = Dispatch(endpoint.models[self._model], order.ask_usage, order.cache_salt, begun)
        body = endpoint.engine.prepare(order.route.path, fields, dispatch)
        head = endpoint.request_head(order.route.path)
        return _PAYLOAD % (head, self._ticket.request_id.encode("ascii"), len(body), body)

    # --- a second attempt -----------------------------------------------------------------------------------------

    def _kind(self) -> tuple[str, bool]:
        """Return what its time to begin an answer is compared with: of answers that come whole it is all of it."""
        return self._model, self._order.stream

    def _hedge(self, now: float) -> None:
        """Ask a second engine, if one has nothing else to do: the first has been silent for longer than is usual."""
        self._hedge_at = NEVER
        hedging, order, group = self._admission.hedging, self._order, self._group()
        job = self._measured(group)
        tokens = job.prompt + job.output
        if hedging is None or not group.chosen or needs_of(order.fields) & Capability.SEVERAL_ANSWERS:
            return
        if not self._admission.idle(group, tokens, now, self._tried) or not hedging.take():
            return
        choice = self._admission.choose(group, self._tried, job, now)
        if choice is None:
            return
        endpoint = choice.endpoint
        attempt = Attempt(endpoint.name, now, endpoint.in_flight, choice, False)
        meter = Meter(order.route.dialect, endpoint.engine, order.model, hide_usage=True, max_event=self._limits.event)
        self._rival = rival = Rival(self, endpoint, attempt, meter, choice.uncached, tokens)
        self._tried.append(endpoint)
        self._ticket.attempts += 1
        endpoint.take(rival.prompt, tokens)
        endpoint.sent(now)
        rival.connection = endpoint.connections.send(self._request(endpoint), rival)
        rival.connected = rival.connection.reused

    def rival_began(self, rival: Rival) -> None:
        """Take that the second attempt has begun an answer: it serves, and the first is cut off."""
        now = self._clock()
        attempt, endpoint, hedging = self._ticket.tried[-1], self._endpoint, self._admission.hedging
        attempt.cause, attempt.ended = OUTRUN, now
        if hedging is not None:
            hedging.took(self._kind(), now - attempt.began)
        assert endpoint is not None
        if self._connection is not None:
            self._connection.abort()
            self._connection = None
        self._adopt(rival, "won", now)

    def _adopt(self, rival: Rival, result: str, now: float) -> None:
        """Go on with the second attempt in place of the first, which is over."""
        self._give_back()
        self._metrics.hedged(result)
        self._rival = None
        self._ticket.tried.append(rival.attempt)
        self._ticket.endpoint = rival.endpoint.name
        self._endpoint, self._connection, self._connected = rival.endpoint, rival.connection, rival.connected
        self._tokens, self._prompt, self._prefill = rival.tokens, rival.prompt, rival.prefill
        self._meter, self._sse, self._answer, self._answer_bytes = None, False, [], 0
        self._replayed = False
        self._last = now
        if self._paused and self._connection is not None:
            self._connection.pause()
        rival.take_over()
        self._rearm()

    def rival_failed(self, rival: Rival, loss: Loss | None) -> None:
        """Take that the second attempt came to nothing: the first goes on alone."""
        now = self._clock()
        if loss is Loss.CONNECT:
            rival.endpoint.down("no connection")
            cause = Cause.CONNECT
        elif loss is None and rival.status != 200:
            error = rival.endpoint.engine.read_error(rival.status, rival.held)
            cause, _ = translate(error, self._order.model, self._order.route.path)
        else:
            cause = Cause.STALE if loss is Loss.STALE else Cause.BROKEN
        self._judge(rival.endpoint, cause, now)
        self._drop_rival("failed", cause.value, now)

    def _drop_rival(self, result: str, cause: str, now: float) -> None:
        """Cut the second attempt off, and take back what it holds."""
        rival, self._rival = self._rival, None
        assert rival is not None
        if rival.connection is not None:
            rival.connection.abort()
        self._metrics.hedged(result)
        rival.attempt.cause, rival.attempt.ended = cause, now
        # Before the one that goes on.
        self._ticket.tried.insert(-1, rival.attempt)
        rival.endpoint.give_back(rival.prompt, rival.tokens)
        self._admission.freed(rival.endpoint)

    def _no_engine(self) -> Refusal:
        serving = self._pool.serving(self._model)
        path = self._order.route.path
        able = self._pool.able(self._model, path, self._order.cache_salt is not None)
        if serving and not able:
            message = f"No engine that serves {self._order.model!r} offers {path}."
            return Refusal(Kind.UNSUPPORTED, message, "model")
        message = f"No healthy engine serves {self._order.model!r} at the moment. Try again shortly."
        return Refusal(Kind.NO_ENGINE, message, retry_after=1.0)

    # --- what the engine does -------------------------------------------------------------------------------------

    def on_connected(self) -> None:
        """Note how long a new connection took."""
        now = self._clock()
        self._metrics.overhead["connect"].observe(now - self._last)
        self._connected = True
        self._ticket.tried[-1].connected = now
        self._last = now
        self._rearm()

    def on_head(self, status: int, content_type: bytes) -> None:
        """Note how the answer is to be read."""
        self._status = status
        self._sse = status == 200 and content_type.startswith(b"text/event-stream")
        if self._sse:
            order, endpoint = self._order, self._endpoint
            assert endpoint is not None
            self._meter = Meter(
                order.route.dialect,
                endpoint.engine,
                order.model,
                hide_usage=order.hide_usage,
                max_event=self._limits.event,
            )

    def on_data(self, data: bytes) -> None:
        """Take one read's worth of the answer."""
        meter = self._meter
        if meter is None:
            self._collect(data)
            return
        before, last = meter.events, self._last
        out = meter.feed(data)
        kept = self._kept
        if out and isinstance(kept, Kept):
            out = kept.take(out)
            if not out:
                self._last = self._clock()
        if out:
            now = self._last = self._clock()
            # The end mark is no event of its own: it must not count as a token.
            if meter.events > before:
                self._ticket.mark(now, meter.events - before)
            if meter.ended:
                self._end(out, now)
                return
            if self._state == STREAMING:
                self._wrote = now
                endpoint = self._endpoint
                if endpoint is not None and endpoint.watched:
                    endpoint.window.gap((now - last) / max(1, meter.events - before))
                self._client.send(out)
            else:
                self._begin(out, now)
        elif meter.partial:
            self._last = self._clock()
        if meter.failure is not None:
            self._engine_error(meter.failure)
        elif meter.overflow:
            message = f"The engine sent an event of more than {self._limits.event} bytes."
            self._broken(Refusal(Kind.ENGINE_FAILED, message))
        elif meter.ended:
            self._end(b"", self._clock())

    def _begin(self, out: bytes, now: float) -> None:
        """Send the first events: from here on another engine is asked only to go on with them, and no other model."""
        self._rest = ()
        self._hedge_at = NEVER
        self._wrote = now
        self._state = STREAMING
        endpoint = self._endpoint
        assert endpoint is not None
        endpoint.went_well(now)
        self._began(endpoint, now)
        self._failure = None
        kept = self._kept
        if kept is None:
            self._keep(out)
        else:
            self._went_on()
        if self._committed:
            self._client.send(out)
        else:
            self._committed = True
            self._client.start_stream(self._headers(now), out)
        # Sooner than before: an answer that began may pause for less time than one that did not.
        self._rearm()

    def _went_on(self) -> None:
        """Note that a stream which broke off has reached its client again."""
        kept = self._kept
        if isinstance(kept, Kept) and kept.cause is not None:
            self._metrics.stream_resumed(kept.cause.value, "continued")
            kept.cause = None
            self._ticket.resumed += 1

    def _keep(self, out: bytes) -> None:
        """Keep what has begun, where it could go on elsewhere; else the body need not be kept either."""
        order = self._order
        kept: Kept | Reason = Reason.OFF
        if not order.mirror:
            kept = keep(order.route, order.fields, self._ticket.bytes_in, self._limits.resume, self._admission.kept)
        self._kept = kept
        if isinstance(kept, Kept):
            kept.take(out)
        else:
            order.fields.clear()

    def _collect(self, data: bytes) -> None:
        self._last = self._clock()
        self._answer.append(data)
        if len(self._answer) == 1:
            if self._admission.hedging is not None and self._status == 200:
                self._told(self._admission.hedging, self._last)
            self._rearm()
        self._answer_bytes += len(data)
        bound = self._limits.response if self._status == 200 else MAX_ERROR_BODY
        if self._answer_bytes > bound:
            self._broken(Refusal(Kind.ENGINE_FAILED, f"The engine's answer is longer than {bound} bytes."))

    def on_complete(self) -> None:
        """Take the end of the engine's answer."""
        self._connection = None
        if self._meter is not None:
            self._broken(Refusal(Kind.ENGINE_FAILED, "The engine ended its stream without the end mark."))
            return
        body = b"".join(self._answer)
        endpoint = self._endpoint
        assert endpoint is not None
        if self._status != 200:
            self._engine_error(endpoint.engine.read_error(self._status, body))
            return
        answer = read_answer(body, endpoint.engine, self._order.model)
        if isinstance(answer, EngineError):
            self._engine_error(answer)
        elif isinstance(answer, AnswerError):
            self._broken(Refusal(Kind.ENGINE_FAILED, answer.message))
        elif self._committed:
            # A heartbeat has begun a stream: a whole answer can no longer be told.
            self._broken(Refusal(Kind.ENGINE_FAILED, "The engine did not stream its answer."))
        else:
            self._whole(answer.body, answer.usage)

    def _whole(self, body: bytes, usage: Usage | None) -> None:
        now = self._clock()
        ticket = self._ticket
        ticket.usage = usage
        ticket.mark(now, 1)
        if usage is not None and self._endpoint is not None:
            self._endpoint.whole(now - ticket.tried[-1].began, usage.completion or 0)
        headers = self._headers(now, stream=False)
        self._finish(OK, 200, now)
        self._client.respond(200, headers, body)

    def on_lost(self, loss: Loss, detail: str) -> None:
        """Take that the connection ended before the answer did."""
        self._connection = None
        endpoint = self._endpoint
        assert endpoint is not None
        if loss is Loss.CONNECT:
            endpoint.down(detail)
            refusal = Refusal(Kind.NO_ENGINE, "The engine cannot be reached. Try again shortly.", retry_after=1.0)
            self._retry(Cause.CONNECT, refusal)
        elif loss is Loss.STALE:
            self._retry(Cause.STALE, Refusal(Kind.ENGINE_FAILED, "The engine closed the connection."))
        elif loss is Loss.GARBAGE:
            self._broken(Refusal(Kind.ENGINE_FAILED, "The engine's answer is not valid HTTP."))
        else:
            self._broken(Refusal(Kind.ENGINE_FAILED, "The engine closed the connection before its answer was whole."))

    # --- failures -------------------------------------------------------------------------------------------------

    def _engine_error(self, error: EngineError) -> None:
        cause, refusal = translate(error, self._order.model, self._order.route.path)
        self._retry(cause, refusal)

    def _broken(self, refusal: Refusal) -> None:
        self._ticket.accepted = True
        self._retry(Cause.BROKEN, refusal)

    def _retry(self, cause: Cause, refusal: Refusal) -> None:
        """Decide what follows a failed attempt, and do it."""
        now = self._clock()
        endpoint = self._endpoint
        assert endpoint is not None
        attempt = self._ticket.tried[-1]
        attempt.cause, attempt.ended = cause.value, now
        attempt.events = self._meter.events if self._meter is not None else 0
        if self._connection is not None:
            self._connection.abort()
            self._connection = None
        self._judge(endpoint, cause, now)
        if self._rival is not None and cause not in (Cause.REQUEST, Cause.SLOW):
            # Another attempt is under way already.
            self._adopt(self._rival, "won", now)
            return
        then = Next.GIVE_UP
        began = self._kept is not None
        if self._state == WAITING:
            retries, others = self._limits.retries, bool(self._rest)
            then = decide(cause, len(self._tried), retries, replayed=self._replayed, others=others)
            if then in _AGAIN and not began and not (self._another_left(cause) and self._admission.may_retry(now)):
                then = Next.GIVE_UP
            if cause is Cause.CONNECT and not began and self._group().wake is not None:
                # Nothing speaks against it but that it is not there yet.
                self._tried.remove(endpoint)
        if then is Next.SAME:
            self._replayed = True
            before = self._ticket.tried[-1]
            again = Attempt(endpoint.name, now, before.load, before.choice, True, resumes=before.resumes)
            self._ticket.tried.append(again)
            self._send(endpoint, now, fresh=True)
            return
        self._give_back()
        if began:
            self._go_on(endpoint, cause, refusal, now)
        elif then is Next.ELSEWHERE or (then is Next.FALL_BACK and self._fall_back(now)):
            self._attempt(now, refusal)
        else:
            self._fail(refusal, now)

    def _another_left(self, cause: Cause) -> bool:
        """Whether another engine may serve it, or one that will be started. Asked before the budget of retries is: a
        model of one broken engine must not use up the retries of all."""
        if self._rest:
            return True
        group = self._group()
        if cause is Cause.CONNECT and group.wake is not None:
            return True
        return self._admission.hopeful(group, self._tried)

    def _go_on(self, endpoint: Endpoint, cause: Cause, refusal: Refusal, now: float) -> None:
        """Send a stream that broke off to another engine, end it where all was said but the end, or tell the client."""
        kept = self._kept
        assert kept is not None
        then: Resume | Finish | Reason = kept if isinstance(kept, Reason) else self._decide(kept, endpoint, cause, now)
        # Why the stream broke off: what its rest met with elsewhere says little to the client.
        self._failure = self._failure or refusal
        if isinstance(then, Resume):
            self._state = WAITING
            self._replayed = False
            if self._paused:
                # The client has not taken all of the beginning yet: `resume` sends the rest on its way.
                self._rearm()
            else:
                self._attempt(now, self._failure)
        elif isinstance(then, Finish):
            assert isinstance(kept, Kept)
            self._metrics.stream_resumed(cause.value, "finished")
            self._end(kept.ending(then, usage=not self._order.hide_usage), now)
        else:
            self._metrics.stream_not_resumed(then.value)
            self._fail(self._failure, now)

    def _decide(self, kept: Kept, endpoint: Endpoint, cause: Cause, now: float) -> Resume | Finish | Reason:
        if kept.cause is not None:
            self._metrics.stream_resumed(kept.cause.value, "failed")
            kept.cause = None
        meter, self._meter = self._meter, None
        hold = self._ticket.hold
        count = hold.counted if hold is not None else int
        then = kept.broke(cause, meter.usage if meter is not None else None, endpoint.engine.capabilities, count)
        if isinstance(then, Resume):
            if not self._admission.may_move(now, self._limits.resume):
                return Reason.BUDGET
            kept.cause = cause
        return then

    def _judge(self, endpoint: Endpoint, cause: Cause, now: float) -> None:
        """Account a failed attempt to its endpoint. Whether it can be reached at all is for ``Endpoint.down``."""
        if cause not in (Cause.REQUEST, Cause.STALE):
            self._metrics.upstream_failed(endpoint.name, cause.value)
        if cause in _ENGINES_FAULT:
            if endpoint.went_wrong(now):
                self._metrics.endpoint_ejected(endpoint.name)
        elif cause is not Cause.STALE and cause is not Cause.CONNECT:
            endpoint.went_well(now)

    def _fail(self, refusal: Refusal, now: float) -> None:
        """Tell the client, in whatever way is left."""
        outcome = OUTCOMES.get(refusal.kind, Outcome.REFUSED)
        dialect = self._order.route.dialect
        status = dialect.status(refusal)
        ticket = self._ticket
        ticket.error = refusal.logged or refusal.message
        headers = self._headers(now, stream=False)
        committed, events = self._committed, ticket.events
        self._finish(outcome, 200 if committed else status, now)
        if committed:
            self._client.end_stream(dialect.error_event(refusal, ticket.request_id, events), close=True)
        else:
            body = dialect.error_body(refusal, ticket.request_id)
            self._client.respond(status, headers + refusal.header_lines(), body)

    # --- ends -----------------------------------------------------------------------------------------------------

    def _end(self, out: bytes, now: float) -> None:
        """End a stream that said its end mark."""
        if self._state == WAITING and self._endpoint is not None:
            self._began(self._endpoint, now)
        self._went_on()
        headers = None if self._committed else self._headers(now)
        self._committed = True
        self._finish(OK, 200, now)
        if headers is not None:
            self._client.start_stream(headers, out)
            out = b""
        self._client.end_stream(out, close=False)

    def _finish(self, outcome: Outcome, status: int, now: float) -> None:
        """Give everything back. After this the relay hears and says nothing more."""
        self._state = DONE
        self.deadline = NEVER
        if self._rival is not None:
            self._drop_rival("lost", OUTRUN, now)
        self._deadlines.forget(self)
        if self._turn is not None:
            self._admission.leave(self._turn)
        connection, self._connection = self._connection, None
        if connection is not None:
            # It was sent and nothing speaks against its being worked on.
            self._ticket.accepted |= self._connected
            if outcome is OK:
                connection.release()
            else:
                connection.abort()
        if outcome is OK and self._endpoint is not None:
            self._endpoint.went_well(now)
        self._give_back()
        usage = self._meter.usage if self._meter is not None else None
        if self._kept is not None:
            usage = self._unkeep(self._kept, usage, outcome)
        if usage is not None:
            self._ticket.usage = usage
        self._ticket.settle(outcome, status, now)
        if self._charged is not None:
            self._settle_turn(self._charged)
        self._on_done(self)

    def _unkeep(self, kept: Kept | Reason, usage: Usage | None, outcome: Outcome) -> Usage | None:
        """Let go of what was kept; return what the whole stream used, given what its last engine told."""
        if isinstance(kept, Reason):
            self._metrics.stream_kept(kept.value)
            return usage
        if kept.cause is not None:
            self._metrics.stream_resumed(kept.cause.value, outcome.value)
        self._metrics.stream_kept(kept.why.value if kept.why is not None else "yes")
        if kept.moves:
            self._ticket.counted = kept.counted
            usage = kept.total(usage) if usage is not None else kept.so_far()
        kept.drop()
        return usage

    def _settle_turn(self, turn: Waiting) -> None:
        """Correct what its tenant was charged when it had its turn."""
        usage = self._ticket.usage
        if usage is not None and usage.prompt is not None:
            self._admission.settle(turn, usage.prompt - (usage.cached or 0), usage.completion or 0)

    def client_gone(self) -> None:
        """Take that the client left: the engine's connection is closed at once, which stops its work."""
        if self._state != DONE:
            self._finish(Outcome.CLIENT_GONE, 499, self._clock())

    def shut_down(self) -> None:
        """End now: the drain time is over."""
        self.give_up(SHUTTING_DOWN)

    def give_up(self, refusal: Refusal) -> None:
        """End with an error, whatever the engine may still say."""
        if self._state == DONE:
            return
        self._fail(refusal, self._clock())

    # --- pace -----------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """The client takes bytes slower than they come: stop reading from the engine."""
        if self._state != DONE and self._connection is not None:
            self._paused = True
            self._paused_at = self._clock()
            self._connection.pause()
            self._rearm()

    def resume(self) -> None:
        """The client has caught up."""
        if self._state == DONE or not self._paused:
            return
        self._paused = False
        now = self._last = self._clock()
        if self._connection is not None:
            self._connection.resume()
            self._rearm()
        else:
            # The stream broke off meanwhile.
            self._attempt(now, self._failure)

    def on_deadline(self, now: float) -> None:
        """Act on the first time-out that is due, or wait for the next."""
        limits = self._limits
        if now >= self._hedge_at and self._state == WAITING and not self._queued and not self._paused:
            self._hedge(now)
        if self._queued:
            self._still_queued(now)
        elif now >= self._total_at:
            message = f"The request took longer than {limits.total:g} s."
            self.give_up(Refusal(Kind.ENGINE_SLOW, message))
        elif self._paused:
            if now - self._paused_at >= limits.write:
                self._client.abort()
                self.client_gone()
        elif not self._connected:
            if now - self._last >= limits.connect:
                self._connect_timed_out()
        elif now - self._last >= self._patience():
            self._timed_out()
        elif self._heartbeat_due(now):
            self._heartbeat(now)
        if self._state != DONE:
            self._rearm()

    def _still_queued(self, now: float) -> None:
        turn = self._turn
        assert turn is not None
        if now >= turn.deadline:
            self._refuse_turn(self._admission.give_up(turn, now, Why.EXPIRED), now)
        elif self._heartbeat_due(now):
            self._heartbeat(now)

    def _patience(self) -> float:
        """Seconds the engine may be silent now."""
        return self._limits.idle if self._state == STREAMING or self._answer else self._limits.first_byte

    def _connect_timed_out(self) -> None:
        endpoint = self._endpoint
        assert endpoint is not None
        endpoint.down(f"no connection within {self._limits.connect:g} s")
        refusal = Refusal(Kind.NO_ENGINE, "The engine cannot be reached. Try again shortly.", retry_after=1.0)
        self._retry(Cause.CONNECT, refusal)

    def _timed_out(self) -> None:
        what = "went silent" if self._state == STREAMING or self._answer else "did not begin its answer"
        message = f"The engine {what} for {self._patience():g} s."
        self._ticket.accepted = True
        self._retry(Cause.SLOW, Refusal(Kind.ENGINE_SLOW, message))

    def _heartbeat_due(self, now: float) -> bool:
        after = self._limits.heartbeat_after
        return bool(after) and self._order.stream and now - self._wrote >= after

    def _heartbeat(self, now: float) -> None:
        self._wrote = now
        if self._committed:
            self._client.send(HEARTBEAT)
        else:
            # From here on a failure can only be told as an event, but another engine may still be asked.
            self._committed = True
            self._client.start_stream(self._headers(now), HEARTBEAT)

    def _rearm(self) -> None:
        """Set when to look again: the earliest of what could be due if nothing else happens."""
        if self._state == DONE:
            return
        turn = self._turn
        if turn is not None and not turn.gone:
            due = turn.deadline
            if self._order.stream and self._limits.heartbeat_after:
                due = min(due, self._wrote + self._limits.heartbeat_after)
        elif self._paused:
            due = self._paused_at + self._limits.write
        elif not self._connected:
            due = self._last + self._limits.connect
        else:
            due = self._last + self._patience()
            if self._order.stream and self._limits.heartbeat_after:
                due = min(due, self._wrote + self._limits.heartbeat_after)
        if self._hedge_at < due and self._state == WAITING and not self._queued and not self._paused:
            due = self._hedge_at
        # A comparison: to ask min() is to call it, and this is done for every answer that begins.
        self.deadline = due if due < self._total_at else self._total_at

    def _headers(self, now: float, *, stream: bool = True) -> bytes:
        ticket = self._ticket
        more = ticket.hold.headers if ticket.hold is not None else b""
        if self._order.lineup:
            more += model_line(self._model)
        if ticket.debug:
            more += route_line(ticket, self._model)
        return (_STREAM_HEAD if stream else _WHOLE_HEAD) % (
            ticket.request_id.encode("ascii"),
            int((now - ticket.started) * 1000),
            more,
        )


_AGAIN = (Next.ELSEWHERE, Next.FALL_BACK)
"""What comes out of the budget of retries."""

_ENGINES_FAULT = frozenset({Cause.BROKEN, Cause.SLOW, Cause.CREDENTIALS, Cause.OVERLOADED, Cause.UNKNOWN_MODEL})
"""What speaks against giving an endpoint more work. Refusing a bad request does not; refusing all that comes does, or
whoever refuses fastest would always have the least to do. One that is only full is forgiven with its next answer."""

OUTCOMES = {
    Kind.ENGINE_FAILED: Outcome.ENGINE_FAILED,
    Kind.ENGINE_SLOW: Outcome.ENGINE_SLOW,
    Kind.NO_ENGINE: Outcome.NO_ENGINE,
    Kind.BUSY: Outcome.BUSY,
    Kind.SLOW_DOWN: Outcome.BUSY,
    Kind.LIMITS_AWAY: Outcome.LIMITS_AWAY,
    Kind.SHUTDOWN: Outcome.SHUTDOWN,
    Kind.INTERNAL: Outcome.INTERNAL,
}


def translate(error: EngineError, model: str, path: str) -> tuple[Cause, Refusal]:
    """Turn an engine's error into what it means for the attempt and what the client is told."""
    message = redact(error.message)
    match error.fault:
        case Fault.REQUEST:
            # Engines quote what they refuse, and that may be the prompt.
            logged = "refused by the engine" + (f" because of {error.param!r}" if error.param else "")
            return Cause.REQUEST, Refusal(Kind.INVALID, message, error.param, error.code, logged=logged)
        case Fault.UNSUPPORTED:
            return Cause.REQUEST, Refusal(Kind.UNSUPPORTED, f"The engine that serves {model!r} does not offer {path}.")
        case Fault.OVERLOADED:
            return Cause.OVERLOADED, Refusal(Kind.BUSY, message, retry_after=1.0)
        case Fault.UNKNOWN_MODEL:
            lost = f"The engine no longer serves {model!r}. Try again shortly."
            return Cause.UNKNOWN_MODEL, Refusal(Kind.NO_ENGINE, lost, retry_after=1.0)
        case Fault.CREDENTIALS:
            told = "The engine refused the gateway's own key; whoever runs the gateway must set the engine's api_key."
            return Cause.CREDENTIALS, Refusal(Kind.ENGINE_FAILED, told)
        case Fault.FAILED:
            return Cause.BROKEN, Refusal(Kind.ENGINE_FAILED, message)
