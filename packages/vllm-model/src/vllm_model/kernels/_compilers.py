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
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from heapq import heappop, heappush
from importlib import import_module
from threading import Thread
from typing import Any

from triton import knobs
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
    """What Triton does once before it compiles, in threads.

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
        with suppress(ImportError):
            from triton.runtime.cache import triton_key

            triton_key()
        make_backend(target.result()).hash()

    pool = ThreadPoolExecutor(2)
    target = pool.submit(lambda: driver.active.get_current_target())
    keys = pool.submit(read)
    pool.shutdown(wait=False)
    return Prepared(target, keys)


class Crew:
    """Processes that compile kernels while more are found out.

    Each is forked for a kernel that none is free for, so before there are threads that matter. Where the context ends, all that
    is not for later is waited for, unless by an exception.

    Args:
        target: What for, Triton's ``GPUTarget``.

    Attributes:
        rest: Behind the context, what ends when the rest is done and the processes have ended; None if there are none.
    """

    def __init__(self, target: Any) -> None:
        self.rest: Thread | None = None
        self._target = target
        self._known: set[Job] = set()
        self._waiting: list[tuple[bool, int, int, Job]] = []
        """A heap of jobs that were not given out: whether later, how short, which."""
        self._left: dict[int, bool] = {}
        """Jobs that are not done, and whether they are for later."""
        self._others: list[Callable[[], object]] = []
        self._pids: list[int] = []
        self._busy = 0
        self._socket, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def add(self, job: Job, length: int, *, later: bool = False) -> None:
        """One more kernel, if it is new.

        Args:
            job: Which.
            length: Of its source: what is long takes long, and begun last it would be waited for alone.
            later: Behind all that are not.
        """
        if job not in self._known:
            index = len(self._known)
            self._known.add(job)
            self._left[index] = later
            heappush(self._waiting, (later, -length, index, job))
        while self._busy and self._receive(0):
            pass
        if self._waiting and self._busy == len(self._pids) < min(len(os.sched_getaffinity(0)), MOST_PROCESSES):
            with suppress(OSError):  # then with fewer
                self._pids.append(_fork(self._theirs, self._socket, self._target))
        self._send()

    def add_others(self, others: Iterable[Callable[[], object]]) -> None:
        """What a thread does each of at the end of the context; an exception of theirs is raised there."""
        self._others += others

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                with ThreadPoolExecutor(MOST_PROCESSES) as pool:
                    running = [pool.submit(other) for other in self._others]
                    self._wait(later=False)
                for each in running:
                    each.result()
        finally:
            self._theirs.close()
            if self._pids:
                self.rest = Thread(target=self._end, name="compilers", daemon=True)
                self.rest.start()
            else:
                self._socket.close()

    def _wait(self, *, later: bool) -> None:
        """Until all jobs are done, or all that are not for later, or the processes are in trouble."""
        quiet = 0
        while self._pids and quiet < LONGEST_WAIT and any(later or not each for each in self._left.values()):
            if self._receive(1.0):
                quiet = 0
                self._send()
            else:
                quiet += 1
                if any(_has_ended(pid) for pid in self._pids):
                    return

    def _end(self) -> None:
        """Wait for all jobs, then for the processes."""
        self._wait(later=True)
        self._socket.close()  # so they end
        for pid in self._pids:
            with suppress(OSError):
                if self._left:
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def _receive(self, timeout: float) -> bool:
        """Take note of a job that is done, if one is by then."""
        self._socket.settimeout(timeout)
        try:
            self._left.pop(int(self._socket.recv(MESSAGE_BYTES)), None)
        except (OSError, ValueError):  # none, or nobody is there any more
            return False
        self._busy -= 1
        return True

    def _send(self) -> None:
        """A job for each that is free."""
        self._socket.settimeout(1.0)
        while self._waiting and self._busy < len(self._pids):
            *_, index, job = heappop(self._waiting)
            with suppress(OSError):
                self._socket.send(json.dumps([index, *job]).encode())
            self._busy += 1


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
    knobs.runtime.jit_cache_hook = None  # the one that finds out what to compile was there when this was forked
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
