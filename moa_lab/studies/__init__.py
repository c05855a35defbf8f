"""Studies: questions from the paper, measured on a model. Each returns a record with rows, goals and an answer."""

from collections.abc import Callable, Mapping
from importlib import import_module

from moa_lab.pipeline import Run
from moa_lab.studies.record import StudyGoal, StudyRecord, table
from moa_lab.studies.scale import Scale, scale_of

Study = Callable[[Run, Scale], StudyRecord]

MODULES: Mapping[str, str] = {
    "retrieval": "densities.costs",
    "quality": "densities.costs",
    "calibration": "calibrating.ablation",
    "space": "searching.space",
    "search": "predicting.objectives",
    "unseen": "predicting.unseen",
    "refine": "searching.refine",
    "rules": "searching.rules",
    "engines": "searching.engines",
    "low_density": "densities.low_density",
    "transfer": "calibrating.transfer",
    "weights": "bits.weights",
    "speed": "densities.speed",
}
"""Studies by name, and the module here that holds the function of that name."""


def study(name: str) -> Study:
    """The study of that name. Raises ValueError for another name."""
    if name not in MODULES:
        raise ValueError(f"study must be one of {', '.join(MODULES)}, got {name!r}")
    found: Study = getattr(import_module(f"moa_lab.studies.{MODULES[name]}"), name)
    return found


__all__ = ["MODULES", "Scale", "Study", "StudyGoal", "StudyRecord", "scale_of", "study", "table"]
