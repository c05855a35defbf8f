"""Tokens asked of what serves a plan: by HTTP, as OpenAI's clients ask, with tokens in and tokens out."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from moa_lab.serving.page_layout import PAGE_TOKENS, bucket_lengths
from moa_lab.text import one_line


class Answers(Protocol):
    """What serves a plan. max_tokens: of the longest request; lengths: those that its windows are taken at, rising."""

    max_tokens: int
    lengths: tuple[int, ...]

    def tokens(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """The `new` likeliest tokens after every prompt, all asked at once."""


class Server:
    """An OpenAI-compatible server of vLLM that runs at `url`.

    n_tokens: the length at which its windows were fixed, if they were (`--plan-length`). Raises ValueError, in words, where nothing of
    that kind answers, here and later.
    """

    def __init__(self, url: str, n_tokens: int | None = None, timeout_s: float = 600) -> None:
        self.url, self._timeout = url.rstrip("/").removesuffix("/v1"), timeout_s
        told = json.loads(self._read("/v1/models"))["data"][0]
        self.model, self.max_tokens = str(told["id"]), int(told["max_model_len"])
        self.lengths = (n_tokens,) if n_tokens else bucket_lengths(self.max_tokens, self._page_tokens())

    def tokens(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """As `Answers.tokens`: a client for each prompt."""
        with ThreadPoolExecutor(max(len(prompts), 1)) as clients:
            return list(clients.map(lambda prompt: self._answer(prompt, new), prompts))

    def metric(self, name: str) -> float:
        """A number that the server tells of itself, for instance vllm:num_requests_running. Raises ValueError for one that it does not."""
        found = re.search(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", self._read("/metrics"), re.MULTILINE)
        if found is None:
            raise ValueError(f"the server at {self.url} tells nothing named {name}")
        return float(found[1])

    def _answer(self, prompt: Sequence[int], new: int) -> list[int]:
        asked = {"prompt": list(prompt), "max_tokens": new, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        choice = json.loads(self._read("/v1/completions", {"model": self.model, **asked}))["choices"][0]
        found: list[int] | None = choice.get("token_ids")
        if found is None:
            raise ValueError(f"the server at {self.url} tells no token ids: it is not vLLM, or one without return_token_ids")
        if len(found) != new:
            raise ValueError(f"the server at {self.url} gave {len(found)} of {new} tokens: it takes {self.max_tokens} in a request")
        return found

    def _page_tokens(self) -> int:
        found = re.search(r'^vllm:cache_config_info{.*block_size="(\d+)"', self._read("/metrics"), re.MULTILINE)
        return int(found[1]) if found else PAGE_TOKENS

    def _read(self, path: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                found: str = answer.read().decode()
        except urllib.error.HTTPError as error:
            told = " ".join(error.read().decode(errors="replace").split())
            raise ValueError(f"the server at {self.url} refused {path}: {told}") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"no server answers at {self.url}{path}: {one_line(error)}") from None
        return found
