# mypy: disable-error-code="no-untyped-call"
"""One device, the one stream on which a backend's work runs, and what the host exchanges with it.

Without a CUDA device, for Triton's interpreter, work runs at once and a graph runs anew what it captured.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_model.kernels._launch import compile_together

Parts = Generator[None, None, torch.Tensor]
"""A step, which stops where something is sent to the device that the host finds while it runs what comes before."""


def through(parts: Parts, between: Callable[[], object] | None = None) -> torch.Tensor:
    """Run all parts of a step, and ``between`` wherever it stops."""
    while True:
        try:
            next(parts)
        except StopIteration as end:
            result: torch.Tensor = end.value
            return result
        if between is not None:
            between()


@dataclass(frozen=True, slots=True)
class Graph:
    """A captured step: fill ``staged``, then replay."""

    staged: torch.Tensor
    replay: Callable[..., torch.Tensor]
    """Runs it and returns its tokens or hidden states, always the same tensor on a CUDA device.

    Takes what is to be called between its parts, when those before have been started.
    """


_RECORDING = Lock()
"""Held while a graph is recorded, by whichever device: torch does one at a time."""


class Device:
    """A device as a backend uses it.

    Args:
        device: ``cuda:N``, or ``cpu`` for the interpreter.

    Attributes:
        pdl: Whether kernels may be launched before the ones ahead have ended (programmatic dependent launch).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_cuda = device.type == "cuda"
        nvidia = self._is_cuda and torch.version.hip is None
        self.pdl = nvidia and torch.cuda.get_device_capability(device)[0] >= 9
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None
        self._pool: Any = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it, work goes to the stream."""
        with torch.inference_mode(), torch.cuda.stream(self._stream) if self._is_cuda else nullcontext():
            yield

    def compile(self, *runs: Callable[[], object], later: Sequence[Callable[[], object]] = ()) -> None:
        """Compile what these would launch, as :func:`compile_together`."""
        if self._is_cuda:
            with torch.inference_mode():
                compile_together(runs, later)

    def reclaim(self) -> None:
        """Give back to the device what nobody holds any more."""
        if self._stream is not None:
            self._stream.synchronize()
            torch.cuda.empty_cache()

    def forget_graphs(self) -> None:
        """All graphs are gone: give back the memory that they shared."""
        self._pool = None
        self.reclaim()

    def synchronize(self) -> None:
        """Wait for all that was given to the stream."""
        if self._stream is not None:
            self._stream.synchronize()

    def pinned(self, size: int) -> torch.Tensor:
        """Memory of the host that the device reads and writes by itself: int32 ``[size]``."""
        return torch.zeros(size, dtype=torch.int32, pin_memory=self._is_cuda)

    def pinned_rows(self, rows: int, columns: int) -> torch.Tensor:
        """As :meth:`pinned`, int32 ``[rows, columns]``, for one transfer; not initialized."""
        return torch.empty(rows, columns, dtype=torch.int32, pin_memory=self._is_cuda)

    def send(self, array: npt.NDArray[np.generic], dtype: npt.DTypeLike) -> torch.Tensor:
        """A copy on the device."""
        host = torch.from_numpy(np.array(array, dtype, order="C", ndmin=1))
        return host.pin_memory().to(self.device, non_blocking=True) if self._is_cuda else host

    def send_aligned(self, *arrays: npt.NDArray[np.integer]) -> list[torch.Tensor]:
        """Copies as int32 in one transfer; each begins at whole 16 bytes: kernels are compiled for one alignment."""
        flat = self.send(np.concatenate([np.pad(array, (0, -len(array) % 4)) for array in arrays]), np.int32)
        places = np.cumsum([0, *(len(array) + -len(array) % 4 for array in arrays)]).tolist()
        return [flat[at : at + len(array)] for at, array in zip(places, arrays, strict=False)]

    def capture(self, staged: torch.Tensor, run: Callable[[], torch.Tensor], *, has_run: bool = False) -> Graph:
        """As :meth:`capture_parts`, of a step that does not stop."""

        def parts() -> Parts:
            return run()
            yield

        return self.capture_parts(staged, parts, has_run=has_run)

    def capture_parts(self, staged: torch.Tensor, run: Callable[[], Parts], *, has_run: bool = False) -> Graph:
        """Run once, which compiles what is not compiled yet, then as a graph, one for each part.

        Args:
            staged: What the graph reads.
            run: What it does.
            has_run: All kernels of ours in it have run, in this graph or others: it is recorded at once.
        """
        if self._stream is None:
            return Graph(staged, lambda between=None: through(run(), between))
        if not has_run:
            through(run())
        try:
            graphs, result = self._record(run)
        except torch.OutOfMemoryError:
            graphs = []
        if not graphs:
            self.reclaim()  # while a graph is recorded, memory that is cached cannot be given back for it
            graphs, result = self._record(run)
        self._pool = self._pool or graphs[0].pool()

        def replay(between: Callable[[], object] | None = None) -> torch.Tensor:
            graphs[0].replay()
            for graph in graphs[1:]:
                if between is not None:
                    between()
                graph.replay()
            return result

        return Graph(staged, replay)

    def _record(self, run: Callable[[], Parts]) -> tuple[list[torch.cuda.CUDAGraph], torch.Tensor]:
        self.synchronize()
        graphs, parts, pool, result = list[torch.cuda.CUDAGraph](), run(), self._pool, None
        with _RECORDING:
            while result is None:
                graph = torch.cuda.CUDAGraph()
                # Relaxed: a library may load a kernel, Python's collector destroy the graphs of an engine that is gone.
                graph.capture_begin(pool=pool, capture_error_mode="relaxed")
                try:
                    next(parts)
                except StopIteration as end:
                    result = end.value
                except BaseException:
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
                graphs.append(graph)
                pool = pool or graph.pool()
        return graphs, result

    def taken_by(self, run: Callable[[], object]) -> tuple[int, int]:
        """Bytes that ``run`` takes of the device for good, and of torch's memory at its highest."""
        if self._stream is None:
            run()
            return 0, 0
        self.reclaim()
        free, allocated = torch.cuda.mem_get_info(self.device)[0], torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        kept = run()  # until it has been measured
        peak = torch.cuda.max_memory_allocated(self.device) - allocated
        self.reclaim()
        taken = free - torch.cuda.mem_get_info(self.device)[0]
        del kept
        return taken, peak

    def mark(self) -> torch.cuda.Event | None:
        """An event behind all that was given to the stream; None where it is over already."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event
