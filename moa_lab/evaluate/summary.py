"""The table of a run: every plan's density, bytes and scores, as JSON data and as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moa_lab.evaluate.equal_bytes import unequal_plans
from moa_lab.evaluate.worse import chosen_text, worse_than_simple
from moa_lab.plan import Plan, check_names
from moa_lab.records import ALLOCATED, Measurement, Measurements
from moa_lab.storage import to_json
from moa_lab.text import aligned, interval_text

# Metric and task of each score in the summary.
SCORES = {
    "retrieval": ("retrieval", "needles"),
    "line_retrieval": ("retrieval", "lines"),
    "cross_entropy": ("cross_entropy", "summaries"),
    "document_cross_entropy": ("cross_entropy", "documents"),
}
VALUE_NAMES = {"retrieval": "accuracy", "cross_entropy": "value"}


def summarise(plans: Sequence[Plan], measurements: Measurements, n_tokens: int, density: float | None = None) -> dict[str, Any]:
    """Scores of every plan by name; `density` and bytes at 2 bytes a number, predicted and allocated, are those at `n_tokens`.

    density: the one that plans are compared at; `unequal` says which do not keep it, measured or made for that length, and why. `worse`
    says where the last plan is worse than a simple one, `chosen` which candidate it is. Raises ValueError for different plans of one name.
    """
    check_names(plans)
    lengths = sorted({row.length for row in measurements})
    return {
        "plans": {plan.name: _entry(plan, measurements, n_tokens) for plan in plans},
        "n_tokens": n_tokens,
        "kv_bytes_are": "predicted from the spans, and as allocated for the ring cache",
        "worse": worse_than_simple(plans[-1], plans[:-1], measurements),
        "chosen": chosen_text(plans[-1]),
        **({} if density is None else {"density_asked": density, "unequal": unequal_plans(plans, density, lengths)}),
        "provenance": to_json(measurements.provenance),
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as lines of text: where the plan is worse than a simple one; one row per plan, one column per score and length, and
    the density at every length; which candidate the plan is."""
    plans = summary["plans"]
    measured = all(ALLOCATED in entry for entry in plans.values())
    columns = [
        (score, length) for score in SCORES for length in sorted({n for entry in plans.values() for n in entry.get(score, {})}, key=int)
    ]
    others = sorted({n for entry in plans.values() for n in entry["density_by_length"]} - {str(summary["n_tokens"])}, key=int)
    head = [
        "plan",
        "density",
        "KV MiB",
        *(["allocated"] if measured else []),
        *(f"density @{length}" for length in others),
        *(f"{score.replace('_', ' ')} @{length}" for score, length in columns),
    ]
    rows = [head]
    for name, entry in plans.items():
        cells = [_cell(entry.get(score, {}).get(length)) for score, length in columns]
        sizes = [f"{entry[key] / 2**20:.1f}" for key in ("kv_bytes", ALLOCATED) if key in entry]
        elsewhere = [f"{share:.1%}" if (share := entry["density_by_length"].get(n)) is not None else "-" for n in others]
        rows.append([name, f"{entry['density']:.1%}", *sizes, *elsewhere, *cells])
    scores = [(name, score) for entry in plans.values() for name in SCORES for score in entry.get(name, {}).values()]
    counts = sorted({f"n = {score['n']} ({name.replace('_', ' ')})" for name, score in scores})
    note = f"density and KV at {summary['n_tokens']} tokens, bytes {summary['kv_bytes_are']}; [95% interval]; {', '.join(counts)}"
    chosen = [summary["chosen"]] if summary.get("chosen") else []
    return "\n".join([*summary.get("worse", ()), *aligned(rows), note, *summary.get("unequal", ()), *chosen])


def _entry(plan: Plan, measurements: Measurements, n_tokens: int) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "density": plan.density(n_tokens),
        "kv_bytes": plan.kv_bytes(n_tokens),
        "density_by_length": {str(n): plan.density(n) for n in sorted({row.length for row in measurements})},
        "span_tokens_mean": float(plan.spans(n_tokens).mean()),
    }
    for row in measurements.select(plan=plan.name, metric=ALLOCATED, length=n_tokens):
        entry[ALLOCATED] = int(row.value)
    for name, (metric, task) in SCORES.items():
        found = measurements.select(plan=plan.name, metric=metric, task=task)
        if found:
            entry[name] = {str(row.length): _score(row) for row in found}
    return entry


def _score(row: Measurement) -> dict[str, Any]:
    return row.score(VALUE_NAMES[row.metric])


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    value = score.get("accuracy", score.get("value"))
    return f"{value:.3f} {interval_text(score['low'], score['high'], '.2f')}"
