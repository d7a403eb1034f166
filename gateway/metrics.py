"""Every metric, once. Functions are named by event; what is hot is a plain integer until somebody scrapes.

prometheus_client writes the exposition format; its own counters and histograms take a lock and a label lookup per
call, which a stream at full speed pays per event. So the numbers live here and a collector hands them over. Labels are
bounded: a model is one of the catalogue's, and tenants beyond ``max_label_values`` become ``other``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest

from engines.protocol import EngineLoad

OTHER = "other"
"""The label of everything beyond the bound."""

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
OVERHEAD_SECONDS = (5e-06, 1e-05, 2.5e-05, 5e-05, 1e-04, 2.5e-04, 5e-04, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0)


class Histogram:
    """Counts per bucket and a sum. ``bounds`` are inclusive upper bounds in seconds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """Count ``times`` observations of the same length."""
        self.counts[bisect_left(self.bounds, seconds)] += times
        self.total += seconds * times

    def buckets(self) -> list[tuple[str, float]]:
        """Return cumulative counts by upper bound, as the exposition format has them."""
        seen = 0
        rows = []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            seen += count
            rows.append(("+Inf" if bound == float("inf") else repr(bound), float(seen)))
        return rows


class ModelSeries:
    """What is measured of one model."""

    __slots__ = ("duration", "in_flight", "inter_token", "ttft")

    def __init__(self) -> None:
        self.ttft = Histogram(SECONDS)
        self.inter_token = Histogram(GAP_SECONDS)
        self.duration = Histogram(SECONDS)
        self.in_flight = 0


class ServedSeries:
    """What is counted of a name for one of the models that serve it."""

    __slots__ = ("outcomes", "ttft")

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], int] = {}
        """By how it came to that model, and how the request ended."""
        self.ttft = Histogram(SECONDS)


class TenantSeries:
    """What is counted of one model for one tenant."""

    __slots__ = ("cached", "completion", "outcomes", "prompt")

    def __init__(self) -> None:
        self.outcomes: dict[str, int] = {}
        self.prompt = 0
        self.completion = 0
        self.cached = 0


class MirrorSeries(TenantSeries):
    """What is counted of the copies that one model gets."""

    __slots__ = ("series",)

    def __init__(self) -> None:
        super().__init__()
        self.series = ModelSeries()


class Metrics:
    """All series of one replica."""

    def __init__(self, max_label_values: int) -> None:
        self._max = max_label_values
        self._tenants: set[str] = set()
        self._models: dict[str, ModelSeries] = {}
        self._series: dict[tuple[str, str], TenantSeries] = {}
        self._served: dict[tuple[str, str], ServedSeries] = {}
        self._mirrors: dict[str, MirrorSeries] = {}
        self._mirrors_shed: dict[str, int] = {}
        self._hedges: dict[str, int] = {}
        self._upstream_errors: dict[tuple[str, str], int] = {}
        self._endpoints: dict[str, tuple[bool, int]] = {}
        self._ejections: dict[str, int] = {}
        self._cordoned: dict[str, bool] = {}
        self._restarts: dict[str, int] = {}
        self._engine_loads: dict[str, tuple[EngineLoad, float]] = {}
        self.overhead = {stage: Histogram(OVERHEAD_SECONDS) for stage in ("auth", "policy", "connect")}
        self.client_retries = 0
        self.early_retries = 0
        self.retries_denied = 0
        self._streams: dict[str, int] = {}
        self._streams_resumed: dict[tuple[str, str], int] = {}
        self._streams_ended: dict[str, int] = {}
        self._limited: dict[tuple[str, str], int] = {}
        self.limits_lost = 0
        self.shares_lost = {"untold": 0, "unread": 0, "missed": 0}
        """What gateways that share a store did not hear of whom they served: charges for which there was no room,
        messages of another version, and times one was away for longer than they are kept."""
        self._queue_refused: dict[tuple[str, str], int] = {}
        self._queue_waits: dict[str, Histogram] = {}
        self.queue: Callable[[], Iterable[tuple[str, int]]] = tuple
        """Who tells how many of each class wait."""
        self.pools: Callable[[], Iterable[tuple[str, int]]] = tuple
        """Who tells how many wait for each pool."""
        self.capacity: Callable[[], Iterable[tuple[str, int, int]]] = tuple
        """Who tells of each endpoint how many requests it is given at once, and its estimated tokens in flight."""
        self._standing: tuple[str, tuple[str, ...]] = ("", ())
        self._usage_stored = 0
        self._usage_lost: dict[str, int] = {}
        self._usage_waiting = (0, 0.0, 0)
        self.reloads = {"ok": 0, "refused": 0}
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def bound_labels(self, most: int) -> None:
        """Show at most so many tenants and models by name; those shown already stay."""
        self._max = most

    def model(self, name: str) -> ModelSeries:
        """Return a model's series; ``name`` comes from the catalogue, or is empty where none was named."""
        series = self._models.get(name)
        if series is None:
            if len(self._models) >= self._max:
                name = OTHER
            series = self._models.setdefault(name, ModelSeries())
        return series

    def tenant(self, model: str, tenant: str) -> TenantSeries:
        """Return what is counted for a tenant on a model."""
        series = self._series.get((model, tenant))
        if series is None:
            if model not in self._models and len(self._models) >= self._max:
                model = OTHER
            if tenant not in self._tenants:
                if len(self._tenants) >= self._max:
                    tenant = OTHER
                self._tenants.add(tenant)
            series = self._series.setdefault((model, tenant), TenantSeries())
        return series

    def mirror(self, model: str) -> MirrorSeries:
        """Return what is counted of the copies that a model gets; ``model`` comes from the configuration."""
        series = self._mirrors.get(model)
        if series is None:
            if len(self._mirrors) >= self._max:
                model = OTHER
            series = self._mirrors.setdefault(model, MirrorSeries())
        return series

    def mirror_shed(self, reason: str) -> None:
        """Count a copy that was not sent: nobody had room for it (`busy`), or enough of them ran (`bound`)."""
        self._mirrors_shed[reason] = self._mirrors_shed.get(reason, 0) + 1

    def hedged(self, result: str) -> None:
        """Count how a second attempt at a request ended: it `won`, `lost` or `failed`."""
        self._hedges[result] = self._hedges.get(result, 0) + 1

    def served(self, model: str, served: str, via: str, outcome: str, first: float | None) -> None:
        """Count a request for a name that stands for several models: which served it, how it came to that, how it
        ended and after how many seconds its first event came."""
        series = self._served.get((model, served))
        if series is None:
            pair = (model, served) if len(self._served) < self._max else (OTHER, OTHER)
            series = self._served.setdefault(pair, ServedSeries())
        if first is not None:
            series.ttft.observe(first)
        series.outcomes[via, outcome] = series.outcomes.get((via, outcome), 0) + 1

    def upstream_failed(self, endpoint: str, reason: str) -> None:
        """Count a failed attempt; both come from closed sets (configuration, ``Cause``)."""
        key = (endpoint, reason)
        self._upstream_errors[key] = self._upstream_errors.get(key, 0) + 1

    def stream_kept(self, resumable: str) -> None:
        """Count a stream that has ended, however: ``yes`` if it could have gone on elsewhere, or why not."""
        self._streams[resumable] = self._streams.get(resumable, 0) + 1

    def stream_resumed(self, cause: str, outcome: str) -> None:
        """Count a stream that broke off and was sent on, by what became of that; both come from closed sets."""
        key = (cause, outcome)
        self._streams_resumed[key] = self._streams_resumed.get(key, 0) + 1

    def stream_not_resumed(self, reason: str) -> None:
        """Count a stream that broke off and did not go on."""
        self._streams_ended[reason] = self._streams_ended.get(reason, 0) + 1

    def queue_refused(self, tier: str, why: str) -> None:
        """Count a request that may not wait, or waited in vain; both come from closed sets."""
        key = (tier, why)
        self._queue_refused[key] = self._queue_refused.get(key, 0) + 1

    def queue_waited(self, tier: str, seconds: float) -> None:
        """Note how long a request waited for its turn."""
        waits = self._queue_waits.get(tier)
        if waits is None:
            waits = self._queue_waits[tier] = Histogram(SECONDS)
        waits.observe(seconds)

    def endpoint_state(self, endpoint: str, healthy: bool, in_flight: int) -> None:
        """Note an endpoint's health and load."""
        self._endpoints[endpoint] = (healthy, in_flight)

    def endpoint_ejected(self, endpoint: str) -> None:
        """Count that an endpoint failed too often and gets no requests for a while."""
        self._ejections[endpoint] = self._ejections.get(endpoint, 0) + 1

    def engine_load(self, endpoint: str, load: EngineLoad, wall: float) -> None:
        """Note what an engine says of its own load at ``wall`` (Unix seconds)."""
        self._engine_loads[endpoint] = (load, wall)

    def endpoint_cordoned(self, endpoint: str, cordoned: bool) -> None:
        """Note whether somebody keeps new requests from an endpoint."""
        self._cordoned[endpoint] = cordoned

    def engine_restarted(self, endpoint: str, times: int) -> None:
        """Note how often an engine ended by itself and was started again, as its minder counts."""
        self._restarts[endpoint] = times

    def endpoint_gone(self, endpoint: str) -> None:
        """Forget an endpoint that is no longer configured."""
        for known in (self._endpoints, self._ejections, self._engine_loads, self._cordoned, self._restarts):
            known.pop(endpoint, None)

    def limited(self, scope: str, counts: str) -> None:
        """Count a request that a limit refused: whose it is and what it counts, both of closed sets."""
        self._limited[scope, counts] = self._limited.get((scope, counts), 0) + 1

    def limits_standing(self, standing: str, of: tuple[str, ...]) -> None:
        """Note by whose word requests are let in, ``of`` all there are."""
        self._standing = (standing, of)

    def in_flight(self) -> int:
        """Return how many requests are under way, those that wait included."""
        return sum(series.in_flight for series in self._models.values())

    def mean_duration(self) -> float:
        """Return the mean seconds a request took, of all so far; 1 before the first."""
        durations = [series.duration for series in self._models.values()]
        times = sum(sum(histogram.counts) for histogram in durations)
        return sum(histogram.total for histogram in durations) / times if times else 1.0

    def usage_stored(self, rows: int) -> None:
        """Count rows of the ledger that are in the database."""
        self._usage_stored += rows

    def usage_lost(self, reason: str, rows: int) -> None:
        """Count rows of the ledger that never will be."""
        self._usage_lost[reason] = self._usage_lost.get(reason, 0) + rows

    def usage_waiting(self, rows: int, seconds: float, size: int) -> None:
        """Note what is not in the database yet: rows, for how long the oldest, bytes on disk."""
        self._usage_waiting = (rows, seconds, size)

    def reloaded(self, ok: bool) -> None:
        """Count a configuration reload."""
        self.reloads["ok" if ok else "refused"] += 1

    def render(self) -> bytes:
        """Return the exposition text. Slow by nature: call it in a thread."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Hand the numbers to prometheus_client."""
        yield from self._collect_requests()
        yield from self._collect_models()
        yield from self._collect_upstreams()
        overhead = HistogramMetricFamily("forebay_overhead_seconds", "Time the gateway itself took", labels=["stage"])
        for stage, histogram in self.overhead.items():
            overhead.add_metric([stage], histogram.buckets(), histogram.total)
        yield overhead
        retries = CounterMetricFamily("forebay_client_retries", "Requests an SDK marked as a retry of its own")
        retries.add_metric([], self.client_retries)
        yield retries
        denied = CounterMetricFamily("forebay_retries_denied", "Retries elsewhere that the budget of retries forbade")
        denied.add_metric([], self.retries_denied)
        yield denied
        hedges = CounterMetricFamily(
            "forebay_hedges", "Requests sent to a second engine, by how that ended", labels=["result"]
        )
        for result, count in list(self._hedges.items()):
            hedges.add_metric([result], count)
        yield hedges
        yield from self._collect_streams()
        yield from self._collect_limits()
        yield from self._collect_queue()
        reloads = CounterMetricFamily("forebay_config_reloads", "Configuration reloads", labels=["result"])
        for result, count in self.reloads.items():
            reloads.add_metric([result], count)
        yield reloads
        yield from self._collect_usage()

    def _collect_streams(self) -> Iterator[Metric]:
        kept = CounterMetricFamily(
            "forebay_streams", "Streams that ended, by whether they could have gone on elsewhere", labels=["resumable"]
        )
        for why, count in list(self._streams.items()):
            kept.add_metric([why], count)
        resumed = CounterMetricFamily(
            "forebay_streams_resumed",
            "Times a stream broke off and was sent on, by why and what came of it",
            labels=["cause", "outcome"],
        )
        for (cause, outcome), count in list(self._streams_resumed.items()):
            resumed.add_metric([cause, outcome], count)
        ended = CounterMetricFamily(
            "forebay_streams_not_resumed", "Streams that broke off and ended with an error", labels=["reason"]
        )
        for reason, count in list(self._streams_ended.items()):
            ended.add_metric([reason], count)
        yield from (kept, resumed, ended)

    def _collect_usage(self) -> Iterator[Metric]:
        stored = CounterMetricFamily("forebay_usage_rows", "Rows of the usage ledger in the database", labels=[])
        stored.add_metric([], self._usage_stored)
        lost = CounterMetricFamily("forebay_usage_rows_lost", "Rows that were lost", labels=["reason"])
        for reason, count in list(self._usage_lost.items()):
            lost.add_metric([reason], count)
        yield from (stored, lost)
        rows, seconds, size = self._usage_waiting
        for name, told, value in (
            ("forebay_usage_waiting_rows", "Rows of the usage ledger not in the database yet", rows),
            ("forebay_usage_lag_seconds", "How long the oldest of them has been waiting", seconds),
            ("forebay_usage_spool_bytes", "Bytes of them on disk", size),
        ):
            yield GaugeMetricFamily(name, told, value=value)

    def _collect_limits(self) -> Iterator[Metric]:
        refused = CounterMetricFamily("forebay_limit_refusals", "Requests a limit refused", labels=["scope", "counts"])
        for (scope, counts), count in list(self._limited.items()):
            refused.add_metric([scope, counts], count)
        early = CounterMetricFamily("forebay_early_retries", "Requests sent again before the time they were told")
        early.add_metric([], self.early_retries)
        stands = GaugeMetricFamily(
            "forebay_limits_standing", "By whose word requests are let in: 1 for one of them", labels=["standing"]
        )
        now, of = self._standing
        for standing in of:
            stands.add_metric([standing], float(standing == now))
        lost = CounterMetricFamily("forebay_limits_lost", "Times the store of limits did not answer any more")
        lost.add_metric([], self.limits_lost)
        yield from (refused, early, stands, lost)

    def _collect_queue(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily("forebay_queue_waiting", "Requests that wait for an engine", labels=["class"])
        for tier, count in self.queue():
            waiting.add_metric([tier], count)
        pools = GaugeMetricFamily("forebay_pool_waiting", "Requests that wait for an engine of a pool", labels=["pool"])
        for pool, count in self.pools():
            pools.add_metric([pool], count)
        waits = HistogramMetricFamily(
            "forebay_queue_seconds", "Time in the queue of requests that had their turn", labels=["class"]
        )
        for tier, histogram in list(self._queue_waits.items()):
            waits.add_metric([tier], histogram.buckets(), histogram.total)
        refused = CounterMetricFamily(
            "forebay_queue_refusals", "Requests that may not wait, or waited in vain", labels=["class", "why"]
        )
        for (tier, why), times in list(self._queue_refused.items()):
            refused.add_metric([tier, why], times)
        most = GaugeMetricFamily("forebay_endpoint_limit", "Requests an endpoint is given at once", labels=["endpoint"])
        tokens = GaugeMetricFamily(
            "forebay_endpoint_tokens", "Estimated tokens of the requests at an endpoint", labels=["endpoint"]
        )
        for endpoint, limit, outstanding in self.capacity():
            most.add_metric([endpoint], limit)
            tokens.add_metric([endpoint], outstanding)
        lost = CounterMetricFamily(
            "forebay_shares_lost", "What gateways did not hear of whom the others served", labels=["what"]
        )
        for what, times in self.shares_lost.items():
            lost.add_metric([what], times)
        yield from (waiting, pools, waits, refused, most, tokens, lost)

    def _collect_requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "forebay_requests", "Requests by how they ended", labels=["model", "tenant", "outcome"]
        )
        tokens = CounterMetricFamily("forebay_tokens", "Tokens by kind", labels=["model", "tenant", "kind"])
        for (model, tenant), series in list(self._series.items()):
            for outcome, count in list(series.outcomes.items()):
                requests.add_metric([model, tenant, outcome], count)
            for kind, value in (("in", series.prompt), ("out", series.completion), ("cached", series.cached)):
                tokens.add_metric([model, tenant, kind], value)
        yield requests
        yield tokens

    def _collect_models(self) -> Iterator[Metric]:
        ttft = HistogramMetricFamily("forebay_ttft_seconds", "Time to the first event or byte", labels=["model"])
        gap = HistogramMetricFamily("forebay_inter_token_seconds", "Time between events of a stream", labels=["model"])
        duration = HistogramMetricFamily("forebay_request_seconds", "Time of whole requests", labels=["model"])
        in_flight = GaugeMetricFamily("forebay_in_flight", "Requests being served", labels=["model"])
        for model, series in list(self._models.items()):
            ttft.add_metric([model], series.ttft.buckets(), series.ttft.total)
            gap.add_metric([model], series.inter_token.buckets(), series.inter_token.total)
            duration.add_metric([model], series.duration.buckets(), series.duration.total)
            in_flight.add_metric([model], series.in_flight)
        yield from (ttft, gap, duration, in_flight)
        yield from self._collect_served()

    def _collect_served(self) -> Iterator[Metric]:
        """What serves the names that stand for several models."""
        requests = CounterMetricFamily(
            "forebay_served_requests",
            "Requests for names that stand for several models, by the model that served",
            labels=["model", "served", "via", "outcome"],
        )
        ttft = HistogramMetricFamily(
            "forebay_served_ttft_seconds", "Time to their first event or byte", labels=["model", "served"]
        )
        for (model, served), series in list(self._served.items()):
            for (via, outcome), count in list(series.outcomes.items()):
                requests.add_metric([model, served, via, outcome], count)
            ttft.add_metric([model, served], series.ttft.buckets(), series.ttft.total)
        yield from (requests, ttft)
        yield from self._collect_mirrors()

    def _collect_mirrors(self) -> Iterator[Metric]:
        """Copies: nothing else counts them."""
        requests = CounterMetricFamily(
            "forebay_mirror_requests", "Copies of requests by how they ended", labels=["model", "outcome"]
        )
        tokens = CounterMetricFamily("forebay_mirror_tokens", "Their tokens by kind", labels=["model", "kind"])
        ttft = HistogramMetricFamily(
            "forebay_mirror_ttft_seconds", "Time to their first event or byte", labels=["model"]
        )
        running = GaugeMetricFamily("forebay_mirror_in_flight", "Copies being served", labels=["model"])
        for model, counted in list(self._mirrors.items()):
            for outcome, count in list(counted.outcomes.items()):
                requests.add_metric([model, outcome], count)
            for kind, value in (("in", counted.prompt), ("out", counted.completion), ("cached", counted.cached)):
                tokens.add_metric([model, kind], value)
            ttft.add_metric([model], counted.series.ttft.buckets(), counted.series.ttft.total)
            running.add_metric([model], counted.series.in_flight)
        shed = CounterMetricFamily("forebay_mirror_shed", "Copies that were not sent", labels=["reason"])
        for reason, count in list(self._mirrors_shed.items()):
            shed.add_metric([reason], count)
        yield from (requests, tokens, ttft, running, shed)

    def _collect_upstreams(self) -> Iterator[Metric]:
        errors = CounterMetricFamily(
            "forebay_upstream_errors", "Attempts an engine did not answer well", labels=["endpoint", "reason"]
        )
        for (endpoint, reason), count in list(self._upstream_errors.items()):
            errors.add_metric([endpoint, reason], count)
        up = GaugeMetricFamily("forebay_endpoint_up", "Whether an endpoint is healthy", labels=["endpoint"])
        load = GaugeMetricFamily("forebay_endpoint_in_flight", "Requests at an endpoint", labels=["endpoint"])
        for endpoint, (healthy, in_flight) in list(self._endpoints.items()):
            up.add_metric([endpoint], float(healthy))
            load.add_metric([endpoint], in_flight)
        ejections = CounterMetricFamily(
            "forebay_endpoint_ejections", "Times an endpoint failed too often in a row", labels=["endpoint"]
        )
        for endpoint, count in list(self._ejections.items()):
            ejections.add_metric([endpoint], count)
        cordoned = GaugeMetricFamily(
            "forebay_endpoint_cordoned", "Whether new requests are kept from an endpoint", labels=["endpoint"]
        )
        for endpoint, held in list(self._cordoned.items()):
            cordoned.add_metric([endpoint], float(held))
        restarts = CounterMetricFamily(
            "forebay_engine_restarts", "Times an engine ended by itself and was started again", labels=["endpoint"]
        )
        for endpoint, times in list(self._restarts.items()):
            restarts.add_metric([endpoint], times)
        yield from (errors, up, load, ejections, cordoned, restarts)
        yield from self._collect_engines()

    def _collect_engines(self) -> Iterator[Metric]:
        """What engines say of themselves, with the moment they said it: its age tells how far to trust it."""
        requests = GaugeMetricFamily(
            "forebay_engine_requests", "Requests in an engine by its own account", labels=["endpoint", "state"]
        )
        cache = GaugeMetricFamily("forebay_engine_cache_used", "Share of an engine's KV cache", labels=["endpoint"])
        told = GaugeMetricFamily("forebay_engine_told_at_seconds", "When an engine said so", labels=["endpoint"])
        for endpoint, (load, wall) in list(self._engine_loads.items()):
            requests.add_metric([endpoint, "running"], load.running)
            requests.add_metric([endpoint, "waiting"], load.waiting)
            if load.cache_used is not None:
                cache.add_metric([endpoint], load.cache_used)
            told.add_metric([endpoint], wall)
        yield from (requests, cache, told)
