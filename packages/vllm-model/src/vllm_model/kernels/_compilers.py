# mypy: disable-error-code="no-untyped-call, attr-defined, import-not-found, import-untyped, unused-ignore"
"""Kernels compiled by several processes at once, into Triton's cache on disk.

Threads would wait for each other: much of Triton's compiler is Python. The processes are forked, so that they have all modules
at once; they use nothing of the device, and nothing that another thread may have held at that moment. They exchange JSON with
their parent through one socket that keeps messages apart: whoever is free takes the next. What they leave undone, for whatever
reason, is compiled when it is launched.
"""

import gc
import json
import os
import signal
import socket
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from threading import Thread
from typing import Any

from triton.compiler import make_backend
from triton.runtime import driver

from vllm_model.kernels._launchers import build_launcher

Job = tuple[str, str, str]
"""One kernel: its module, its name there, and Triton's JSON of how it is launched."""
MOST_PROCESSES = 16
LONGEST_WAIT = 60
"""Seconds without a compiled kernel after which no more is waited for."""
MESSAGE_BYTES = 1 << 16


@dataclass(frozen=True)
class Prepared:
    """What Triton does once before it compiles, in a thread.

    Attributes:
        target: What for, its ``GPUTarget``: it builds a module in C to ask.
        keys: It has read all of itself for the keys of its cache; what is forked later knows these.
    """

    target: "Future[Any]"
    keys: "Future[None]"


@cache
def prepare() -> Prepared:
    """Begin it, once a process."""

    def read() -> None:
        make_backend(target.result()).hash()
        with suppress(ImportError):
            from triton.runtime.cache import triton_key

            triton_key()

    pool = ThreadPoolExecutor(1)
    target = pool.submit(lambda: driver.active.get_current_target())
    keys = pool.submit(read)
    pool.shutdown(wait=False)
    return Prepared(target, keys)


def compile_jobs(
    jobs: Sequence[Job], target: Any, *, later: Sequence[Job] = (), others: Iterable[Callable[[], object]] = ()
) -> Thread | None:
    """Compile kernels in their order: the slow ones had better be the first.

    Args:
        jobs: It returns when these are compiled.
        target: What for, Triton's ``GPUTarget``.
        later: These are compiled behind them, while the caller goes on.
        others: What is done by threads at the same time; it returns when that is done too.

    Returns:
        What ends when all is done; None if nothing is left.
    """
    order = [*dict.fromkeys([*jobs, *later])]
    crew = _Crew(order, target) if order else None  # forked before there are threads
    with ThreadPoolExecutor(MOST_PROCESSES) as pool:
        running = [pool.submit(other) for other in others]
        if crew is not None:
            crew.wait(len(set(jobs)))
    for each in running:
        each.result()
    if crew is None:
        return None
    rest = Thread(target=crew.finish, name="compilers", daemon=True)
    rest.start()
    return rest


class _Crew:
    """Processes at work.

    Args:
        jobs: All that they will do.
        target: What for.
    """

    def __init__(self, jobs: Sequence[Job], target: Any) -> None:
        self._jobs, self._left, self._sent = jobs, set(range(len(jobs))), 0
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(1.0)
        processes = min(len(jobs), len(os.sched_getaffinity(0)), MOST_PROCESSES)
        with theirs:
            self._pids = [_fork(theirs, self._socket, target) for _ in range(processes)]
        for _ in range(processes):
            self._send()

    def wait(self, number: int) -> None:
        """Until the first jobs are done, so many, or the processes are in trouble."""
        quiet = 0
        while quiet < LONGEST_WAIT and any(index < number for index in self._left):
            try:
                self._left.discard(int(self._socket.recv(MESSAGE_BYTES)))
            except TimeoutError:
                quiet += 1
                if any(_has_ended(pid) for pid in self._pids):
                    return
                continue
            except (OSError, ValueError):  # nobody is there any more
                return
            quiet = 0
            self._send()

    def finish(self) -> None:
        """Wait for all jobs, then for the processes."""
        self.wait(len(self._jobs))
        self._socket.close()  # so they end
        for pid in self._pids:
            with suppress(OSError):
                if self._left:
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def _send(self) -> None:
        """One more job, for whoever is free."""
        if self._sent < len(self._jobs):
            with suppress(OSError):
                self._socket.send(json.dumps([self._sent, *self._jobs[self._sent]]).encode())
            self._sent += 1


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
    gc.disable()  # nothing of the parent's is given back here, tensors of the device least of all
    while message := jobs.recv(MESSAGE_BYTES):
        index, module, name, specialization = json.loads(message)
        with suppress(Exception):
            build_launcher(getattr(import_module(module), name).preload(specialization))
        jobs.send(str(index).encode())


def _has_ended(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return True


class _Absent:
    """A driver of a device that this process must not touch."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0
