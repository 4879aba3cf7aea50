# mypy: disable-error-code="no-untyped-call"
"""One device, the one stream on which a backend's work runs, and what the host exchanges with it.

Without a CUDA device, for Triton's interpreter, work runs at once and a graph runs anew what it captured.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_model.kernels._launch import compile_together


@dataclass(frozen=True, slots=True)
class Graph:
    """A captured step: fill ``staged``, then replay."""

    staged: torch.Tensor
    replay: Callable[[], torch.Tensor]
    """Runs it and returns its tokens or hidden states, always the same tensor on a CUDA device."""


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
        """Run once, which compiles what is not compiled yet, then as a graph.

        Args:
            staged: What the graph reads.
            run: What it does.
            has_run: All kernels of ours in it have run, in this graph or others: it is recorded at once.
        """
        if self._stream is None:
            return Graph(staged, run)
        if not has_run:
            run()
        try:
            graph, result = self._record(run)
        except torch.OutOfMemoryError:
            self.reclaim()  # while a graph is recorded, memory that is cached cannot be given back for it
            graph, result = self._record(run)
        self._pool = self._pool or graph.pool()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return Graph(staged, replay)

    def _record(self, run: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with _RECORDING:
            # Relaxed: a library may load a kernel, Python's collector destroy the graphs of an engine that is gone.
            graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")
            try:
                result = run()
            except BaseException:
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph, result

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
