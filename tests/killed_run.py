"""A tiny run that kills itself (SIGKILL) at a given stage; a program of its own for tests/test_pipeline.py.

python killed_run.py MODEL_FOLDER DOCUMENTS.jsonl OUT [STAGE]
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from moa_lab import presets
from moa_lab.pipeline import Run

TINY = replace(
    presets.PRESETS["quick"], lengths=(384, 512), questions=2, questions_per_sample=1, summaries=2, answer_tokens=8, candidates=4,
    refine_rounds=2, refine_heads=3, validation_questions=2, validation_summaries=2, validate_profiled=True,
    test_lengths=(512,), needles=2, needles_per_text=1, own_answers=2, lines=1, documents=1,
    baselines=("ranked", "paper"), search_seconds=20.0,
)  # fmt: skip


def main(model: str, documents: str, out: str, stage: str | None = None) -> None:
    """Run, and die at the first step of `stage` that has finished something."""
    # Two samples at once: a kill meets both half-way.
    torch.set_num_threads(2)
    cast(dict[str, presets.Preset], presets.PRESETS)["tiny"] = TINY

    def progress(name: str, done: int, total: int) -> None:
        if name == stage and done >= 1:
            os.kill(os.getpid(), signal.SIGKILL)

    settings = presets.RunSettings(model=model, density=0.6, preset="tiny", source=documents, columns="text=text,summary=summary")
    Run(Path(out), settings, progress).everything()


if __name__ == "__main__":
    main(*sys.argv[1:])
