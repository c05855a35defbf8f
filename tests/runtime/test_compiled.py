"""torch.compile traces a decode step whole, kernels and cache included, once and for all steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_plans import small_plan, stored_plan
from torch._dynamo.testing import CompileCounter
from transformers import PreTrainedModel

from moa_lab.kernels import dispatch
from moa_lab.plan import Plan
from moa_lab.runtime import Sampling, apply_plan, ring_cache
from moa_lab.runtime.decoding import Decoder

torch.set_num_threads(1)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEW = 12


@pytest.mark.parametrize(("family", "plan"), [("llama", small_plan), ("gemma2", small_plan), ("llama", stored_plan)])
def test_a_compiled_step_is_one_graph_and_says_the_same(
    family: str, plan: Callable[[PreTrainedModel], Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What decides for the kernels is traced too; the interpreter runs them.
    monkeypatch.setattr(dispatch, "on_gpu", lambda tensor: True)
    model = tiny_model(family, tie_word_embeddings=False).to(DEVICE)
    tokens, counter = random_tokens(2, 40).to(DEVICE), CompileCounter()
    torch._dynamo.reset()
    said = []
    for step in (model, torch.compile(model, backend=counter, fullgraph=True)):
        with apply_plan(model, plan(model), 40 + NEW), torch.no_grad():
            cache = ring_cache(model, 40 + NEW)
            logits = model(tokens, past_key_values=cache).logits[:, -1]
            decoder = Decoder(step, cache, torch.tensor([40, 40], device=DEVICE), Sampling(), [], NEW)
            decoder.first(logits)
            decoder.run(graph=False)
            said.append(decoder.tokens())
            assert cache.get_seq_length() == 40 + NEW - 1
    assert said[0] == said[1]
    assert counter.frame_count == 1
