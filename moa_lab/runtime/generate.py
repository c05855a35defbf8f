"""Generation over the ring cache: prefill in chunks, then one token after another without a host synchronisation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.clock import clock
from moa_lab.geometry.wrappers import is_split, plain_model
from moa_lab.models import chat_ids, geometry_of, prompt_ids
from moa_lab.plan import PlanOrPath, as_plan, dense_plan
from moa_lab.runtime.apply import apply_plan, ring_cache
from moa_lab.runtime.arguments import check_tokenizer, stop_ids, texts, truth, whole_number
from moa_lab.runtime.decoding import Decoder, check_graph
from moa_lab.runtime.hf_cache import RingCache
from moa_lab.runtime.sampling import Sampling

PREFILL_TOKENS = 32768
"""Tokens of all rows that go through the model at once in prefill: what a larger chunk would gain is small, its memory is not."""


@dataclass(frozen=True)
class Generation:
    """What was generated, and what it took.

    texts, tokens: one per prompt, up to and with the stop token. prompt_tokens: per prompt. prefill_s, decode_s: seconds;
    decode_steps: passes after the first new token. kv_bytes_predicted: of the plan, all rows; kv_bytes_allocated: what the cache held.
    captured: whether the decode step ran as a CUDA graph.
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    prompt_tokens: tuple[int, ...]
    prefill_s: float
    decode_s: float
    decode_steps: int
    kv_bytes_predicted: int
    kv_bytes_allocated: int
    captured: bool

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens a second after the first, all rows together."""
        return self.decode_steps * len(self.texts) / self.decode_s if self.decode_s else 0.0


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str],
    *,
    plan: PlanOrPath | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    chat: bool = False,
    stop_tokens: int | str | Iterable[int | str] | None = None,
    prefill_tokens: int = PREFILL_TOKENS,
    graph: bool | None = None,
    compiled: bool = False,
) -> Generation:
    """Answer `prompts`, all in one batch, under `plan` (or the config card at that path; None: every head keeps everything).

    Spans are those of the longest prompt and the new tokens together. sampling: None takes the likeliest token. chat: prompts are
    a user's messages, which are text: a control token that one spells is none. Without chat, prompts are read as the tokenizer reads
    them, so that control tokens can be written by hand. stop_tokens: ids, or texts of one token each (a longer token that holds such a
    text ends nothing); None for the model's own end of sequence. prefill_tokens: of all rows, at once. graph: capture the decode step
    as a CUDA graph (None: on one GPU, where the model allows it; True must succeed). compiled: `torch.compile` the decode step first,
    which takes a minute or so and pays for long answers. Raises ValueError, before any work is done, for no prompts, an empty one,
    tokens beyond the model's maximum length, an argument of another kind, a stop token that the model does not have, and a graph
    without a GPU.
    """
    model = plain_model(model)
    longest = geometry_of(model).max_length
    check_tokenizer(tokenizer)
    asked = texts(prompts)
    truth("chat", chat)
    truth("compiled", compiled)
    whole_number("max_new_tokens", max_new_tokens)
    whole_number("prefill_tokens", prefill_tokens)
    if sampling is not None and not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a Sampling, such as Sampling(temperature=0.7), got {sampling!r}")
    check_graph(graph, model.device, is_split(model))
    stops = stop_ids(model, tokenizer, stop_tokens)
    plan = dense_plan(geometry_of(model)) if plan is None else as_plan(plan)
    rows = [chat_ids(tokenizer, [{"role": "user", "content": text}]) if chat else prompt_ids(tokenizer, text) for text in asked]
    if not rows or not all(rows):
        raise ValueError("generation needs at least one prompt, and a token in every prompt")
    n_tokens = max(map(len, rows)) + max_new_tokens
    if n_tokens > longest:
        raise ValueError(
            f"{max(map(len, rows))} prompt and {max_new_tokens} new tokens: all together must be at most {longest}, "
            "the model's maximum length"
        )
    with apply_plan(model, plan, n_tokens):
        cache = ring_cache(model, n_tokens)
        started = clock(model.device)
        logits, lengths = prefill(model, cache, rows, prefill_tokens)
        decoder = Decoder(
            torch.compile(model, fullgraph=True) if compiled else model, cache, lengths, sampling or Sampling(), stops, max_new_tokens
        )
        decoder.first(logits)
        first = clock(model.device)
        decoder.run(False if is_split(model) else graph)
        ended = clock(model.device)
    tokens = decoder.tokens()
    return Generation(
        texts=tuple(str(tokenizer.decode(_without_stop(row, stops), skip_special_tokens=chat)) for row in tokens),
        tokens=tuple(map(tuple, tokens)),
        prompt_tokens=tuple(map(len, rows)),
        prefill_s=first - started,
        decode_s=ended - first,
        decode_steps=decoder.steps,
        kv_bytes_predicted=len(rows) * plan.kv_bytes(n_tokens, logits.dtype.itemsize),
        kv_bytes_allocated=cache.allocated_bytes,
        captured=decoder.captured,
    )


def prefill(
    model: PreTrainedModel, cache: RingCache, rows: Sequence[Sequence[int]], prefill_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (batch, vocabulary) of every row's last token, and int64 lengths (batch,); the rows are padded on the left.

    A plan is applied to the model, and `cache` is a new one of it. prefill_tokens: of all rows, at once.
    """
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        tokens[index, longest - len(row) :] = torch.tensor(row)
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    tokens, mask, positions, lengths = (x.to(model.device) for x in (tokens, mask, positions, lengths))
    # Whole prompts of as many rows as fit, not chunks of all rows: only those that are longer come in chunks.
    together = max(prefill_tokens // longest, 1)
    groups = [slice(start, min(start + together, len(rows))) for start in range(0, len(rows), together)]
    chunk = max(prefill_tokens // min(together, len(rows)), 1)
    last = []
    for group in cache.in_turn(groups):
        for start in range(0, longest, chunk):
            part = slice(start, start + chunk)
            # The whole mask as far as the tokens go; without padding none is needed.
            padded = {"attention_mask": mask[group, : part.stop]} if len(rows) > 1 else {}
            logits = model(
                input_ids=tokens[group, part], position_ids=positions[group, part], past_key_values=cache, use_cache=True,
                logits_to_keep=1, **padded,
            ).logits  # fmt: skip
        last.append(logits[:, -1])
    return torch.cat(last), lengths


def _without_stop(tokens: Sequence[int], stops: Sequence[int]) -> list[int]:
    return list(tokens[:-1]) if tokens and tokens[-1] in stops else list(tokens)
