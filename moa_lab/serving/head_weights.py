"""A checkpoint's weights with the KV heads of every layer, and the query heads that read them, in another order.

Heads of a layer are exchangeable: rows of what makes queries, keys and values, and columns of what puts them together, are moved alike,
and the model is the same. An engine that slices a layer's heads in their order then gives each device the heads that it should hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import torch

from moa_lab.geometry import ModelGeometry

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"})
"""Of transformers, by `model_type`: those of whose attention every weight is known here."""
ATTENTION = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.(.+)$")
QUERIES, KEYS, VALUES = "q_proj.weight", "k_proj.weight", "v_proj.weight"
FUSED, OUTPUT = "qkv_proj.weight", "o_proj.weight"
UNMOVED = ("o_proj.bias", "q_norm.weight", "k_norm.weight", "rotary_emb.inv_freq")
"""Alike for all heads."""


class HeadWeights:
    """Puts the weights of a checkpoint in another order. order: of every layer, KV heads of the checkpoint in the order that is wanted."""

    def __init__(self, order: Sequence[Sequence[int]], geometry: ModelGeometry) -> None:
        self._geometry, self._seen = geometry, set[tuple[int, str]]()
        self._key_rows = [_rows(heads, geometry.head_dim) for heads in order]
        self._query_rows = [_rows(heads, geometry.head_dim * geometry.group_size) for heads in order]

    def reordered(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and weights as they come, those of attention moved. Raises ValueError for one that is not known."""
        for name, weight in weights:
            found = ATTENTION.search(name)
            yield name, weight if found is None else self._moved(name, int(found[1]), found[2], weight)

    def check_complete(self) -> None:
        """Raise ValueError where weights of a layer's heads did not come by their names: others may have come in the checkpoint's order."""
        for layer in range(len(self._key_rows)):
            lacking = {QUERIES, KEYS, VALUES, OUTPUT} - {part for at, part in self._seen if at == layer}
            if lacking:
                raise ValueError(f"the checkpoint has no {' and '.join(sorted(lacking))} in layer {layer}: its heads cannot be moved")

    def _moved(self, name: str, layer: int, part: str, weight: torch.Tensor) -> torch.Tensor:
        if part in UNMOVED:
            return weight
        query, key = self._query_rows[layer], self._key_rows[layer]
        kind = part.removesuffix("bias") + "weight" if part.endswith(".bias") else part
        dimension, rows = 0, {QUERIES: query, KEYS: key, VALUES: key}.get(kind)
        if kind == FUSED:
            rows = torch.cat([query, key + len(query), key + len(query) + len(key)])
        elif kind == OUTPUT:
            dimension, rows = 1, query
        if rows is None or weight.shape[dimension] != len(rows):
            raise ValueError(f"weight {name} of shape {tuple(weight.shape)} is not known: its heads cannot be moved")
        self._seen |= {(layer, each) for each in ((QUERIES, KEYS, VALUES) if kind == FUSED else (kind,))}
        return weight.index_select(dimension, rows.to(weight.device))


def _rows(heads: Sequence[int], size: int) -> torch.Tensor:
    """Of heads of `size` rows: int64 (heads * size,)."""
    return (torch.tensor(heads, device="cpu")[:, None] * size + torch.arange(size, device="cpu")).flatten()
