"""KV heads dealt out to the devices of a tensor-parallel engine, and one block table for all of them.

Every device holds some of each layer's KV heads, and their pages in a pool of its own; the scheduler hands out the same pages on all. So
step j of a table has as many places as the device with the most heads that have a page j, and on each device its heads take them in its
own order: places that it has no head for stay empty. How many stay empty depends on who holds which heads. An engine slices a layer's
heads in their order; where its weights may be put in another one (`moa_lab.serving.head_weights`), heads are dealt so that devices hold
about as many pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from moa_lab.cache import LayerLayout
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import WHOLE_BITS, Bits, Plan, dense_plan
from moa_lab.serving.page_layout import PAGE_TOKENS, AnyLayout, MixedLayout, PageLayout, PageShape, RequestPages, page_layout

LENGTHS = 8
"""At most so many lengths are weighed where heads are dealt: one order holds for requests of all lengths."""


@dataclass(frozen=True)
class HeadShares:
    """order: of every layer, all KV heads in the order in which devices hold them. count: shares, each of as many heads of a layer."""

    order: tuple[tuple[int, ...], ...]
    count: int

    @property
    def is_natural(self) -> bool:
        """Whether heads are in the model's order."""
        return all(row == tuple(range(len(row))) for row in self.order)

    def pages(
        self, plan: Plan, lengths: tuple[int, ...], max_tokens: int, page_tokens: int = PAGE_TOKENS,
        tokens: Mapping[Bits, int] | None = None,
    ) -> tuple[RequestPages, ...]:  # fmt: skip
        """As `request_pages`, for every share: each tells the same numbers of pages."""
        by_length = [self._of_length(page_layout(plan, n_tokens, max_tokens, page_tokens, tokens)) for n_tokens in lengths]
        return tuple(RequestPages(lengths, tuple(each[share] for each in by_length)) for share in range(self.count))

    def density(self, plan: Plan, n_tokens: int, page_tokens: int = PAGE_TOKENS, shape: PageShape | None = None) -> float:
        """Bytes of the pages that a request of `n_tokens` takes on each device, as a share of what a dense cache would take there.

        shape: of the plan's pages; None: of `page_tokens` untouched tokens.
        """
        kept, dense = (
            self._of_length(page_layout(of, n_tokens, n_tokens, page_tokens, tokens))[0].pages_for(n_tokens)
            for of, tokens in ((plan, shape.tokens if shape else None), (dense_plan(plan.geometry), None))
        )
        return kept / dense * (shape.nbytes / shape.untouched if shape else 1)

    def _of_length(self, whole: AnyLayout) -> list[AnyLayout]:
        kinds = [self._of_kind(kind) for kind, _ in whole.kinds]
        return list(kinds[0]) if len(kinds) == 1 else [MixedLayout(own) for own in zip(*kinds, strict=True)]

    def _of_kind(self, kind: PageLayout) -> list[PageLayout]:
        parts = [self._part(kind, share) for share in range(self.count)]
        having = np.zeros((self.count, max(len(part.having) for part in parts)), dtype=np.int64)
        for row, part in zip(having, parts, strict=True):
            row[: len(part.having)] = part.having
        most = tuple(having.max(axis=0).tolist())
        return [replace(part, at_least=most) for part in parts]

    def _part(self, kind: PageLayout, share: int) -> PageLayout:
        size = len(self.order[0]) // self.count
        mine = [row[share * size : (share + 1) * size] for row in self.order]
        layers = (
            LayerLayout(each.sink_tokens, tuple(each.windows[head] for head in heads), each.reach, each.capacity)
            for each, heads in zip(kind.layers, mine, strict=True)
        )
        of_kind = (tuple(at for at, head in enumerate(heads) if head in own) for heads, own in zip(mine, kind.heads, strict=False))
        return PageLayout(tuple(layers), kind.page_tokens, kind.bits, tuple(of_kind))


def natural_shares(geometry: ModelGeometry, devices: int = 1) -> HeadShares:
    """A layer's heads in the model's order, cut into as many shares as there are devices.

    With more devices than KV heads, several hold the same one. Raises ValueError where heads cannot be dealt evenly.
    """
    if devices < 1 or geometry.query_heads % devices or (geometry.kv_heads % devices and devices % geometry.kv_heads):
        raise ValueError(
            f"{geometry.query_heads} query heads / {geometry.kv_heads} KV heads cannot be dealt evenly to {devices} devices: their number "
            f"must divide the query heads, and divide the KV heads or be a multiple of them"
        )
    return HeadShares((tuple(range(geometry.kv_heads)),) * geometry.layers, min(devices, geometry.kv_heads))


def balanced_shares(
    plan: Plan, devices: int, lengths: Sequence[int], page_tokens: int = PAGE_TOKENS, tokens: Mapping[Bits, int] | None = None
) -> HeadShares:
    """Heads dealt, within their layers, so that few places of the tables stay empty for requests of `lengths`.

    One after the other, the layer first whose heads differ most, each to the device where it adds least; then any two heads of a layer
    are swapped as long as that helps. The model's order stays where that leaves no fewer empty. The same plan gives the same shares
    everywhere. Raises ValueError as `natural_shares`.
    """
    natural = natural_shares(plan.geometry, devices)
    if natural.count == 1:
        return natural
    taken = _pages_taken(plan, lengths[:: len(lengths) // -LENGTHS], tokens or {WHOLE_BITS: page_tokens})
    holder = _swapped(taken, *_dealt(taken, natural.count))
    in_order = np.repeat(np.arange(natural.count), plan.geometry.kv_heads // natural.count)
    if _places(taken, np.tile(in_order, (plan.geometry.layers, 1))) <= _places(taken, holder) + 1e-9:
        return natural
    return HeadShares(tuple(tuple(np.argsort(row, kind="stable").tolist()) for row in holder), natural.count)


def _pages_taken(plan: Plan, lengths: Sequence[int], tokens: Mapping[Bits, int]) -> np.ndarray:
    """Whether a head has a page j in a request of each length, all requests weighing the same: (layers, kv_heads, steps of all lengths and
    kinds)."""
    found = []
    for n_tokens in lengths:
        # Coarser pages tell as much of long requests.
        times = -(-n_tokens // (64 * min(tokens.values())))
        layout = page_layout(plan, n_tokens, n_tokens, tokens={bits: times * count for bits, count in tokens.items()})
        most = [kind.most_pages[..., None] for kind, _ in layout.kinds]
        found += [(pages > np.arange(pages.max())) / sum(map(np.sum, most)) for pages in most]
    return np.concatenate(found, axis=-1)


def _places(taken: np.ndarray, holder: np.ndarray) -> float:
    """Places in the tables of all lengths, where share `holder` (layers, kv_heads) has each head."""
    held = [taken[holder == share].sum(axis=0) for share in range(holder.max() + 1)]
    return float(np.max(held, axis=0).sum())


def _dealt(taken: np.ndarray, shares: int) -> tuple[np.ndarray, np.ndarray]:
    """The share of every head, int64 (layers, kv_heads), and what each has: (shares, steps)."""
    layers, kv_heads, steps = taken.shape
    holder, held, sizes = np.zeros((layers, kv_heads), dtype=np.int64), np.zeros((shares, steps)), taken.sum(axis=-1)
    for layer in np.argsort(-np.ptp(sizes, axis=1), kind="stable"):
        room = np.full(shares, kv_heads // shares)
        for head in np.argsort(-sizes[layer], kind="stable"):
            # Places that are added, then pages that the share has already.
            added = np.maximum(held + taken[layer, head] - held.max(axis=0), 0).sum(axis=1)
            share = min(np.flatnonzero(room), key=lambda at: (round(added[at], 9), round(held[at].sum(), 9)))
            holder[layer, head] = share
            held[share] += taken[layer, head]
            room[share] -= 1
    return holder, held


def _swapped(taken: np.ndarray, holder: np.ndarray, held: np.ndarray) -> np.ndarray:
    """`holder`, after all swaps that leave fewer places empty."""
    layers, kv_heads, _ = taken.shape
    places, before = held.max(axis=0).sum(), np.inf
    while places < before - 1e-9:
        before = places
        for layer in range(layers):
            for one, two in combinations(range(kv_heads), 2):
                pair = holder[layer, [one, two]]
                if pair[0] == pair[1]:
                    continue
                tried, change = held.copy(), taken[layer, two] - taken[layer, one]
                tried[pair] += np.stack([change, -change])
                found = tried.max(axis=0).sum()
                if found < places - 1e-9:
                    held, places = tried, found
                    holder[layer, [one, two]] = pair[::-1]
    return holder
