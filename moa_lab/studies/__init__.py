"""The questions of the paper, answered on a model: each study leaves a record with its rows, its goals and a sentence."""

from moa_lab.studies.densities import DENSITIES, quality, retrieval
from moa_lab.studies.record import StudyGoal, StudyRecord, table

STUDIES = {"retrieval": retrieval, "quality": quality}
"""Studies by name; each takes a `Run` and densities and returns its record."""

__all__ = ["DENSITIES", "STUDIES", "StudyGoal", "StudyRecord", "quality", "retrieval", "table"]
