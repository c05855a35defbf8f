"""All studies on a tiny model, as a user starts them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moa_lab.pipeline import Run


@dataclass(frozen=True)
class Sketch:
    """Studies of the preset sketch. records: folder of their records; run: what they share."""

    records: Path
    run: Run

    def line(self, name: str, out: Path) -> list[str]:
        """Arguments of `moa-lab` that make the record `out` of one study, or of all in the folder `out`."""
        settings = self.run.settings
        return [
            "study", name, "--out", str(out), "--work", str(self.run.folder), "--model", settings.model, "--preset", settings.preset,
            "--source", str(settings.source), "--columns", str(settings.columns),
            # Below the floor, the sketch's own, and one more.
            "--densities", "0.1,0.5,0.75",
        ]  # fmt: skip
