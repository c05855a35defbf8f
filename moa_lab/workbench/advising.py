"""Which measured plan to take: the runs that are weighed, the wish, the advice, and the chosen plan in the state."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from moa_lab.evaluate.options import Option, Wish, options_of
from moa_lab.evaluate.recommend import Advice, recommend
from moa_lab.text import given_path
from moa_lab.workbench.opening import known_runs
from moa_lab.workbench.state import State

FIRST = 0.9
"""Share of the dense model's needles that is asked for before anything is wished."""


class Advising:
    """Weighs measured plans of the state's model. advice: the last one given."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.advice: Advice | None = None
        self._read: tuple[str, tuple[Option, ...]] | None = None

    def options(self, folders: str = "", known: Iterable[Path] | None = None) -> tuple[Option, ...]:
        """The plans of the runs in `folders`, paths with commas between them; empty: of all runs of this model that are known.

        known: those, None for `known_runs`. Raises ValueError where nothing was measured, and for runs of different models.
        """
        named = [part for part in re.split(r"[,\n]", folders) if part.strip()]
        if named:
            return options_of(map(given_path, named))
        own, found = self._weights(), []
        for run in known_runs() if known is None else known:
            try:
                options = options_of([run])
            except ValueError:
                continue
            if own is not None and all(option.weights == own for option in options):
                found.append(run)
        if not found:
            raise ValueError("no measured run of this model is known: name the folders of its runs (`moa-lab run --out FOLDER`)")
        return options_of(found)

    def advise(self, wish: Wish | None = None, folders: str = "", known: Iterable[Path] | None = None, again: bool = True) -> Advice:
        """Recommend a plan. Raises ValueError as `options` and `recommend`.

        wish: None for `FIRST` of the dense model's needles. again: read the runs anew, also where the same were weighed last.
        """
        self.advice = None
        if again or self._read is None or self._read[0] != folders:
            self._read = None
            self._read = (folders, self.options(folders, known))
        self.advice = recommend(self._read[1], wish or Wish(needles=FIRST))
        return self.advice

    def take(self) -> None:
        """Make the recommended plan the state's. Raises ValueError where there is none."""
        if self.advice is None or self.advice.plan is None:
            raise ValueError("no plan is recommended")
        self.state.set(plan=self.advice.plan)

    def _weights(self) -> str | None:
        """The weights that the state's records are of."""
        records = (self.state.measurements, self.state.profile, self.state.table, self.state.front, self.state.plan)
        return next((record.provenance.weights for record in records if record is not None and record.provenance.weights), None)
