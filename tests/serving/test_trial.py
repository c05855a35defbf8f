"""A server that is started for a block: asked while it runs, stopped at its end, and told of where it cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moa_lab.serving import trial

STUB = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"data": [{"id": "small", "max_model_len": 256}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer({"choices": [{"token_ids": [5] * asked["max_tokens"]}]})
    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def log_message(self, *_):
        pass

HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Stands in for `moa-lab serve`: the lines that were started, with their processes."""
    found: list[Any] = []
    start = subprocess.Popen
    (tmp_path / "stub.py").write_text(STUB)

    def popen(line: list[str], **_: object) -> subprocess.Popen[bytes]:
        port = line[line.index("--port") + 1]
        found.append((line, start([sys.executable, str(tmp_path / "stub.py"), "x" if "broken.json" in line else port], stderr=-3)))
        return found[-1][1]

    monkeypatch.setattr(trial.subprocess, "Popen", popen)
    monkeypatch.setattr(trial, "find_spec", lambda _: object())
    return found


def test_a_server_answers_within_its_block_and_is_stopped_at_its_end(started: list[Any]) -> None:
    with trial.running_server("small", "plan.json", ("--max-model-len", "256")) as server:
        assert server.tokens([[1, 2]], 3) == [[5, 5, 5]]
    line, process = started[0]
    assert line[1:8] == ["-m", "moa_lab", "serve", "--model", "small", "--plan", "plan.json"]
    assert line[-2:] == ["--max-model-len", "256"]
    assert process.poll() is not None


def test_a_server_that_ends_or_that_cannot_be_started_is_told_in_words(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="ended before it answered"), trial.running_server("small", "broken.json"):
        pass
    with pytest.raises(ValueError, match="does not answer in time"), trial.running_server("small", "plan.json", patience_s=0):
        pass
    assert started[-1][1].poll() is not None
    monkeypatch.setattr(trial, "find_spec", lambda _: None)
    words = r"vLLM is not installed here.*: moa-lab serve --model small --plan plan\.json$"
    with pytest.raises(ValueError, match=words), trial.running_server("small", "plan.json"):
        pass
    assert len(started) == 2
