"""compute-sanitizer over the kernels' tests, on a machine with a CUDA device: all that a tool finds makes this fail.

    python scripts/sanitize_kernels.py [memcheck] [racecheck] [initcheck] [synccheck]

Runs the small tests, and of the large ones some that launch the shapes that are shipped, without those of libraries' kernels
and of graphs that allocate. Only our kernels are watched, or it would take hours. Then racecheck dies of any product by
cuBLAS, also of one alone: it has no tests with those at all. Without names: memcheck and racecheck.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "packages/vllm-model/src/vllm_model"
TESTS = "packages/vllm-model/tests/kernels"
RUNS = {
    "small": ["-m", "not gpu", "-k", "not other_cards and not distribution and not library"],
    "shipped shapes": [
        "-m",
        "gpu",
        "-k",
        "(graph_follows or cluster_linear or several_queries or (16-8-128 and not dtype1 and (warp_decode or on_the_card)))"
        " and not library and not both_kinds",
    ],
}


def watched() -> list[str]:
    """The options that name our kernels."""
    sources = "\n".join(path.read_text() for path in sorted(KERNELS.rglob("*.py")))
    names = sorted(set(re.findall(r"@triton\.jit.*\ndef (_\w+_kernel)\(", sources)))
    names += [path.stem for path in sorted(KERNELS.rglob("*.cu"))]
    return [part for name in names for part in ("--kernel-name", f"kernel_substring={name}")]


def main() -> int:
    """Run the tools one after the other; the exit status is 0 only if none found anything and all tests passed."""
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = []
    for tool in sys.argv[1:] or ["memcheck", "racecheck"]:
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *watched()]
        if tool == "memcheck":
            sanitizer += ["--report-api-errors", "no"]  # the libraries ask for what a driver need not have
        for name, selection in RUNS.items():
            begun = time.monotonic()
            command = [*sanitizer, sys.executable, "-m", "pytest", "-q", "-x", "-o", "timeout=0", TESTS, *selection]
            if tool == "racecheck":
                command += ["--ignore", f"{TESTS}/test_residual_stream.py"]
            status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
            print(f"{tool}, {name}: exit status {status} after {time.monotonic() - begun:.0f} s", flush=True)
            if status:
                failed.append((tool, name))
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
