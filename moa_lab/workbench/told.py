"""A line in a notebook that says what is being waited for."""

from __future__ import annotations

from typing import Any


class Told:
    """Shown below the cell at once, and changed by `say`; outside notebooks nothing is shown."""

    def __init__(self, text: str) -> None:
        self._line: Any = None
        try:
            from IPython.core.getipython import get_ipython
            from IPython.display import display
        except ImportError:
            # Scripts need no IPython.
            return
        if getattr(get_ipython(), "kernel", None) is not None:
            self._line = display({"text/plain": text}, raw=True, display_id=True)

    def say(self, text: str) -> None:
        """Say something else in its place."""
        if self._line is not None:
            self._line.update({"text/plain": text}, raw=True)
