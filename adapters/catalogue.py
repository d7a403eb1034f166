"""The public model names, and what a client may be told of each."""

from __future__ import annotations

from collections.abc import Iterable
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

    def resolve(self, name: str) -> Model | None:
        """Return the model behind a public name."""
        return self._models.get(name)

    def list(self) -> list[Model]:
        """Return every model, by name."""
        return [self._models[name] for name in sorted(self._models)]
