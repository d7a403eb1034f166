"""What the simulated engine tells of itself at ``/metrics``, under vLLM's names. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from engines.simulation.batching import EngineModel, Finished

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
FINISH_REASONS = ("stop", "length", "abort", "error")


class Histogram:
    """Observations of seconds, in buckets."""

    def __init__(self) -> None:
        self.buckets = [0] * (len(_SECONDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """Count a duration, ``times`` over."""
        self.buckets[bisect_left(_SECONDS, seconds)] += times
        self.sum += seconds * times

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Yield it in Prometheus' text format."""
        yield f"# TYPE {name} histogram"
        count = 0
        for limit, bucket in zip((*map(str, _SECONDS), "+Inf"), self.buckets, strict=True):
            count += bucket
            yield f'{name}_bucket{{{labels},le="{limit}"}} {float(count)}'
        yield f"{name}_count{{{labels}}} {float(count)}"
        yield f"{name}_sum{{{labels}}} {self.sum}"


class Figures:
    """Counts of whole requests; everything else is the model's."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.ended: Counter[str] = Counter()
        self.refused = 0
        self.first_token = Histogram()
        self.between_tokens = Histogram()
        self.whole = Histogram()
        self.queue = Histogram()

    def finished(self, outcome: Finished, reason: str) -> None:
        """Note a sequence that is through. Between its tokens its mean is noted: no step is looked at for this."""
        self.ended[reason] += 1
        self.first_token.observe((outcome.first_token - outcome.arrived) / 1e9)
        self.whole.observe((outcome.at - outcome.arrived) / 1e9)
        self.queue.observe((outcome.started - outcome.arrived) / 1e9)
        gaps = outcome.tokens - 1
        if gaps > 0:
            self.between_tokens.observe((outcome.at - outcome.first_token) / 1e9 / gaps, gaps)

    def text(self, model: EngineModel, seconds: float) -> str:
        """Return the page. ``seconds`` is the time of day, the value of ``lora_requests_info``."""
        labels = f'engine="0",model_name="{_escaped(self.model_name)}"'
        lines = [*_gauges(model, labels), *_counters(model, labels)]
        lines.append("# TYPE vllm:request_success_total counter")
        lines += [
            f'vllm:request_success_total{{{labels},finished_reason="{reason}"}} {float(self.ended[reason])}'
            for reason in FINISH_REASONS
        ]
        name = "vllm:admission_rejections_total"
        lines.append(f'{name}{{{labels},reason="max_num_queued_reqs"}} {float(self.refused)}')
        lines += self.first_token.lines("vllm:time_to_first_token_seconds", labels)
        lines += self.between_tokens.lines("vllm:inter_token_latency_seconds", labels)
        lines += self.whole.lines("vllm:e2e_request_latency_seconds", labels)
        lines += self.queue.lines("vllm:request_queue_time_seconds", labels)
        lines.append(_adapters(model, seconds))
        return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _gauges(model: EngineModel, labels: str) -> Iterator[str]:
    for name, value in (
        ("num_requests_running", model.running),
        ("num_requests_waiting", model.waiting),
        ("kv_cache_usage_perc", model.cache_used),
    ):
        yield f"# TYPE vllm:{name} gauge"
        yield f"vllm:{name}{{{labels}}} {float(value)}"
    yield f'vllm:num_requests_waiting_by_reason{{{labels},reason="capacity"}} {float(model.waiting)}'


def _counters(model: EngineModel, labels: str) -> Iterator[str]:
    counters = model.counters
    for name, value in (
        ("prefix_cache_queries", counters.prompt_tokens),
        ("prefix_cache_hits", counters.cached_tokens),
        ("num_preemptions", counters.preemptions),
        ("prompt_tokens", counters.prompt_tokens),
        ("generation_tokens", counters.generated_tokens),
    ):
        yield f"# TYPE vllm:{name} counter"
        yield f"vllm:{name}_total{{{labels}}} {float(value)}"


def _adapters(model: EngineModel, seconds: float) -> str:
    def listed(names: Sequence[str]) -> str:
        return _escaped(",".join(sorted(names)))

    running, waiting = listed(model.running_adapters), listed(model.waiting_adapters)
    labels = f'max_lora="{model.profile.max_loras}",running_lora_adapters="{running}",waiting_lora_adapters="{waiting}"'
    return f"vllm:lora_requests_info{{{labels}}} {seconds}"
