"""Which algorithm of cuBLASLt is faster than torch's choice: measured by ``benchmarks/tune_library.py`` on an H200."""

from vllm_model.kernels.library_linear import Algorithm

ALGORITHMS: dict[tuple[int, int, int], Algorithm] = {
    (8, 4096, 4096): Algorithm(66, 10, 35, 1, 0, 1, 1, 0, 2),  # o: 13.1 to 11.3 us
    (8, 4096, 12288): Algorithm(66, 10, 35, 1, 0, 1, 1, 0, 2),  # down: 30.8 to 27.4 us
    (8, 24576, 4096): Algorithm(66, 448, 35, 1, 0, 1, 1, 0, 5),  # gate and up: 54.7 to 49.9 us
    (16, 4096, 4096): Algorithm(66, 312, 35, 1, 0, 0, 7, 0, 2),  # o: 13.4 to 11.4 us
    (72, 4096, 12288): Algorithm(66, 314, 35, 1, 0, 0, 1, 0, 2),  # down: 32.4 to 29.6 us
    (80, 4096, 12288): Algorithm(66, 314, 35, 1, 0, 1, 3, 0, 5),  # down: 33.4 to 29.6 us
    (88, 4096, 12288): Algorithm(66, 315, 35, 1, 0, 0, 5, 0, 5),  # down: 33.4 to 29.9 us
    (96, 4096, 4096): Algorithm(66, 27, 35, 1, 0, 1, 2, 0, 7),  # o: 15.4 to 13.1 us
    (104, 4096, 12288): Algorithm(66, 316, 35, 1, 0, 1, 3, 0, 5),  # down: 34.9 to 31.0 us
    (112, 4096, 4096): Algorithm(66, 27, 35, 1, 0, 0, 0, 0, 2),  # o: 15.6 to 12.7 us
    (120, 4096, 4096): Algorithm(66, 27, 35, 1, 0, 0, 0, 0, 2),  # o: 14.7 to 12.6 us
    (120, 4096, 12288): Algorithm(66, 18, 35, 2, 2, 1, 6, 0, 5),  # down: 34.6 to 33.2 us
    (128, 4096, 4096): Algorithm(66, 15, 35, 1, 0, 1, 0, 0, 5),  # o: 14.2 to 12.7 us
    (128, 24576, 4096): Algorithm(66, 208, 35, 1, 0, 1, 2, 0, 5),  # gate and up: 59.9 to 57.2 us
    (144, 4096, 4096): Algorithm(66, 317, 35, 1, 0, 0, 1, 0, 5),  # o: 15.5 to 12.5 us
    (144, 4096, 12288): Algorithm(66, 400, 35, 2, 2, 1, 5, 0, 2),  # down: 37.0 to 35.2 us
    (160, 4096, 4096): Algorithm(66, 398, 35, 1, 0, 0, 1, 0, 2),  # o: 18.9 to 14.3 us
    (176, 4096, 4096): Algorithm(66, 164, 35, 1, 0, 0, 0, 0, 2),  # o: 18.1 to 14.1 us
    (176, 4096, 12288): Algorithm(66, 401, 35, 2, 2, 1, 5, 0, 5),  # down: 41.0 to 37.5 us
    (176, 6144, 4096): Algorithm(66, 401, 35, 1, 0, 1, 5, 0, 5),  # QKV: 26.4 to 19.7 us
    (192, 4096, 4096): Algorithm(66, 164, 35, 1, 0, 1, 0, 0, 2),  # o: 19.9 to 14.6 us
    (192, 4096, 12288): Algorithm(66, 32, 35, 4, 2, 0, 6, 0, 2),  # down: 53.7 to 41.4 us
    (192, 6144, 4096): Algorithm(66, 183, 35, 1, 0, 0, 0, 0, 2),  # QKV: 23.1 to 19.9 us
    (208, 4096, 4096): Algorithm(66, 135, 35, 1, 0, 1, 6, 0, 7),  # o: 18.7 to 17.1 us
    (208, 4096, 12288): Algorithm(66, 402, 35, 2, 2, 0, 1, 0, 3),  # down: 44.5 to 41.0 us
    (224, 4096, 4096): Algorithm(66, 125, 35, 1, 0, 0, 4, 0, 4),  # o: 20.3 to 16.6 us
    (224, 4096, 12288): Algorithm(66, 414, 35, 4, 2, 1, 7, 0, 2),  # down: 46.8 to 45.1 us
    (224, 6144, 4096): Algorithm(66, 165, 35, 1, 0, 1, 4, 0, 2),  # QKV: 26.7 to 23.3 us
    (224, 24576, 4096): Algorithm(66, 403, 35, 1, 0, 0, 1, 0, 5),  # gate and up: 84.9 to 73.5 us
    (240, 4096, 4096): Algorithm(66, 18, 35, 1, 0, 0, 0, 0, 2),  # o: 18.2 to 16.0 us
    (240, 4096, 12288): Algorithm(66, 18, 35, 1, 0, 1, 0, 0, 2),  # down: 49.9 to 43.0 us
    (240, 6144, 4096): Algorithm(66, 28, 35, 1, 0, 0, 4, 0, 2),  # QKV: 24.6 to 22.8 us
    (256, 4096, 4096): Algorithm(66, 18, 35, 1, 0, 0, 0, 0, 2),  # o: 18.0 to 17.2 us
    (512, 24576, 4096): Algorithm(66, 189, 35, 1, 0, 0, 0, 0, 5),  # gate and up: 164.8 to 157.9 us
    (2048, 24576, 4096): Algorithm(66, 201, 35, 1, 0, 1, 2, 0, 5),  # gate and up: 617.4 to 580.6 us
    (4096, 6144, 4096): Algorithm(66, 197, 35, 1, 0, 1, 2, 0, 5),  # QKV: 315.0 to 297.9 us
    (4096, 24576, 4096): Algorithm(66, 201, 35, 1, 0, 0, 2, 0, 5),  # gate and up: 1218.0 to 1152.2 us
}
"""By rows, outputs and inputs, in bfloat16: Qwen3-8B's products, torch's choice and this, with cuBLASLt 13.1; with another
version the table is not used.

Rows are those of steps: of graphs with prompts 512, 1024, 2048, 4096; of graphs without 8 to 128 by eights, then to 256 by
sixteens. What is fastest for one number of rows is not for the next, so no other rows take an algorithm from here.
"""


def choose_algorithm(rows: int, n: int, k: int) -> Algorithm | None:
    """The algorithm of the product of ``rows`` rows with ``n`` outputs and ``k`` inputs; None: torch's choice."""
    return ALGORITHMS.get((rows, n, k))
