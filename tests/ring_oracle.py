"""A cache that keeps everything, to hold the ring against: tokens arrive in chunks, queries see what the masks say."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from moa_lab.cache import LayerLayout, PackedRing, ring_layer
from moa_lab.cache.storage import heads_as_stored
from moa_lab.kernels.reference import masked_attention
from moa_lab.masks import visible
from moa_lab.plan import Bits

HEAD_DIM = 16


@dataclass
class Chunk:
    """New tokens of every row, padded on the left: query, key, value (batch, heads, tokens, head_dim)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    padding: torch.Tensor
    lengths: torch.Tensor


class Sequences:
    """Rows that grow chunk by chunk, and what attention over all that was seen gives."""

    def __init__(
        self, layout: LayerLayout, batch: int, *, group: int = 2, head_dim: int = HEAD_DIM, dtype: torch.dtype = torch.float32,
        device: str = "cpu", seed: int = 0, softcap: float | None = None, sinks: bool = False,
        bits: list[Bits] | None = None,
    ) -> None:  # fmt: skip
        self.layout, self.group, self.softcap, self.scale = layout, group, softcap, head_dim**-0.5
        self.ring = ring_layer(layout, batch, head_dim, dtype, torch.device(device), bits)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._random = torch.Generator().manual_seed(seed)
        query_heads = len(layout.windows) * group
        self.sink_logits = (1 + torch.randn(query_heads, 1, 1, generator=self._random)).to(self.ring.sample) if sinks else None
        self._keys: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        self._values: list[list[torch.Tensor]] = [[] for _ in range(batch)]

    def chunk(self, counts: list[int]) -> Chunk:
        """The next `counts[b]` tokens of row b."""
        batch, tokens, kv_heads = len(counts), max(counts), len(self.layout.windows)
        shape = (batch, tokens, kv_heads * (self.group + 2), self.ring.sample.shape[-1])
        drawn = torch.randn(shape, generator=self._random).to(self.ring.sample).transpose(1, 2)
        query, key, value = drawn.split([kv_heads * self.group, kv_heads, kv_heads], dim=1)
        padding = torch.tensor([tokens - count for count in counts], dtype=torch.int32, device=drawn.device)
        self.lengths = self.lengths + torch.tensor(counts, dtype=torch.int32, device=drawn.device)
        held_key, held_value = heads_as_stored(key, value, self.ring.stored_bits)
        for row, count in enumerate(counts):
            self._keys[row].append(held_key[row, :, tokens - count :])
            self._values[row].append(held_value[row, :, tokens - count :])
        return Chunk(query, key, value, padding, self.lengths)

    def expected(self, chunk: Chunk) -> torch.Tensor:
        """Attention of the chunk's queries to everything before them, masked, in float32; 0 for padding."""
        output = torch.zeros_like(chunk.query, dtype=torch.float32)
        windows = torch.tensor(self.layout.windows, device=output.device)[:, None, None].repeat_interleave(self.group, dim=0)
        for row, padding in enumerate(chunk.padding.tolist()):
            key, value = (torch.cat(x[row], dim=1)[None].float() for x in (self._keys, self._values))
            known = torch.arange(key.shape[2], device=output.device)
            asked = known[key.shape[2] - (chunk.query.shape[2] - padding) :, None]
            shown = visible(asked, known, self.layout.sink_tokens, windows) & (asked - known < (self.layout.reach or key.shape[2] + 1))
            query = chunk.query[row : row + 1, :, padding:].float()
            output[row, :, padding:] = masked_attention(query, key, value, shown[None], self.scale, self.softcap, self.sink_logits)[0]
        return output

    def poison(self, unwritten: Chunk | None = None) -> None:
        """NaN in every slot that holds no token: what is read from there shows. unwritten: a chunk that is not in the ring yet."""
        new = 0 if unwritten is None else unwritten.key.shape[2] - unwritten.padding
        empty = self.ring.positions(self.lengths - new) < 0
        if not isinstance(self.ring, PackedRing):
            self.ring.keys[empty] = self.ring.values[empty] = float("nan")
            return
        for head, part in product(range(len(self.layout.windows)), range(2)):
            of_head = empty[:, self.ring.layout.starts[head] : self.ring.layout.starts[head + 1]]
            for kind, held in self.ring.views(head, part).items():
                # In a grid, too, these bits are NaN.
                held[of_head] = float("nan") if kind == "plain" else -1

    def reorder(self, rows: list[int]) -> None:
        """Rows dropped, repeated, moved."""
        index = torch.tensor(rows, device=self.lengths.device)
        self.ring.select(index)
        self.lengths = self.lengths[index]
        self._keys, self._values = ([list(kept[row]) for row in rows] for kept in (self._keys, self._values))


def random_layout(rng: np.random.Generator) -> LayerLayout:
    """Sinks, windows, own windows and capacities of every kind."""
    sink = int(rng.integers(0, 9))
    windows = tuple(int(w) for w in rng.choice([1, 2, 5, 9, 16, 33, 1000], size=rng.integers(1, 4)))
    reach = None if rng.random() < 0.5 else int(rng.integers(1, 40))
    return LayerLayout(sink, windows, reach, capacity=int(rng.integers(60, 130)))
