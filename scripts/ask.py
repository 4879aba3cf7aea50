"""Starts the server with the default model, asks it one question with the openai client, and streams the answer."""

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from openai import OpenAI

QUESTION = "What is the capital of France?"
SERVER = Path(sys.executable).with_name("vllm-server")
START_SECONDS = 1800.0
"""The first start fetches the model, which may take long on a slow line."""


def main() -> None:
    """Ask the question on the command line, or the one above."""
    question = " ".join(sys.argv[1:]) or QUESTION
    port = free_port()
    began = time.perf_counter()
    server = subprocess.Popen([SERVER, "serve", "--port", str(port), "--log-level", "warning"])
    try:
        wait_until_healthy(server, port)
        print(f"\nYou: {question}\nModel: ", end="", flush=True)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        model = client.models.list().data[0].id
        chunks = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=200, stream=True
        )
        first = None
        for chunk in chunks:
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter()
                print(chunk.choices[0].delta.content, end="", flush=True)
        if first is None:
            raise SystemExit("The model gave no answer.")
        print(f"\n\n({first - began:.1f} s from starting the server to the first token)")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
    print(f"Keep it running with\n\n    {shown(SERVER)}\n\nand give any OpenAI client the base URL http://127.0.0.1:8000/v1")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(server: "subprocess.Popen[bytes]", port: int) -> None:
    """Return once ``/health`` answers; exit if the server does."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit("The server did not start; its message is above.")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise SystemExit(f"The server did not answer within {START_SECONDS:.0f} s.")


def shown(path: Path) -> str:
    """``path`` as one would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    main()
