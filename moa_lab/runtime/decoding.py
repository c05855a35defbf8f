"""The decode loop: one pass per new token, captured as a CUDA graph where there is one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moa_lab.runtime.hf_cache import RingCache
from moa_lab.runtime.sampling import Sampling

logger = logging.getLogger(__name__)

WARM_UP = 3
"""Steps that run before one is captured: what is made on first use is there by then."""
CHECK_EVERY = 32
"""Steps between two questions whether all rows have stopped: the only time the host waits."""


def check_graph(graph: bool | None, device: torch.device, split: bool = False) -> None:
    """Raises ValueError where a decode step on `device` (and on others: split) cannot be captured though `graph` asks for it."""
    if not (graph is None or isinstance(graph, bool)):
        raise ValueError(f"graph must be True, False or None, got {graph!r}")
    if graph and device.type != "cuda":
        raise ValueError(f"graph=True needs a GPU, and the model is on {device}: leave it out, and the step runs without a CUDA graph")
    if graph and split:
        raise ValueError("graph=True needs the whole model on one GPU: leave it out, and the step runs without a CUDA graph")


class Decoder:
    """New tokens of every row, up to `most`, and what a step needs, all of it on the device.

    model: the model, or what `torch.compile` made of it. cache: as the prefill left it, with room for all that is to come; lengths:
    int64 (batch,), tokens of every row so far.
    """

    def __init__(
        self, model: Callable[..., Any], cache: RingCache, lengths: torch.Tensor, sampling: Sampling, stops: Sequence[int], most: int
    ) -> None:
        device, batch = lengths.device, len(lengths)
        self._model, self._cache, self._sampling, self._most = model, cache, sampling, most
        self._positions = lengths[:, None].clone()
        self._generator = sampling.generator(device)
        self._stops = torch.tensor(list(stops), dtype=torch.long, device=device)
        self._tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self._said = torch.zeros(batch, most, dtype=torch.long, device=device)
        self._at = torch.zeros(1, dtype=torch.long, device=device)
        self._stopped = torch.zeros(batch, dtype=torch.bool, device=device)
        # A mask that is there already keeps the model from making one in every pass; the cache knows what is seen.
        self._mask = torch.ones(batch, 1, 1, 1, dtype=torch.bool, device=device)
        self.steps = 0
        self.captured = False

    def first(self, logits: torch.Tensor) -> None:
        """Choose every row's first token from the prompt's `logits` (batch, vocabulary)."""
        self._say(logits)

    def run(self, graph: bool | None = None) -> None:
        """Decode until all rows have stopped or have said all they may.

        graph: capture the step as a CUDA graph; None: on a GPU, where the model allows it. Raises ValueError where there is no GPU,
        and RuntimeError where the step cannot be captured, if True.
        """
        check_graph(graph, self._tokens.device)
        wanted = self._tokens.is_cuda if graph is None else graph
        step = self._step
        with self._cache.decoding():
            while self.steps < self._most - 1:
                if self.steps % CHECK_EVERY == 0 and bool(self._stopped.all()):
                    break
                if wanted and self.steps == WARM_UP:
                    step = self._captured() or step
                    if graph and step == self._step:
                        raise RuntimeError("the decode step of this model cannot be captured: leave graph=True out (the log says why)")
                step()
                self.steps += 1
        self._cache.came(self.steps)

    def tokens(self) -> list[list[int]]:
        """What every row said, up to and with its stop token."""
        rows = self._said[:, : self.steps + 1].tolist()
        stops = set(self._stops.tolist())
        ends = [next((at for at, token in enumerate(row) if token in stops), len(row) - 1) for row in rows]
        return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]

    def _step(self) -> None:
        found = self._model(
            input_ids=self._tokens, position_ids=self._positions, attention_mask=self._mask, past_key_values=self._cache, use_cache=True
        )  # fmt: skip
        self._positions += 1
        self._say(found.logits[:, -1])

    def _say(self, logits: torch.Tensor) -> None:
        chosen = self._sampling.pick(logits, self._generator)
        self._tokens.copy_(chosen[:, None])
        self._said.index_copy_(1, self._at, chosen[:, None])
        self._at += 1
        self._stopped |= torch.isin(chosen, self._stops)

    def _captured(self) -> Callable[[], None] | None:
        """The step as a graph. Where the model synchronises with the host in every step: None, and a line in the log."""
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            logger.warning("the decode step cannot be captured (%s): it runs step by step", str(error).splitlines()[0])
            return None
        self.captured = True
        return graph.replay
