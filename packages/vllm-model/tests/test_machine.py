"""Threads and memory are sized by what the process may use, not by what the machine has."""

from pathlib import Path

import pytest

from vllm_model.machine import free_memory_bytes, usable_cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four cores of two hyperthreads each, of which the process may use six threads; 8 GiB of memory."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 4, 5, 6}, raising=False)
    for cpu in range(8):
        _write(tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 4},{cpu % 4 + 4}")
    _write(tmp_path / "proc/meminfo", "MemTotal: 9000000 kB\nMemAvailable: 8388608 kB\n")
    _write(tmp_path / "proc/self/cgroup", "0::/system.slice/engine.service\n")
    return tmp_path


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_hyperthreads_of_one_core_count_once(machine: Path) -> None:
    assert usable_cores(machine) == 3


@pytest.mark.parametrize("group", ["", "system.slice", "system.slice/engine.service"])
def test_every_control_group_around_the_process_counts(machine: Path, group: str) -> None:
    folder = machine / "sys/fs/cgroup" / group
    _write(folder / "cpu.max", "250000 100000\n")
    _write(folder / "memory.max", str(3 << 30))
    _write(folder / "memory.current", str(1 << 30))
    assert usable_cores(machine) == 2
    assert free_memory_bytes(machine) == 2 << 30


def test_a_share_below_one_core_is_one(machine: Path) -> None:
    _write(machine / "sys/fs/cgroup/cpu.max", "50000 100000")
    assert usable_cores(machine) == 1


def test_no_limit_is_the_machine(machine: Path) -> None:
    _write(machine / "sys/fs/cgroup/cpu.max", "max 100000")
    _write(machine / "sys/fs/cgroup/memory.max", "max")
    assert usable_cores(machine) == 3
    assert free_memory_bytes(machine) == 8 << 30


def test_this_machine_has_something() -> None:
    assert usable_cores() >= 1
    assert free_memory_bytes() > 0


def test_without_linux_there_is_an_answer(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) >= 1
    assert free_memory_bytes(tmp_path) > 0
