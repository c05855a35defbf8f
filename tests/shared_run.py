"""A tiny run of as many processes as torchrun starts, the last of which kills itself (SIGKILL) at a given stage; see test_processes.py.

python -m torch.distributed.run --nproc-per-node 2 shared_run.py MODEL_FOLDER DOCUMENTS.jsonl OUT [STAGE]
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from killed_run import TINY

from moa_lab import presets, processes
from moa_lab.pipeline import Run

LEARNING = replace(
    TINY, lengths=(640, 768), test_lengths=(768,), learning_steps=4, learning_questions=4, learning_others=2, refine_rounds=1,
    refine_heads=2,
)  # fmt: skip


def main(model: str, documents: str, out: str, stage: str | None = None) -> None:
    """Run, and die in the last process at the first step of `stage` that has finished something; of a profile, whose steps the first
    process alone is told, as it begins."""
    torch.set_num_threads(1)
    cast(dict[str, presets.Preset], presets.PRESETS)["tiny"] = LEARNING
    last = processes.asked_for() - 1

    def progress(name: str, done: int, total: int) -> None:
        if name == stage and (done or name == "profile") and int(os.environ.get("RANK", "0")) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    settings = presets.RunSettings(model=model, density=0.6, preset="tiny", source=documents, columns="text=text,summary=summary")
    with processes.joined():
        Run(Path(out), settings, progress).everything()


if __name__ == "__main__":
    main(*sys.argv[1:])
