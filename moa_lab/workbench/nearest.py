"""What was measured nearest to a density, in words: one score, and all of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moa_lab.evaluate.compare import row_of
from moa_lab.evaluate.options import NEEDLES, TEXTS, Option
from moa_lab.evaluate.over_bytes import RUN, measured_at
from moa_lab.figures.densities import family
from moa_lab.figures.intervals import told
from moa_lab.figures.measurements import metric_label
from moa_lab.figures.theme import percent
from moa_lab.records import Measurement


def nearest_text(rows: Sequence[Measurement], density: float) -> str:
    """What was measured nearest to a density, in words, beside the dense model's score; "" where no plan was measured.

    rows: as `scores_over_bytes` names them, of one task and length.
    """
    plans = [row for row in rows if row.density < 1]
    if not plans:
        return ""
    row = min(plans, key=lambda one: (abs(one.density - density), -one.n))
    dense = next((f"; dense {_score(one)}" for one in rows if one.density >= 1), "")
    run = row.detail.get(RUN)
    return f"Measured nearest, at {percent(row.density, 1)}: {_score(row)} ({run or family(row)}, n = {row.n:,}){dense}."


def lost_text(options: Sequence[Option], density_at: Callable[[int], float]) -> str:
    """All that the run measured whose plan is nearest in density, beside its own dense model, in one sentence; "" where none was.

    At the longest length that all `options` were measured at, of the first task that they have in common. density_at: by length.
    """
    places = measured_at(options)
    if not places:
        return ""
    task, length = places[0]
    density = density_at(length)
    rows = [(option, row_of(option.rows, option.plan.name, task, length)) for option in options]
    option, row = min(rows, key=lambda pair: (abs(pair[1].density - density), -pair[1].n))
    scores = "; ".join(_beside(option, task, length) for task, n in measured_at([option]) if n == length)
    return f"Measured at {percent(row.density, 1)} and {length:,} tokens, the nearest ({option.source or option.plan.name}): {scores}."


def _beside(option: Option, task: str, length: int) -> str:
    ours, dense = (row_of(option.rows, name, task, length) for name in (option.plan.name, "dense"))
    unit = "" if task == NEEDLES else " nats a token"
    return f"{TEXTS.get(task, task)} {_score(ours)}, dense {_shown(dense, dense.value)}{unit}"


def _score(row: Measurement) -> str:
    return f"{_shown(row, row.value)} [{told(row, lambda value: _shown(row, value), ', ')}]"


def _shown(row: Measurement, value: float) -> str:
    return percent(value, 1) if metric_label(row.metric)[1] == "%" else f"{value:.3f}"
