"""The panels of the workbench, each made when it is first looked at: a page is sent every widget, and all of them take it seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ipywidgets as w

from moa_lab.workbench.widgets import without_null


class Panels(Mapping[str, Any]):
    """Panels by the title of their tab. makes: what makes each of them, in the order of the tabs. made: those that were made so far.

    boxes: what the tabs hold; a panel's is empty until it is made.
    """

    def __init__(self, makes: Mapping[str, Callable[[], Any]]) -> None:
        self._makes = dict(makes)
        self.made: dict[str, Any] = {}
        self.boxes = {title: w.VBox([]) for title in makes}

    def __getitem__(self, title: str) -> Any:
        if title not in self.made:
            self.made[title] = self._makes[title]()
            without_null(self.made[title].box)
            self.boxes[title].children = (self.made[title].box,)
        return self.made[title]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makes)

    def __len__(self) -> int:
        return len(self._makes)

    def __contains__(self, title: object) -> bool:
        # A mapping's own way is to ask for the value, which would make the panel.
        return title in self._makes
