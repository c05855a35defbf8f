"""The state of a descent, or of a mean of slopes, on disk, so that a killed one goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from moa_lab import processes
from moa_lab.calibration.samples import SampleSet
from moa_lab.models import weights_fingerprint
from moa_lab.provenance import digest
from moa_lab.records import LossTable
from moa_lab.storage import is_intact, read_tensors, write_tensors

STATE_SCHEMA = "moa-lab/descent/1"
SAVE_S = 30.0
"""Seconds between two saves: what a kill costs at most."""


class Checkpoint:
    """The file of one course in `folder` (None: nothing is kept), named after all that decides it (see `course_of`).

    state: arrays, and numbers as JSON data.
    """

    def __init__(self, folder: str | Path | None, name: str, course: Mapping[str, Any]) -> None:
        self._path = None if folder is None else Path(folder) / f"{name}-{digest(json.dumps(course, sort_keys=True).encode())}.safetensors"
        self._saved = time.monotonic()

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The last saved state; None where there is none that can be read."""
        if self._path is None or not is_intact(self._path, lambda path: read_tensors(path, STATE_SCHEMA)):
            return None
        arrays, told = read_tensors(self._path, STATE_SCHEMA)
        return arrays, told["state"]

    def save(self, arrays: Mapping[str, np.ndarray], state: Mapping[str, Any], *, last: bool = False) -> None:
        """Save if the last save is some time ago, or if this is the last step."""
        if self._path is not None and processes.is_first() and (last or time.monotonic() - self._saved >= SAVE_S):
            write_tensors(self._path, arrays, {"schema": STATE_SCHEMA, "state": dict(state)})
            self._saved = time.monotonic()


def course_of(model: PreTrainedModel, samples: SampleSet, table: LossTable) -> dict[str, Any]:
    """What decides any course over these samples, as JSON data: the model as it runs, the samples, and the choices of the table."""
    return {
        "model": weights_fingerprint(model), "samples": samples.identity, "rules": [str(rule) for rule in table.rules],
        "table": [table.lengths, table.sink_tokens, table.min_span], "device": model.device.type, "dtype": str(model.dtype),
        **({"stored": table.stored} if table.stored else {}),
    }  # fmt: skip
