"""How many planted changes do the tests notice? ``nox -s mutation`` runs this; it needs cosmic-ray and the two lower layers.

A sample of all one-operator changes to the scheduler, the block pool and the prefix cache is made in a copy of the tree, one
at a time, and the tests of the core run on each. What they do not notice is shown; exit status 1 if that is too much.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import WorkerOutcome, WorkItem, WorkResult

ROOT = Path(__file__).resolve().parent.parent
CORE = "packages/vllm-core/src/vllm_core"
TESTS = "packages/vllm-core/tests"
QUICK = (
    "block_pool",
    "prefix_cache",
    "waiting_queue",
    "scheduler",
    "metrics",
    "engine",
    "scheduling",
    "speculation",
    "simulation",
)
"""Tests that notice most, the cheapest first; ``-x`` ends the run with the first failure."""
PROOF = ("check_integrity", "_check_lengths", "_check_blocks")
"""Functions that are checks themselves: the tests prove them by planting bugs, not by changing the checks."""

CONFIG = """
[cosmic-ray]
module-path = [{modules}]
timeout = {timeout}
excluded-modules = []
test-command = "{command}"

[cosmic-ray.distributor]
name = "local"
"""


def main() -> int:
    """Sample, run, report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", type=int, default=100, help="changes to try; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="decides which")
    parser.add_argument("--least", type=float, default=0.9, help="share that must be noticed")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one change")
    parser.add_argument("--modules", nargs="+", default=["scheduler", "block_pool", "prefix_cache"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy = Path(folder)
        for name in ("vllm-traits", "vllm-core"):
            shutil.copytree(ROOT / "packages" / name, copy / "packages" / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(str(copy / "packages" / name / "src") for name in ("vllm-traits", "vllm-core")),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        modules = ", ".join(f'"{CORE}/{name}.py"' for name in options.modules)
        files = " ".join(f"{TESTS}/test_{name}.py" for name in QUICK)
        command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider --hypothesis-seed=0 {files}"
        (copy / "config.toml").write_text(CONFIG.format(modules=modules, timeout=options.timeout, command=command))

        def run(*arguments: str) -> None:
            subprocess.run(arguments, cwd=copy, env=environment, check=True)

        run(*command.split())  # unchanged, they pass
        cosmic_ray = (sys.executable, "-m", "cosmic_ray.cli")
        run(*cosmic_ray, "init", "config.toml", "session.sqlite")
        with use_db(str(copy / "session.sqlite"), WorkDB.Mode.open) as session:
            _sample(session, copy, options.sample, options.seed)
        run(*cosmic_ray, "exec", "config.toml", "session.sqlite")
        with use_db(str(copy / "session.sqlite"), WorkDB.Mode.open) as session:
            return _report(session, options.least)


def _sample(session: WorkDB, copy: Path, size: int, seed: int) -> None:
    """Leave so many of the changes that are worth trying, and skip the rest."""
    every = sorted(session.work_items, key=lambda item: (str(item.mutations[0].module_path), item.mutations[0].start_pos))
    worth = [item for item in every if _is_worth_it(item, copy)]
    chosen = worth if not size else random.Random(seed).sample(worth, min(size, len(worth)))
    kept = {item.job_id for item in chosen}
    for item in every:
        if item.job_id not in kept:
            session.set_result(item.job_id, WorkResult(WorkerOutcome.SKIPPED))
    sys.stdout.write(f"{len(chosen)} of {len(worth)} changes, seed {seed}\n")


def _is_worth_it(item: WorkItem, copy: Path) -> bool:
    """Not in the checks, not in an annotation, where any change is noticed at import, not identity in place of an order, which
    is the same for small numbers and no mistake that anybody makes, and not what is the same: of two arrays of bool, ``*``
    is ``&`` and ``+`` is ``|``.
    """
    change = item.mutations[0]
    if change.operator_name.endswith(("_Is", "_IsNot", "BitAnd_Mul", "BitOr_Add")):
        return False
    line = (copy / change.module_path).read_text().splitlines()[change.start_pos[0] - 1]
    is_annotation = "BitOr" in change.operator_name and "|=" not in line
    return change.definition_name not in PROOF and not is_annotation


def _report(session: WorkDB, least: float) -> int:
    results = [(job, result) for job, result in session.results if result.worker_outcome is not WorkerOutcome.SKIPPED]
    survivors = [(job, result) for job, result in results if not result.is_killed]
    for _, result in survivors:
        sys.stdout.write(f"\nnot noticed:\n{result.diff}\n")
    share = 1 - len(survivors) / max(1, len(results))
    sys.stdout.write(f"{len(results)} changes, {len(results) - len(survivors)} noticed: {100 * share:.1f} %\n")
    return 0 if share >= least else 1


if __name__ == "__main__":
    sys.exit(main())
