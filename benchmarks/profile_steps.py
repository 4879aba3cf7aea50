"""Where the time of a step goes: wall and host time of decode steps, and their kernels.

    python benchmarks/profile_steps.py MODEL_FOLDER [rows:context | prefill:length ...]

Weights are random. For each case: microseconds of a step by the clock, of schedule, submit, wait and commit on the host, the
sum of its kernels on the device, and the kernels by total time.
"""

import sys
import time
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vllm_core import SamplingParams
from vllm_model import LLM

STEPS = 50


class Clock:
    """Adds up the time that calls of one method take."""

    def __init__(self, owner: Any, name: str) -> None:
        self.total, self._call = 0.0, getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._call(*args)
        finally:
            self.total += time.perf_counter() - start


def steps(llm: LLM, count: int) -> float:
    """Seconds of a step."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        llm.engine.step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def report(seen: Any, title: str, wall: float, count: int) -> None:
    """The kernels of ``count`` steps by total time."""
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name].append(event.time_range.elapsed_us())
    busy, calls = sum(map(sum, kernels.values())) / count, sum(map(len, kernels.values())) / count
    print(f"\n== {title}: step {wall * 1e6:.0f} us, kernels {busy:.0f} us, {calls:.0f} a step")
    for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:16]:
        print(f"   {sum(times) / count:8.1f} us  {len(times) / count:6.1f} x {sum(times) / len(times):7.2f}  {name[:100]}")


def case(llm: LLM, clocks: dict[str, Clock], rows: int, context: int) -> None:
    """One load of equal sequences, decoding."""
    engine = llm.engine
    for row in range(rows):
        prompt = [(row * 7919 + i * 31 + context) % 100000 for i in range(context)]
        engine.add_request(f"{rows}-{context}-{row}", prompt, SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=400))
    state = engine.scheduler.state
    while engine.scheduler.num_waiting or (state.num_tokens[[s.slot for s in engine.scheduler.running]] <= context).any():
        engine.step()
    steps(llm, 10)
    for clock in clocks.values():
        clock.total = 0.0
    wall = steps(llm, STEPS)
    host = {name: clock.total / STEPS * 1e6 for name, clock in clocks.items()}
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        steps(llm, 5)
    report(seen, f"{rows} rows, {context} tokens", wall, 5)
    print("   host:", ", ".join(f"{name} {us:.0f}" for name, us in host.items()))
    for row in range(rows):
        engine.abort(f"{rows}-{context}-{row}")
    while engine.has_unfinished_requests():
        engine.step()


def prefill(llm: LLM, length: int) -> None:
    """Prompts of one length, one after the other."""

    def run(salt: int) -> float:
        prompts = [[(row * 7919 + i * 31 + salt * 1013) % 100000 for i in range(length)] for row in range(8)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        llm.generate(prompts, SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=1, detokenize=False), use_tqdm=False)
        return (time.perf_counter() - start) / 8

    run(1)
    wall = run(2)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run(3)
    report(seen, f"prompts of {length}", wall, 8)


def main() -> None:
    """Run the cases of the command line."""
    start = time.perf_counter()
    llm = LLM(sys.argv[1], load_format="dummy", max_model_len=8192, gpu_memory_utilization=0.8, skip_tokenizer_init=True)
    print(f"load {time.perf_counter() - start:.1f} s")
    engine = llm.engine
    clocks = {
        "schedule": Clock(engine.scheduler, "schedule"),
        "submit": Clock(engine.target_model, "submit"),
        "commit (with the wait)": Clock(engine, "_commit"),
        "commit": Clock(engine.scheduler, "commit"),
        "record": Clock(engine, "_record"),
    }
    for each in sys.argv[2:] or ["1:256", "64:640", "256:600", "prefill:4096"]:
        rows, context = each.split(":")
        if rows == "prefill":
            prefill(llm, int(context))
        else:
            case(llm, clocks, int(rows), int(context))


if __name__ == "__main__":
    main()
