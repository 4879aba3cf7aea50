"""Where the time of a start goes: seconds from a process's start to its first token, and to what lies between.

    python benchmarks/profile_start.py MODEL_FOLDER [processes]

Weights are random. Each process begins with an empty kernel cache; one more finds the cache that the last one filled. Only the
first process of a machine reads its libraries from the disk.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any


def behind(owner: Any, name: str, mark: Callable[[str], None], label: str) -> None:
    """Mark the end of each call of a function."""
    call = getattr(owner, name)

    def marked(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        mark(label)
        return result

    setattr(owner, name, marked)


def child(folder: str, begun: float) -> None:
    """Start, and print when each part was reached."""

    def mark(label: str) -> None:
        print(f"   {time.time() - begun:6.2f}  {label}", flush=True)

    mark("python")
    import torch  # noqa: F401

    mark("torch imported")
    from vllm_core import SamplingParams
    from vllm_model import LLM, llm

    mark("the project imported")
    from vllm_model.cuda.chunk_steps import ChunkSteps
    from vllm_model.cuda.loose_steps import LooseSteps
    from vllm_model.cuda_backend import CudaBackend
    from vllm_model.kernels import _launch

    mark("Triton imported")
    behind(llm, "load_backend", mark, "weights made")
    behind(_launch, "_taken_down", mark, "kernels taken down")
    behind(CudaBackend, "_compile", mark, "kernels compiled")
    behind(LooseSteps, "run_widest", mark, "widest step run")
    behind(CudaBackend, "kv_cache_budget", mark, "memory measured")
    behind(ChunkSteps, "capture_all", mark, "graphs of chunks captured")
    model = LLM(folder, load_format="dummy", max_model_len=8192, gpu_memory_utilization=0.85, skip_tokenizer_init=True)
    mark("graphs captured")
    model.generate([5, 6, 7], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    mark("first token")


def main() -> None:
    """Run the processes one after the other."""
    folder, times = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3
    for turn in range(times):
        with tempfile.TemporaryDirectory() as cache:
            for state in ["empty", *(["full"] if turn == times - 1 else [])]:
                print(f"{folder}, kernel cache {state}", flush=True)
                command = [sys.executable, __file__, "child", folder, str(time.time())]
                subprocess.run(command, env=os.environ | {"TRITON_CACHE_DIR": cache}, check=True)


if __name__ == "__main__":
    if sys.argv[1] == "child":
        child(sys.argv[2], float(sys.argv[3]))
    else:
        main()
