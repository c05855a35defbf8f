"""Figures of benchmarks as files, for `moa-lab show --figure`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moa_lab.bench.beside import Kept, beside, kept_of, session_of
from moa_lab.bench.record import BENCH_SCHEMA, BenchRecord
from moa_lab.figures import CONFIG, goal_ratios, speed_and_quality, with_theme

PICTURE = {"width": 860, "scale": 2}


def draw(path: Path, schema: str, out: Path, runs: Sequence[Path] = (), length: int | None = None) -> str:
    """Draw the record of a benchmark to an HTML file that needs no network, or to a picture (.png); returns what was left out, in words.

    runs: folders of runs whose quality at `length` (None: of the benchmark's prompt) is drawn over the speeds of this record; without
    them, the record against its goals. Raises ValueError for other records, and where no run has a speed.
    """
    if runs:
        session = session_of(path)
        found, alone = beside(session, [kept_of(run, length or session.prompt) for run in runs])
        if not found:
            raise ValueError(f"{path}: no speed was measured in the bits and near the bytes of {_told_kept(alone)}")
        fig, left_out = speed_and_quality(session, found), f"without a speed, and not drawn: {_told_kept(alone)}" if alone else ""
    elif schema == BENCH_SCHEMA:
        fig, left_out = goal_ratios(BenchRecord.load(path)), ""
    else:
        raise ValueError(f"{path}: only benchmarks are drawn to a file, this is {schema}; `moa-lab run` draws the others into its report")
    if out.suffix.lower() == ".png":
        with_theme(fig, dark=False).update_layout(paper_bgcolor="white").write_image(out, **PICTURE)
    else:
        fig.write_html(out, include_plotlyjs=True, config={**CONFIG})  # a copy: plotly takes entries out
    return left_out


def _told_kept(plans: Sequence[Kept]) -> str:
    return ", ".join(f"{one.model} with {one.share:.1%} in {one.bits} bits" for one in plans)
