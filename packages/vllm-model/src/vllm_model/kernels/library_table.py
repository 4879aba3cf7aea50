"""Which algorithm of cuBLASLt is faster than torch's choice: measured by ``benchmarks/tune_library.py`` on an H200."""

from vllm_model.kernels.library_linear import Algorithm

ALGORITHMS: dict[tuple[int, int, int], Algorithm] = {}
"""By rows, outputs and inputs, in bfloat16; none is measured yet, so no version of cuBLASLt is theirs.

Rows are those of steps: of graphs with prompts 512, 1024, 2048, 4096; of graphs without 8 to 128 by eights, then to 256 by
sixteens. What is fastest for one number of rows is not for the next, so no other rows take an algorithm from here.
"""


def choose_algorithm(rows: int, n: int, k: int) -> Algorithm | None:
    """The algorithm of the product of ``rows`` rows with ``n`` outputs and ``k`` inputs; None: torch's choice."""
    return ALGORITHMS.get((rows, n, k))
