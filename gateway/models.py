"""What public names stand for beyond the model of that name: shares of several, copies, and others to fall back on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from gateway.policy.split import Arm, Split
from gateway.values import Name, PositiveDuration, Section

MOST_FALLBACKS = 4
"""Of one name: each may cost its client another wait, and an engine another request that breaks it."""

Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class ModelRoute(Section):
    """One of the models that serve a name."""

    model: Name
    """A model that engines serve."""
    weight: Weight = 1.0
    """Its part of the requests, beside those of the others; 0: none."""
    device: Literal["cpu", "cuda", "ascend"] | None = None
    """Only engines on such a device (`upstreams[].device`); any when left out."""


class ModelMirror(Section):
    """Copies of requests, whose answers nobody sees and nobody pays for."""

    model: Name
    """A model that engines serve, and that gets them."""
    share: Annotated[float, Field(gt=0, le=1)]
    """Part of the requests that is copied."""
    timeout: PositiveDuration = 60.0
    """How long a copy may take."""


class PublicModel(Section):
    """What a public name stands for: a name of its own, or that of a model that engines serve."""

    routes: tuple[ModelRoute, ...] = ()
    """Models that share its requests; the model of this very name when left out."""
    sticky: Literal["key", "session"] = "key"
    """Whose requests stay with one model: those of a key (of an address where there are no keys), or of a session
    (`prompt_cache_key`, else `user`, else the key)."""
    mirror: ModelMirror | None = None
    """Copies of its requests for another model."""
    fallback: Annotated[tuple[Name, ...], Field(max_length=MOST_FALLBACKS)] = ()
    """Models that serve its requests, the first that can, while nothing of an answer has reached the client and no
    engine can take it, or those that were asked failed; each only for keys that may use it."""

    @model_validator(mode="after")
    def _useful(self) -> PublicModel:
        if not self.routes and self.mirror is None and not self.fallback:
            raise ValueError("says nothing; write routes, mirror or fallback")
        if self.routes and not any(route.weight for route in self.routes):
            raise ValueError("routes: all weigh 0; give at least one of them a weight")
        named = [(route.model, route.device) for route in self.routes]
        if len(set(named)) < len(named):
            raise ValueError("routes: one of them is there twice; add their weights")
        if len(set(self.fallback)) < len(self.fallback):
            raise ValueError("fallback: one of them is there twice; it would be asked once")
        return self


# --- checks ------------------------------------------------------------------------------------------------------


def problems_with(
    models: Mapping[str, PublicModel], served: Iterable[str] | None, devices: Iterable[str | None]
) -> Iterator[str]:
    """Say what does not fit together. ``served``: every model there will ever be, None where engines are asked;
    ``devices``: those of the endpoints."""
    known, there = None if served is None else sorted({*served}), {*devices}
    for name, public in models.items():
        for place, model in _named(public):
            where = f"models.{name}.{place}"
            if model != name and model in models and models[model].routes:
                yield f"{where}: {model!r} has routes of its own; name a model that engines serve"
            elif known is not None and model not in known:
                near = difflib.get_close_matches(model, known, n=1)
                yield f"{where}: no upstream serves it; {f'did you mean {near[0]}?' if near else 'add it to one'}"
        if known is not None and not public.routes and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            yield f"models.{name}: no upstream serves it; " + (
                f"did you mean {near[0]}?" if near else "give it routes, or add it to one"
            )
        if name in public.fallback:
            yield f"models.{name}.fallback: falls back on itself; take it out"
        for index, route in enumerate(public.routes):
            if route.device is not None and there and route.device not in there:
                yield f"models.{name}.routes[{index}].device: no upstream has device: {route.device}"


def _named(public: PublicModel) -> Iterator[tuple[str, str]]:
    """Every model that a name stands for, with its place."""
    for index, route in enumerate(public.routes):
        yield f"routes[{index}].model", route.model
    if public.mirror is not None:
        yield "mirror.model", public.mirror.model
    for index, model in enumerate(public.fallback):
        yield f"fallback[{index}]", model


# --- what the edge goes by ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Published:
    """A public name, ready to be asked. ``split`` None: one model serves it."""

    arms: tuple[Arm, ...]
    split: Split | None
    by_session: bool
    fallback: tuple[Arm, ...]
    mirror: ModelMirror | None

    def pick(self, subject: int) -> Arm:
        """Return what serves a subject."""
        return self.arms[0] if self.split is None else self.arms[self.split.pick(subject)]


def published(models: Mapping[str, PublicModel]) -> dict[str, Published]:
    """Return what every name stands for that something is said of."""
    return {name: _published(name, public) for name, public in models.items()}


def _published(name: str, public: PublicModel) -> Published:
    weighed = [(Arm(route.model, route.device or ""), route.weight) for route in public.routes]
    arms = tuple(arm for arm, _ in weighed) or (Arm(name),)
    return Published(
        arms=arms,
        split=Split(name, weighed) if len(weighed) > 1 else None,
        by_session=public.sticky == "session",
        fallback=tuple(Arm(model) for model in public.fallback),
        mirror=public.mirror,
    )


def aliases(models: Mapping[str, PublicModel]) -> dict[str, tuple[str, ...]]:
    """Return the names that something is said of, and the models behind each."""
    return {name: tuple(arm.model for arm in one.arms) for name, one in published(models).items()}
