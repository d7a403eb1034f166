"""The relayed paths. A row adds a path; everything else is FastAPI's.

Every row here is run on a real vLLM or replays its recording in ``tests/``.
"""

from __future__ import annotations

from gateway.serving.dialect import ANTHROPIC, OPENAI, RESPONSES, Route

_STORED = "answers are not stored here: send the whole conversation in 'input'"

RELAYED: dict[str, Route] = {
    route.path: route
    for route in (
        Route(
            "/v1/chat/completions",
            OPENAI,
            "Create a chat completion",
            token_fields=("max_completion_tokens", "max_tokens"),
            n_fields=("n",),
            streams=True,
            asks_usage=True,
            resumed="content",
            media_fields=("messages",),
            media_in_lists=True,
        ),
        Route(
            "/v1/completions",
            OPENAI,
            "Create a completion",
            token_fields=("max_tokens",),
            implied_tokens=16,
            n_fields=("n", "best_of"),
            streams=True,
            asks_usage=True,
            resumed="text",
        ),
        Route(
            "/v1/responses",
            RESPONSES,
            "Create a response",
            token_fields=("max_output_tokens",),
            streams=True,
            media_fields=("input", "previous_input_messages"),
            refused_fields=(
                ("previous_response_id", _STORED),
                ("conversation", _STORED),
                ("background", "background answers are kept by one engine only: leave the field out"),
            ),
        ),
        Route(
            "/v1/messages",
            ANTHROPIC,
            "Create a message (Anthropic's dialect)",
            token_fields=("max_tokens",),
            streams=True,
            media_fields=("messages", "system"),
        ),
        Route(
            "/v1/embeddings",
            OPENAI,
            "Create embeddings",
            media_fields=("input", "messages"),
        ),
        Route(
            "/v1/rerank",
            OPENAI,
            "Rank documents for a query",
            media_fields=("query", "documents"),
        ),
        Route(
            "/v1/score",
            OPENAI,
            "Score pairs of texts",
            media_fields=("text_1", "text_2", "data_1", "data_2", "queries", "documents", "items"),
        ),
        Route(
            "/tokenize",
            OPENAI,
            "Turn a prompt into tokens",
            charged=False,
            media_fields=("messages",),
        ),
    )
}
