"""Numbers as Prometheus reads them: whole, cumulative, and never more of them than allowed."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from gateway.metrics import GAP_SECONDS, OTHER, OVERHEAD_SECONDS, SECONDS, Histogram, Metrics
from gateway.serving.meter import Usage
from gateway.serving.ticket import Outcome, Ticket

Labels = frozenset[tuple[str, str]]


def scraped(metrics: Metrics) -> dict[str, dict[Labels, float]]:
    """What a scraper finds: samples by name and labels; a sample that stands twice fails."""
    samples: dict[str, dict[Labels, float]] = defaultdict(dict)
    for family in text_string_to_metric_families(metrics.render().decode()):
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")
        for sample in family.samples:
            labels = frozenset(sample.labels.items())
            assert labels not in samples[sample.name], sample
            samples[sample.name][labels] = sample.value
    return samples


def labels(**pairs: str) -> Labels:
    return frozenset(pairs.items())


def served(metrics: Metrics, model: str = "m", tenant: str = "t", outcome: Outcome = Outcome.OK) -> Ticket:
    """Run one request through its ticket."""
    ticket = Ticket(metrics, lambda *_: None, "req_1", "/v1/chat/completions", 100.0)
    ticket.tenant = tenant
    ticket.serve(model, stream=True)
    ticket.mark(100.2, 1)
    ticket.mark(100.5, 3)
    ticket.usage = Usage(10, 4, 6)
    ticket.settle(outcome, 200, 101.0)
    return ticket


def test_a_request_is_counted_everywhere_once() -> None:
    metrics = Metrics(10)
    served(metrics)
    found = scraped(metrics)
    assert found["forebay_requests_total"] == {labels(model="m", tenant="t", outcome="ok"): 1}
    assert found["forebay_tokens_total"] == {
        labels(model="m", tenant="t", kind="in"): 10,
        labels(model="m", tenant="t", kind="out"): 4,
        labels(model="m", tenant="t", kind="cached"): 6,
    }
    assert found["forebay_in_flight"][labels(model="m")] == 0
    assert found["forebay_ttft_seconds_count"][labels(model="m")] == 1
    assert round(found["forebay_ttft_seconds_sum"][labels(model="m")], 6) == 0.2
    assert found["forebay_inter_token_seconds_count"][labels(model="m")] == 3
    assert round(found["forebay_inter_token_seconds_sum"][labels(model="m")], 6) == 0.3
    assert found["forebay_request_seconds_count"][labels(model="m")] == 1
    assert found["forebay_request_seconds_sum"][labels(model="m")] == 1


def test_every_outcome_is_a_label_of_its_own() -> None:
    metrics = Metrics(10)
    for outcome in Outcome:
        served(metrics, outcome=outcome)
    found = scraped(metrics)["forebay_requests_total"]
    assert found == {labels(model="m", tenant="t", outcome=outcome.value): 1 for outcome in Outcome}


def test_in_flight_is_what_runs_now() -> None:
    metrics = Metrics(10)
    ticket = Ticket(metrics, lambda *_: None, "req_1", "/x", 0)
    ticket.serve("m", stream=False)
    assert scraped(metrics)["forebay_in_flight"][labels(model="m")] == 1
    ticket.settle(Outcome.CLIENT_GONE, 499, 1)
    assert scraped(metrics)["forebay_in_flight"][labels(model="m")] == 0


# Only half a surrogate pair cannot be a name: what reads bodies and configuration refuses it.
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | st.sampled_from(
    ["a", "b", OTHER, 'quo"te', "back\\slash", "line\nbreak", "ü", ""]
)


@given(pairs=st.lists(st.tuples(NAMES, NAMES), max_size=12), bound=st.integers(1, 4))
def test_labels_are_bounded_and_nothing_is_lost(pairs: list[tuple[str, str]], bound: int) -> None:
    """Whatever the names, also those that need escapes: beyond the bound they are counted together."""
    metrics = Metrics(bound)
    for model, tenant in pairs:
        served(metrics, model, tenant)
    found = scraped(metrics)
    assert sum(found["forebay_requests_total"].values()) == len(pairs)
    assert sum(found["forebay_ttft_seconds_count"].values()) == len(pairs)
    for name in ("model", "tenant"):
        values = {value for sample in found["forebay_requests_total"] for key, value in sample if key == name}
        assert len(values - {OTHER}) <= bound
    assert len(found["forebay_in_flight"]) <= bound + 1


def test_a_model_beyond_the_bound_is_other_in_every_series() -> None:
    """The same name for the same thing, so that panels can divide one by the other."""
    metrics = Metrics(2)
    for model in ("", "a", "b", "c"):
        served(metrics, model)
    found = scraped(metrics)
    assert {dict(sample)["model"] for sample in found["forebay_requests_total"]} == {"", "a", OTHER}
    assert {dict(sample)["model"] for sample in found["forebay_in_flight"]} == {"", "a", OTHER}
    assert found["forebay_ttft_seconds_count"][labels(model=OTHER)] == 2


BOUNDS = st.sampled_from([SECONDS, GAP_SECONDS, OVERHEAD_SECONDS, (1.0,), (0.0, 1.0)])


@given(bounds=BOUNDS, data=st.data())
def test_buckets_are_cumulative_and_inclusive(bounds: tuple[float, ...], data: st.DataObject) -> None:
    """Equal to counting anew for each bound."""
    values = st.floats(0, 1000) | st.sampled_from(bounds)
    observed = data.draw(st.lists(st.tuples(values, st.integers(1, 3)), max_size=15))
    histogram = Histogram(bounds)
    for seconds, times in observed:
        histogram.observe(seconds, times)
    everything = [seconds for seconds, times in observed for _ in range(times)]
    rows = histogram.buckets()
    assert [float(bound) for bound, _ in rows] == [*bounds, float("inf")]
    assert [count for _, count in rows] == [
        sum(1 for v in everything if v <= bound) for bound in (*bounds, float("inf"))
    ]
    assert abs(histogram.total - sum(everything)) <= 1e-6 * max(1, sum(everything))


def test_bounds_rise() -> None:
    for bounds in (SECONDS, GAP_SECONDS, OVERHEAD_SECONDS):
        assert list(bounds) == sorted(set(bounds))


def test_the_rest_is_there_from_the_start() -> None:
    """A counter that only appears with its first count cannot be alerted on."""
    metrics = Metrics(10)
    found = scraped(metrics)
    assert found["forebay_client_retries_total"] == {labels(): 0}
    assert found["forebay_config_reloads_total"] == {labels(result="ok"): 0, labels(result="refused"): 0}
    assert {dict(sample)["stage"] for sample in found["forebay_overhead_seconds_count"]} == {
        "auth",
        "policy",
        "connect",
    }
    metrics.reloaded(True)
    metrics.reloaded(False)
    metrics.client_retries += 1
    metrics.upstream_failed("e", "connect")
    metrics.upstream_failed("e", "connect")
    metrics.endpoint_state("e", True, 3)
    metrics.endpoint_state("f", False, 0)
    found = scraped(metrics)
    assert set(found["forebay_config_reloads_total"].values()) == {1}
    assert found["forebay_upstream_errors_total"] == {labels(endpoint="e", reason="connect"): 2}
    assert found["forebay_endpoint_up"] == {labels(endpoint="e"): 1, labels(endpoint="f"): 0}
    assert found["forebay_endpoint_in_flight"] == {labels(endpoint="e"): 3, labels(endpoint="f"): 0}
    metrics.endpoint_gone("e")
    metrics.endpoint_gone("never")
    assert set(scraped(metrics)["forebay_endpoint_up"]) == {labels(endpoint="f")}


def test_a_scrape_may_run_while_series_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in a thread. Here the event loop gets its turn at the worst moments: between any two samples."""
    metrics = Metrics(10_000)
    served(metrics)
    metrics.upstream_failed("e", "broken")
    metrics.endpoint_state("e", True, 1)
    added = 0

    def take_a_turn() -> None:
        nonlocal added
        added += 1
        served(metrics, f"m{added}", f"t{added}")
        metrics.tenant("m", "t").outcomes[f"outcome {added}"] = 1
        metrics.upstream_failed(f"e{added}", "broken")
        metrics.endpoint_state(f"e{added}", True, added)
        metrics.endpoint_state(f"f{added}", False, 0)
        metrics.endpoint_gone(f"e{added - 1}")

    for family in (CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily):
        add_metric = family.add_metric

        def interrupted(*args: Any, add_metric: Any = add_metric, **named: Any) -> None:
            add_metric(*args, **named)
            take_a_turn()

        monkeypatch.setattr(family, "add_metric", interrupted)
    found = scraped(metrics)
    assert added > 10
    assert found["forebay_requests_total"][labels(model="m", tenant="t", outcome="ok")] == 1
    monkeypatch.undo()
    assert len(scraped(metrics)["forebay_in_flight"]) == added + 2
