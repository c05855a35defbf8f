"""Plans tried on one answer, with their scores: a history, and a way back and forth through it."""

from __future__ import annotations

from dataclasses import dataclass

from moa_lab.plan import Plan
from moa_lab.trace import Answer


@dataclass(frozen=True, eq=False)
class Trial:
    """A plan, the answer under it, and what was changed to get there. density: at the case's length. loss_change: mean nats a token more
    than the dense model.
    """

    plan: Plan
    answer: Answer
    what: str
    density: float
    loss_change: float

    @property
    def is_same(self) -> bool:
        """Whether the plan says what was asked for, word by word."""
        return self.answer.first_difference is None


class Trials:
    """Every plan tried once, oldest first, and the path by which undo and redo go: indices into `tried`, and where on it we are."""

    def __init__(self) -> None:
        self.tried: list[Trial] = []
        self._path: list[int] = []
        self._at = -1

    @property
    def current(self) -> Trial | None:
        """The trial that is shown; None before the first."""
        return self.tried[self._path[self._at]] if self._path else None

    @property
    def index(self) -> int:
        """Of the current trial in `tried`; -1 before the first."""
        return self._path[self._at] if self._path else -1

    @property
    def can_undo(self) -> bool:
        """Whether there is a trial before the current one."""
        return self._at > 0

    @property
    def can_redo(self) -> bool:
        """Whether something was undone."""
        return self._at + 1 < len(self._path)

    def find(self, plan: Plan) -> Trial | None:
        """The trial of a plan that does the same; None where there is none."""
        return next((trial for trial in self.tried if trial.plan.identity() == plan.identity()), None)

    def keep(self, trial: Trial) -> None:
        """Make `trial` the current one, after which nothing is left to redo; it is added to the history unless it is there."""
        if trial not in self.tried:
            self.tried.append(trial)
        self.choose(self.tried.index(trial))

    def choose(self, index: int) -> Trial:
        """Make trial number `index` of `tried` the current one. Raises ValueError for an unknown one."""
        if not 0 <= index < len(self.tried):
            raise ValueError(f"there are {len(self.tried)} trials, got number {index}")
        if index != self.index:
            self._path[self._at + 1 :] = [index]
            self._at += 1
        return self.tried[index]

    def undo(self) -> Trial:
        """Back to the trial before. Raises ValueError at the first."""
        if not self.can_undo:
            raise ValueError("there is nothing to undo")
        self._at -= 1
        return self.tried[self._path[self._at]]

    def redo(self) -> Trial:
        """Forth again. Raises ValueError where nothing was undone."""
        if not self.can_redo:
            raise ValueError("there is nothing to redo")
        self._at += 1
        return self.tried[self._path[self._at]]
