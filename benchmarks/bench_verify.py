"""What a step with guesses takes on a card: replayed as a graph, and kernel by kernel.

    python benchmarks/bench_verify.py MODEL_FOLDER [--context 690] [--rows 1 8 64] [--guesses 1 4 8]

Weights are random. Prints one JSON line a shape: milliseconds (median of 30) from submit to the tokens on the host of a step
without guesses, of one with them as a graph, and of the same kernel by kernel.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from vllm_model import load_backend
from vllm_traits.batch import Batch, BatchState
from vllm_traits.ids import SeqId, StepId
from vllm_traits.sampling_params import SamplingParams

BLOCK_SIZE = 16
MAX_NUM_BATCHED_TOKENS = 4096


def step(
    state: BatchState, rows: int, computed: int, length: int, num_draft: int, *, first: int = 0, new: bool = False
) -> Batch:
    """Rows of equal length; the last ``num_draft`` of their tokens are guesses."""
    slots = np.arange(first, first + rows, dtype=np.int32)
    return Batch(
        step_id=StepId(0),
        state=state,
        slots=slots,
        seq_ids=tuple(SeqId(slot) for slot in slots.tolist()),
        token_ids=np.ascontiguousarray(state.token_ids[slots, computed : computed + length]).ravel(),
        query_start=np.arange(rows + 1, dtype=np.int32) * length,
        num_computed=np.full(rows, computed, np.int32),
        sample=np.ones(rows, np.bool_),
        num_draft=np.full(rows, num_draft, np.int32),
        changed_slots=slots if new else slots[:0],
    )


def milliseconds(run: Callable[[], Any], repeats: int = 30) -> float:
    """The median."""
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times[3:]) * 1e3, 3)


def both(backend: Any, batch: Batch) -> dict[str, float]:
    """Milliseconds of a step with guesses, one way and the other."""

    def loose() -> None:
        with backend._device.running():
            backend.steps._finisher.finish(batch, backend.steps.loose.run(batch, backend.steps._sampler.mode(batch))).result()

    return {"graph": milliseconds(lambda: backend.submit(batch).result()), "kernel by kernel": milliseconds(loose)}


def shapes(backend: Any, state: BatchState, rows: int, context: int, guesses: list[int]) -> None:
    """Measure one number of rows."""
    single = step(state, rows, context, 1, 0)
    figures = {"rows": rows, "context": context, "no guesses": milliseconds(lambda: backend.submit(single).result())}
    for num in guesses:
        print(json.dumps(figures | {"guesses": num} | both(backend, step(state, rows, context, 1 + num, num))), flush=True)


def main() -> None:
    """Parse, fill the cache, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--context", type=int, default=690)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--guesses", type=int, nargs="+", default=[1, 4, 8])
    args = parser.parse_args()
    most, context = max(args.rows), args.context
    backend: Any = load_backend(args.model, load_format="dummy", device="cuda", max_model_len=8192)
    state = BatchState(most, 8192, BLOCK_SIZE)
    state.token_ids[:, : context + 16] = np.random.default_rng(0).integers(0, 100_000, (most, context + 16))
    blocks = -(-(context + 16) // BLOCK_SIZE)
    state.block_tables[:, :blocks] = np.arange(most * blocks).reshape(most, blocks)
    state.num_blocks[:], state.num_tokens[:], state.temperature[:] = blocks, context + 1, 0.6
    state.params = [SamplingParams(temperature=0.6)] * most
    backend.initialize(state, num_blocks=most * blocks, max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS)
    for slot in range(most):
        backend.submit(step(state, 1, 0, context, 0, first=slot, new=True)).result()
    for rows in args.rows:
        shapes(backend, state, rows, context, args.guesses)


if __name__ == "__main__":
    main()
