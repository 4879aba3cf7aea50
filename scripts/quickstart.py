"""Sets up a virtual environment in .venv and runs the main job, or the tests. Needs Python 3.11 or newer and nothing else.

    python3 scripts/quickstart.py          start the server, ask the default model a question over HTTP, print its answer
    python3 scripts/quickstart.py test     run every test; further arguments go to pytest

Run again, both reuse what is there.
"""

import hashlib
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("vllm-traits", "vllm-core", "vllm-model", "vllm-server")
TORCH = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> None:
    """Set up, then become the server's first client or the tests."""
    command, *arguments = sys.argv[1:] or ["ask"]
    if command not in ("ask", "test"):
        raise SystemExit(__doc__)
    if sys.version_info < (3, 11):
        raise SystemExit(f"Python 3.11 or newer is needed; this is {platform.python_version()}.")
    folder = Path(os.environ.get("VLLM_VENV", ROOT / ".venv"))
    python = set_up(folder, group=command)
    os.chdir(ROOT)
    program = ["scripts/ask.py"] if command == "ask" else ["-m", "pytest"]
    os.execv(python, [str(python), *program, *arguments])  # noqa: S606 - our own files, no shell


def set_up(folder: Path, group: str) -> Path:
    """The environment's Python, with the four packages (editable) and what ``group`` of pyproject.toml lists."""
    python = folder / "bin" / "python"
    stamp = folder / f"installed-{group}"
    if python.exists() and stamp.exists() and stamp.read_text() == _fingerprint(group):
        return python
    if not python.exists():
        print(f"Making a virtual environment in {folder}", flush=True)
        try:
            venv.create(folder, with_pip=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"No virtual environment ({error}). On Debian and Ubuntu: apt install python3-venv.") from error
    ensure_torch(python)
    print(f"Installing the four packages and the requirements of '{group}'", flush=True)
    editable = [part for package in PACKAGES for part in ("-e", str(ROOT / "packages" / package))]
    if not _pip(python, "--quiet", *editable, *_requirements(group)):
        raise SystemExit("pip failed; its message is above.")
    stamp.write_text(_fingerprint(group))
    return python


def ensure_torch(python: Path) -> None:
    """Torch without CUDA: from wherever pip is set up to look, else PyTorch's index, else the registry's own build."""
    if _has_torch(python):
        return
    print(f"Installing torch {TORCH} for the CPU (about 200 MB)", flush=True)
    if platform.system() == "Linux":
        attempts = [["--quiet", f"torch=={TORCH}+cpu"], ["--index-url", CPU_INDEX, f"torch=={TORCH}+cpu"], [f"torch=={TORCH}"]]
    else:
        attempts = [[f"torch=={TORCH}"]]
    for attempt in attempts[:-1]:
        if _pip(python, "--retries", "1", *attempt, quiet_errors=True):
            return
    if not _pip(python, *attempts[-1]):
        raise SystemExit("torch could not be installed; pip's message is above.")


def _has_torch(python: Path) -> bool:
    code = f"import importlib.metadata as m; assert m.version('torch').split('+')[0] == '{TORCH}'"
    return subprocess.run([python, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


def _pip(python: Path, *arguments: str, quiet_errors: bool = False) -> bool:
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, stderr=subprocess.DEVNULL if quiet_errors else None).returncode == 0


def _requirements(group: str) -> list[str]:
    import tomllib

    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    return [requirement for requirement in groups[group] if isinstance(requirement, str)]


def _fingerprint(group: str) -> str:
    """Changes with whatever decides what is installed, and with the C sources, which an installation compiles."""
    files = [ROOT / "packages" / package / "pyproject.toml" for package in PACKAGES]
    model = ROOT / "packages" / "vllm-model"
    native = sorted((model / "src" / "vllm_model" / "native").glob("*"))
    files += [model / "hatch_build.py", *(file for file in native if file.suffix in (".c", ".h") or file.name == "build.py")]
    versions = [ROOT / "packages" / package / "src" / package.replace("-", "_") / "__init__.py" for package in PACKAGES]
    lines = [line for file in versions for line in file.read_text().splitlines() if line.startswith("__version__")]
    content = "\n".join([sys.version, TORCH, *_requirements(group), *(file.read_text() for file in files), *lines])
    return hashlib.sha256(content.encode()).hexdigest()


if __name__ == "__main__":
    main()
