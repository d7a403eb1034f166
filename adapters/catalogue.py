"""The public model names, and what a client may be told of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Model:
    """A public name. ``created`` is in Unix seconds, ``max_model_len`` in tokens (None: not told)."""

    name: str
    created: int
    max_model_len: int | None = None


class Catalogue:
    """Every model the gateway can name. A name once seen stays: an engine that is away makes it no less known."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._aliases: dict[str, tuple[int, tuple[str, ...]]] = {}
        """Names of their own: since when, and the models behind each."""

    def learn(self, models: Iterable[Model]) -> None:
        """Add what an engine serves; the first to tell of a name decides when it was created."""
        for model in models:
            known = self._models.get(model.name)
            if known is None:
                self._models[model.name] = model
            elif model.max_model_len is not None and model.max_model_len != known.max_model_len:
                self._models[model.name] = Model(model.name, known.created, model.max_model_len)

    def retain(self, names: Iterable[str]) -> None:
        """Forget every name that is not in ``names``: no endpoint is configured to serve it any more."""
        kept = set(names)
        self._models = {name: model for name, model in self._models.items() if name in kept}

    def publish(self, aliases: Mapping[str, tuple[str, ...]], created: int) -> None:
        """Take the names that stand for other models, all there are; one that was there keeps its date."""
        known = self._aliases
        self._aliases = {name: (known.get(name, (created,))[0], behind) for name, behind in aliases.items()}

    def resolve(self, name: str) -> Model | None:
        """Return what a public name is: a model, or a name that stands for several and promises what all of them do."""
        known, alias = self._models.get(name), self._aliases.get(name)
        if alias is None or (known is not None and alias[1] == (name,)):
            return known
        created, behind = alias
        lengths = [known.max_model_len for known in map(self._models.get, behind) if known is not None]
        told = [length for length in lengths if length is not None]
        return Model(name, created, min(told) if told and len(told) == len(behind) else None)

    def list(self) -> list[Model]:
        """Return every public name."""
        names = sorted(self._models.keys() | self._aliases.keys())
        return [model for model in map(self.resolve, names) if model is not None]
