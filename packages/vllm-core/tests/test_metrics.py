"""What Prometheus reads."""

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllm_core import Engine, EngineConfig, SamplingParams
from vllm_core.metrics import Histogram
from vllm_traits.fake_backend import FakeBackend


def read(engine: Engine) -> dict[str, float]:
    text = generate_latest(engine.metrics.registry).decode()
    return {
        sample.name + str(sample.labels.get("finished_reason", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def test_a_served_request_is_counted_and_gauges_return_to_zero() -> None:
    now = 100.0
    engine = Engine(FakeBackend(), config=EngineConfig(), clock=lambda: now, model_name="m")
    engine.add_request("a", list(range(40)), SamplingParams(temperature=0, max_tokens=3))
    assert read(engine)["vllm:num_requests_waiting"] == 1
    now += 1
    engine.step()
    running = read(engine)
    assert running["vllm:num_requests_running"] == 1
    assert running["vllm:kv_cache_usage_perc"] > 0
    while engine.has_unfinished_requests():
        now += 2
        engine.step()
    engine.add_request("b", list(range(40)), SamplingParams(temperature=0, max_tokens=1))
    engine.step()
    engine.add_request("c", [1], SamplingParams())
    engine.abort("c")
    end = read(engine)
    assert end["vllm:num_requests_running"] == end["vllm:num_requests_waiting"] == end["vllm:kv_cache_usage_perc"] == 0
    assert end["vllm:prompt_tokens_total"] == 80
    assert end["vllm:generation_tokens_total"] == 4
    assert end["vllm:prefix_cache_queries_total"] == 80
    assert end["vllm:prefix_cache_hits_total"] == 32
    assert end["vllm:request_success_totallength"] == 2
    assert end["vllm:request_success_totalabort"] == 1
    assert end["vllm:time_to_first_token_seconds_count"] == 2
    assert end["vllm:time_to_first_token_seconds_sum"] == 1
    assert end["vllm:inter_token_latency_seconds_count"] == 2
    assert end["vllm:inter_token_latency_seconds_sum"] == 4
    assert end["vllm:e2e_request_latency_seconds_sum"] == 5


def test_buckets_are_cumulative_and_bounds_inclusive() -> None:
    histogram = Histogram([1, 2.5])
    for value in (0.5, 1, 2, 3):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 2), ("2.5", 3), ("+Inf", 4)]
    assert histogram.sum == 6.5
