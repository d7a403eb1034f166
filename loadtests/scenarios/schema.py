"""A scenario's file: what is asked, by whom, how often, and what counts as served well.

`python -m loadtests.scenarios.run --help` and loadtests/scenarios/README.md teach it by example.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gateway.values import Duration
from loadtests.scenarios import arrivals, lengths
from loadtests.scenarios.arrivals import Arrival

FOLDER = Path(__file__).parent
"""Where the scenarios are that come with it."""
SECRET_VARIABLE = "FOREBAY_LOAD_SECRET"
"""What the keys of scenarios are made from; without it everybody knows them."""

Positive = Annotated[float, Field(gt=0)]
Tokens = Annotated[int, Field(ge=1)]


class BadScenarioError(Exception):
    """A scenario cannot be used; the text says where and why."""


class Part(BaseModel):
    """A part of the file: fields that it does not know are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Poisson(Part):
    """``rate`` a second, independent of each other."""

    kind: Literal["poisson"]
    rate: Positive

    def draw(self, seconds: float, chance: random.Random) -> list[Arrival]:
        """The arrivals of so many seconds."""
        return arrivals.process(self.rate, 1.0, 0.0, seconds, chance)


class Gamma(Part):
    """``rate`` a second, in bursts. ``cv``: deviation over mean of the time between two (1: Poisson, 0: a clock)."""

    kind: Literal["gamma"]
    rate: Positive
    cv: Annotated[float, Field(ge=0, le=20)]

    def draw(self, seconds: float, chance: random.Random) -> list[Arrival]:
        """The arrivals of so many seconds."""
        return arrivals.process(self.rate, self.cv, 0.0, seconds, chance)


class StepPart(Part):
    """A part of a run: ``times`` the rate, for a ``share`` of the run (relative to the other parts' shares)."""

    times: Annotated[float, Field(ge=0)]
    share: Positive = 1.0


class Steps(Part):
    """One rate after the other."""

    kind: Literal["steps"]
    rate: Positive
    cv: Annotated[float, Field(ge=0, le=20)] = 1.0
    steps: Annotated[list[StepPart], Field(min_length=1)]

    def draw(self, seconds: float, chance: random.Random) -> list[Arrival]:
        """The arrivals of so many seconds."""
        whole = sum(part.share for part in self.steps)
        parts = [arrivals.Step(part.times, part.share / whole * seconds) for part in self.steps]
        return arrivals.steps(self.rate, self.cv, parts, chance)


class Replay(Part):
    """The arrivals of a CSV file, beside the scenario's; ``input`` and ``output`` name columns of tokens, if any."""

    kind: Literal["replay"]
    file: Path
    time: str = "time"
    input: str | None = None
    output: str | None = None
    speed: Positive = 1.0

    def draw(self, seconds: float, chance: random.Random) -> list[Arrival]:
        """The arrivals of so many seconds. BadScenarioError."""
        try:
            columns = arrivals.Columns(self.time, self.input, self.output)
            return arrivals.replay(self.file, columns, self.speed, seconds)
        except (OSError, arrivals.BadTraceError) as error:
            raise BadScenarioError(str(error)) from None


Arrivals = Annotated[Poisson | Gamma | Steps | Replay, Field(discriminator="kind")]


class Length(Part):
    """Tokens: exactly one of a number (``tokens``), a published ``fit``, a ``lognormal`` [mu, sigma] and ``uniform``
    [least, most]; bounded by ``least`` and ``most``."""

    tokens: Tokens | None = None
    fit: str | None = None
    lognormal: tuple[float, float] | None = None
    uniform: tuple[Tokens, Tokens] | None = None
    least: Tokens = 1
    most: Tokens | None = None

    @model_validator(mode="after")
    def _one(self) -> Length:
        given = [one for one in (self.tokens, self.fit, self.lognormal, self.uniform) if one is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of tokens, fit, lognormal and uniform")
        if self.fit is not None and self.fit not in lengths.FITS:
            raise ValueError(f"there is no fit {self.fit!r}; there are {', '.join(lengths.FITS)}")
        return self

    def draw(self, chance: random.Random) -> int:
        """A length."""
        most = self.most
        if self.tokens is not None:
            drawn = self.tokens
        elif self.uniform is not None:
            drawn = chance.randint(*self.uniform)
        elif self.lognormal is not None:
            drawn = lengths.lognormal(*self.lognormal, chance)
        else:
            fit = lengths.FITS[str(self.fit)]
            drawn, most = lengths.lognormal(fit.mu, fit.sigma, chance), most or fit.most
        return max(self.least, min(drawn, most) if most is not None else drawn)


class Slo(Part):
    """What counts as served well: the first token within ``ttft`` of the intended start, and tokens after it no further
    apart than ``itl`` in the mean."""

    ttft: Duration
    itl: Duration | None = None


class Session(Part):
    """Several turns, each with all that was said before. ``turns``: their mean number (geometric), at most ``most``;
    ``pause``: mean seconds from an answer to the next question (exponential); ``adds``: tokens of a later question."""

    turns: Annotated[float, Field(ge=1)] = 2.5
    most: Annotated[int, Field(ge=1)] = 10
    pause: Duration = 5.0
    adds: Length


class Klass(Part):
    """One class of requests. ``shared``: tokens of instructions that all its requests begin with; ``tenants``: who
    sends them, and what share of them; ``retries``: how often a client comes back, as OpenAI's SDKs do (their own
    default is 2); ``timeout``: how long it waits for more; ``body``: further fields of the request."""

    arrivals: Arrivals
    input: Length
    output: Length
    slo: Slo
    tenants: Annotated[dict[str, Positive], Field(min_length=1)]
    path: Literal["/v1/chat/completions", "/v1/completions"] = "/v1/chat/completions"
    stream: bool = True
    shared: Annotated[int, Field(ge=0)] = 0
    session: Session | None = None
    retries: Annotated[int, Field(ge=0, le=20)] = 0
    timeout: Duration = 60.0
    exact_output: bool = True
    """Whether ``ignore_eos`` asks for exactly the drawn number of tokens; vLLM, SGLang and LMDeploy know it."""
    model: str | None = None
    body: dict[str, Any] = {}

    @model_validator(mode="after")
    def _sessions_are_chats(self) -> Klass:
        if self.session is not None and self.path != "/v1/chat/completions":
            raise ValueError("a session is a chat: its path is /v1/chat/completions")
        return self


class Tenant(Part):
    """Who asks. ``keys``: how many; ``key_env``: a variable with the one key to use instead; ``limits``, ``caps``: of
    the tenant and of its keys, as forebay.yaml has them."""

    keys: Annotated[int, Field(ge=1, le=1000)] = 1
    key_env: str | None = None
    weight: float | None = None
    limits: dict[str, Any] = {}
    caps: dict[str, Any] = {}


class Deaths(Part):
    """Engines that die: one every ``every``, in turn, by SIGKILL, started again after ``back``."""

    every: Duration
    back: Duration = 2.0


class Fleet(Part):
    """What `python -m loadtests.scenarios.run` starts when it is given no host: simulated engines and a gateway.
    ``args``: of each engine; ``gateway``: further parts of its forebay.yaml."""

    engines: Annotated[int, Field(ge=1, le=32)] = 2
    profile: str = "h100-8b"
    speed: Positive = 1.0
    args: list[str] = []
    gateway: dict[str, Any] = {}
    deaths: Deaths | None = None


class Scenario(Part):
    """A whole scenario. ``seconds``: how long requests come; ``patience``: how long the last ones are waited for;
    ``at_once``: requests one client process has under way at most: more of them start late, which is reported."""

    name: str
    about: str
    seconds: Duration
    patience: Duration = 30.0
    seed: int = 1
    at_once: Annotated[int, Field(ge=1, le=50_000)] = 2000
    model: str = "simulated"
    tenants: dict[str, Tenant] = {}
    classes: Annotated[dict[str, Klass], Field(min_length=1)]
    fleet: Fleet = Fleet()

    @model_validator(mode="after")
    def _known_tenants(self) -> Scenario:
        for name, klass in self.classes.items():
            for tenant in klass.tenants:
                if tenant not in self.tenants:
                    raise ValueError(f"classes.{name}.tenants: {tenant!r} is not one of tenants")
        return self

    def secrets(self) -> Iterator[tuple[str, int, str]]:
        """Every key: tenant, number, the key itself. BadScenarioError where a variable is not set."""
        for name, tenant in self.tenants.items():
            for number in range(1 if tenant.key_env else tenant.keys):
                yield name, number, _key(name, number, tenant.key_env)


def _key(tenant: str, number: int, variable: str | None) -> str:
    if variable is not None:
        try:
            return os.environ[variable]
        except KeyError:
            raise BadScenarioError(f"tenants.{tenant}.key_env: the variable {variable} is not set") from None
    secret = os.environ.get(SECRET_VARIABLE, "forebay")
    return "sk-load-" + hashlib.sha256(f"{secret}/{tenant}/{number}".encode()).hexdigest()[:32]


def find(name: str) -> Path:
    """The file of a scenario: a path, or the name of one that comes with it. BadScenarioError."""
    for file in (Path(name), FOLDER / f"{name}.yaml"):
        if file.is_file():
            return file
    raise BadScenarioError(f"there is no scenario {name!r}; there are {', '.join(names())}, or give a file")


def names() -> list[str]:
    """Scenarios that come with it."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load(file: Path, seconds: float | None = None, seed: int | None = None) -> Scenario:
    """Read a scenario's file. ``seconds``, ``seed``: instead of its own. BadScenarioError."""
    try:
        told = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise BadScenarioError(f"{file}: {error}") from None
    if not isinstance(told, dict):
        raise BadScenarioError(f"{file}: a scenario is a mapping with name, about, seconds and classes")
    changed = {"seconds": seconds, "seed": seed}
    told |= {name: value for name, value in changed.items() if value is not None}
    for klass in (told.get("classes") or {}).values() if isinstance(told.get("classes"), dict) else ():
        _beside(file, klass)
    try:
        return Scenario.model_validate(told)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise BadScenarioError("\n".join([f"{file}:", *lines])) from None


def _beside(file: Path, klass: Any) -> None:
    """A trace is looked for beside its scenario."""
    told = klass.get("arrivals") if isinstance(klass, dict) else None
    if isinstance(told, dict) and isinstance(told.get("file"), str):
        told["file"] = str(file.parent / told["file"])


def gateway_part(scenario: Scenario, plain_keys: bool) -> dict[str, Any]:
    """The keys and tenants of a scenario as forebay.yaml has them: keys in full, or only what tells them apart."""
    keys: list[dict[str, Any]] = []
    for tenant, number, secret in scenario.secrets():
        proof = {"key": secret} if plain_keys else {"sha256": hashlib.sha256(secret.encode()).hexdigest()}
        caps = {"caps": scenario.tenants[tenant].caps} if scenario.tenants[tenant].caps else {}
        keys.append({"name": f"load-{tenant}-{number}", "tenant": tenant, **proof, **caps})
    tenants: dict[str, Any] = {}
    for name, tenant_part in scenario.tenants.items():
        own: dict[str, Any] = {} if tenant_part.weight is None else {"weight": tenant_part.weight}
        own |= {"limits": tenant_part.limits} if tenant_part.limits else {}
        if own:
            tenants[name] = own
    return {"keys": keys, **({"limits": {"tenants": tenants}} if tenants else {})}
