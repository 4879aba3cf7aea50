"""The CPU kernels' tests under the compiler's sanitizers; all that one finds makes this fail. Needs gcc on Linux.

    python scripts/sanitize_native.py [address] [thread]

``address`` also looks for undefined behaviour. Tests run on a copy of vllm_model whose libraries are built for them.
"""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "packages/vllm-model/src/vllm_model"
TESTS = ROOT / "packages/vllm-model/tests/native"
FLAGS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "thread": ("-fsanitize=thread",),
}
RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
SETTINGS = {
    # Python keeps what it has until it ends.
    "address": {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    # Torch's own threads are not watched: what orders them is not built for it.
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1 die_after_fork=0"},
}
LEFT_OUT = {"address": "not out_of_memory", "thread": "not out_of_memory and not products and not draw"}
"""Shadow memory has no limit; and what one thread does alone has no races."""


def run(sanitizer: str, folder: Path) -> int:
    """Build for one sanitizer under ``folder`` and run the tests; pytest's exit status."""
    package = shutil.copytree(PACKAGE, folder / sanitizer / "vllm_model", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if not runpy.run_path(str(package / "native" / "build.py"))["build"](options=("-g", "-O1", *FLAGS[sanitizer])):
        raise SystemExit("The compiler built nothing.")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    found = [
        subprocess.check_output([*compiler, f"-print-file-name={name}"], text=True).strip() for name in RUNTIMES[sanitizer]
    ]
    paths = [str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | SETTINGS[sanitizer] | {"LD_PRELOAD": " ".join(found), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS), "-k", LEFT_OUT[sanitizer]]
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


def main() -> int:
    """Run what is asked for, or all; 0 only if every test passed."""
    with tempfile.TemporaryDirectory() as folder:
        failed = [name for name in sys.argv[1:] or FLAGS if run(name, Path(folder)) != 0]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
