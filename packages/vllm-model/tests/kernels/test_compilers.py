"""Processes that compile kernels; what they compile is checked by ``test_other_cards.py``."""

import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")
from vllm_model.kernels._compilers import Job, compile_jobs


class Kernel:
    """Compiled by leaving the process's number behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def preload(self, specialization: str) -> None:
        if specialization == "raises":
            raise RuntimeError("no such instruction")
        if specialization == "dies":
            os._exit(1)
        time.sleep(0.05)
        (self.folder / specialization).write_text(str(os.getpid()))


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    module = ModuleType("some_kernels")
    module.kernel = Kernel(tmp_path)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_kernels", module)
    return ("some_kernels", "kernel", "")


def done(folder: Path) -> dict[str, int]:
    return {path.name: int(path.read_text()) for path in folder.iterdir()}


def test_every_kernel_is_compiled_by_another_process_which_then_ends(job: Job, tmp_path: Path) -> None:
    rest = compile_jobs([(*job[:2], str(i % 40)) for i in range(50)], None)
    assert rest is not None
    rest.join()
    pids = set(done(tmp_path).values())
    assert set(done(tmp_path)) == {str(i) for i in range(40)}
    assert os.getpid() not in pids
    for pid in pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def test_later_kernels_are_compiled_while_the_caller_goes_on(job: Job, tmp_path: Path) -> None:
    now, later = [[(*job[:2], f"{name}{i}") for i in range(60)] for name in ("now", "later")]
    rest = compile_jobs(now, None, later=later)
    assert rest is not None
    there = {path.name for path in tmp_path.iterdir()}
    assert there >= {name for *_, name in now}
    assert there != {name for *_, name in now + later}
    rest.join()
    assert set(done(tmp_path)) == {name for *_, name in now + later}


def test_other_work_is_done_by_threads_meanwhile(job: Job, tmp_path: Path) -> None:
    pids: list[int] = []
    compile_jobs([(*job[:2], "a")], None, others=[lambda: pids.append(os.getpid())] * 3)
    assert pids == [os.getpid()] * 3
    assert compile_jobs([], None, others=[lambda: pids.append(0)]) is None
    assert pids[-1] == 0
    with pytest.raises(ZeroDivisionError):
        compile_jobs([], None, others=[lambda: 1 // 0])


def test_what_does_not_compile_is_left(job: Job, tmp_path: Path) -> None:
    compile_jobs([(*job[:2], each) for each in ("a", "raises", "b")] + [("no_such_module", "kernel", "")], None)
    assert set(done(tmp_path)) == {"a", "b"}


def test_processes_that_die_are_not_waited_for(job: Job, tmp_path: Path) -> None:
    start = time.monotonic()
    compile_jobs([(*job[:2], each) for each in ("dies", "a", "b", "c")], None)
    assert time.monotonic() - start < 10
    assert set(done(tmp_path)) <= {"a", "b", "c"}
