"""Solving ahead: the densities near the one that is shown, while nobody moves the slider."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

REST_S = 0.5
"""Seconds without a move after which solving goes on: it must not slow a slider that is dragged."""
POLL_S = 0.05


class Ahead:
    """Calls `solve` for densities in a thread of its own, one by one. A new `start` ends what was being done."""

    def __init__(self, solve: Callable[[float], object]) -> None:
        self._solve = solve
        self._stop = threading.Event()
        self._moved_s = 0.0
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        """Whether densities are left to be solved."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, densities: Sequence[float]) -> None:
        """Solve these, in order."""
        self.stop()
        stop = self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(tuple(densities), stop), daemon=True)
        self._thread.start()

    def moved(self) -> None:
        """Wait until nothing has moved for `REST_S`."""
        self._moved_s = time.monotonic()

    def stop(self) -> None:
        """End after the density that is being solved."""
        self._stop.set()

    def _run(self, densities: Sequence[float], stop: threading.Event) -> None:
        for density in densities:
            while time.monotonic() - self._moved_s < REST_S and not stop.is_set():
                time.sleep(POLL_S)
            if stop.is_set():
                return
            try:
                self._solve(density)
            except ValueError:
                # Infeasible with what is pinned now: the slider says so when it gets there.
                continue
