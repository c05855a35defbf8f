"""Memory and time that a profile will need, extrapolated from a short run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import PreTrainedModel

from moa_lab.calibration.samples import Sample
from moa_lab.clock import clock
from moa_lab.geometry.wrappers import plain_model
from moa_lab.models import geometry_of
from moa_lab.plan import SINK_TOKENS
from moa_lab.profiling.backward import backward_pass
from moa_lab.profiling.row_blocks import ROW_BLOCK_ELEMENTS
from moa_lab.side_by_side import free_bytes, on_one_core, workers

PROBE_TOKENS = {"cpu": (128, 384), "cuda": (512, 2048)}
"""Shorter passes tell nothing of longer ones: on a GPU they take as long as it takes to ask for them."""
# Temporaries of one row block: scores, weights, their gradients, influence and its tiles.
ROW_BLOCK_ARRAYS = 8
SAFETY = 1.15
GPU_BATCH_TOKENS = 32_768
GPU_BYTES = 12 * 10**9
"""Most GPU memory for a profile before activations are recomputed to save more; with 7B weights at 4k a quarter of it is enough."""


@dataclass(frozen=True)
class Seconds:
    """Of one pass by its length: a part that grows with the tokens, and a part that grows with their square."""

    linear: float
    quadratic: float

    @classmethod
    def through(cls, lengths: Sequence[int], seconds: Sequence[float]) -> Seconds:
        """Fitted to what passes of two lengths took, which `far_apart` makes different enough."""
        (n0, n1), (s0, s1) = lengths, seconds
        quadratic = max(0.0, (s1 / n1 - s0 / n0) / max(n1 - n0, 1))
        return cls(max(s1 / n1 - quadratic * n1, 0.0), quadratic)

    def __call__(self, n: int) -> float:
        return self.linear * n + self.quadratic * n * n


@dataclass(frozen=True)
class Estimate:
    """Predicted cost of a profile. Bytes beyond the loaded weights; seconds for all samples together, and of each by its length."""

    longest_tokens: int
    needed_bytes: int
    checkpointed_bytes: int
    free_bytes: int
    seconds: float
    bytes_per_token: float
    device: str
    seconds_each: Seconds = Seconds(0.0, 0.0)

    @property
    def budget_bytes(self) -> int:
        """Bytes that activations may take before they are recomputed: all free ones, on a GPU at most `GPU_BYTES`."""
        return self.free_bytes if self.device == "cpu" else min(self.free_bytes, GPU_BYTES)

    @property
    def checkpoint(self) -> bool:
        """Whether activations are recomputed in backward, because they do not fit in the budget."""
        return self.needed_bytes > self.budget_bytes

    @property
    def bytes_in_flight(self) -> int:
        """Bytes that one of the longest samples takes."""
        return self.checkpointed_bytes if self.checkpoint else self.needed_bytes

    def samples_in_flight(self, length: int) -> int:
        """Samples of `length` tokens that share a pass, as fit in half the budget; one on a CPU, whose cores take a sample each."""
        if self.device == "cpu" or self.checkpoint:
            return 1
        fitting = int(self.budget_bytes / 2 // max(self.bytes_per_token * length * SAFETY, 1))
        return max(1, min(fitting, GPU_BATCH_TOKENS // length))

    def require_fit(self) -> None:
        """Raise ValueError when even with recomputation the longest sample does not fit."""
        if self.checkpointed_bytes > self.free_bytes:
            raise ValueError(
                f"profiling {self.longest_tokens} tokens needs about {self.checkpointed_bytes / 2**30:.1f} GiB beyond the weights, "
                f"{self.free_bytes / 2**30:.1f} GiB are free on {self.device}; use shorter lengths or a larger machine"
            )

    def __str__(self) -> str:
        gib = self.bytes_in_flight / 2**30
        recomputing = " with activations recomputed" if self.checkpoint else ""
        return f"about {gib:.1f} GiB beyond the weights{recomputing} ({self.free_bytes / 2**30:.1f} GiB free), about {self.seconds:.0f} s"


def estimate_cost(model: PreTrainedModel, samples: Iterable[Sample], *, sink_tokens: int = SINK_TOKENS) -> Estimate:
    """Measure two short backward passes and extrapolate to `samples`.

    They are measured once a model, device and dtype. Memory: what autograd saves grows linearly with the length, because attention
    saves only q, k, v; the row block comes on top. Time: a linear and a quadratic term fitted to the two passes.
    """
    model = plain_model(model)
    samples = list(samples)
    geometry = geometry_of(model)
    lengths = [sample.length for sample in samples]
    longest = max(lengths)
    vocabulary, width = next(model.get_input_embeddings().parameters()).shape
    measured = _MEASURED.setdefault(model, {})
    how = (model.device, model.dtype, sink_tokens)
    if how not in measured:
        measured[how] = _measured(model, geometry.max_length, vocabulary, sink_tokens)
    rates = measured[how]
    per_token = rates.bytes_per_token
    answers = max(len(sample.answer_positions) for sample in samples)
    logits = answers * vocabulary * 4 * 3
    block = ROW_BLOCK_ELEMENTS.get(model.device.type, ROW_BLOCK_ELEMENTS["cpu"])
    rows = ROW_BLOCK_ARRAYS * 4 * max(block, geometry.query_heads * 64 * longest)
    mask = 5 * longest**2
    tiles = geometry.layers * geometry.query_heads * (-(-longest // 64)) ** 2 * 4
    fixed = logits + rows + mask + 2 * tiles
    # Recomputing keeps one hidden state per layer, and one layer's activations at a time.
    hidden = width * model.dtype.itemsize * geometry.layers
    checkpointed = hidden * longest + per_token * longest / geometry.layers
    return Estimate(
        longest_tokens=longest,
        needed_bytes=int(SAFETY * (per_token * longest + fixed)),
        checkpointed_bytes=int(SAFETY * (checkpointed + fixed)),
        free_bytes=free_bytes(model.device),
        seconds=sum(map(rates.seconds, lengths)) / workers(len(lengths), model.device),
        bytes_per_token=per_token,
        device=str(model.device),
        seconds_each=rates.seconds,
    )


@dataclass(frozen=True)
class _Rates:
    """Seconds of a sample, and bytes a token that autograd saves."""

    seconds: Seconds
    bytes_per_token: float


_MEASURED: WeakKeyDictionary[PreTrainedModel, dict[tuple[torch.device, torch.dtype, int], _Rates]] = WeakKeyDictionary()


def far_apart(lengths: Sequence[int], max_length: int) -> tuple[int, int]:
    """Two lengths within a model's maximum, the longer at least three times the shorter: how noisily a pass of nearly the same length
    differs says nothing of how time grows."""
    short, long = (min(n, max_length) for n in lengths)
    return max(1, min(short, long // 3)), long


def _measured(model: PreTrainedModel, max_length: int, vocabulary: int, sink_tokens: int) -> _Rates:
    asked = PROBE_TOKENS.get(model.device.type, PROBE_TOKENS["cpu"])
    try:
        return _rates(model, far_apart(asked, max_length), vocabulary, sink_tokens)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return _rates(model, far_apart(PROBE_TOKENS["cpu"], max_length), vocabulary, sink_tokens)


def _rates(model: PreTrainedModel, lengths: tuple[int, int], vocabulary: int, sink_tokens: int) -> _Rates:
    n0, n1 = lengths
    # As the profile will run: a sample a core. A short pass that all cores share would mostly wait for the slowest of them.
    # The first pass is slower than the others, on a GPU of each length, and does not count.
    order = (n0, n0, n1) if model.device.type == "cpu" else (n0, n1, n0, n1)
    *_, first, last = on_one_core(lambda: [_probe(model, n, vocabulary, sink_tokens) for n in order], model.device)
    seconds, saved = zip(first, last, strict=True)
    return _Rates(Seconds.through((n0, n1), seconds), saved[1] / n1)


def _probe(model: PreTrainedModel, n: int, vocabulary: int, sink_tokens: int) -> tuple[float, int]:
    """Seconds of a backward pass over `n` tokens, and the bytes that it saves."""
    probe = Sample("probe", np.arange(n, dtype=np.int64) % vocabulary, ((n - 1, n),))
    counter = _SavedBytes(model)
    started = clock(model.device)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, counter.unpack):
        backward_pass(model, [probe], lambda layer, reduced: None, sink_tokens)
    return clock(model.device) - started, counter.bytes


class _SavedBytes:
    """Counts the bytes autograd saves for backward, each storage once, parameters left out."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.bytes = 0
        self._seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor
