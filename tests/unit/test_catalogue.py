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


def test_a_name_that_stands_for_others_is_a_model_to_whoever_asks() -> None:
    """It promises the context that each of them has, keeps its date over a reload, and goes with its declaration."""
    catalogue = Catalogue()
    catalogue.learn([Model("a", 1, 4096), Model("b", 1, 2048), Model("c", 3)])
    catalogue.publish({"both": ("a", "b"), "some": ("a", "c"), "c": ("c",), "away": ("away",)}, 50)
    assert catalogue.resolve("both") == Model("both", 50, 2048)
    assert catalogue.resolve("some") == Model("some", 50)
    assert (catalogue.resolve("c"), catalogue.resolve("away")) == (Model("c", 3), Model("away", 50))
    catalogue.publish({"both": ("a",), "new": ("b",)}, 60)
    assert catalogue.resolve("both") == Model("both", 50, 4096)
    assert [model.name for model in catalogue.list()] == ["a", "b", "both", "c", "new"]
    catalogue.publish({}, 70)
    assert catalogue.resolve("both") is None
