"""What is asked when, by whom and with which words: a scenario and its seed drawn out into requests. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice
from typing import Any

from loadtests.scenarios.schema import Klass, Scenario

# Words that are one token for most vocabularies, and for the simulated engine.
_WORDS = """
able also area away back bank base bear bed best bird blue boat body book born both busy call calm camp card care case
city coal coat cold cook cool corn cost dark date deal deep door down draw drop dust each east easy edge even face fact
fair fall farm fast fear feel fill film find fine fire fish flat flow food foot form four free full game gate gift girl
give gold good gray grow half hall hand hard head hear heat help hill hold hole home hope hour idea iron item jump keep
kind king knee know lake land lane last late lead left less life lift like line list live load long look lose loud love
made main make many mark meal mean meet mile milk mill mind moon more move much name near neck need news next nice nine
north note ocean open oven page pair park part past path peak pick plan play pond pool poor post pull push quay race
rain read real rest rich ride ring rise road rock roof room root rope rose rule safe sail salt sand seat seed sell send
ship shop show sick side sign sing site size skin slow snow soft soil some song soon sort star stay stem step stop such
suit take talk tall team tell ten tent test than them then they thin this tide time tiny tool town tree true tune turn
unit upon vast very view wait walk wall warm wash wave week well west what wide wild wind wine wing wish wood word work
yard year zero
""".split()  # noqa: SIM905 - to be read
_BOOK = random.Random("a book").choices(_WORDS, k=8192)


def words(count: int, chance: random.Random) -> str:
    """So many words of a text that nobody else has: its first two are drawn for it, so no cache knows it."""
    own = chance.getrandbits(40)
    head = [f"{own >> 20:05x}", f"{own & 0xFFFFF:05x}"]
    start = own % len(_BOOK)
    return " ".join([*head, *islice(cycle(_BOOK), start, start + max(0, count - 2))][:count])


@dataclass(frozen=True, slots=True)
class Planned:
    """A request, or the first of a session, that is to begin ``at`` seconds after the run has begun. ``chance`` is what
    its further randomness is drawn from; ``input``, ``output``: tokens, where a trace says them."""

    number: int
    at: float
    klass: str
    tenant: str
    key: str
    turns: int
    phase: str = ""
    input: int | None = None
    output: int | None = None
    seed: str = ""


def plan(scenario: Scenario) -> list[Planned]:
    """All requests of a scenario in the order they begin; the same for the same seed, and one class draws the same
    whatever the other classes are. BadScenarioError."""
    keys: dict[str, list[str]] = {}
    for tenant, _, secret in scenario.secrets():
        keys.setdefault(tenant, []).append(secret)
    found = [one for name, klass in scenario.classes.items() for one in _class(scenario, name, klass, keys)]
    found.sort(key=lambda one: one.at)
    return found


def _class(scenario: Scenario, name: str, klass: Klass, keys: dict[str, list[str]]) -> Iterator[Planned]:
    chance = random.Random(f"{scenario.seed}/{name}")
    tenants, weights = list(klass.tenants), list(accumulate(klass.tenants.values()))
    for number, arrival in enumerate(klass.arrivals.draw(scenario.seconds, chance)):
        (tenant,) = chance.choices(tenants, cum_weights=weights)
        yield Planned(
            number,
            arrival.at,
            name,
            tenant,
            chance.choice(keys[tenant]),
            _turns(klass, chance),
            arrival.phase,
            arrival.input,
            arrival.output,
            f"{scenario.seed}/{name}/{number}",
        )


def _turns(klass: Klass, chance: random.Random) -> int:
    turns = 1
    if klass.session is not None:
        stays = 1 - 1 / klass.session.turns
        while turns < klass.session.most and chance.random() < stays:
            turns += 1
    return turns


def share(planned: Sequence[Planned], number: int, of: int) -> list[Planned]:
    """What the ``number``-th (from 1) of several client processes asks."""
    return list(planned[number - 1 :: of])


class Conversation:
    """The bodies of a planned request, turn by turn."""

    def __init__(self, planned: Planned, klass: Klass, model: str) -> None:
        self._planned = planned
        self._klass = klass
        self._model = klass.model or model
        self._chance = random.Random(planned.seed)
        self._messages: list[dict[str, str]] = []
        self.turn = 0
        if klass.shared:
            self._messages.append({"role": "system", "content": instructions(planned.klass, klass.shared)})

    @property
    def chance(self) -> random.Random:
        """What all that is drawn for it is drawn from."""
        return self._chance

    def ask(self) -> dict[str, Any]:
        """Return the body of the next turn."""
        klass, planned = self._klass, self._planned
        if self.turn == 0:
            asked = planned.input or klass.input.draw(self._chance)
        else:
            assert klass.session is not None
            asked = klass.session.adds.draw(self._chance)
        self._messages.append({"role": "user", "content": words(asked, self._chance)})
        output = planned.output or klass.output.draw(self._chance)
        body: dict[str, Any] = {"model": self._model, "max_tokens": output}
        if klass.exact_output:
            body["ignore_eos"] = True
        if klass.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if klass.path == "/v1/completions":
            body["prompt"] = "\n".join(message["content"] for message in self._messages)
        else:
            body["messages"] = list(self._messages)
        self.turn += 1
        return {**body, **klass.body}

    def answered(self, text: str) -> float | None:
        """Note an answer; return after how many seconds the next question comes, None when there is none."""
        session = self._klass.session
        if session is None or self.turn >= self._planned.turns:
            return None
        self._messages.append({"role": "assistant", "content": text})
        return self._chance.expovariate(1 / session.pause) if session.pause else 0.0


def instructions(klass: str, tokens: int) -> str:
    """What all requests of a class begin with."""
    return words(tokens, random.Random(f"instructions of {klass}"))
