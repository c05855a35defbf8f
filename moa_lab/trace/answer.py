"""How likely a plan finds each token of an answer, and what it says itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from moa_lab.geometry.wrappers import plain_model
from moa_lab.plan import Plan
from moa_lab.runtime import apply_plan, ring_cache
from moa_lab.runtime.hf_cache import RingCache
from moa_lab.trace.case import Case

CHUNK_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens of a prompt that are run at once; between chunks the work can be stopped."""

SAID_TOKENS = 32
"""Tokens of a prompt that take as long as one that is said, on a CPU: progress counts in them."""

Progress = Callable[[float, float], None]
"""Called with (steps done, steps in all); what it raises ends the work."""


def within(progress: Progress | None, number: int, count: int) -> Progress | None:
    """The progress of step `number` of `count`, from 0, told to `progress` as a part of all of them."""
    if progress is None:
        return None
    return lambda done, total: progress(number + (done / total if total else 0.0), count)


@dataclass(frozen=True, eq=False)
class Answer:
    """A case's answer under a plan.

    wanted: int64 (answer tokens,), the case's answer. log_probabilities: float64 (answer tokens,), of each of them given the prompt and
    the answer before it. likeliest: int64 (answer tokens,), the token that the plan would have said there. said: its own greedy answer,
    of at most as many tokens, up to and with one that ends it.
    """

    plan: Plan
    wanted: np.ndarray
    log_probabilities: np.ndarray
    likeliest: np.ndarray
    said: tuple[int, ...]

    @property
    def first_difference(self) -> int | None:
        """Number of the first token that the plan would not have said; None where it says all of them."""
        differs = np.flatnonzero(self.likeliest != self.wanted)
        return int(differs[0]) if len(differs) else None

    @property
    def losses(self) -> np.ndarray:
        """Nats a token."""
        return -self.log_probabilities

    @property
    def loss(self) -> float:
        """Mean nats a token."""
        return float(self.losses.mean())

    @property
    def probabilities(self) -> np.ndarray:
        """Of each token."""
        return np.exp(self.log_probabilities)


@torch.no_grad()
def answer(model: PreTrainedModel, case: Case, plan: Plan, stops: Sequence[int] | None = None, progress: Progress | None = None) -> Answer:
    """Answer `case` under `plan`: its answer token by token, and the plan's own from the first token that differs.

    stops: tokens that end an answer. progress: of the prompt and of what is said. The prompt is run once, over the ring cache.
    Raises ValueError for a plan of another geometry and a length beyond the model.
    """
    model = plain_model(model)
    wanted = torch.from_numpy(case.answer).to(model.device)
    with apply_plan(model, plan, case.n_tokens):
        cache = ring_cache(model, case.n_tokens)
        last = _read(model, cache, case.prompt, len(wanted), progress)
        logits = last[None]
        if len(wanted) > 1:
            # On a copy: the plan may go on from the prompt in other words.
            forced = model(input_ids=wanted[None, :-1], past_key_values=copy.deepcopy(cache), use_cache=True).logits[0]
            logits = torch.cat([logits, forced])
        logits = logits.double() if logits.device.type == "cpu" else logits.float()
        likeliest = logits.argmax(dim=-1)
        told = logits.log_softmax(dim=-1).gather(-1, wanted[:, None])[:, 0]
        same = bool((likeliest == wanted).all())
        said = case.answer.tolist() if same else _say(model, cache, last, len(case.prompt), len(wanted), stops or (), progress)
    return Answer(plan, case.answer, told.double().cpu().numpy(), likeliest.cpu().numpy(), tuple(said))


@torch.no_grad()
def say(
    model: PreTrainedModel, plan: Plan, prompt: np.ndarray, n_tokens: int, max_new_tokens: int, stops: Sequence[int] = (),
    progress: Progress | None = None,
) -> list[int]:  # fmt: skip
    """The greedy answer to `prompt` (n,) under `plan` at length `n_tokens`, up to and with a token of `stops`; at least one token."""
    model = plain_model(model)
    with apply_plan(model, plan, n_tokens):
        cache = ring_cache(model, n_tokens)
        last = _read(model, cache, prompt, max_new_tokens, progress)
        return _say(model, cache, last, len(prompt), max_new_tokens, stops, progress)


def _read(model: PreTrainedModel, cache: RingCache, prompt: np.ndarray, count: int, progress: Progress | None) -> torch.Tensor:
    """Run the prompt, after which at most `count` tokens are said, into the cache: logits (vocabulary,) of the token after it."""
    step = CHUNK_TOKENS.get(model.device.type, CHUNK_TOKENS["cpu"])
    for start in range(0, len(prompt), step):
        if progress:
            progress(start, len(prompt) + SAID_TOKENS * count)
        ids = torch.from_numpy(prompt[start : start + step]).to(model.device)[None]
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    last: torch.Tensor = logits[0, -1]
    return last


def _say(
    model: PreTrainedModel, cache: RingCache, logits: torch.Tensor, read: int, count: int, stops: Sequence[int], progress: Progress | None
) -> list[int]:
    """At most `count` tokens after a prompt of `read`, the first of them from its `logits`."""
    said = [int(logits.argmax())]
    while len(said) < count and said[-1] not in stops:
        if progress:
            progress(read + SAID_TOKENS * len(said), read + SAID_TOKENS * count)
        ids = torch.tensor([[said[-1]]], device=model.device)
        said.append(int(model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].argmax()))
    return said
