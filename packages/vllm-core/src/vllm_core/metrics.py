"""What an engine counts, under vLLM's names, so that dashboards made for it work.

Prometheus' own histograms take a microsecond an observation, too much for a token each; these take arrays. Values are read when
Prometheus asks, so a gauge can never be stale.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

# The bucket bounds are vLLM's, in seconds or tokens.
TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

LABELS = ("model_name", "engine")


class Histogram:
    """Counts by bucket and the sum.

    Args:
        bounds: Upper bounds, inclusive, ascending; one more bucket takes what is above.
    """

    def __init__(self, bounds: Iterable[float]) -> None:
        self._bounds = [float(bound) for bound in bounds]
        self.bounds = np.array(self._bounds, np.float64)
        self.counts = np.zeros(len(self.bounds) + 1, np.int64)
        self.sum = 0.0

    def observe(self, values: float | npt.NDArray[np.floating] | npt.NDArray[np.integer]) -> None:
        """Count one value or an array of them."""
        if isinstance(values, int | float):
            self.counts[bisect_left(self._bounds, values)] += 1
            self.sum += values
            return
        flat = np.asarray(values, np.float64)
        self.counts += np.bincount(np.searchsorted(self.bounds, flat), minlength=len(self.counts))
        self.sum += float(flat.sum())

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts as Prometheus wants them."""
        names = [*(f"{bound:g}" if bound != int(bound) else f"{bound:.1f}" for bound in self.bounds), "+Inf"]
        return list(zip(names, np.cumsum(self.counts).tolist(), strict=True))


class EngineMetrics(Collector):
    """One engine's numbers; ``registry`` exports them.

    Args:
        model_name: The label ``model_name``.
        max_model_len: Bounds the histograms of lengths.
        max_draft_tokens: 0: nothing is said of guesses.
        gauges: Read at export: name to value.
        info: ``vllm:cache_config_info``'s labels.
        registry: Where to register; None: a registry of its own.
    """

    def __init__(
        self,
        *,
        model_name: str,
        max_model_len: int,
        max_draft_tokens: int = 0,
        gauges: Callable[[], dict[str, float]],
        info: dict[str, str],
        registry: CollectorRegistry | None = None,
    ) -> None:
        self.labels = [model_name, "0"]
        self._gauges = gauges
        self._info = info
        lengths = [scale * step for scale in (10**i for i in range(8)) for step in (1, 2, 5) if scale * step <= max_model_len]
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.num_preemptions = 0
        self.spec_decode_num_drafts = 0
        self.spec_decode_num_draft_tokens = 0
        self.spec_decode_num_accepted_tokens_per_pos: npt.NDArray[np.int64] = np.zeros(max_draft_tokens, np.int64)
        self.request_success = {"stop": 0, "length": 0, "abort": 0}
        self.time_to_first_token = Histogram(TTFT)
        self.inter_token_latency = Histogram(ITL)
        self.e2e_request_latency = Histogram(LATENCY)
        self.request_queue_time = Histogram(LATENCY)
        self.request_prefill_time = Histogram(LATENCY)
        self.request_decode_time = Histogram(LATENCY)
        self.request_prompt_tokens = Histogram(lengths)
        self.request_generation_tokens = Histogram(lengths)
        self.iteration_tokens = Histogram(ITERATION)
        self.registry = registry if registry is not None else CollectorRegistry()
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Prometheus' way in."""
        for name, value in self._gauges().items():
            gauge = GaugeMetricFamily(f"vllm:{name}", _HELP[name], labels=LABELS)
            gauge.add_metric(self.labels, value)
            yield gauge
        counters = ["prefix_cache_queries", "prefix_cache_hits", "prompt_tokens", "generation_tokens", "num_preemptions"]
        if len(self.spec_decode_num_accepted_tokens_per_pos):
            counters += ["spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"]
            yield self._accepted_per_pos()
        for name in counters:
            counter = CounterMetricFamily(f"vllm:{name}", _HELP[name], labels=LABELS)
            counter.add_metric(self.labels, getattr(self, name))
            yield counter
        success = CounterMetricFamily("vllm:request_success", _HELP["request_success"], labels=[*LABELS, "finished_reason"])
        for reason, count in self.request_success.items():
            success.add_metric([*self.labels, reason], count)
        yield success
        for name, attribute in _HISTOGRAMS.items():
            histogram: Histogram = getattr(self, attribute)
            family = HistogramMetricFamily(f"vllm:{name}", _HELP[attribute], labels=LABELS)
            family.add_metric(self.labels, histogram.buckets(), histogram.sum)
            yield family
        info = GaugeMetricFamily("vllm:cache_config_info", "How the KV cache is set up", labels=[*LABELS, *self._info])
        info.add_metric([*self.labels, *self._info.values()], 1)
        yield info

    @property
    def spec_decode_num_accepted_tokens(self) -> int:
        """Guesses that were right."""
        return int(self.spec_decode_num_accepted_tokens_per_pos.sum())

    def _accepted_per_pos(self) -> CounterMetricFamily:
        name = "spec_decode_num_accepted_tokens_per_pos"
        counter = CounterMetricFamily(f"vllm:{name}", _HELP[name], labels=[*LABELS, "position"])
        for position, count in enumerate(self.spec_decode_num_accepted_tokens_per_pos.tolist()):
            counter.add_metric([*self.labels, str(position)], count)
        return counter


_HISTOGRAMS = {
    "time_to_first_token_seconds": "time_to_first_token",
    "inter_token_latency_seconds": "inter_token_latency",
    "e2e_request_latency_seconds": "e2e_request_latency",
    "request_queue_time_seconds": "request_queue_time",
    "request_prefill_time_seconds": "request_prefill_time",
    "request_decode_time_seconds": "request_decode_time",
    "request_prompt_tokens": "request_prompt_tokens",
    "request_generation_tokens": "request_generation_tokens",
    "iteration_tokens_total": "iteration_tokens",
}
_HELP = {
    "num_requests_running": "Sequences that hold a slot",
    "num_requests_waiting": "Sequences that wait for one",
    "kv_cache_usage_perc": "Share of the KV blocks that are held, 0 to 1",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache",
    "prefix_cache_hits": "Prompt tokens found there",
    "prompt_tokens": "Prompt tokens computed or found",
    "generation_tokens": "Tokens generated",
    "num_preemptions": "Times that a running sequence gave its blocks back",
    "spec_decode_num_drafts": "Sequences of steps that held guesses",
    "spec_decode_num_draft_tokens": "Guesses that steps held",
    "spec_decode_num_accepted_tokens": "Guesses that were right",
    "spec_decode_num_accepted_tokens_per_pos": "Guesses that were right, by their place in the draft",
    "request_success": "Finished choices by reason",
    "time_to_first_token": "From arrival to the first token",
    "inter_token_latency": "Between one token of a sequence and its next",
    "e2e_request_latency": "From arrival to the end",
    "request_queue_time": "From arrival to the first step",
    "request_prefill_time": "From the first step to the first token",
    "request_decode_time": "From the first token to the end",
    "request_prompt_tokens": "Length of prompts",
    "request_generation_tokens": "Length of outputs",
    "iteration_tokens": "Tokens run by one step",
}
