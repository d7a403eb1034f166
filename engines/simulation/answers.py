"""Answers as vLLM 0.32.0 writes them: whole, and as events of a stream. Pure.

A stream is a writer: ``opening`` when its first token is there, one event for each token, ``closing`` at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from engines.simulation.bodies import Dialect, Job, Refused
from engines.simulation.choices import Choice
from engines.simulation.speech import logprobs_of, token_id

encode = msgspec.json.encode
FINGERPRINT = "vllm-0.32.0-simulated"
DONE = b"data: [DONE]\n\n"
Json = dict[str, Any]


class Head(NamedTuple):
    """What all of one answer shares. ``cached`` is None where prompt details are not told."""

    id: str
    created: int
    model: str
    job: Job
    prompt_tokens: int
    cached: int | None = None


def error(refused: Refused, dialect: Dialect | None = None) -> bytes:
    """Return the body of a refusal."""
    if dialect is Dialect.MESSAGES:
        return encode({"type": "error", "error": {"type": refused.kind, "message": refused.message}})
    inner = {"message": refused.message, "type": refused.kind, "param": refused.param, "code": refused.status}
    return encode({"error": inner})


def _event(value: Json) -> bytes:
    return b"data: " + encode(value) + b"\n\n"


def _named_event(value: Json) -> bytes:
    kind: str = value["type"]
    return b"event: " + kind.encode() + b"\ndata: " + encode(value) + b"\n\n"


# --- parts -------------------------------------------------------------------------------------------------------


def _usage(head: Head, tokens: int, **more: object) -> Json:
    return {
        "prompt_tokens": head.prompt_tokens,
        "total_tokens": head.prompt_tokens + tokens,
        "completion_tokens": tokens,
        **more,
    }


def _details(head: Head) -> Json | None:
    if head.cached is None:
        return None
    return {"cached_tokens": head.cached, "created_cache_tokens": 0, "multimodal_tokens": None}


def _usage_event(head: Head, object_name: str, tokens: int) -> bytes:
    usage = _usage(head, tokens)
    if head.cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": head.cached, "created_cache_tokens": 0}
    chunk = {"id": head.id, "object": object_name, "created": head.created, "model": head.model, "choices": []}
    return _event({**chunk, "usage": usage, "system_fingerprint": FINGERPRINT})


def _chat_logprobs(choice: Choice, start: int, end: int, top: int) -> Json:
    content = []
    for index in range(start, end):
        if not choice.tokens[index]:
            continue
        likely = logprobs_of(choice.tokens[index], index, max(top, 1))
        entries = [{"token": p, "logprob": value, "bytes": list(p.encode())} for p, value in likely]
        content.append({**entries[0], "top_logprobs": entries[:top]})
    return {"content": content}


def _text_logprobs(tokens: Sequence[str], top: int, offset: int = 0, *, first_unknown: bool = False) -> Json:
    found: Json = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for index, piece in enumerate(tokens):
        likely = logprobs_of(piece, index, max(top, 1))
        known = not (first_unknown and index == 0)
        found["text_offset"].append(offset)
        found["token_logprobs"].append(likely[0][1] if known else None)
        found["tokens"].append(piece)
        found["top_logprobs"].append(dict(likely) if known else None)
        offset += len(piece)
    return found


def _prompt_logprobs(tokens: Sequence[str], top: int) -> list[Json | None]:
    found: list[Json | None] = [None]
    for index, piece in enumerate(tokens[1:], 1):
        likely = logprobs_of(piece, index, max(top, 1))
        found.append(
            {
                str(token_id(p)): {"logprob": value, "rank": rank, "decoded_token": p}
                for rank, (p, value) in enumerate(likely, 1)
            }
        )
    return found


def _ids(job: Job, tokens: Sequence[str]) -> list[int] | None:
    return [token_id(piece) if piece else 2 for piece in tokens] if job.token_ids else None


def _tool_id(head: Head, choice: Choice) -> str:
    return f"chatcmpl-tool-{head.id.removeprefix('chatcmpl-')[:16]}{choice.index or ''}"


# --- whole answers -----------------------------------------------------------------------------------------------


def whole(head: Head, choices: Sequence[Choice]) -> bytes:
    """Return the body of an answer that is not streamed."""
    build = {
        Dialect.CHAT: _whole_chat,
        Dialect.COMPLETION: _whole_completion,
        Dialect.MESSAGES: _whole_message,
        Dialect.RESPONSES: _whole_response,
    }
    return encode(build[head.job.dialect](head, choices))


def _tokens_of(choices: Sequence[Choice]) -> int:
    return sum(len(choice.tokens) for choice in choices)


def _whole_chat(head: Head, choices: Sequence[Choice]) -> Json:
    job = head.job
    details = {"prompt_tokens_details": _details(head), "completion_tokens_details": None}
    return {
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "choices": [_chat_choice(head, choice) for choice in choices],
        "service_tier": None,
        "system_fingerprint": FINGERPRINT,
        "usage": _usage(head, _tokens_of(choices), **details),
        "prompt_logprobs": None,
        "prompt_token_ids": _ids(job, job.prompts[0].tokens),
        "prompt_text": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def _chat_choice(head: Head, choice: Choice) -> Json:
    job = head.job
    message: Json = {"role": "assistant", "content": "" if choice.tool else choice.text, "refusal": None}
    message |= {"annotations": None, "audio": None, "function_call": None}
    if choice.tool is not None:
        function = {"name": choice.tool.name, "arguments": choice.text}
        message["tool_calls"] = [{"id": _tool_id(head, choice), "type": "function", "function": function}]
    message["reasoning"] = None
    asked = job.logprobs is not None and choice.tool is None
    return {
        "index": choice.index,
        "message": message,
        "logprobs": _chat_logprobs(choice, 0, len(choice.tokens), job.logprobs or 0) if asked else None,
        "finish_reason": choice.finish,
        "stop_reason": choice.stop_reason,
        "token_ids": _ids(job, choice.tokens),
        "routed_experts": None,
    }


def _whole_completion(head: Head, choices: Sequence[Choice]) -> Json:
    details = {"prompt_tokens_details": _details(head), "completion_tokens_details": None}
    return {
        "id": head.id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
        "choices": [_completion_choice(head, choice) for choice in choices],
        "service_tier": None,
        "system_fingerprint": FINGERPRINT,
        "usage": _usage(head, _tokens_of(choices), **details),
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def _completion_choice(head: Head, choice: Choice) -> Json:
    job = head.job
    prompt = job.prompts[choice.index // job.n].tokens
    tokens = [piece for piece in choice.tokens if piece]
    before = prompt if job.echo else []
    asked = job.logprobs is not None
    logprobs = _text_logprobs([*before, *tokens], job.logprobs or 0, first_unknown=job.echo) if asked else None
    return {
        "index": choice.index,
        "text": "".join(before) + choice.text,
        "logprobs": logprobs,
        "finish_reason": choice.finish,
        "stop_reason": choice.stop_reason,
        "token_ids": _ids(job, choice.tokens),
        "prompt_logprobs": _prompt_logprobs(prompt, job.logprobs or 0) if asked and job.echo else None,
        "prompt_token_ids": _ids(job, prompt),
        "routed_experts": None,
    }


def _anthropic_stop(choice: Choice) -> str:
    if choice.stop_reason is not None:
        return "stop_sequence"
    return {"length": "max_tokens", "abort": "end_turn"}.get(choice.finish, "end_turn")


def _whole_message(head: Head, choices: Sequence[Choice]) -> Json:
    choice = choices[0]
    answer: Json = {
        "id": head.id,
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": choice.text}],
        "model": head.model,
        "stop_reason": _anthropic_stop(choice),
    }
    if choice.stop_reason is not None:
        answer["stop_sequence"] = choice.stop_reason
    answer["usage"] = {"input_tokens": head.prompt_tokens, "output_tokens": len(choice.tokens)}
    return answer


def _whole_response(head: Head, choices: Sequence[Choice]) -> Json:
    choice = choices[0]
    item = _response_item(head, choice.text)
    return _response(head, choice, [item])


def _response_item(head: Head, text: str | None) -> Json:
    parts: list[Json] = (
        [] if text is None else [{"annotations": [], "text": text, "type": "output_text", "logprobs": None}]
    )
    return {
        "id": "msg_" + head.id.removeprefix("resp_"),
        "content": parts,
        "role": "assistant",
        "status": "in_progress" if text is None else "completed",
        "type": "message",
        "phase": None,
    }


def _response(head: Head, choice: Choice | None, output: list[Json]) -> Json:
    """A response as it begins (no choice yet) or ends."""
    cut = choice is not None and choice.finish == "length"
    status = "in_progress" if choice is None else "incomplete" if cut else "completed"
    return {
        "id": head.id,
        "created_at": head.created,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": None,
        "metadata": None,
        "model": head.model,
        "object": "response",
        "output": output,
        "parallel_tool_calls": True,
        "temperature": head.job.temperature,
        "tool_choice": "none",
        "tools": [],
        "top_p": head.job.top_p,
        "background": False,
        "max_output_tokens": head.job.max_tokens,
        "max_tool_calls": None,
        "previous_response_id": None,
        "prompt": None,
        "reasoning": None,
        "service_tier": "auto",
        "status": status,
        "text": None,
        "top_logprobs": None,
        "truncation": "disabled",
        "usage": None if choice is None else _response_usage(head, choice),
        "user": None,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "input_messages": None,
        "output_messages": None,
    }


def _response_usage(head: Head, choice: Choice) -> Json:
    cached = {"cached_tokens": head.cached or 0, "cache_write_tokens": 0}
    turns: Json = {"output_tokens_per_turn": [], "tool_output_tokens_per_turn": []}
    return {
        "input_tokens": head.prompt_tokens,
        "input_tokens_details": {**cached, "input_tokens_per_turn": [], "cached_tokens_per_turn": []},
        "output_tokens": len(choice.tokens),
        "output_tokens_details": {"reasoning_tokens": 0, "tool_output_tokens": 0, **turns},
        "total_tokens": head.prompt_tokens + len(choice.tokens),
    }


# --- streams -----------------------------------------------------------------------------------------------------


class Writer(Protocol):
    """Writes one answer as events."""

    def at_once(self) -> bytes:
        """Return what comes before the first token is there."""
        ...

    def opening(self, head: Head) -> bytes:
        """Return what comes with the first token; ``head`` knows by now what was cached."""
        ...

    def tokens(self, choice: Choice, start: int, end: int, last: bool) -> bytes:
        """Return the events of tokens ``start`` to ``end``, one each. ``last``: no other choice is still under way."""
        ...

    def closing(self, choices: Sequence[Choice]) -> bytes:
        """Return what comes at the end."""
        ...

    def failing(self, refused: Refused) -> bytes:
        """Return the end of a stream that failed."""
        ...


def writer(head: Head, choices: Sequence[Choice]) -> Writer:
    """Return the writer of a stream."""
    match head.job.dialect:
        case Dialect.CHAT:
            return _ChatWriter(head, choices)
        case Dialect.COMPLETION:
            return _CompletionWriter(head, choices)
        case Dialect.MESSAGES:
            return _MessageWriter(head)
        case Dialect.RESPONSES:
            return _ResponseWriter(head)


class _OpenAiWriter:
    """What chats and completions share."""

    object_name: str

    def __init__(self, head: Head, choices: Sequence[Choice]) -> None:
        self.head = head
        self.choices = choices
        start = {"id": head.id, "object": self.object_name, "created": head.created, "model": head.model}
        self.start: Json = start
        self.prefix = b"data: " + encode(start)[:-1] + b',"choices":[{"index":'

    def at_once(self) -> bytes:
        return b""

    def chunk(self, choice: Json, tokens: int, *, ends: bool = False, more: Json | None = None) -> bytes:
        """Return an event of one choice. ``tokens`` are those so far, ``ends`` that nothing follows but the usage."""
        job = self.head.job
        value = {**self.start, "choices": [choice]}
        if job.running_usage:
            value["usage"] = _usage(self.head, tokens, completion_tokens_details=None)
        elif ends and not job.usage:
            value["system_fingerprint"] = FINGERPRINT
        return _event({**value, **(more or {})})

    def closing(self, choices: Sequence[Choice]) -> bytes:
        usage = b""
        if self.head.job.usage:
            usage = _usage_event(self.head, self.object_name, _tokens_of(choices))
        return usage + DONE

    def failing(self, refused: Refused) -> bytes:
        return b"data: " + error(refused) + b"\n\n" + DONE


class _ChatWriter(_OpenAiWriter):
    object_name = "chat.completion.chunk"

    def opening(self, head: Head) -> bytes:
        self.head = head
        ids = _ids(head.job, head.job.prompts[0].tokens)
        more = {"prompt_token_ids": ids, "prompt_text": None}
        delta = {"role": "assistant", "content": ""}
        return b"".join(
            self.chunk({"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}, 0, more=more)
            for choice in self.choices
        )

    def tokens(self, choice: Choice, start: int, end: int, last: bool) -> bytes:
        job = self.head.job
        plain = choice.tool is None and job.logprobs is None and not job.token_ids and not job.running_usage
        events = []
        for index in range(start, end):
            if index + 1 == len(choice.tokens):
                events.append(self._event_of(choice, index, last))
            elif not plain:
                events.append(self._event_of(choice, index, False))
            elif piece := choice.piece(index):
                head = self.prefix + str(choice.index).encode() + b',"delta":{"content":' + encode(piece)
                events.append(head + b'},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n')
        return b"".join(events)

    def _event_of(self, choice: Choice, index: int, ends: bool) -> bytes:
        job = self.head.job
        final = index + 1 == len(choice.tokens)
        delta = self._delta(choice, index)
        if not delta and not final:
            return b""
        logprobs = None
        if job.logprobs is not None and choice.tool is None and choice.tokens[index]:
            logprobs = _chat_logprobs(choice, index, index + 1, job.logprobs)
        part: Json = {"index": choice.index, "delta": delta, "logprobs": logprobs}
        part["finish_reason"] = choice.finish if final else None
        if final:
            part["stop_reason"] = choice.stop_reason
        part["token_ids"] = _ids(job, choice.tokens[index : index + 1])
        return self.chunk(part, index + 1, ends=ends)

    def _delta(self, choice: Choice, index: int) -> Json:
        if choice.tool is None:
            piece = choice.piece(index)
            return {"content": piece} if piece else {}
        if index == 0:
            call = {"id": _tool_id(self.head, choice), "type": "function", "index": 0}
            return {"content": None, "tool_calls": [{**call, "function": {"name": choice.tool.name}}]}
        if not choice.tokens[index]:
            return {}
        return {"content": None, "tool_calls": [{"index": 0, "function": {"arguments": choice.tokens[index]}}]}


class _CompletionWriter(_OpenAiWriter):
    object_name = "text_completion"

    def opening(self, head: Head) -> bytes:
        self.head = head
        return b""

    def tokens(self, choice: Choice, start: int, end: int, last: bool) -> bytes:
        job, events = self.head.job, []
        offset = sum(map(len, choice.tokens[:start]))
        for index in range(start, end):
            piece = choice.piece(index)
            final = index + 1 == len(choice.tokens)
            text, tokens = piece, choice.tokens[index : index + 1]
            if index == 0 and job.echo:
                text = "".join(job.prompts[choice.index // job.n].tokens) + piece
            if not text and not final:
                continue
            part: Json = {"index": choice.index, "text": text, "logprobs": None}
            if job.logprobs is not None and piece:
                part["logprobs"] = _text_logprobs(tokens, job.logprobs, offset)
            part |= {
                "finish_reason": choice.finish if final else None,
                "stop_reason": choice.stop_reason if final else None,
            }
            prompt_ids = _ids(job, job.prompts[choice.index // job.n].tokens) if index == 0 else None
            part |= {"prompt_token_ids": prompt_ids, "token_ids": _ids(job, tokens)}
            events.append(self.chunk(part, index + 1, ends=final and last))
            offset += len(choice.tokens[index])
        return b"".join(events)


class _MessageWriter:
    """Anthropic's typed events."""

    def __init__(self, head: Head) -> None:
        self.head = head

    def at_once(self) -> bytes:
        return b""

    def opening(self, head: Head) -> bytes:
        self.head = head
        message: Json = {"id": head.id, "type": "message", "role": "assistant", "content": [], "model": head.model}
        usage = {"input_tokens": head.prompt_tokens, "output_tokens": 0}
        message |= {"stop_reason": None, "stop_sequence": None, "usage": usage}
        block = {"type": "content_block_start", "content_block": {"type": "text", "text": ""}, "index": 0}
        return _named_event({"type": "message_start", "message": message}) + _named_event(block)

    def tokens(self, choice: Choice, start: int, end: int, last: bool) -> bytes:
        shown = [piece for index in range(start, end) if (piece := choice.piece(index))]
        return b"".join(
            _named_event({"type": "content_block_delta", "delta": {"type": "text_delta", "text": piece}, "index": 0})
            for piece in shown
        )

    def closing(self, choices: Sequence[Choice]) -> bytes:
        choice = choices[0]
        usage = {"input_tokens": self.head.prompt_tokens, "output_tokens": len(choice.tokens)}
        delta = {"stop_reason": _anthropic_stop(choice), "stop_sequence": choice.stop_reason}
        return b"".join(
            _named_event(value)
            for value in (
                {"type": "content_block_stop", "index": 0},
                {"type": "message_delta", "delta": delta, "usage": usage},
                {"type": "message_stop"},
            )
        )

    def failing(self, refused: Refused) -> bytes:
        return b"event: error\ndata: " + error(refused, Dialect.MESSAGES) + b"\n\n"


class _ResponseWriter:
    """OpenAI's typed events, numbered."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.number = 0

    def _event(self, kind: str, **fields: object) -> bytes:
        value = {**fields, "sequence_number": self.number, "type": kind}
        self.number += 1
        return _named_event(value)

    def _where(self) -> Json:
        return {"content_index": 0, "item_id": "msg_" + self.head.id.removeprefix("resp_"), "output_index": 0}

    def at_once(self) -> bytes:
        response = _response(self.head, None, [])
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def opening(self, head: Head) -> bytes:
        self.head = head
        part = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
        item = _response_item(head, None)
        return self._event("response.output_item.added", item=item, output_index=0) + self._event(
            "response.content_part.added", **self._where(), part=part
        )

    def tokens(self, choice: Choice, start: int, end: int, last: bool) -> bytes:
        shown = [piece for index in range(start, end) if (piece := choice.piece(index))]
        return b"".join(
            self._event("response.output_text.delta", **self._where(), delta=piece, logprobs=[]) for piece in shown
        )

    def closing(self, choices: Sequence[Choice]) -> bytes:
        choice = choices[0]
        item = _response_item(self.head, choice.text)
        return b"".join(
            (
                self._event("response.output_text.done", **self._where(), logprobs=[], text=choice.text),
                self._event("response.content_part.done", **self._where(), part=item["content"][0]),
                self._event("response.output_item.done", item=item, output_index=0),
                self._event("response.completed", response=_response(self.head, choice, [item])),
            )
        )

    def failing(self, refused: Refused) -> bytes:
        return self._event("error", code="server_error", message=refused.message, param=None)
