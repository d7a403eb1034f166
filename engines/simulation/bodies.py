"""Request bodies, read as vLLM reads them: into jobs, or refused with vLLM's own words (0.32.0).

Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import msgspec

from engines.simulation.schema import least_instance
from engines.simulation.speech import piece_of, pieces, render, split_answer

Fields = dict[str, Any]
MAX_CHOICES = 16384
MAX_LOGPROBS = 20
MAX_STOPS = 4
MAX_PROMPTS = 256
COMPLETION_TOKENS = 16


class Refused(Exception):  # noqa: N818 - an answer, not a failure
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param


def wrong(param: str, message: str, value: object = None) -> Refused:
    """Return the 400 for a parameter, which vLLM names once more behind its message."""
    shown = f", value={value}" if value is not None else ""
    return Refused(400, f"{message} (parameter={param}{shown})", param=param)


class Problem(NamedTuple):
    """What pydantic says of one field."""

    kind: str
    where: str
    message: str
    value: object
    context: Mapping[str, object] | None = None


def invalid(*problems: Problem) -> Refused:
    """Return the 400 for a body that does not fit its model."""
    lines = []
    for problem in problems:
        said: dict[str, object] = {"type": problem.kind, "loc": problem.where, "msg": problem.message}
        said["input"] = _shown(problem.value)
        if problem.context is not None:
            said["ctx"] = problem.context
        lines.append(f"\n  {said}")
    title = f"{len(problems)} validation error{'s' if len(problems) > 1 else ''}:"
    return Refused(400, title + "".join(lines), "Bad Request", problems[0].where if problems else None)


def _shown(value: object) -> object:
    for kind, name in ((dict, "dict"), (list, "list")):
        if isinstance(value, kind):
            return f"<{name} of {len(value)} items>"
    return value


def read_json(body: bytes, content_type: str | None) -> Fields:
    """Return the fields of a body. Refused."""
    if content_type is None or content_type.partition(";")[0].strip().lower() != "application/json":
        message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
        raise Refused(400, message, "Bad Request")
    try:
        fields = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        fields = _slowly(body)
    if not isinstance(fields, dict):
        raise invalid(
            Problem("model_attributes_type", "body", "Input should be a valid dictionary or object", _shown(fields))
        )
    return fields


def _slowly(body: bytes) -> Any:
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        context = {"error": error.msg}
        raise invalid(Problem("json_invalid", f"body.{error.pos}", "JSON decode error", {}, context)) from None
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"There was an error parsing the body: {type(error).__name__}", "Bad Request") from None


# --- fields ------------------------------------------------------------------------------------------------------


def required(fields: Fields, name: str) -> Any:
    """Return a field that must be there. Refused."""
    if name not in fields:
        raise invalid(Problem("missing", f"body.{name}", "Field required", fields))
    return fields[name]


def number(fields: Fields, name: str, default: float | None) -> float | None:
    """Return a number; a string that spells one will do, as pydantic has it. Refused."""
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            message = "Input should be a valid number, unable to parse string as a number"
            raise invalid(Problem("float_parsing", f"body.{name}", message, value)) from None
    raise invalid(Problem("float_type", f"body.{name}", "Input should be a valid number", value))


def whole(fields: Fields, name: str, default: int | None) -> int | None:
    """Return a whole number. Refused."""
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, float) and not value.is_integer():
        message = "Input should be a valid integer, got a number with a fractional part"
        raise invalid(Problem("int_from_float", f"body.{name}", message, value))
    if isinstance(value, int | float):
        return int(value)
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            message = "Input should be a valid integer, unable to parse string as an integer"
            raise invalid(Problem("int_parsing", f"body.{name}", message, value)) from None
    raise invalid(Problem("int_type", f"body.{name}", "Input should be a valid integer", value))


def yes(fields: Fields, name: str, default: bool = False) -> bool:
    """Return a flag. Refused."""
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool | int | float | str) and value in (True, False, "true", "false"):
        return value in (True, "true")
    message = "Input should be a valid boolean, unable to interpret input"
    raise invalid(Problem("bool_parsing", f"body.{name}", message, value))


def word(fields: Fields, name: str) -> str | None:
    """Return a string. Refused."""
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value
    raise invalid(Problem("string_type", f"body.{name}", "Input should be a valid string", value))


# --- jobs --------------------------------------------------------------------------------------------------------


class Dialect(Enum):
    """Which kind of answer is wanted."""

    CHAT = "chat"
    COMPLETION = "completion"
    MESSAGES = "messages"
    RESPONSES = "responses"


class Prompt(msgspec.Struct):
    """One prompt: all its tokens; the text before the answer began, which the answer is keyed on; what has begun."""

    tokens: list[str]
    keyed_on: str
    begun: str = ""


class Tool(msgspec.Struct):
    """A tool that is to be called, with these arguments as JSON."""

    name: str
    arguments: str
    finish: str


class Job(msgspec.Struct):
    """What a request asks for. ``max_tokens`` None: as many as fit. ``logprobs`` None: none are told."""

    dialect: Dialect
    model: str | None
    prompts: list[Prompt]
    stream: bool = False
    usage: bool = False
    running_usage: bool = False
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    logprobs: int | None = None
    seed: int | None = None
    priority: int = 0
    cache_salt: str | None = None
    echo: bool = False
    token_ids: bool = False
    said: str | None = None
    """The answer itself, where a schema or a choice decides it."""
    tool: Tool | None = None
    temperature: float = 1.0
    top_p: float = 1.0


class Limits(NamedTuple):
    """What a prompt may be."""

    model: str
    max_model_len: int


def read_chat(fields: Fields, limits: Limits) -> Job:
    """Read a body of ``/v1/chat/completions``. Refused."""
    messages = required(fields, "messages")
    _check_messages(messages)
    shape = _response_format(fields)
    _check_stream_options(fields)
    if fields.get("top_logprobs") is not None and not yes(fields, "logprobs"):
        raise wrong("top_logprobs", "when using `top_logprobs`, `logprobs` must be set to true.")
    tool = _tool(fields, messages)
    job = _sampling(fields, Dialect.CHAT, limits)
    if yes(fields, "logprobs"):
        job.logprobs = _logprobs(whole(fields, "top_logprobs", 0) or 0)
    open_end = yes(fields, "continue_final_message")
    job.prompts = [_chat_prompt(messages, limits, open_end, yes(fields, "add_generation_prompt", True))]
    job.tool = tool
    if tool is None:
        job.said = shape if shape is not None else _choice(fields)
    return _within(job, limits)


def read_completion(fields: Fields, limits: Limits) -> Job:
    """Read a body of ``/v1/completions``. Refused."""
    given = required(fields, "prompt")
    shape = _response_format(fields)
    _check_stream_options(fields)
    if fields.get("suffix") is not None:
        raise Refused(400, "suffix is only supported for models with FIM completion rendering", param="suffix")
    job = _sampling(fields, Dialect.COMPLETION, limits)
    asked = whole(fields, "logprobs", None)
    if asked is not None:
        job.logprobs = _logprobs(asked)
    if fields.get("max_tokens") is None:
        job.max_tokens = COMPLETION_TOKENS
    job.echo = yes(fields, "echo")
    job.prompts = [_plain_prompt(one, limits) for one in _several(given)]
    job.said = shape if shape is not None else _choice(fields)
    return _within(job, limits)


def read_messages(fields: Fields, limits: Limits) -> Job:
    """Read a body of ``/v1/messages``, Anthropic's. Refused."""
    messages = required(fields, "messages")
    required(fields, "max_tokens")
    _check_messages(messages)
    if system := fields.get("system"):
        messages = [{"role": "system", "content": system}, *messages]
    job = _sampling(fields, Dialect.MESSAGES, limits)
    job.stop = _stop_strings(fields, "stop_sequences")
    open_end = messages[-1].get("role") == "assistant"
    job.prompts = [_chat_prompt(messages, limits, open_end, True)]
    return _within(job, limits)


def read_responses(fields: Fields, limits: Limits) -> Job:
    """Read a body of ``/v1/responses``. Refused."""
    given = required(fields, "input")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    _check_messages(messages)
    if instructions := fields.get("instructions"):
        messages = [{"role": "system", "content": instructions}, *messages]
    job = _sampling(fields, Dialect.RESPONSES, limits)
    job.max_tokens = whole(fields, "max_output_tokens", None)
    job.prompts = [_chat_prompt(messages, limits, False, True)]
    return _within(job, limits)


def _sampling(fields: Fields, dialect: Dialect, limits: Limits) -> Job:
    """What every dialect has, in the order in which vLLM complains."""
    job = Job(
        dialect,
        word(fields, "model"),
        [],
        stream=yes(fields, "stream"),
        n=_n(fields),
        max_tokens=_max_tokens(fields, limits),
        min_tokens=whole(fields, "min_tokens", 0) or 0,
        ignore_eos=yes(fields, "ignore_eos"),
        stop=_stop_strings(fields),
        include_stop=yes(fields, "include_stop_str_in_output"),
        seed=whole(fields, "seed", None),
        priority=whole(fields, "priority", 0) or 0,
        cache_salt=word(fields, "cache_salt"),
        token_ids=yes(fields, "return_token_ids"),
        temperature=_temperature(fields),
        top_p=_top_p(fields),
    )
    if job.n > 1 and job.temperature == 0:
        raise Refused(400, f"n must be 1 when using greedy sampling, got {job.n}.")
    options = fields.get("stream_options")
    if job.stream and isinstance(options, dict):
        job.usage = bool(options.get("include_usage"))
        job.running_usage = bool(options.get("continuous_usage_stats")) and job.usage
    return job


def _stop_strings(fields: Fields, name: str = "stop") -> tuple[str, ...]:
    stop = fields.get(name)
    if stop is None or isinstance(stop, str):
        return (stop,) if stop else ()
    no_string = Problem("string_type", f"body.{name}", "Input should be a valid string", stop)
    if not isinstance(stop, list) or not all(isinstance(one, str) for one in stop):
        raise invalid(no_string, Problem("list_type", f"body.{name}", "Input should be a valid list", stop))
    if len(stop) > MAX_STOPS:
        context = {"field_type": "List", "max_length": MAX_STOPS, "actual_length": len(stop)}
        message = f"List should have at most {MAX_STOPS} items after validation, not {len(stop)}"
        raise invalid(no_string, Problem("too_long", f"body.{name}", message, stop, context))
    return tuple(one for one in stop if one)


def _n(fields: Fields) -> int:
    wanted = whole(fields, "n", 1)
    assert wanted is not None
    if wanted < 1:
        raise Refused(400, f"n must be at least 1, got {wanted}.")
    if wanted > MAX_CHOICES:
        more = "To increase this limit, set the VLLM_MAX_N_SEQUENCES environment variable."
        raise Refused(400, f"n must be at most {MAX_CHOICES}, got {wanted}. {more}")
    return wanted


def _temperature(fields: Fields) -> float:
    value = number(fields, "temperature", 1.0)
    assert value is not None
    if value < 0:
        raise wrong("temperature", f"temperature must be non-negative, got {value}.", value)
    return value


def _top_p(fields: Fields) -> float:
    value = number(fields, "top_p", 1.0)
    assert value is not None
    if not 0 < value <= 1:
        raise wrong("top_p", f"top_p must be in (0, 1], got {value}.", value)
    return value


def _max_tokens(fields: Fields, limits: Limits) -> int | None:
    name = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    value = whole(fields, name, None)
    if value is None:
        return None
    if value < 1:
        raise wrong("max_tokens", f"max_tokens must be at least 1, got {value}.", value)
    if value > limits.max_model_len:
        message = (
            f"max_tokens={value} cannot be greater than max_model_len={limits.max_model_len}."
            " Please request fewer output tokens."
        )
        raise wrong("max_tokens", message, value)
    return value


def _logprobs(asked: int) -> int:
    if asked > MAX_LOGPROBS:
        message = f"Requested sample logprobs of {asked}, which is greater than max allowed: {MAX_LOGPROBS}"
        raise wrong("logprobs", message, asked)
    return asked


def _check_stream_options(fields: Fields) -> None:
    if fields.get("stream_options") is not None and not yes(fields, "stream"):
        raise wrong("stream_options", "Stream options can only be defined when `stream=True`.")


def _within(job: Job, limits: Limits) -> Job:
    """See that prompt and answer fit the context."""
    longest = max(len(prompt.tokens) for prompt in job.prompts)
    most = limits.max_model_len
    if longest > most or (longest == most and job.max_tokens is None):
        raise too_long(most)
    if job.max_tokens is not None and longest + job.max_tokens > most:
        message = (
            f"This model's maximum context length is {most} tokens. However, you requested {job.max_tokens} output"
            f" tokens and your prompt contains {longest} input tokens, for a total of {longest + job.max_tokens}"
            " tokens. Please reduce the length of the input prompt or the number of requested output tokens."
        )
        raise wrong("input_tokens", message, longest)
    return job


def too_long(most: int) -> Refused:
    """Return the 400 for a prompt that leaves no room for an answer."""
    message = (
        f"This model's maximum context length is {most} tokens. However, your prompt contains at least {most + 1} input"
        " tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input"
        " prompt."
    )
    return wrong("input_tokens", message, most + 1)


# --- prompts -----------------------------------------------------------------------------------------------------


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list):
        raise invalid(Problem("list_type", "body.messages", "Input should be a valid list", messages))
    if not messages:
        raise Refused(400, "Cannot apply chat template to an empty conversation. Provide at least one message.")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise invalid(Problem("dict_type", f"body.messages.{index}", "Input should be a valid dictionary", message))


def _chat_prompt(messages: list[Fields], limits: Limits, open_end: bool, answer_next: bool) -> Prompt:
    turns = [(str(message.get("role", "user")), _content(message, limits)) for message in messages]
    begun = turns[-1][1] if open_end and turns[-1][0] == "assistant" else ""
    keyed_on = render(turns[:-1] if begun else turns, open_end=False)
    tokens = pieces(render(turns, open_end=open_end, answer_next=answer_next))
    return Prompt(tokens, keyed_on, begun)


def _content(message: Fields, limits: Limits) -> str:
    content = message.get("content")
    made = message.get("tool_calls")
    calls = "".join(json.dumps(call) for call in made) if isinstance(made, list) else ""
    if content is None or isinstance(content, str):
        return (content or "") + calls
    texts = []
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict) or part.get("type") not in ("text", "input_text", "output_text", "refusal"):
            raise Refused(400, f"{limits.model} is not a multimodal model")
        texts.append(str(part.get("text") or ""))
    return "\n".join(texts) + calls


def chat_tokens(fields: Fields, limits: Limits) -> list[str]:
    """Return the tokens of the chat in a body, for counting. Refused."""
    messages = required(fields, "messages")
    _check_messages(messages)
    if system := fields.get("system"):
        messages = [{"role": "system", "content": system}, *messages]
    return _chat_prompt(messages, limits, False, yes(fields, "add_generation_prompt", True)).tokens


def _several(given: Any) -> list[Any]:
    """One prompt is text or token numbers, several are a list of those."""
    if isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], int)):
        return [given]
    if isinstance(given, list) and given:
        if len(given) > MAX_PROMPTS:
            raise Refused(400, f"at most {MAX_PROMPTS} prompts are taken at once, got {len(given)}")
        return given
    raise Refused(400, "Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")


def _plain_prompt(given: Any, limits: Limits) -> Prompt:
    if isinstance(given, str) and given:
        tokens = pieces(given)
    elif isinstance(given, list) and given and all(isinstance(one, int) and one >= 0 for one in given):
        tokens = [piece_of(one) for one in given]
    else:
        raise Refused(400, "Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
    keyed_on, begun = split_answer("".join(tokens))
    return Prompt(tokens, keyed_on, begun)


# --- answers that are decided by the request ---------------------------------------------------------------------


def _response_format(fields: Fields) -> str | None:
    """The answer a response format asks for, as JSON; None when any text will do."""
    wanted = fields.get("response_format")
    if not isinstance(wanted, dict):
        return None
    kind = wanted.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return json.dumps({"answer": "word"})
    if kind == "json_schema":
        described = wanted.get("json_schema")
        return _met(described.get("schema") if isinstance(described, dict) else None)
    raise _bad_format(wanted)


def _met(schema: Any) -> str:
    try:
        return json.dumps(least_instance(schema))
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise Refused(400, f"Grammar error: {error}") from None


def _bad_format(wanted: Fields) -> Refused:
    """vLLM's words for a format that is none."""
    kinds, tag, where = "'text', 'json_object' or 'json_schema'", "'structural_tag'", "body.response_format"
    value = wanted.get("type")

    def literal(expected: str) -> Problem:
        return Problem("literal_error", f"{where}.type", f"Input should be {expected}", value, {"expected": expected})

    def missing(name: str) -> Problem:
        return Problem("missing", f"{where}.{name}", "Field required", wanted)

    return invalid(
        literal(kinds), literal(tag), missing("format"), literal(tag), missing("structures"), missing("triggers")
    )


def _choice(fields: Fields) -> str | None:
    wanted = fields.get("structured_outputs")
    if not isinstance(wanted, dict):
        return None
    choices = wanted.get("choice")
    if isinstance(choices, list) and choices:
        return str(choices[0])
    if (schema := wanted.get("json")) is not None:
        return _met(schema)
    if wanted.get("regex") is not None or wanted.get("grammar") is not None:
        raise Refused(400, "Grammar error: the simulated engine knows choices and JSON schemas, no other grammars")
    return None


def _tool(fields: Fields, messages: Sequence[Fields]) -> Tool | None:
    """The tool to call: the one that is forced, or that the last message asks for by ``call NAME``."""
    choice, tools = fields.get("tool_choice"), fields.get("tools")
    if not tools:
        if choice not in (None, "none", "auto"):
            raise wrong("tool_choice", "When using `tool_choice`, `tools` must be set.")
        return None
    known = {str(function["name"]): function for function in _functions(tools)}
    if choice == "none" or not known:
        return None
    if isinstance(choice, dict):
        wanted = choice.get("function")
        name = wanted.get("name") if isinstance(wanted, dict) else None
        if not isinstance(name, str) or name not in known:
            message = "The tool specified in `tool_choice` does not match any of the specified `tools`"
            raise wrong("tool_choice", message)
        return _call(known[name], "stop")
    if choice == "required":
        return _call(next(iter(known.values())), "tool_calls")
    last = messages[-1].get("content")
    asked = re.search(r"\bcall (\w+)", last) if isinstance(last, str) and messages[-1].get("role") == "user" else None
    return _call(known[asked[1]], "tool_calls") if asked and asked[1] in known else None


def _functions(tools: Any) -> list[Fields]:
    if not isinstance(tools, list):
        raise invalid(Problem("list_type", "body.tools", "Input should be a valid list", tools))
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or "name" not in function:
            raise invalid(Problem("missing", f"body.tools.{index}.function.name", "Field required", tool))
    return [tool["function"] for tool in tools]


def _call(function: Fields, finish: str) -> Tool:
    schema = function.get("parameters") or {"type": "object"}
    return Tool(str(function["name"]), _met(schema), finish)
