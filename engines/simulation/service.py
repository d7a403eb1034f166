"""The simulated engine's paths: what each request gets.

A request is read, planned in full (``choices``), handed to the model through the driver, and answered as its tokens
come. Faults that it meets are played here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable
from typing import Any

import msgspec

from engines.simulation import answers, bodies
from engines.simulation.adapters import Adapter, read_adapter
from engines.simulation.batching import Finished, FirstToken, Refusal, Request
from engines.simulation.bodies import Dialect, Job, Limits, Refused
from engines.simulation.choices import Choice, plan
from engines.simulation.driver import Driver
from engines.simulation.faults import Fault, Faults
from engines.simulation.figures import Figures
from engines.simulation.http import Exchange
from engines.simulation.speech import Identity, piece_of, pieces, prefix_hashes, prompt_digest, token_id, vector

_log = logging.getLogger(__name__)

VERSION = "0.32.0"
VECTOR_SIZE = 64
_TEXT = "text/plain; charset=utf-8"
_METRICS = "text/plain; version=1.0.0; charset=utf-8"

BUSY = Refused(
    503,
    "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance.",
    "Service Unavailable",
)
ENDING = Refused(500, "cannot schedule new futures after shutdown", "InternalServerError")


class Options(msgspec.Struct, frozen=True):
    """How the engine was started. ``root`` is what it tells as the place of its model."""

    names: tuple[str, ...]
    root: str
    api_key: str | None = None
    prompt_details: bool = False
    request_id_headers: bool = False
    pooling: bool = False
    developer: bool = False
    faults: bool = False
    adapter_loading: bool = True


class Service:
    """All paths of one engine."""

    def __init__(self, options: Options, driver: Driver, faults: Faults) -> None:
        self.options = options
        self.driver = driver
        self.faults = faults
        self.figures = Figures(options.names[0])
        self.adapters: dict[str, Adapter] = {}
        self.under_way: dict[str, Answering] = {}
        self.ending = False
        self._count = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._routes = self._all_routes()

    @property
    def limits(self) -> Limits:
        """What a prompt may be."""
        return Limits(self.options.names[0], self.driver.model.profile.max_model_len)

    def handle(self, exchange: Exchange) -> None:
        """Answer a request, now or later."""
        if self.options.request_id_headers:
            request_id = exchange.headers.get("x-request-id") or secrets.token_hex(16)
            exchange.more_headers.append(("x-request-id", request_id))
        if not self._let_in(exchange):
            exchange.answer(401, b'{"error":"Unauthorized"}')
            return
        methods = self._routes.get(exchange.path)
        if methods is None:
            exchange.answer(404, b'{"detail":"Not Found"}')
        elif exchange.method not in methods:
            exchange.answer(405, b'{"detail":"Method Not Allowed"}', "application/json", ("allow", ", ".join(methods)))
        else:
            try:
                methods[exchange.method](exchange)
            except Refused as refused:
                self.refuse(exchange, refused)
            except Exception as error:  # what no rule foresaw is an answer too, as in any web server
                _log.exception("%s %s", exchange.method, exchange.path)
                self.refuse(exchange, Refused(500, str(error), "InternalServerError"))

    def refuse(self, exchange: Exchange, refused: Refused) -> None:
        """Answer with an error."""
        dialect = Dialect.MESSAGES if exchange.path.startswith("/v1/messages") else None
        exchange.answer(refused.status, answers.error(refused, dialect))

    def _let_in(self, exchange: Exchange) -> bool:
        key = self.options.api_key
        if key is None or not exchange.path.startswith("/v1"):
            return True
        return secrets.compare_digest(exchange.headers.get("authorization", "").encode(), f"Bearer {key}".encode())

    def _all_routes(self) -> dict[str, dict[str, Callable[[Exchange], None]]]:
        options = self.options
        routes: dict[str, dict[str, Callable[[Exchange], None]]] = {
            "/health": {"GET": self._health},
            "/ping": {"GET": self._health, "POST": self._health},
            "/version": {"GET": lambda exchange: exchange.answer(200, answers.encode({"version": VERSION}))},
            "/load": {
                "GET": lambda exchange: exchange.answer(200, answers.encode({"server_load": len(self.under_way)}))
            },
            "/metrics": {"GET": self._metrics},
            "/v1/models": {"GET": self._models},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
        }
        if options.pooling:
            routes["/v1/embeddings"] = {"POST": self._embeddings}
        else:
            routes |= {
                "/v1/chat/completions": {"POST": self._generation(bodies.read_chat)},
                "/v1/completions": {"POST": self._generation(bodies.read_completion)},
                "/v1/messages": {"POST": self._generation(bodies.read_messages)},
                "/v1/messages/count_tokens": {"POST": self._count_tokens},
                "/v1/responses": {"POST": self._generation(bodies.read_responses)},
            }
        if options.adapter_loading:
            routes["/v1/load_lora_adapter"] = {"POST": self._load_adapter}
            routes["/v1/unload_lora_adapter"] = {"POST": self._unload_adapter}
        if options.developer or options.faults:
            routes["/abort_requests"] = {"POST": self._abort_requests}
        if options.faults:
            routes["/faults"] = {"GET": self._list_faults, "POST": self._add_fault, "DELETE": self._clear_faults}
        return routes

    # --- the engine itself

    def _health(self, exchange: Exchange) -> None:
        exchange.answer(200, b"", None)

    def _metrics(self, exchange: Exchange) -> None:
        exchange.answer(200, self.figures.text(self.driver.model, time.time()).encode(), _METRICS)

    def _models(self, exchange: Exchange) -> None:
        length = self.limits.max_model_len
        data = [_model_card(name, self.options.root, None, length) for name in self.options.names]
        base = self.options.names[0]
        data += [_model_card(adapter.name, adapter.directory, base, None) for adapter in self.adapters.values()]
        exchange.answer(200, answers.encode({"object": "list", "data": data}))

    def adapter_of(self, model: str | None) -> Adapter | None:
        """Return the adapter that a request names, None for the base model. Refused."""
        if not model or model in self.options.names:
            return None
        adapter = self.adapters.get(model)
        if adapter is None:
            aliases = ", ".join(self.options.names)
            message = f"The model `{model}` does not exist. Valid aliases: {aliases}."
            raise Refused(404, message, "NotFoundError", "model")
        return adapter

    # --- generation

    def _generation(self, read: Callable[[bodies.Fields, Limits], Job]) -> Callable[[Exchange], None]:
        def handle(exchange: Exchange) -> None:
            fields = bodies.read_json(exchange.body, exchange.headers.get("content-type"))
            job = read(fields, self.limits)
            adapter = self.adapter_of(job.model)
            if self.ending:
                raise ENDING
            model = job.model or self.options.names[0]
            fault = self.faults.meet(model, job.prompts[0].keyed_on) if self.options.faults else None
            if fault is not None and fault.kind == "refuse":
                raise Refused(fault.status, fault.message, "InternalServerError")
            if fault is not None and fault.kind == "impostor":
                adapter = None if fault.adapter is None else self.adapters.get(fault.adapter)
            answering = Answering(self, exchange, job, model, adapter, fault, self._answer_id(exchange, job))
            if fault is not None and fault.kind == "delay":
                self._later(fault.seconds, answering)
            else:
                answering.begin()

        return handle

    def _later(self, seconds: float, answering: Answering) -> None:
        timer = asyncio.get_running_loop().call_later(seconds, answering.begin)
        answering.exchange.on_gone = timer.cancel

    def _answer_id(self, exchange: Exchange, job: Job) -> str:
        given = exchange.headers.get("x-request-id") or secrets.token_hex(8)
        prefix = {Dialect.COMPLETION: "cmpl", Dialect.RESPONSES: "resp"}.get(job.dialect, "chatcmpl")
        return f"{prefix}{'_' if prefix == 'resp' else '-'}{given}"

    def number(self) -> int:
        """Return a number that no other request has."""
        self._count += 1
        return self._count

    def _abort_requests(self, exchange: Exchange) -> None:
        fields = bodies.read_json(exchange.body, exchange.headers.get("content-type"))
        wanted = set(fields.get("request_ids") or ())
        found = [one for one in list(self.under_way.values()) if one.head.id in wanted]
        for answering in found:
            answering.abort()
        exchange.answer(200, answers.encode({"status": "aborted", "aborted": len(found)}))

    # --- tokens and embeddings

    def _tokenize(self, exchange: Exchange) -> None:
        fields = bodies.read_json(exchange.body, exchange.headers.get("content-type"))
        self.adapter_of(bodies.word(fields, "model"))
        if "messages" in fields:
            tokens = bodies.chat_tokens(fields, self.limits)
        else:
            tokens = pieces(str(bodies.required(fields, "prompt")))
        shown = tokens if bodies.yes(fields, "return_token_strs") else None
        answer: dict[str, Any] = {"count": len(tokens), "max_model_len": self.limits.max_model_len}
        answer |= {"tokens": [token_id(piece) for piece in tokens], "token_strs": shown}
        exchange.answer(200, answers.encode(answer))

    def _detokenize(self, exchange: Exchange) -> None:
        fields = bodies.read_json(exchange.body, exchange.headers.get("content-type"))
        numbers = bodies.required(fields, "tokens")
        if not isinstance(numbers, list) or not all(isinstance(one, int) and one >= 0 for one in numbers):
            raise bodies.invalid(bodies.Problem("int_type", "body.tokens", "Input should be a valid integer", numbers))
        exchange.answer(200, answers.encode({"prompt": "".join(piece_of(number) for number in numbers)}))

    def _count_tokens(self, exchange: Exchange) -> None:
        fields = bodies.read_json(exchange.body, exchange.headers.get("content-type"))
        self.adapter_of(bodies.word(fields, "model"))
        count = len(bodies.chat_tokens(fields, self.limits))
        told = {"input_tokens": count, "context_management": {"original_input_tokens": count}}
        exchange.answer(200, answers.encode(told))

    def _embeddings(self, exchange: Exchange) -> None:
        fields = bodies.read_json(exchange.body, exchange.headers.get("content-type"))
        model = bodies.word(fields, "model")
        self.adapter_of(model)
        given = bodies.required(fields, "input")
        texts = [str(one) for one in (given if isinstance(given, list) else [given])][: bodies.MAX_PROMPTS]
        count = sum(len(pieces(text)) for text in texts)
        data = [
            {"index": index, "object": "embedding", "embedding": vector(text, VECTOR_SIZE)}
            for index, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0, "prompt_tokens_details": None}
        answer = {"id": f"embd-{secrets.token_hex(8)}", "object": "list", "created": int(time.time())}
        exchange.answer(
            200, answers.encode({**answer, "model": model or self.limits.model, "data": data, "usage": usage})
        )

    # --- adapters

    def _load_adapter(self, exchange: Exchange) -> None:
        fields = bodies.read_json(exchange.body, exchange.headers.get("content-type"))
        name, directory = bodies.required(fields, "lora_name"), bodies.required(fields, "lora_path")
        if not name or not directory or not isinstance(name, str) or not isinstance(directory, str):
            raise _bad_adapter("Both 'lora_name' and 'lora_path' must be provided.")
        if name in self.options.names:
            raise _bad_adapter(f"The lora adapter '{name}' conflicts with a served base model.")
        in_place = bodies.yes(fields, "load_inplace")
        self._refuse_known(name, in_place)
        task = asyncio.get_running_loop().create_task(self._load(exchange, name, directory, in_place))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _refuse_known(self, name: str, in_place: bool) -> None:
        if name in self.adapters and not in_place:
            advice = "If you want to load the adapter in place, set 'load_inplace' to True."
            raise _bad_adapter(f"The lora adapter '{name}' has already been loaded. {advice}")

    async def _load(self, exchange: Exchange, name: str, directory: str, in_place: bool) -> None:
        model = self.driver.model
        try:
            adapter = await asyncio.to_thread(read_adapter, name, directory, model.profile.max_lora_rank)
            self._refuse_known(name, in_place)
            model.unload_adapter(name)
            await self.driver.load_adapter(name)
            self._refuse_known(name, in_place)
        except Refused as refused:
            self.refuse(exchange, refused)
            return
        except OSError as error:
            self.refuse(exchange, Refused(500, str(error), "InternalServerError"))
            return
        self.adapters[name] = adapter
        exchange.answer(200, f"Success: LoRA adapter '{name}' added successfully.".encode(), None)

    async def load_at_start(self, name: str, directory: str) -> None:
        """Load an adapter that is there from the beginning. Refused."""
        adapter = await asyncio.to_thread(read_adapter, name, directory, self.driver.model.profile.max_lora_rank)
        await self.driver.load_adapter(name)
        self.adapters[name] = adapter

    def _unload_adapter(self, exchange: Exchange) -> None:
        fields = bodies.read_json(exchange.body, exchange.headers.get("content-type"))
        name = bodies.required(fields, "lora_name")
        if self.adapters.pop(name, None) is None:
            raise Refused(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        self.driver.model.unload_adapter(name)
        exchange.answer(200, f"Success: LoRA adapter '{name}' removed successfully.".encode(), None)

    # --- faults

    def _list_faults(self, exchange: Exchange) -> None:
        exchange.answer(200, answers.encode(self.faults.known))

    def _add_fault(self, exchange: Exchange) -> None:
        try:
            self.faults.add(msgspec.json.decode(exchange.body, type=Fault))
        except ValueError as error:
            raise Refused(400, str(error)) from None
        exchange.answer(200, b"{}")

    def _clear_faults(self, exchange: Exchange) -> None:
        self.faults.clear()
        exchange.answer(200, b"{}")


def _bad_adapter(message: str) -> Refused:
    return Refused(400, message, "InvalidUserInput")


def _model_card(name: str, root: str, parent: str | None, length: int | None) -> dict[str, Any]:
    created = int(time.time())
    permission = {"id": f"modelperm-{secrets.token_hex(8)}", "object": "model_permission", "created": created}
    permission |= {"allow_create_engine": False, "allow_sampling": True, "allow_logprobs": True}
    permission |= {"allow_search_indices": False, "allow_view": True, "allow_fine_tuning": False}
    permission |= {"organization": "*", "group": None, "is_blocking": False}
    card = {"id": name, "object": "model", "created": created, "owned_by": "vllm", "root": root, "parent": parent}
    return {**card, "max_model_len": length, "permission": [permission]}


_ANSWERED = ("delay", "refuse", "impostor")
"""Faults that leave an answer whole, once it has begun."""


class Answering:
    """One request for which tokens are made, and its answer."""

    def __init__(
        self,
        service: Service,
        exchange: Exchange,
        job: Job,
        model: str,
        adapter: Adapter | None,
        fault: Fault | None,
        answer_id: str,
    ) -> None:
        self.service = service
        self.exchange = exchange
        self.job = job
        self.adapter = adapter
        self.fault = fault
        self.choices: list[Choice] = []
        prompt_tokens = sum(len(prompt.tokens) for prompt in job.prompts)
        cached = 0 if service.options.prompt_details else None
        self.head = answers.Head(answer_id, int(time.time()), model, job, prompt_tokens, cached)
        self.streams = job.stream or fault is not None
        self._there: list[int] = []
        self._written: list[int] = []
        self._left: dict[str, int] = {}
        self._opened = False
        self._writer: answers.Writer | None = None

    def begin(self) -> None:
        """Plan it and hand it to the engine."""
        service, job, number = self.service, self.job, self.service.number()
        if job.n * len(job.prompts) > bodies.MAX_CHOICES:
            service.refuse(self.exchange, Refused(400, f"n must be at most {bodies.MAX_CHOICES}."))
            return
        requests = [self._request(index, f"{number}-{index}") for index in range(job.n * len(job.prompts))]
        self._left = {request.id: index for index, request in enumerate(requests)}
        self._there = [0] * len(requests)
        self._written = [0] * len(requests)
        self.exchange.on_gone = self._gone
        if self._break_at(0):
            return
        if job.stream:
            self._writer = answers.writer(self.head, self.choices)
        service.under_way[str(number)] = self
        self._key = str(number)
        refusal = service.driver.submit(requests, self)
        if refusal is not None:
            del service.under_way[self._key]
            service.figures.refused += 1
            self.service.refuse(self.exchange, BUSY if refusal is Refusal.QUEUE_FULL else _never(refusal))
        elif self._writer is not None and not self.exchange.begun:
            self._begin_stream()

    def _request(self, index: int, request_id: str) -> Request:
        job, model = self.job, self.service.driver.model
        prompt = job.prompts[index // job.n]
        adapter = self.adapter
        identity = Identity(
            self.service.options.names[0],
            adapter.name if adapter else None,
            adapter.version if adapter else None,
            prompt_digest(prompt.keyed_on),
            index,
        )
        room = model.profile.max_model_len - len(prompt.tokens)
        choice = plan(job, prompt, identity, index, room)
        self.choices.append(choice)
        apart = (adapter.name, adapter.directory) if adapter else (None, None)
        hashes = prefix_hashes([*prompt.tokens, *choice.tokens], model.profile.hash_tokens, job.cache_salt, *apart)
        name = adapter.name if adapter else None
        return Request(request_id, len(prompt.tokens), len(choice.tokens), hashes, name, job.priority)

    # --- what the driver tells

    def first_token(self, outcome: FirstToken) -> None:
        """The prompt of one sequence is computed."""
        if self.head.cached is not None:
            self.head = self.head._replace(cached=self.head.cached + outcome.cached_tokens)

    def tokens(self, request_id: str, count: int) -> None:
        """One sequence has so many tokens."""
        index = self._left[request_id]
        if count != self._there[index]:
            self._there[index] = count
            self._write(index)

    def finished(self, outcome: Finished) -> None:
        """One sequence is through."""
        index = self._left[outcome.id]
        self._there[index] = outcome.tokens
        if not self._write(index):
            return
        del self._left[outcome.id]
        reason = self.choices[index].finish
        self.service.figures.finished(outcome, "stop" if reason == "tool_calls" else reason)
        if not self._left:
            self._end()

    # --- writing

    def _begin_stream(self) -> None:
        assert self._writer is not None
        self.exchange.stream()
        self.exchange.write(self._writer.at_once())
        self.exchange.on_writable = self._caught_up

    def _write(self, index: int) -> bool:
        """Write what there is of one sequence; False when the fault that this request meets came true."""
        count = self._there[index]
        fault = self.fault
        at_fault = fault is not None and fault.kind not in _ANSWERED and count >= fault.after_tokens
        if at_fault and fault is not None:
            self._there[index] = min(count, fault.after_tokens)
        if self._writer is not None:
            self._write_events(index)
        return not (at_fault and self._break_at(count))

    def _write_events(self, index: int) -> None:
        assert self._writer is not None
        start, end = self._written[index], self._there[index]
        if end <= start or (self.exchange.begun and not self.exchange.writable):
            return
        if not self.exchange.begun:
            self._begin_stream()
        events = b""
        if not self._opened:
            self._opened = True
            events = self._writer.opening(self.head)
        events += self._writer.tokens(self.choices[index], start, end, self._is_last(index))
        self._written[index] = end
        self.exchange.write(events)

    def _is_last(self, index: int) -> bool:
        others = zip(self.choices, self._there, strict=True)
        return all(there >= len(choice.tokens) for choice, there in others if choice.index != index)

    def _caught_up(self) -> None:
        for index in range(len(self.choices)):
            self._write_events(index)
        if not self._left and not self.exchange.over:
            self._end()

    def _end(self) -> None:
        """All sequences are through: end the answer, when the client has taken what came before."""
        self.service.under_way.pop(self._key, None)
        if self._writer is None:
            self.exchange.answer(200, answers.whole(self.head, self.choices))
        elif self._written == [len(choice.tokens) for choice in self.choices]:
            self.exchange.write(self._writer.closing(self.choices))
            self.exchange.end()

    # --- ending early

    def abort(self) -> None:
        """End it as vLLM does when it is told to: what is there is the answer, and its finish reason says so."""
        for request_id, index in list(self._left.items()):
            choice = self.choices[index]
            there = self.service.driver.model.emitted(request_id)
            choice.tokens = [*choice.tokens[:there], ""]
            choice.text = choice.text[: sum(map(len, choice.tokens))]
            choice.finish, choice.stop_reason = "abort", None
            self._there[index] = len(choice.tokens)
            self.service.figures.ended["abort"] += 1
        self.service.driver.abort(list(self._left))
        indexes = list(self._left.values())
        self._left.clear()
        for index in indexes:
            if self._writer is not None:
                self._write_events(index)
        self._end()

    def _gone(self) -> None:
        self.service.figures.ended["abort"] += len(self._left)
        self._drop()

    def _drop(self) -> None:
        if hasattr(self, "_key"):
            self.service.under_way.pop(self._key, None)
        self.service.driver.abort(list(self._left))
        self._left = {}

    def _break_at(self, count: int) -> bool:
        """Play the fault this request meets, if it is time; True when that was the end of it."""
        fault = self.fault
        if fault is None or fault.kind in _ANSWERED or count < fault.after_tokens:
            return False
        if count == 0 and fault.after_tokens == 0 and fault.kind == "error_event" and self.job.stream:
            self._writer = answers.writer(self.head, self.choices)
        self._drop()
        match fault.kind:
            case "exit":
                os._exit(1)
            case "reset":
                self.exchange.reset()
            case "close":
                self.exchange.close()
            case "error_event":
                self._fail(Refused(fault.status, fault.message, "InternalServerError"))
            case _:
                pass
        return True

    def _fail(self, refused: Refused) -> None:
        if self._writer is None:
            self.service.refuse(self.exchange, refused)
            return
        if not self.exchange.begun:
            self._begin_stream()
        self.exchange.write(self._writer.failing(refused))
        self.exchange.end()


def _never(refusal: Refusal) -> Refused:
    return Refused(400, f"the engine refused the request: {refusal.value}")
