"""Check our decode loop on a model with random weights: its tokens against an uncached pass under the same plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from moa_lab.bench.models import ModelShape, random_model, stretched_plan
from moa_lab.models import geometry_of
from moa_lab.plan import Plan
from moa_lab.runtime import Sampling, apply_plan, ring_cache
from moa_lab.runtime.decoding import Decoder
from moa_lab.runtime.generate import prefill

NEAR_TIE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Logits (normal, standard deviation 1.5) closer than this may swap with the order of summation."""


@torch.no_grad()
def check_tokens(
    shape: ModelShape, plan: Plan, device: torch.device, dtype: torch.dtype, n_tokens: int = 1024, new_tokens: int = 24
) -> dict[str, Any]:
    """Greedy tokens of our loop, on two layers of the geometry, against an uncached pass under the same plan: counts, as JSON data.

    The pass reads the loop's tokens. equal: its likeliest token is the loop's next one; near_ties: it is not, by less than `NEAR_TIE`;
    wrong: the others. equal_dense: `equal` of a pass without the plan, which shows whether the plan changes tokens at all.
    """
    model = random_model(replace(shape, layers=2), n_tokens, device, dtype, spread=1.5)
    cut = stretched_plan(plan, geometry_of(model), n_tokens)
    generator = torch.Generator(device).manual_seed(1)
    prompt = torch.randint(shape.vocabulary, (2, n_tokens - new_tokens), generator=generator, device=device)
    with apply_plan(model, cut, n_tokens):
        decoder = _decoded(model, prompt, n_tokens, new_tokens)
        said = torch.tensor(decoder.tokens(), device=device)
        whole = torch.cat([prompt, said[:, :-1]], dim=1)
        expected = model(input_ids=whole, use_cache=False, logits_to_keep=new_tokens).logits.float()
    dense = model(input_ids=whole, use_cache=False, logits_to_keep=new_tokens).logits
    equal = expected.argmax(dim=-1) == said
    short = expected.amax(dim=-1) - expected.gather(2, said[..., None])[..., 0]
    # Not `short > NEAR_TIE`: NaN must count as wrong.
    wrong = ~equal & ~(short <= NEAR_TIE[dtype])
    return {
        "tokens": said.numel(), "equal": int(equal.sum()), "near_ties": int((~equal & ~wrong).sum()), "wrong": int(wrong.sum()),
        "equal_dense": int((dense.argmax(dim=-1) == said).sum()), "captured": decoder.captured,
    }  # fmt: skip


def _decoded(model: PreTrainedModel, prompt: torch.Tensor, n_tokens: int, new_tokens: int, chunk: int = 256) -> Decoder:
    """Our loop after a prefill in chunks, in a cache with room for `n_tokens`; a plan is applied to the model."""
    cache = ring_cache(model, n_tokens)
    logits, lengths = prefill(model, cache, prompt.tolist(), chunk * len(prompt))
    decoder = Decoder(model, cache, lengths, Sampling(), [], new_tokens)
    decoder.first(logits)
    decoder.run()
    return decoder
