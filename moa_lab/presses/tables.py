"""The rows as lines of text: what was found, what was kept, what a method needs."""

from __future__ import annotations

from moa_lab.records import Measurements
from moa_lab.text import aligned, interval_text

METRIC = "retrieval"


def table(record: Measurements) -> str:
    """One line a row."""
    lines = [["tokens", "method", "found", "95% interval", "n", "kept", "footprint", "reads", "passes", "before"]]
    for row in record:
        needs = row.detail["needs"]
        scores = (f"{row.value:.3f}", interval_text(row.low, row.high), str(row.n), f"{row.density:.1%}", f"{row.detail['footprint']:.3f}")
        lines.append([str(row.length), row.plan, *scores, needs["reads"], str(needs["passes"]), needs["before"]])
    left_out = [f"left out: {name}: {reason}" for name, reason in record.settings["left_out"].items()]
    note = "kept: share of the keys that the answer's last query sees; footprint: KV entries x tokens held, dense = 1 (arXiv 2506.17121)"
    return "\n".join([*aligned(lines), *left_out, note])
