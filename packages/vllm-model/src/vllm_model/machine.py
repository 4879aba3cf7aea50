"""What of this machine the process may use, by Linux's own files; elsewhere what Python knows."""

import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores this process may use: its affinity, hyperthreads counted once, and the share of its control groups.

    Two threads on the two halves of one core wait for the same units: one of them is enough.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cpus = root / "sys/devices/system/cpu"
    cores = len({_read(cpus / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed})
    for group in _control_groups(root):
        limit, _, period = (_read(group / "cpu.max") or "max").partition(" ")
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def free_memory_bytes(root: Path = Path("/")) -> int:
    """Memory this process can still take: the machine's, or less if one of its control groups has less."""
    meminfo = _read(root / "proc/meminfo")
    if meminfo is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    free = next(int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable"))
    for group in _control_groups(root):
        limit, used = _read(group / "memory.max"), _read(group / "memory.current")
        if limit is not None and used is not None and limit != "max":
            free = min(free, int(limit) - int(used))
    return free


def _control_groups(root: Path) -> Iterator[Path]:
    """The process's control group (version 2) and those around it; in a container the outermost is the container's."""
    lines = (_read(root / "proc/self/cgroup") or "").splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    top = root / "sys/fs/cgroup"
    group = top / own.strip("/")
    while group != top:
        yield group
        group = group.parent
    yield top


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
