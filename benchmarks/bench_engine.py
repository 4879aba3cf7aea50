"""What the engine itself costs: schedule, submit and commit with a backend that computes nothing, one core.

    python benchmarks/bench_engine.py [--profile]

Prints one JSON line a case: microseconds of ``Engine.step`` (median, 99th percentile) for sequences that decode, and
milliseconds to find the prefix of a long prompt.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import time
from typing import Any

import numpy as np

from vllm_core import Engine, EngineConfig, SamplingParams
from vllm_traits.fake_backend import FakeBackend

STEPS = 500
RNG = np.random.default_rng(0)


def engine_of(num_blocks: int, **settings: Any) -> Engine:
    """An engine over a backend that computes nothing."""
    backend = FakeBackend(vocab_size=50_000, max_model_len=65_536, supports_overlap=True, keep_kv=False, max_draft_tokens=8)
    return Engine(backend, config=EngineConfig(num_blocks=num_blocks, max_num_waiting=10**6, **settings))


def decoding(num_seqs: int, context: int, num_blocks: int, **settings: Any) -> Engine:
    """An engine whose sequences have all run their prompts."""
    engine = engine_of(num_blocks, **settings)
    params = SamplingParams(temperature=0, max_tokens=8 * STEPS, ignore_eos=True)
    outputs = [engine.add_request(str(i), RNG.integers(0, 50_000, context).tolist(), params) for i in range(num_seqs)]
    while not all(output.outputs[0].token_ids for output in outputs):
        engine.step()
    return engine


def measure(name: str, engine: Engine, profile: bool = False) -> None:
    """Time steps, one by one."""
    times = []
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    for _ in range(STEPS):
        start = time.perf_counter()
        engine.step()
        times.append((time.perf_counter() - start) * 1e6)
    if profile:
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(20)
        return
    ordered = sorted(times)
    line = {"case": name, "median_us": round(statistics.median(times)), "p99_us": round(ordered[int(0.99 * STEPS)])}
    print(json.dumps(line), flush=True)


def prefix_lookup(length: int = 32_768, repeats: int = 9) -> None:
    """A prompt of which all but the last block is cached: keys and look-up, and the whole of adding and admitting it."""
    engine = engine_of(1 << 16)
    prompt = RNG.integers(0, 50_000, length).tolist()
    params = SamplingParams(temperature=0, max_tokens=1)
    engine.add_request("first", prompt, params)
    while engine.has_unfinished_requests():
        engine.step()
    finding, whole = [], []
    for i in range(repeats):
        start = time.perf_counter()
        engine.add_request(str(i), prompt, params)
        (sequence,) = engine._requests[str(i)].sequences
        sequence.keys.clear()
        begin = time.perf_counter()
        engine.scheduler.prefix_cache.prepare(sequence)
        hits, _ = engine.scheduler.prefix_cache.match(sequence)
        finding.append((time.perf_counter() - begin) * 1e3)
        while engine.has_unfinished_requests():
            engine.step()
        whole.append((time.perf_counter() - start) * 1e3)
        assert len(hits) == (length - 1) // 16
    line = {"case": f"prefix of {length} tokens", "keys_and_lookup_ms": round(statistics.median(finding), 2)}
    print(json.dumps(line | {"request_ms": round(statistics.median(whole), 2)}), flush=True)


def main() -> None:
    """Run every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="profile the first case instead")
    arguments = parser.parse_args()
    measure("256 decode, 512 context, 64k blocks", decoding(256, 512, 1 << 16), arguments.profile)
    if arguments.profile:
        return
    measure("256 decode, 8192 context, 256k blocks", decoding(256, 8192, 1 << 18))
    measure("256 decode, 512 context, 1M blocks", decoding(256, 512, 1 << 20))
    measure("256 decode, no prefix cache", decoding(256, 512, 1 << 16, enable_prefix_caching=False))
    for policy in ("fcfs", "priority", "lpm"):
        engine = decoding(256, 512, 1 << 16, scheduling_policy=policy)
        for i in range(10_000):
            engine.add_request(f"waits {i}", RNG.integers(0, 50_000, 64).tolist(), SamplingParams(max_tokens=8))
        measure(f"256 decode, 10,000 wait, {policy}", engine)
    measure("1 decode, 512 context", decoding(1, 512, 1 << 16))
    measure("1 decode, ngram guesses", decoding(1, 512, 1 << 16, max_draft_tokens=8, proposers=("ngram",)))
    measure("64 decode, ngram guesses", decoding(64, 512, 1 << 16, max_draft_tokens=8, proposers=("ngram",)))
    prefix_lookup()


if __name__ == "__main__":
    main()
