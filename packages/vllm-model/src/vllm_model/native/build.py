"""Compiles the kernels, once for each set of instructions that this kind of processor may have.

Run when the package is installed (``hatch_build.py``), and by hand after a change: ``python build.py``. Where there is no C
compiler nothing is built, and the model runs on torch's own operations.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
X86_FLAGS = ("-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16")
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "amx": (*X86_FLAGS, *AVX512_FLAGS, "-mamx-tile", "-mamx-bf16"),
        "avx512bf16": (*X86_FLAGS, *AVX512_FLAGS),
        "avx2": X86_FLAGS,
    },
    "aarch64": {"neon": ()},
}
"""Compiler options by machine and variant, the fastest first."""
OPTIONS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")


def machine() -> str:
    """The processor's kind, a key of ``VARIANTS`` or not."""
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def library_path(variant: str, folder: Path = HERE) -> Path:
    """Where a variant lies once it is built."""
    return folder / f"libkernels-{variant}.so"


def fingerprint() -> str:
    """Of the sources, which a library carries too."""
    files = sorted([*HERE.glob("*.c"), *HERE.glob("*.h"), HERE / "build.py"])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def build(folder: Path = HERE, options: tuple[str, ...] = ()) -> list[Path]:
    """Compile what this machine's compiler can, in parallel; returns what there is now."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None or sys.platform not in ("linux", "darwin"):
        return []
    running = {}
    for variant, flags in VARIANTS.get(machine(), {}).items():
        path = library_path(variant, folder)
        part = path.with_suffix(f".{os.getpid()}.so")  # so that a program that runs keeps the file it has loaded
        named = f'-DSOURCES="{fingerprint()}"'
        command = [*compiler, *OPTIONS, *flags, *options, named, str(HERE / "decoder.c"), "-o", str(part), "-lm", "-lpthread"]
        running[path] = part, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # noqa: S603 - our own sources
    built = []
    for path, (part, process) in running.items():
        errors = process.communicate()[1]
        if process.returncode == 0:
            part.replace(path)
            built.append(path)
        else:
            part.unlink(missing_ok=True)
            print(f"{path.name} was not built: {errors.decode(errors='replace')[:500]}", file=sys.stderr)  # noqa: T201
    return built


if __name__ == "__main__":
    for name in build():
        print(name)  # noqa: T201
