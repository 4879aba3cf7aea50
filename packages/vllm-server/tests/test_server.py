"""The program: what it prints, how it ends, and backends of others."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

BACKEND = """
import time
from vllm_traits.fake_backend import FakeBackend

def slow(path):
    def on_submit(batch):
        time.sleep(0.02)
    return FakeBackend(vocab_size=49152, max_model_len=2048, on_submit=on_submit)

def wrong(path):
    return 5
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "their_backend.py").write_text(BACKEND)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def server(environment: dict[str, str], port: int) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "vllm_server.cli", "--port", str(port), "--backend", "their_backend:slow"]
    process = subprocess.Popen(command, env=environment)
    for _ in range(600):
        assert process.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            break
        except OSError:
            time.sleep(0.05)
    yield process
    process.kill()
    process.wait()


def start_stream(port: int, max_tokens: int) -> socket.socket:
    body = json.dumps({"prompt": "x", "stream": True, "max_tokens": max_tokens, "ignore_eos": True}).encode()
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    assert client.recv(1) == b"H"
    return client


def read_all(client: socket.socket) -> bytes:
    data = b""
    while b"[DONE]" not in data and (part := client.recv(65536)):
        data += part
    return data


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_runs_and_exits_0(server: "subprocess.Popen[str]", port: int, number: int) -> None:
    with start_stream(port, 60) as client:
        server.send_signal(number)
        time.sleep(0.2)
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", b'{"prompt": "x"}', headers)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=5)
        assert caught.value.code == 503
        caught.value.close()
        assert b"[DONE]" in read_all(client)
    assert server.wait(15) == 0


def test_a_second_signal_is_immediate(server: "subprocess.Popen[str]", port: int) -> None:
    with start_stream(port, 2000):
        server.terminate()
        time.sleep(0.3)
        assert server.poll() is None
        server.terminate()
        assert server.wait(5) == 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere.gguf"], "nowhere.gguf"),
        (["--backend", "their_backend:wrong"], "ModelBackend"),
        (["--backend", "their_backend:absent"], "absent"),
        (["--backend", "unknown-entry-point"], "entry point"),
        (["--max-model-len", "100000"], "max_model_len"),
        (["--max-num-batched-tokens", "1", "--backend", "their_backend:slow"], "max_num_batched_tokens"),
        (["--chat-template", "/nowhere.jinja", "--backend", "their_backend:slow"], "nowhere.jinja"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(arguments: list[str], message: str, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "vllm_server.cli", "--log-level", "error", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_taken_port_is_named(environment: dict[str, str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "vllm_server.cli", "--port", str(port), "--backend", "their_backend:slow"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 1
    assert f"Cannot listen on 127.0.0.1:{port}" in result.stderr
