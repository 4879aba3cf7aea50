"""The four distributions fit together, and their public names do not change by accident."""

import importlib
import importlib.metadata
import itertools
import runpy
import shutil
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PUBLIC = {
    "vllm_traits": {
        *("LAST_SAMPLED", "Batch", "BatchOutput", "BatchState", "BlockId", "CompletedStep", "KvCacheBudget", "ModelBackend"),
        *("ModelSpec", "SamplingParams", "SeqId", "SlotId", "StepHandle", "StepId", "StructuredOutputsParams", "TokenId"),
        "TokenLogprobs",
    },
    "vllm_core": {
        *("AsyncEngine", "CompletionOutput", "Engine", "EngineConfig", "EngineMetrics", "RequestMetrics", "RequestOutput"),
        "SamplingParams",
    },
    "vllm_model": {
        *("LLM", "ChatTemplate", "IncrementalDetokenizer", "SpeculativeConfig", "Tokenizer"),
        *("encode_chat", "load_backend", "resolve_model"),
    },
    "vllm_server": {"ServerConfig", "build_app"},
}
PACKAGES = list(PUBLIC)


def project(package: str) -> dict[str, object]:
    path = ROOT / "packages" / package.replace("_", "-") / "pyproject.toml"
    table: dict[str, object] = tomllib.loads(path.read_text())["project"]
    return table


@pytest.mark.parametrize("package", PACKAGES)
def test_the_public_names(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) == PUBLIC[package]
    assert all(getattr(module, name) is not None for name in module.__all__)
    assert (ROOT / "packages" / package.replace("_", "-") / "src" / package / "py.typed").is_file()


def test_one_version_and_sibling_pins() -> None:
    versions = {importlib.import_module(package).__version__ for package in PACKAGES}
    assert len(versions) == 1
    (version,) = versions
    for lower, package in itertools.pairwise(PACKAGES):
        pins = [text for text in project(package)["dependencies"] if text.startswith("vllm-")]  # type: ignore[attr-defined]
        assert pins == [f"{lower.replace('_', '-')}=={version}"]
        assert importlib.metadata.version(package.replace("_", "-")) == version


def test_every_package_is_described_alike() -> None:
    fields = ("readme", "license", "requires-python", "classifiers")
    assert len({repr([project(package)[field] for field in fields]) for package in PACKAGES}) == 1


@pytest.mark.parametrize(
    "changed", ["src/vllm_model/native/products.h", "src/vllm_model/native/build.py", "hatch_build.py", None]
)
def test_the_quick_start_installs_anew_what_it_compiles(changed: str | None, tmp_path: Path) -> None:
    fingerprint = runpy.run_path(str(ROOT / "scripts" / "quickstart.py"))["_fingerprint"]
    before = fingerprint("test")
    shutil.copytree(ROOT / "packages", tmp_path / "packages", ignore=shutil.ignore_patterns("tests", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    fingerprint.__globals__["ROOT"] = tmp_path
    if changed is not None:
        with (tmp_path / "packages" / "vllm-model" / changed).open("a") as file:
            file.write("\n")
    assert (fingerprint("test") == before) == (changed is None)
