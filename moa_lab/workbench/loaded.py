"""The model that all panels share."""

from __future__ import annotations

import threading
from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class Loaded:
    """Model and tokenizer of the name that `name` tells, loaded once, when they are first asked for, and again when the name changes."""

    def __init__(self, name: Callable[[], str], load: Callable[[str], Pair]) -> None:
        self._name, self._load = name, load
        self._lock = threading.Lock()
        self._held: tuple[str, Pair] | None = None

    def __call__(self) -> Pair:
        """The pair; of two panels that ask at once, the second waits. Raises what loading raises."""
        name = self._name()
        with self._lock:
            if self._held is None or self._held[0] != name:
                self._held = (name, self._load(name))
            return self._held[1]
