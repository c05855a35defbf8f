"""The order in which the heads of a layer stand below one another on a map."""

from __future__ import annotations

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage


def largest_first(values: np.ndarray) -> np.ndarray:
    """The heads of every layer, those of the largest value first: int64 (layers, heads), `order[layer, row]` is a head.

    values: (layers, heads). Of equal ones the lower number comes first. Raises ValueError for values of another form.
    """
    if values.ndim != 2:
        raise ValueError(f"values must be (layers, heads), got {values.shape}")
    return np.argsort(-values, axis=1, kind="stable")


def alike_together(values: np.ndarray) -> np.ndarray:
    """The heads of every layer, those with similar features beside one another: as `largest_first`.

    values: finite (layers, heads, features). Clusters are joined by their mean Euclidean distance, and their branches turned so that
    neighbours are as close as they can be (Bar-Joseph, Gifford and Jaakkola, 2001). Raises ValueError for values of another form.
    """
    if values.ndim != 3 or not np.isfinite(values).all():
        raise ValueError(f"values must be finite (layers, heads, features), got {values.shape}")
    if values.shape[1] < 2:
        return np.zeros(values.shape[:2], dtype=np.int64)
    return np.stack([leaves_list(linkage(layer, "average", optimal_ordering=True)) for layer in values]).astype(np.int64)


def in_order(values: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """`values` (layers, heads, ...) with the heads of every layer in `order` (layers, heads); None: as they are.

    Raises ValueError where `order` is not, for every layer, a permutation of its heads.
    """
    if order is None:
        return values
    layers, heads = values.shape[:2]
    if order.shape != (layers, heads) or not np.array_equal(np.sort(order, axis=1), np.broadcast_to(np.arange(heads), (layers, heads))):
        raise ValueError(f"order must name each of the {heads} heads once in every of {layers} layers, got {order.shape}")
    # One layer number a row: heads of a layer stay in its column of the map.
    taken: np.ndarray = values[np.arange(layers)[:, None], order]
    return taken
