"""What the simulated engine reads and says: pieces that stand for tokens, and answers that tell who gave them.

An answer begins with its identity, which a test can read back:

    model=smollm2 adapter=support@3f2a version=0c41d2aa93be prompt=5d8a6c1f0b7e choice=0: ...

``version`` is a digest of the adapter's files as they were when it was loaded (``none`` without an adapter), ``prompt``
of the rendered prompt. Names are percent-encoded. What follows are words drawn from a hash of the identity (and of
``seed`` where a request has one), so that the same request has the same answer on every engine and every day.

An answer that is to be continued (``continue_final_message``, or a completion of a rendered chat) is keyed on the
prompt as it was before the answer began: the continuation is what would have come.

Pure: no I/O, no clock, no randomness.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from statistics import NormalDist
from urllib.parse import quote, unquote

import msgspec

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
GENERATION = f"{TURN_START}assistant\n"
_SPECIAL = re.compile(r"(<\|im_(?:start|end)\|>)")
_PIECE = re.compile(r" ?[!-~]{1,5}|[\s\S]")
_IDENTITY = re.compile(r"model=(\S+) adapter=(\S+) version=(\S+) prompt=([0-9a-f]{12}) choice=(\d+):")
_SYLLABLES = [consonant + vowel for consonant in "bdfghklmnprstvwz" for vowel in "aeiou"]
# The lengths of answers in the Azure conversation trace of 2023: log-normal, in tokens.
_LENGTH_MU, _LENGTH_SIGMA, _LEAST_WORDS = 5.02, 0.86, 8
_NORMAL = NormalDist()


class Identity(msgspec.Struct, frozen=True):
    """Who gave an answer, and to what."""

    model: str
    adapter: str | None
    version: str | None
    prompt: str
    choice: int = 0

    def text(self) -> str:
        """Return it as the beginning of an answer."""
        model, adapter = quote(self.model, safe=""), quote(self.adapter or "none", safe="@:")
        who = f"model={model} adapter={adapter} version={self.version or 'none'}"
        return f"{who} prompt={self.prompt} choice={self.choice}:"


def read_identity(text: str) -> Identity | None:
    """Return the identity an answer begins with; None when it does not, as when it was cut short."""
    found = _IDENTITY.match(text)
    if found is None:
        return None
    model, adapter, version, prompt, choice = found.groups()
    return Identity(
        unquote(model),
        None if adapter == "none" else unquote(adapter),
        None if version == "none" else version,
        prompt,
        int(choice),
    )


def prompt_digest(prompt: str) -> str:
    """Return the 12 hexadecimal digits that stand for a rendered prompt."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:12]


# --- tokens ------------------------------------------------------------------------------------------------------


def pieces(text: str) -> list[str]:
    """Split text into what counts as tokens here: about four characters of English each; ``"".join`` undoes it."""
    found: list[str] = []
    for index, part in enumerate(_SPECIAL.split(text)):
        if index % 2:
            found.append(part)
        else:
            found += _PIECE.findall(part)
    return found


def token_id(piece: str) -> int:
    """Return a number for a piece, below 2**53; ``piece_of`` undoes it."""
    if piece in (TURN_START, TURN_END):
        return 1 if piece == TURN_START else 2
    return int.from_bytes(b"\x01" + piece.encode("utf-8", "surrogatepass"), "big")


def piece_of(number: int) -> str:
    """Return the piece of a number; a number that is none stands for itself."""
    if number in (1, 2):
        return TURN_START if number == 1 else TURN_END
    data = number.to_bytes((number.bit_length() + 7) // 8, "big")
    try:
        return data[1:].decode() if data[:1] == b"\x01" and 1 < len(data) <= 7 else f" #{number}"
    except UnicodeDecodeError:
        return f" #{number}"


def render(messages: Sequence[tuple[str, str]], *, open_end: bool, answer_next: bool = True) -> str:
    """Return a chat as one text. With ``open_end`` the last message goes on, else ``answer_next`` begins an answer."""
    turns = [f"{TURN_START}{role}\n{content}{TURN_END}\n" for role, content in messages]
    if open_end and turns:
        turns[-1] = turns[-1].removesuffix(f"{TURN_END}\n")
        return "".join(turns)
    return "".join(turns) + (GENERATION if answer_next else "")


def split_answer(prompt: str) -> tuple[str, str]:
    """Return a prompt as it was before the answer began, and what there is of the answer."""
    head, mark, begun = prompt.rpartition(GENERATION)
    if not mark or TURN_END in begun:
        return prompt, ""
    return head + mark, begun


def prefix_hashes(tokens: Sequence[str], size: int, *apart: str | None) -> list[int]:
    """Return a hash for each full unit of ``size`` tokens, over everything before it; ``apart`` separates caches."""
    state = repr(apart).encode()
    found = []
    for end in range(size, len(tokens) + 1, size):
        unit = "\0".join(tokens[end - size : end]).encode("utf-8", "surrogatepass")
        state = hashlib.blake2b(unit, digest_size=8, key=state[:64]).digest()
        found.append(int.from_bytes(state, "big"))
    return found


# --- answers -----------------------------------------------------------------------------------------------------


def _bytes(key: str) -> Iterator[int]:
    number = 0
    while True:
        yield from hashlib.blake2b(f"{key}/{number}".encode()).digest()
        number += 1


def _words(key: str) -> Iterator[str]:
    """Yield words without end, each one piece."""
    source = _bytes(key)
    for first in source:
        second, third = next(source), next(source)
        word = " " + _SYLLABLES[first % len(_SYLLABLES)]
        if second & 3:
            word += _SYLLABLES[second % len(_SYLLABLES)]
        yield word + "." if third < 24 and len(word) < 6 else word


def _natural_length(key: str) -> int:
    """Return how many words an answer has when nothing stops it."""
    share = (int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") + 0.5) / 2**32
    return max(_LEAST_WORDS, round(math.exp(_LENGTH_MU + _LENGTH_SIGMA * _NORMAL.inv_cdf(share))))


def answer(identity: Identity, *, seed: int | None = None, begun: str = "", least: int = 0) -> Iterator[str]:
    """Yield the pieces of the answer after what has ``begun``; of at least ``least`` pieces.

    When ``begun`` is not how this answer begins, another one follows it, keyed on that text too.
    """
    key = f"{identity.text()}{seed}"
    head = pieces(identity.text())
    # What has begun is no part of the pieces that are asked for.
    whole = chain(head, islice(_words(key), max(_natural_length(key), least + len(pieces(begun)))))
    if not begun:
        yield from whole
        return
    text = ""
    for piece in whole:
        text += piece
        if len(text) >= len(begun):
            break
        if not begun.startswith(text):
            break
    if text.startswith(begun):
        yield from pieces(text[len(begun) :])
        yield from whole
    else:
        key += prompt_digest(begun)
        yield from islice(_words(key), max(_natural_length(key), least))


def logprobs_of(piece: str, index: int, top: int) -> list[tuple[str, float]]:
    """Return a piece with its log-probability, and after it the ``top`` - 1 next likely ones with theirs."""
    source = _bytes(f"{piece}/{index}")
    likely = -next(source) / 512
    found = [(piece, likely)]
    words = _words(f"{piece}/{index}/others")
    while len(found) < top:
        found.append((next(words), found[-1][1] - (1 + next(source)) / 64))
    return found


def vector(text: str, size: int) -> list[float]:
    """Return an embedding of length 1."""
    values = [value - 127.5 for value in islice(_bytes(text), size)]
    norm = math.sqrt(sum(value * value for value in values))
    return [value / norm for value in values]
