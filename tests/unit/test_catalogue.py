"""Names once seen stay known."""

from __future__ import annotations

from adapters.catalogue import Catalogue, Model


def test_a_name_is_learnt_once_and_its_length_later() -> None:
    """The first to tell decides when it was created: the date a client sees does not jump about."""
    catalogue = Catalogue()
    catalogue.learn([Model("b", 5), Model("a", 7, 100)])
    catalogue.learn([Model("b", 9, 2048), Model("a", 1)])
    assert catalogue.list() == [Model("a", 7, 100), Model("b", 5, 2048)]
    catalogue.learn([Model("a", 1, 4096)])
    assert catalogue.resolve("a") == Model("a", 7, 4096)


def test_only_exact_names_are_known() -> None:
    catalogue = Catalogue()
    catalogue.learn([Model("a", 1)])
    for name in ("A", "a ", "", "b"):
        assert catalogue.resolve(name) is None


def test_an_engine_that_is_away_makes_no_model_unknown() -> None:
    catalogue = Catalogue()
    catalogue.learn([Model("a", 1)])
    catalogue.learn([])
    assert catalogue.resolve("a") is not None


def test_what_no_endpoint_may_serve_any_more_is_forgotten() -> None:
    catalogue = Catalogue()
    catalogue.learn([Model("a", 1), Model("b", 1)])
    catalogue.retain(["b", "c"])
    assert [model.name for model in catalogue.list()] == ["b"]
    catalogue.learn([Model("a", 3)])
    assert catalogue.resolve("a") == Model("a", 3)
