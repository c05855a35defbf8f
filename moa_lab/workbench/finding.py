"""Finding a head by what people call it."""

from __future__ import annotations

import re

_NAMES = re.compile(r"\s*(?:layer|l)?\s*(\d+)\s*[,.:; ]?\s*(?:kv\s*head|query\s*head|head|h)?\s*(\d+)\s*", re.IGNORECASE)


def find_head(text: str, layers: int, heads: int) -> tuple[int, int]:
    """Layer and head of "L12 H3", "12 3", "12.3" or "layer 12, KV head 3".

    Raises ValueError for another text, and for a head that the model does not have.
    """
    found = _NAMES.fullmatch(text)
    if found is None or not re.search(r"\d\D+\d", text):
        raise ValueError(f"{text!r} names no head: write, for instance, L12 H3")
    layer, head = int(found[1]), int(found[2])
    if layer >= layers or head >= heads:
        raise ValueError(f"there is no L{layer} H{head}: layers are 0 to {layers - 1}, heads 0 to {heads - 1}")
    return layer, head
