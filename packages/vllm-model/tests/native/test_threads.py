"""Threads of the compiled kernels: how many there are changes nothing but the time, and none is waited for in vain."""

import subprocess
import sys
from ctypes import CDLL

import pytest
import torch

from vllm_model.native import PackedWeight, load_kernels

SET_UP = """
import os, signal, sys, time
import torch
from vllm_model.native import PackedWeight, load_kernels
kernels = load_kernels()
torch.manual_seed(0)
weight = PackedWeight(kernels, torch.randn(2048, 64))
x = torch.randn(7, 64)
expected = weight(x, dot=False)
def check(times=50):
    for _ in range(times):
        assert torch.equal(weight(x, dot=False), expected)
"""
CHANGES = """
for i in range(300):
    kernels.set_threads(1 + i % 4)
    check(1)
    if i % 30 == 0:
        time.sleep(0.02)  # the threads go to sleep
        check(2)
        time.sleep(0.02)
"""
FORK = """
kernels.set_threads(3)
check()
if "asleep" in sys.argv:
    time.sleep(0.1)
child = os.fork()
if not child:
    signal.alarm(30)  # not to outlive a test that gives up
check()
if "threads" in sys.argv and not child:
    kernels.set_threads(2)
for _ in range(5):
    time.sleep(0.02)
    check()
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def run(program: str, *arguments: str) -> None:
    """In a process of its own, which may hang."""
    if load_kernels() is None:
        pytest.skip("there are no compiled kernels")
    command = [sys.executable, "-W", "ignore", "-c", SET_UP + program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_any_number_of_threads_gives_the_same(kernels: CDLL) -> None:
    torch.manual_seed(0)
    weight, x = PackedWeight(kernels, torch.randn(700, 96)), torch.randn(150, 96)
    results = []
    for threads in (1, 2, 3, 7):
        kernels.set_threads(threads)
        results += [weight(x[:rows], dot=False) for rows in (1, 5, 150)]
    for i, result in enumerate(results):
        torch.testing.assert_close(result, results[i % 3])


def test_no_threads_and_too_many(kernels: CDLL) -> None:
    weight, x = PackedWeight(kernels, torch.eye(64)), torch.randn(3, 64)
    for threads in (0, -5, 1 << 20):
        assert kernels.set_threads(threads) == 0
        assert torch.equal(weight(x, dot=False), x)


def test_their_number_changes_while_they_are_idle() -> None:
    run(CHANGES)


@pytest.mark.parametrize("arguments", [(), ("asleep",), ("threads",), ("asleep", "threads")], ids="-".join)
def test_a_forked_child_computes(arguments: tuple[str, ...]) -> None:
    """It has none of its parent's threads, and may have its own."""
    run(FORK, *arguments)
