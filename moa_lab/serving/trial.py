"""A server of a plan on this machine, started, asked and stopped: to try one, and to show one in a notebook."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from moa_lab.serving.answers import Server

SMALL = ("--max-model-len", "1024", "--dtype", "float32", "--kv-cache-memory-bytes", "300000000", "--enforce-eager")
"""Options of vLLM for a small server on a CPU: requests of 1,024 tokens, 0.3 GB of keys and values."""


@contextmanager
def running_server(model: str, plan: str | Path, options: Sequence[str] = SMALL, patience_s: float = 240) -> Iterator[Server]:
    """`moa-lab serve` on a free port, until the block ends; it answers when the block begins.

    Raises ValueError where vLLM is not installed, with the line that starts a server where it is, and where the server ends or does not
    answer within `patience_s`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = ["serve", "--model", model, "--plan", str(plan), "--port", str(port), *options]
    if find_spec("vllm") is None:
        shown = shlex.join(["moa-lab", *line[:5]])
        raise ValueError(f"vLLM is not installed here, so nothing was asked; where it is, this starts a server: {shown}")
    running = subprocess.Popen([sys.executable, "-m", "moa_lab", *line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield _answering(f"http://127.0.0.1:{port}", running, time.monotonic() + patience_s)
    finally:
        running.terminate()
        running.wait(60)


def _answering(url: str, running: subprocess.Popen[bytes], until: float) -> Server:
    """The server at `url`, once it answers."""
    while running.poll() is None and time.monotonic() < until:
        try:
            return Server(url)
        except ValueError:
            time.sleep(0.5)
    raise ValueError("the server ended before it answered" if running.poll() is not None else "the server does not answer in time")
