"""Bodies of any form are read into a job or refused, never anything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from engines.simulation import bodies
from engines.simulation.bodies import Job, Limits, Refused
from engines.simulation.choices import plan
from engines.simulation.schema import least_instance
from engines.simulation.speech import Identity
from tests.support.examples import examples
from tests.support.table import each

LIMITS = Limits("m", 300)
GOOD: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hello, call look"}],
    "prompt": "Hello",
    "input": "Hello",
    "max_tokens": 5,
}
READERS = (bodies.read_chat, bodies.read_completion, bodies.read_messages, bodies.read_responses)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 400) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "function", "name", "parameters", "role", "content", "text", "choice", "json_schema"]
            )
            | st.sampled_from(
                ["schema", "properties", "required", "items", "enum", "anyOf", "allOf", "$ref", "minimum"]
            ),
            inner
            | st.sampled_from(["function", "json_schema", "object", "array", "string", "integer", "text", "look"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)
fields = st.dictionaries(
    st.sampled_from(
        [
            "messages",
            "prompt",
            "input",
            "max_tokens",
            "max_completion_tokens",
            "max_output_tokens",
            "n",
            "stop",
            "stop_sequences",
            "temperature",
            "top_p",
            "logprobs",
            "top_logprobs",
            "seed",
            "stream",
            "stream_options",
            "tools",
            "tool_choice",
            "response_format",
            "structured_outputs",
            "echo",
            "continue_final_message",
            "add_generation_prompt",
            "min_tokens",
            "ignore_eos",
            "priority",
            "cache_salt",
            "model",
            "suffix",
            "system",
            "instructions",
            "return_token_ids",
            "include_stop_str_in_output",
        ]
    ),
    anything,
    max_size=5,
)


@settings(max_examples=examples(60))
@given(fields, st.sampled_from(READERS))
def test_any_body_is_a_job_or_refused(changed: dict[str, Any], read: Callable[[dict[str, Any], Limits], Job]) -> None:
    """And a job can be planned within its room."""
    try:
        job = read({**GOOD, **changed}, LIMITS)
    except Refused as refused:
        assert 400 <= refused.status < 500
        return
    for prompt in job.prompts:
        room = LIMITS.max_model_len - len(prompt.tokens)
        choice = plan(job, prompt, Identity("m", None, None, "0" * 12), 0, room)
        assert 1 <= len(choice.tokens) <= room
        shown = "".join(choice.piece(index) for index in range(len(choice.tokens)))
        assert shown == choice.text


@each(
    ("schema", "value"),
    [
        ({"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]}, {"a": 3}),
        ({"type": "array", "items": {"enum": ["x"]}, "minItems": 2}, ["x", "x"]),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "string", "minLength": 6}}}, "wordaa"),
        ({"anyOf": [{"type": "zzz"}, {"type": "boolean"}]}, True),
        ({"allOf": [{"properties": {"b": {"const": 1}}}, {"required": ["b"]}]}, {"b": 1}),
        ({"type": "number", "exclusiveMaximum": 0}, -1),
        ({"type": "integer", "multipleOf": 5, "minimum": 7}, 10),
    ],
)
def test_the_least_instance_of_a_schema(schema: dict[str, Any], value: object) -> None:
    assert least_instance(schema) == value
