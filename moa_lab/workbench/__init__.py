"""The workbench: what its panels do, as plain objects that a script may use as well, and the panels themselves.

`Workbench.open(run)` shows the records of a run in JupyterLab.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Workbench"]


def __getattr__(name: str) -> Any:
    # The panels need ipywidgets; the objects behind them do not.
    if name == "Workbench":
        from moa_lab.workbench.desk import Workbench

        return Workbench
    raise AttributeError(f"module 'moa_lab.workbench' has no attribute {name!r}")
