"""Run the parity cases on a model: the ring cache and the kernels beside the reference."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from moa_lab.cache.storage import heads_as_stored
from moa_lab.evaluate.parity.cases import Case, words
from moa_lab.evaluate.parity.passes import POSITIONS, masked_in_blocks, produce
from moa_lab.evaluate.parity.record import ParityRow
from moa_lab.evaluate.parity.tally import Tally
from moa_lab.interface import AttentionCall, Handler, route_attention
from moa_lab.plan import Plan
from moa_lab.runtime import RingCache, Sampling, apply_plan, ring_cache
from moa_lab.runtime.decoding import Decoder

NEW_TOKENS = 256
FULL_PRECISION_TOLERANCE = 1e-3
NOISE_FACTOR = 2.0
STORED_NOISE_FACTOR = STORED_FLOOR_FACTOR = 4.0
"""With stored bits a number near the middle between two places of its grid moves by a whole step, which the few positions that noise is
measured at may not show: so much more noise, and so many steps of the coarsest grid at least. In float32 few numbers do."""
FLOOR_FACTOR = 8.0


class Bench:
    """A model, a plan at length `n`, and texts to run: int64 (rows, n)."""

    def __init__(self, model: PreTrainedModel, plan: Plan, n: int, texts: torch.Tensor) -> None:
        self.model, self.plan, self.n, self.texts = model, plan, n, texts
        self.left_out: list[str] = []
        self._bytes: list[tuple[int, int]] = []
        self.noise = self._noise() if model.dtype.itemsize < 4 else None
        floor = FLOOR_FACTOR * torch.finfo(model.dtype).eps
        factor = NOISE_FACTOR
        if plan.bits:
            factor, floor = STORED_NOISE_FACTOR, max(floor, STORED_FLOOR_FACTOR / (2.0 ** int(plan.widths().min()) - 1))
        self.tolerance = FULL_PRECISION_TOLERANCE if self.noise is None else max(factor * self.noise, floor)

    def settings(self) -> dict[str, Any]:
        """The settings that the record stores."""
        return {"n_tokens": self.n, "tolerance": self.tolerance, "noise": self.noise, "left_out": list(self.left_out)}

    @torch.no_grad()
    def scripted(self, case: Case) -> ParityRow:
        """Run a case's scripts over a ring cache, and each row alone through the reference."""
        tally = Tally(self.tolerance)
        for script in case.scripts:
            with apply_plan(self.model, self.plan, self.n):
                cache = ring_cache(self.model, self.n)
                produced = produce(self.model, cache, script, self.texts)
            self._keep_bytes(cache)
            for row, (logits, at) in enumerate(produced):
                tokens = self.texts[row : row + 1, : sum(step[row] for step in script)]
                tally.add(logits, self.reference(tokens, at))
        return tally.row(case.name, case.compared)

    @torch.no_grad()
    def generated(self) -> ParityRow:
        """Tokens and logits of transformers' `generate` against one reference pass over the same tokens."""
        new = min(self.n // 8, NEW_TOKENS)
        prompt = self.texts[:1, : self.n - new]
        # Greedy, whatever the model's generation config says.
        greedy: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        generate: Any = self.model.generate
        with apply_plan(self.model, self.plan, self.n):
            answer = generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new,
                return_dict_in_generate=True, output_logits=True, **greedy,
            )  # fmt: skip
        self._keep_bytes(answer.past_key_values)
        at = torch.arange(self.n - new - 1, self.n - 1, device=prompt.device)
        expected = self.reference(answer.sequences[:, :-1], at)
        tally = Tally(self.tolerance)
        tally.add(torch.cat(answer.logits), expected, said=answer.sequences[0, self.n - new :], never=self._stops())
        return tally.row("long generation", f"{new} tokens of generate after {self.n - new}")

    @torch.no_grad()
    def decoded(self) -> ParityRow:
        """Tokens of the decode loop of `moa_lab.generate` (on a GPU a captured graph), for a batch of unequal lengths."""
        new = min(self.n // 16, NEW_TOKENS)
        lengths = [max((self.n - new) // share, 1) for share in (1, 3, 11)]
        with apply_plan(self.model, self.plan, self.n):
            cache = ring_cache(self.model, self.n)
            logits = [logits for logits, _ in produce(self.model, cache, (tuple(lengths),), self.texts, positions=1)]
            decoder = Decoder(self.model, cache, torch.tensor(lengths, device=self.texts.device), Sampling(), (), new)
            decoder.first(torch.cat(logits))
            decoder.run()
        self._keep_bytes(cache)
        tally = Tally(2 * self.tolerance)
        for row, (length, said) in enumerate(zip(lengths, decoder.tokens(), strict=True)):
            answer = torch.tensor(said, device=self.texts.device)
            tokens = torch.cat([self.texts[row, :length], answer[:-1]])[None]
            at = torch.arange(length - 1, tokens.shape[1], device=tokens.device)
            tally.add_tokens(answer, self.reference(tokens, at))
        steps = "in a captured graph" if decoder.captured else "step by step"
        return tally.row("decode loop", f"{new} tokens after prompts of {words(lengths)}, {steps}")

    def allocated(self) -> ParityRow:
        """Bytes of all caches so far against what the plan predicts."""
        shares = [abs(held / predicted - 1) for held, predicted in self._bytes]
        same = sum(share == 0 for share in shares)
        held, predicted = self._bytes[int(np.argmax(shares))]
        compared = f"{held} bytes, predicted {predicted}; {len(shares)} caches"
        return ParityRow("allocated bytes", compared, 0, max(shares), same / len(shares), len(shares), 0.0, same == len(shares))

    def reference(self, tokens: torch.Tensor, at: torch.Tensor, n_tokens: int | None = None) -> torch.Tensor:
        """Logits (positions, vocabulary), float32, of one uncached pass over `tokens` (1, n) with a full mask for every head.

        at: int64 (positions,). n_tokens: as in `masked`.
        """
        with self.masked(n_tokens):
            logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False, logits_to_keep=at).logits
        return logits[0].float()

    def masked(self, n_tokens: int | None = None, reverse: bool = False) -> AbstractContextManager[None]:
        """Attend with a full mask for every head, with the spans of length `n_tokens` (None: the length of the bench), to keys and values
        as the plan's bits leave them.

        reverse: attention sums over the keys from the newest to the oldest.
        """
        windows = torch.from_numpy(self.plan.windows(n_tokens or self.n)).to(self.texts.device)
        windows = windows.repeat_interleave(self.plan.geometry.group_size, dim=1)

        def handler(layer: int) -> Handler:
            bits = self.plan.bits_of(layer)

            def attend(call: AttentionCall) -> torch.Tensor:
                key, value = heads_as_stored(call.key, call.value, bits)
                return masked_in_blocks(replace(call, key=key, value=value), self.plan.sink_tokens, windows[layer], reverse)

            return attend

        return route_attention(self.model, handler)

    @torch.no_grad()
    def _noise(self) -> float:
        """Difference between two equally right orders of summation on this model, in standard deviations of a position's logits.

        The second order: token by token over transformers' full cache with reversed keys, under the same masks.
        """
        tokens, cache, found = self.texts[:1], DynamicCache(), []
        alone = min(POSITIONS, self.n // 2)
        ends = range(self.n - alone, self.n + 1)
        with self.masked(reverse=True):
            for start, end in zip([0, *ends], ends, strict=False):
                step = self.model(input_ids=tokens[:, start:end], past_key_values=cache, use_cache=True, logits_to_keep=1)
                found.append(step.logits[:, -1].float())
        tally = Tally(math.inf)
        tally.add(torch.cat(found), self.reference(tokens, torch.arange(self.n - alone - 1, self.n, device=tokens.device)))
        return tally.difference

    def _keep_bytes(self, cache: RingCache) -> None:
        predicted = cache.batch_size * self.plan.kv_bytes(self.n, dtype_bytes=self.model.dtype.itemsize)
        self._bytes.append((cache.allocated_bytes, predicted))

    def _stops(self) -> list[int]:
        settings = self.model.generation_config
        ends = settings.eos_token_id if settings else None
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
