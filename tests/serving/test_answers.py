"""A client of a server, against one that answers what it is told to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

from moa_lab.serving import Server, bucket_lengths

MODELS = {"data": [{"id": "small", "max_model_len": 256}]}
METRICS = 'vllm:cache_config_info{block_size="16",engine="0"} 1.0\nvllm:num_requests_running{engine="0"} 3.0\n'


class Told:
    """What the server answers. token_ids: of every request, None for none."""

    token_ids: list[int] | None = None
    status = 200
    asked: Any = None


@pytest.fixture
def told() -> Iterator[Told]:
    answers = Told()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(METRICS if self.path == "/metrics" else json.dumps(MODELS))

        def do_POST(self) -> None:
            answers.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(json.dumps({"choices": [{"text": "", "token_ids": answers.token_ids}]}), answers.status)

        def _answer(self, body: str, status: int = 200) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    answers.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    yield answers
    server.shutdown()
    server.server_close()


def test_a_server_tells_its_model_its_limit_and_the_lengths_of_its_windows(told: Any) -> None:
    server = Server(told.url + "/v1/")
    assert (server.model, server.max_tokens, server.lengths) == ("small", 256, bucket_lengths(256, 16))
    assert Server(told.url, 100).lengths == (100,)
    assert server.metric("vllm:num_requests_running") == 3


def test_tokens_go_in_and_tokens_come_out(told: Any) -> None:
    told.token_ids = [7, 8, 9]
    assert Server(told.url).tokens([[1, 2], [3]], 3) == [[7, 8, 9], [7, 8, 9]]
    assert told.asked["model"] == "small"
    assert (told.asked["max_tokens"], told.asked["temperature"], told.asked["ignore_eos"]) == (3, 0, True)


def test_what_goes_wrong_is_said_in_words(told: Any) -> None:
    server = Server(told.url)
    with pytest.raises(ValueError, match="tells no token ids"):
        server.tokens([[1]], 3)
    told.token_ids = [7]
    with pytest.raises(ValueError, match="gave 1 of 3 tokens: it takes 256"):
        server.tokens([[1]], 3)
    told.status = 400
    with pytest.raises(ValueError, match="refused /v1/completions"):
        server.tokens([[1]], 3)
    with pytest.raises(ValueError, match="tells nothing named vllm:nothing"):
        server.metric("vllm:nothing")
    with pytest.raises(ValueError, match=r"no server answers at http://127\.0\.0\.1:1/v1/models"):
        Server("http://127.0.0.1:1")
