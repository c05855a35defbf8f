"""vLLM on a tiny model under a plan, and the tokens that it should give; for tests in the environment that has vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moa_lab.plan import Plan
from moa_lab.runtime import apply_plan, ring_cache
from moa_lab.serving import bucket_lengths

SETTINGS: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 256, "max_num_seqs": 16, "block_size": 16,
    "kv_cache_memory_bytes": 16 << 20,
}  # fmt: skip
"""Of vLLM, for tiny models."""


class Engine:
    """vLLM under a plan, and what its scheduler does."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        from vllm import LLM

        self.llm = LLM(str(folder), **SETTINGS | settings)
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.most_running = self.most_preemptions = 0
        own = self.scheduler.schedule

        def schedule(*arguments: Any, **named: Any) -> Any:
            found = own(*arguments, **named)
            self.most_running = max(self.most_running, len(self.scheduler.running))
            self.most_preemptions = max(self.most_preemptions, sum(each.num_preemptions for each in self.scheduler.requests.values()))
            return found

        self.scheduler.schedule = schedule

    def tokens(self, prompts: Sequence[list[int]], new: int | Sequence[int]) -> list[list[int]]:
        """The likeliest tokens after every prompt."""
        from vllm import SamplingParams

        counts = [new] * len(prompts) if isinstance(new, int) else list(new)
        settings = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False) for count in counts]
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    @property
    def concurrency(self) -> float:
        """How many requests of the greatest length fit, as vLLM says."""
        return float(self.llm.llm_engine.vllm_config.cache_config.kv_cache_max_concurrency)

    @property
    def pages(self) -> int:
        """Pages of the pool."""
        return int(self.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks)

    @property
    def caches_prefixes(self) -> bool:
        """Whether the scheduler looks for prefixes that it knows."""
        return bool(self.scheduler.kv_cache_manager.enable_caching)

    @property
    def usage(self) -> float:
        """Share of the pages that somebody holds."""
        return float(self.scheduler.kv_cache_manager.usage)


Start = Callable[..., Engine]


@torch.no_grad()
def expected(model: PreTrainedModel, plan: Plan, prompt: list[int], new: int, n_tokens: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens of the model under the plan, with windows as at `n_tokens`, and how far each was before the second."""
    tokens, margins, chunk = [], [], torch.tensor([prompt])
    with apply_plan(model, plan, n_tokens):
        cache = ring_cache(model, len(prompt) + new)
        for _ in range(new):
            logits = model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
            first, second = logits.topk(2).values.tolist()
            tokens.append(int(logits.argmax()))
            margins.append(first - second)
            chunk = torch.tensor([tokens[-1:]])
    return tokens, margins


def check_tokens(
    model: PreTrainedModel, plan: Plan, prompts: Sequence[list[int]], found: Sequence[list[int]], n_tokens: int | None = None,
    tie: float = 1e-4, page_tokens: int = SETTINGS["block_size"],
) -> None:  # fmt: skip
    """All tokens are those of the model under the plan; after a tie, which is told, a sequence is compared no further.

    n_tokens: the length of the windows; None: of every request, as an engine of `SETTINGS` takes it.
    """
    equal = ties = 0
    for prompt, tokens in zip(prompts, found, strict=True):
        total = len(prompt) + len(tokens)
        at = n_tokens or next(each for each in bucket_lengths(SETTINGS["max_model_len"], page_tokens) if each >= total)
        wanted, margins = expected(model, plan, prompt, len(tokens), at)
        other = next((at for at, pair in enumerate(zip(tokens, wanted, strict=True)) if pair[0] != pair[1]), None)
        assert other is None or margins[other] < tie, f"prompt of {len(prompt)} tokens, new token {other}: {margins[other or 0]:.2e} ahead"
        ties += other is not None
        equal += len(tokens) if other is None else other
    print(json.dumps({"equal": equal, "of": sum(map(len, found)), "ties": ties}))
    assert equal >= 0.99 * sum(map(len, found))
