"""Where a step's time goes on the CPU: the compiled kernels on a real model, by rows, and by phase within a step.

    python benchmarks/profile_cpu.py [MODEL] [--quantization int8] [--dtype float32] [--threads 2]

Prints the memory's read speed first, as threads of the same number reach it, and what share of it a step of one row reads
weights at. Medians of 30 steps (3 of long ones); phases by a library built with -DPROFILE, to standard error.
"""

import argparse
import ctypes
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from vllm_model import load_backend, native, resolve_model
from vllm_model.machine import usable_cores
from vllm_model.native import build
from vllm_model.native_backend import NativeBackend
from vllm_traits import Batch, BatchState

CASES = [(1, 1, 160), (1, 1, 900), (2, 1, 160), (4, 1, 160), (8, 1, 160), (16, 1, 160), (32, 1, 160), (1, 17, 300), (4, 512, 0)]
"""Rows, tokens a row, tokens before them."""


def kernels_that_tell(folder: Path) -> ctypes.CDLL:
    """The variant that would run, built with -DPROFILE."""
    chosen = native.load_kernels()
    assert chosen is not None, "there are no compiled kernels"
    build.build(folder, options=("-DPROFILE",))
    name = Path(chosen._name).stem.removeprefix("libkernels-")
    kernels = native._typed(ctypes.CDLL(str(build.library_path(name, folder))))
    assert kernels.set_threads(1) == 0
    print(f"variant {name}")
    return kernels


def read_speed(threads: int) -> float:
    """Bytes a second of a sum over 800 MB."""
    torch.set_num_threads(threads)
    numbers = torch.ones(200_000_000)
    times = []
    for _ in range(7):
        began = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - began)
    return numbers.nbytes / min(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--quantization")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=usable_cores())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kernels = kernels_that_tell(Path(folder))
    native.load_kernels.cache_clear()
    for module in ("vllm_model.backend", "vllm_model.native_backend"):
        __import__(module, fromlist=[""]).load_kernels = lambda: kernels
    backend = load_backend(
        resolve_model(args.model), dtype=args.dtype, device="cpu", quantization=args.quantization, num_threads=args.threads
    )
    assert isinstance(backend, NativeBackend), "this model does not run on the compiled kernels"
    state = BatchState(32, 2048, 16)
    state.block_tables[:] = np.arange(32 * 128, dtype=np.int32).reshape(32, 128)
    backend.initialize(state, num_blocks=32 * 128, max_num_batched_tokens=4096)
    rng = np.random.default_rng(0)

    def step(rows: int, tokens: int, before: int) -> None:
        batch = Batch(
            step_id=0,  # type: ignore[arg-type]
            state=state,
            slots=np.arange(rows, dtype=np.int32),
            seq_ids=tuple(range(rows)),  # type: ignore[arg-type]
            token_ids=rng.integers(0, backend.config.vocab_size, rows * tokens).astype(np.int32),
            query_start=(np.arange(rows + 1) * tokens).astype(np.int32),
            num_computed=np.full(rows, before, np.int32),
            sample=np.ones(rows, np.bool_),
            num_draft=np.zeros(rows, np.int32),
            changed_slots=np.zeros(0, np.int32),
        )
        backend._logits(backend._hidden(batch, batch.query_start[1:].astype(np.int64) - 1))

    ceiling = read_speed(args.threads)
    weights = backend._native.nbytes if backend._native is not None else 0
    print(f"memory is read at {ceiling / 1e9:.1f} GB/s; the weights are {weights / 1e6:.0f} MB")
    for rows, tokens, before in CASES:
        times = []
        for turn in range(32 if rows * tokens < 100 else 5):
            if turn == 2:
                kernels.profile(0)
            began = time.perf_counter()
            step(rows, tokens, before)
            times.append(time.perf_counter() - began)
        took = statistics.median(times[2:])
        share = f", {weights / took / ceiling:.0%} of the memory's speed" if rows * tokens == 1 else ""
        print(
            f"{rows} rows of {tokens} behind {before}: {took * 1e3:.2f} ms, {rows * tokens / took:.0f} tokens/s{share}",
            flush=True,
        )
        kernels.profile(1)


if __name__ == "__main__":
    main()
