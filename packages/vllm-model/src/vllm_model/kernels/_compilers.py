# mypy: disable-error-code="no-untyped-call, attr-defined, import-not-found, import-untyped, unused-ignore"
"""Kernels compiled by several processes at once, into Triton's cache on disk.

Threads would wait for each other: much of Triton's compiler is Python. The processes are forked, so that they have all modules
at once; they use nothing of the device, and nothing that another thread may have held at that moment. They exchange JSON with
their parent through one socket that keeps messages apart: whoever is free takes the next. What they leave undone, for whatever
reason, is compiled when it is launched.
"""

import json
import os
import signal
import socket
import warnings
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from itertools import islice
from typing import Any

from triton.runtime import driver

from vllm_model.kernels._launchers import build_launcher

Job = tuple[str, str, str]
"""One kernel: its module, its name there, and Triton's JSON of how it is launched."""
MOST_PROCESSES = 16
LONGEST_WAIT = 60
"""Seconds without a compiled kernel after which no more is waited for."""
MESSAGE_BYTES = 1 << 16


def compile_jobs(jobs: Iterable[Job], target: Any) -> None:
    """Compile kernels, the first ones first, for a target, Triton's ``GPUTarget``."""
    messages = [json.dumps(job).encode() for job in dict.fromkeys(jobs)]
    if not messages:
        return
    with suppress(ImportError):
        from triton.runtime.cache import triton_key

        triton_key()  # which reads hundreds of megabytes: once, before there are several processes
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with mine:
        with theirs:
            pids = [
                _fork(theirs, mine, target) for _ in range(min(len(messages), len(os.sched_getaffinity(0)), MOST_PROCESSES))
            ]
        done = _exchange(mine, messages, pids)
    for pid in pids:  # they end, since nobody can send to them any more
        with suppress(OSError):
            if done < len(messages):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _exchange(mine: socket.socket, messages: list[bytes], pids: list[int]) -> int:
    """Give each process something to do until nothing is left: how many kernels are compiled."""
    left, done, quiet = iter(messages), 0, 0
    mine.settimeout(1.0)
    with suppress(OSError):  # if all of them have ended
        for message in islice(left, len(pids)):
            mine.send(message)
        while done < len(messages) and quiet < LONGEST_WAIT:
            try:
                mine.recv(MESSAGE_BYTES)
            except TimeoutError:
                quiet += 1
                if any(os.waitpid(pid, os.WNOHANG)[0] for pid in pids):
                    break
                continue
            done, quiet = done + 1, 0
            for message in islice(left, 1):
                mine.send(message)
    return done


def _fork(jobs: socket.socket, parents: socket.socket, target: Any) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, whose locks the child never asks for
        pid = os.fork()
    if pid == 0:
        try:
            parents.close()
            _work(jobs, target)
        finally:
            os._exit(0)  # without a word to what was inherited
    return pid


def _work(jobs: socket.socket, target: Any) -> None:
    """Compile what comes until nothing can come any more."""
    driver.set_active(_Absent(target))
    while message := jobs.recv(MESSAGE_BYTES):
        with suppress(Exception):
            module, name, specialization = json.loads(message)
            build_launcher(getattr(import_module(module), name).preload(specialization))
        jobs.send(b"done")


class _Absent:
    """A driver of a device that this process must not touch."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0
