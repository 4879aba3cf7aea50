"""That the kernels compile for cards that nobody here has, and fit into their shared memory."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 99 << 10
"""Bytes of shared memory that a program can have with compute capability 8.6 and 8.9; with 8.0 it is more."""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("capability", [80, 89])
def test_kernels_fit_into_the_shared_memory(capability: int, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_for.py")
    run = subprocess.run(
        [sys.executable, str(script), str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    taken = [(name, int(size)) for name, size in (line.split() for line in run.stdout.splitlines())]
    assert len(taken) > 15
    assert [each for each in taken if each[1] > LIMIT] == []
