"""What one sequence will say, decided when its request is read: every token, and why it ends.

Pure.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate, islice

import msgspec

from engines.simulation.bodies import Job, Prompt, Tool
from engines.simulation.speech import Identity, answer, pieces


class Choice(msgspec.Struct):
    """One answer. ``tokens`` are pieces of text, the last one empty when the sequence ended by itself, and with a tool
    the first one stands for its name. ``text`` is what the client gets of them in the end."""

    index: int
    tokens: list[str]
    text: str
    finish: str
    stop_reason: str | None = None
    tool: Tool | None = None
    held_back: int = 0
    """Characters that a stream keeps back since they may be the beginning of a stop string."""
    ends: list[int] = []
    """Where each token ends in the text of all of them; only filled where something is held back."""

    def shown(self, tokens: int) -> int:
        """Return how many characters a stream has shown after so many tokens."""
        if tokens >= len(self.tokens):
            return len(self.text)
        return max(0, min(self.ends[tokens - 1] - self.held_back, len(self.text))) if tokens else 0

    def piece(self, token: int) -> str:
        """Return what a stream shows with a token, counted from 0; nothing when it is all held back."""
        if not self.held_back:
            return self.tokens[token]
        return self.text[self.shown(token) : self.shown(token + 1)]


def plan(job: Job, prompt: Prompt, identity: Identity, index: int, room: int) -> Choice:
    """Return what a sequence will say in at most ``room`` tokens."""
    limit = room if job.max_tokens is None else min(room, job.max_tokens)
    if job.tool is not None:
        return _calling(job.tool, index, limit)
    source: Iterator[str]
    if job.said is not None:
        source = iter(pieces(job.said))
    else:
        least = limit if job.ignore_eos else job.min_tokens
        source = answer(identity, seed=job.seed, begun=prompt.begun, least=least)
    tokens = list(islice(source, limit))
    finish = "length"
    if len(tokens) < limit:
        tokens.append("")
        finish = "stop"
    text = "".join(tokens)
    choice = Choice(index, tokens, text, finish)
    if job.stop:
        _stop(choice, job)
    return choice


def _stop(choice: Choice, job: Job) -> None:
    """End it at the first stop string there is."""
    found = [(choice.text.find(stop), stop) for stop in job.stop]
    hits = [(at + len(stop), at, stop) for at, stop in found if at >= 0]
    choice.held_back = 0 if job.include_stop else max(len(stop) for stop in job.stop) - 1
    choice.ends = list(accumulate(len(piece) for piece in choice.tokens))
    if not hits:
        return
    end, at, stop = min(hits)
    count = max(bisect_left(choice.ends, end) + 1, 1)
    if count <= job.min_tokens:
        return
    choice.tokens = choice.tokens[:count]
    choice.text = choice.text[: end if job.include_stop else at]
    choice.finish, choice.stop_reason = "stop", stop
    # Where the end comes in the middle of a token, what follows it there is not shown.
    choice.held_back = max(choice.held_back, 1)


def _calling(tool: Tool, index: int, limit: int) -> Choice:
    tokens = ["", *pieces(tool.arguments), ""]
    finish = tool.finish
    if len(tokens) > limit:
        tokens, finish = tokens[:limit], "length"
    return Choice(index, tokens, "".join(tokens), finish, tool=tool)
