"""EngineLimits: how many different windows an engine can hold, and in what units it allocates them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moa_lab.geometry import check_whole


@dataclass(frozen=True)
class EngineLimits:
    """What a serving engine can hold of a plan.

    windows_per_model: most different windows; heads that keep the whole sequence come on top (None: any number). windows_per_layer: most
    in a layer, where keeping everything counts as one; 1: a layer is cut as a whole. class_multiple: the layers of one window come in
    multiples of so many (the heads, where a layer may have several windows); what is missing is allocated for nothing. block_tokens:
    tokens are allocated in blocks of so many. tokens_in_flight: tokens that a window's cache holds beside the window, of a prompt's chunk
    say; never more than the sequence has. stores_bits: whether keys and values may be stored in a plan's bits. keeps_sink: whether the
    first tokens stay beside a window. needs: what serving a plan takes there, in a clause. Raises ValueError for numbers that are not
    whole or too small.
    """

    name: str
    windows_per_model: int | None = None
    windows_per_layer: int | None = None
    class_multiple: int = 1
    block_tokens: int = 1
    tokens_in_flight: int = 0
    stores_bits: bool = False
    keeps_sink: bool = False
    needs: str = ""

    def __post_init__(self) -> None:
        if not self.name.isprintable() or not self.name.strip():
            raise ValueError(f"name must be a line of text, got {self.name!r}")
        for name in ("windows_per_model", "windows_per_layer"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        check_whole("class_multiple", self.class_multiple, 1)
        check_whole("block_tokens", self.block_tokens, 1)
        check_whole("tokens_in_flight", self.tokens_in_flight, 0)

    @property
    def cuts_layers(self) -> bool:
        """Whether all heads of a layer have one window."""
        return self.windows_per_layer == 1

    def slots(self, spans: np.ndarray, n_tokens: int) -> np.ndarray:
        """Tokens that are allocated for heads that keep `spans` (any shape) of a sequence of `n_tokens`: int64 of the same shape."""
        blocks = -(-(np.asarray(spans, dtype=np.int64) + self.tokens_in_flight) // self.block_tokens)
        return np.asarray(np.minimum(blocks, -(-n_tokens // self.block_tokens)) * self.block_tokens)

    def told(self) -> str:
        """The limits in a few words."""
        layer, model = self.windows_per_layer, self.windows_per_model
        most = [] if layer is None else [f"{layer} window{'s' * (layer > 1)} a layer"]
        most += [] if model is None else [f"{model} window{'s' * (model > 1)} a model beside the whole"]
        unit = "layers" if self.cuts_layers else "heads"
        most += [f"{unit} of a window in multiples of {self.class_multiple}"] if self.class_multiple > 1 else []
        most += [f"blocks of {self.block_tokens} tokens"] if self.block_tokens > 1 else []
        most += [f"{self.tokens_in_flight} tokens in flight"] if self.tokens_in_flight else []
        return ", ".join(most) or "any windows, to the token"
