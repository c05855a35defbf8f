"""Presses of kvpress at the number of entries asked for, and a plan as one of them. Needs kvpress (0.5.5), in an environment of its own."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel

from moa_lab.presses.attention import SpanMask, attending
from moa_lab.presses.methods import REPLAYED_TOKENS, kept_context, split_heads
from moa_lab.presses.questions import Question

if find_spec("datasets") is None:
    # kvpress imports it for texts from the hub, which `Presses` gives it instead.
    sys.modules["datasets"] = module_from_spec(ModuleSpec("datasets", None))
    sys.modules["datasets"].load_dataset = None  # type: ignore[attr-defined]

from kvpress import (
    AdaKVPress,
    BasePress,
    DuoAttentionPress,
    ExpectedAttentionPress,
    KVPressTextGenerationPipeline,
    KVzipPress,
    PrefillDecodingPress,
    SnapKVPress,
    StreamingLLMPress,
)
from kvpress.presses import duo_attention_press, kvzip_press

# KVzip reads its tokenizer anew for every context.
kvzip_press.AutoTokenizer = SimpleNamespace(from_pretrained=cache(AutoTokenizer.from_pretrained))

TEXT_CHARACTERS = 8_000
"""Of each text that heads are scored on."""
KVZIP_CHARACTERS = 16_000
SPLITS = {"duo": (128, 256), "duo-192": (64, 128), "kvzip-heads": (64, 128)}
"""Tokens that a streaming head keeps at least, first and newest: kvpress's own, and the 192 of this project's whole-or-floor plans."""


class SpanPress(PrefillDecodingPress):
    """A plan among the presses: in force while the context is read, and while the question is read and answered."""

    def __init__(self, spans: SpanMask) -> None:
        super().__init__()
        self.spans = spans

    @contextlib.contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[None]:
        with attending(model, self.spans, "moa_lab_spans"):
            yield


class SplitPress(DuoAttentionPress):
    """DuoAttention with given scores of heads (layers, kv_heads): the `streaming` lowest keep their first and newest tokens."""

    def __init__(self, scores: np.ndarray, streaming: int, first: int, newest: int) -> None:
        super().__init__(head_compression_ratio=streaming / scores.size)
        self.scores, self.sizes = scores, (first, newest)

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        self.sink_size, self.recent_size = self.sizes
        mask = np.zeros(self.scores.size, dtype=bool)
        mask[np.argsort(self.scores, axis=None)[: round(self.scores.size * self.head_compression_ratio)]] = True
        self.streaming_mask = torch.from_numpy(mask.reshape(self.scores.shape)).to(model.device)


class _HeadScores(KVzipPress):
    """KVzip's score of a head: the largest of its entries (`--save_head_score` in snu-mllab/KVzip)."""

    def compress_post(self, model: PreTrainedModel) -> None:
        self.found = self.score_val[:, 0].amax(dim=-1).float().cpu().numpy()


class Presses:
    """Makes presses for a model. texts: what heads are scored on, excerpts of the calibration split."""

    def __init__(self, model: PreTrainedModel, pipeline: KVPressTextGenerationPipeline, texts: Sequence[str], n_texts: int = 50) -> None:
        self.model, self.pipeline = model, pipeline
        pieces = [text[at : at + TEXT_CHARACTERS] for text in texts for at in range(0, len(text) - TEXT_CHARACTERS, TEXT_CHARACTERS)]
        self.texts = pieces[:: max(1, len(pieces) // n_texts)][:n_texts]
        self.long_text = max(texts, key=len)[:KVZIP_CHARACTERS]

    def press(self, method: str, keep: float, question: Question) -> BasePress:
        """The press that holds `keep` of all tokens when the question is answered. Raises ValueError where it cannot."""
        context, kept = len(question.context), kept_context(keep, question)
        # Half an entry more, which kvpress rounds down.
        dropped = max(0.0, 1 - (kept + 0.5) / context)
        if method == "streaming":
            return StreamingLLMPress(dropped)
        if method == "snapkv":
            # Its default kernel of 5 cannot keep seven tokens of one digit together.
            return SnapKVPress(dropped, window_size=32, kernel_size=13)
        if method == "adakv":
            return AdaKVPress(ExpectedAttentionPress(dropped, epsilon=1e-2))
        if method == "kvzip":
            return KVzipPress(dropped, chunk_size=REPLAYED_TOKENS)
        first, newest = SPLITS[method]
        scores = self.kvzip_scores if method == "kvzip-heads" else self.duo_scores
        streaming, floor = split_heads(kept, context, scores.size, first + newest)
        return SplitPress(scores, streaming, first, floor - first)

    @cached_property
    def duo_scores(self) -> np.ndarray:
        """kvpress's scores on the fly, (layers, kv_heads), of our texts in the place of BookSum's chapters."""
        chapters = SimpleNamespace(tolist=lambda: self.texts)
        table: Any = SimpleNamespace(to_pandas=lambda: table, sample=lambda *_, **__: {"chapter": chapters})
        with mock.patch.object(duo_attention_press, "load_dataset", return_value=table):
            return np.asarray(duo_attention_press.duo_attention_on_the_fly(self.model, num_samples=len(self.texts)))

    @cached_property
    def kvzip_scores(self) -> np.ndarray:
        """KVzip's scores of heads on one text, (layers, kv_heads)."""
        read = self.pipeline.preprocess(self.long_text, [""], "", max_context_length=self.model.config.max_position_embeddings)
        press = _HeadScores(0.5, chunk_size=REPLAYED_TOKENS)
        with press(self.model):
            self.model.model(input_ids=read["context_ids"].to(self.model.device), past_key_values=DynamicCache())
        return press.found
