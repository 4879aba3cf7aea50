"""Processes that compile kernels; what they compile is checked by ``test_other_cards.py``."""

import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")
from vllm_model.kernels import _compilers
from vllm_model.kernels._compilers import Crew, Job


class Kernel:
    """Compiled by leaving the process's number behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def preload(self, specialization: str) -> None:
        if specialization == "raises":
            raise RuntimeError("no such instruction")
        if specialization == "dies":
            os._exit(1)
        while specialization == "waits" and not (self.folder / "go").exists():
            time.sleep(0.01)
        time.sleep(0.05)
        (self.folder / specialization).write_text(str(os.getpid()))


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    module = ModuleType("some_kernels")
    module.kernel = Kernel(tmp_path)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_kernels", module)
    return ("some_kernels", "kernel", "")


def done(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def pids(folder: Path) -> set[int]:
    return {int(path.read_text()) for path in folder.iterdir()}


def have_ended(crew: Crew) -> bool:
    assert crew._pids
    for pid in crew._pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return True


def test_every_kernel_is_compiled_by_another_process_which_then_ends(job: Job, tmp_path: Path) -> None:
    with Crew(None) as crew:
        for i in range(50):
            crew.add((*job[:2], str(i % 40)), 1)
    assert crew.rest is not None
    crew.rest.join()
    assert done(tmp_path) == {str(i) for i in range(40)}
    assert pids(tmp_path) <= set(crew._pids)
    assert len(crew._pids) <= len(os.sched_getaffinity(0))
    assert have_ended(crew)


def test_it_begins_while_others_are_found_out(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by finding again what is known."""
    monkeypatch.setattr(_compilers, "MOST_PROCESSES", 1)
    with Crew(None) as crew:
        end = time.monotonic() + 30
        for name in ("a", "b", "c"):
            crew.add((*job[:2], name), 1)
        while len(done(tmp_path)) < 3 and time.monotonic() < end:
            crew.add((*job[:2], "a"), 1)
            time.sleep(0.01)
        assert done(tmp_path) == {"a", "b", "c"}


def test_the_longest_of_those_that_wait_is_next(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compilers, "MOST_PROCESSES", 1)
    with Crew(None) as crew:
        crew.add((*job[:2], "waits"), 1)
        for later, length in [(True, 9), (False, 2), (False, 8), (False, 5)]:
            crew.add((*job[:2], f"{later}{length}"), length, later=later)
        (tmp_path / "go").touch()
    assert crew.rest is not None
    crew.rest.join()
    order = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name for path in order] == ["go", "waits", "False8", "False5", "False2", "True9"]


def test_as_many_processes_as_there_is_work_for(job: Job, tmp_path: Path) -> None:
    with Crew(None) as crew:
        crew.add((*job[:2], "a"), 1)
        crew.add((*job[:2], "a"), 1)
    assert len(crew._pids) == 1
    with Crew(None) as idle:
        pass
    assert idle._pids == []


def test_without_processes_kernels_are_left(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    start = time.monotonic()
    with Crew(None) as crew:
        crew.add((*job[:2], "a"), 1)
    assert (done(tmp_path), crew.rest) == (set(), None)
    assert time.monotonic() - start < 10


def test_later_kernels_are_compiled_while_the_caller_goes_on(job: Job, tmp_path: Path) -> None:
    now, later = [{f"{name}{i}" for i in range(60)} for name in ("now", "later")]
    with Crew(None) as crew:
        for name in [*later, *now]:
            crew.add((*job[:2], name), 1, later=name in later)
    there = done(tmp_path)
    assert there >= now
    assert there != now | later
    assert crew.rest is not None
    crew.rest.join()
    assert done(tmp_path) == now | later


def test_other_work_is_done_by_threads_meanwhile(job: Job, tmp_path: Path) -> None:
    by: list[int] = []
    with Crew(None) as crew:
        crew.add((*job[:2], "a"), 1)
        crew.add_others([lambda: by.append(os.getpid())] * 3)
    assert by == [os.getpid()] * 3
    with Crew(None) as crew:
        crew.add_others([lambda: by.append(0)])
    assert by[-1] == 0
    assert crew.rest is None
    with pytest.raises(ZeroDivisionError), Crew(None) as crew:
        crew.add_others([lambda: 1 // 0])


def test_processes_end_also_after_an_exception(job: Job, tmp_path: Path) -> None:
    crew = Crew(None)

    def find_out() -> None:
        with crew:
            crew.add((*job[:2], "a"), 1)
            raise MemoryError

    with pytest.raises(MemoryError):
        find_out()
    assert crew.rest is not None
    crew.rest.join()
    assert done(tmp_path) == {"a"}
    assert have_ended(crew)


def test_what_does_not_compile_is_left(job: Job, tmp_path: Path) -> None:
    with Crew(None) as crew:
        for each in ("a", "raises", "b"):
            crew.add((*job[:2], each), 1)
        crew.add(("no_such_module", "kernel", ""), 1)
    assert done(tmp_path) == {"a", "b"}


def test_processes_that_die_are_not_waited_for(job: Job, tmp_path: Path) -> None:
    start = time.monotonic()
    with Crew(None) as crew:
        for each in ("dies", "a", "b", "c"):
            crew.add((*job[:2], each), 1)
    assert time.monotonic() - start < 10
    assert done(tmp_path) <= {"a", "b", "c"}
