"""The README's code runs as it stands."""

import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"<!-- test: (\w+) -->\n```python\n(.*?)```", re.DOTALL)
BLOCKS = [
    (document.parent.name + "/" + document.name, where, code)
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for where, code in BLOCK.findall(document.read_text())
]
BASE_URL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, "-m", "vllm_server.cli", "--port", str(port)])
    try:
        for _ in range(1200):
            assert process.poll() is None, "the server ended"
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        assert process.wait(60) == 0


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_there_is_code_for_each_way_in() -> None:
    code = "\n".join(code for _, _, code in BLOCKS)
    assert all(name in code for name in ("OpenAI(", "LLM(", "Engine(load_backend", "class CountingBackend"))


@pytest.mark.parametrize("code", [code for _, where, code in BLOCKS if where == "alone"])
def test_code_that_stands_alone(code: str) -> None:
    output = run(code)
    assert "Paris" in output or "France" not in code


@pytest.mark.parametrize("code", [code for _, where, code in BLOCKS if where == "server"])
def test_code_against_a_server(code: str, server: str) -> None:
    assert BASE_URL in code
    assert "Paris" in run(code.replace(BASE_URL, server))
