"""vLLM with its own cache and under plans, side by side: every side and length in a process of its own, in one record."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moa_lab.bench.engine import ENGINE_SCHEMA, SERVED, STORES
from moa_lab.plan import Plan
from moa_lab.provenance import provenance
from moa_lab.storage import RecordError, read_json, write_json
from moa_lab.text import aligned

SERVING_SCHEMA = "moa-lab/serving/1"
GOALS = ((0.26, 3.3), (0.51, 1.8))
"""Up to this density, so many times the tokens/s of vLLM's own cache in bfloat16."""
BASE = "vLLM-bf16"
MOST_SAID = 200
"""Characters that a row keeps of why its side failed."""


def bench_serving(
    out: Path,
    plans: Sequence[Path],
    prompts: Sequence[int],
    block_size: int | None = None,
    quick: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure what `out` does not have yet, and write it there after every side. A side that fails is told in words in its row. Rows whose
    tokens/s are not of steps, as records had them first, are measured anew.

    plans: config cards; prompts: tokens of a prompt. See `moa_lab.bench.engine.bench_engine`. Raises ValueError for a file at `out` that is
    no such record, or of other plans.
    """
    cards = {_told(Plan.load(path)): path for path in plans}
    if len(cards) < len(plans):
        raise ValueError(f"two of the plans have the same name and density: {', '.join(cards)}")
    sides: list[tuple[str, str, Path | None]] = [(peer, peer, None) for peer in STORES]
    sides += [(name, SERVED, path) for name, path in cards.items()]
    record: dict[str, Any] = read_json(out, SERVING_SCHEMA) if out.exists() else {"schema": SERVING_SCHEMA, "rows": []}
    jobs = [(side, prompt) for prompt in prompts for side in sides]
    for done, ((name, peer, path), prompt) in enumerate(jobs, start=1):
        if not any(row["side"] == name and row["prompt"] == prompt and "steps" in row for row in record["rows"]):
            others = [row for row in record["rows"] if (row["side"], row["prompt"]) != (name, prompt)]
            found = _measured(peer, path, prompt, block_size if path else None, quick)
            told = found.pop("session", {})
            record |= {key: told[key] for key in ("model", "device", "vllm", "torch", "new_tokens") if key in told}
            record["provenance"] = vars(provenance(seed=0, device=told.get("device")))
            record["rows"] = [*others, {"side": name, "prompt": prompt, **found}]
            write_json(out, record)
        if progress is not None:
            progress(done, len(jobs))
    return record


def serving_table(record: dict[str, Any]) -> str:
    """The rows as lines of text, with what each makes of the base's tokens/s, and its goal."""
    base = {row["prompt"]: row["rate"] for row in record["rows"] if row["side"] == BASE and "rate" in row}
    lines = [["prompt", "side", "density", "batch", "tokens/s", "ms a step", "times bf16", "goal"]]
    for row in sorted(record["rows"], key=lambda row: (row["prompt"], row["side"])):
        if "rate" not in row:
            lines.append([str(row["prompt"]), row["side"], "", "", row["failed"], "", "", ""])
            continue
        density = row.get("density")
        times = row["rate"] / base[row["prompt"]] if row["prompt"] in base else None
        goal = next((factor for most, factor in GOALS if density is not None and density <= most), None)
        lines.append(
            [
                str(row["prompt"]), row["side"], "" if density is None else f"{density:.1%}", str(row["batch"]), f"{row['rate']:.1f}",
                f"{row['ms']:.1f}", "" if times is None else f"{times:.2f}", "" if goal is None else f"{goal}",
            ]
        )  # fmt: skip
    return "\n".join(aligned(lines))


def _told(plan: Plan) -> str:
    """Runs name their plans alike: what tells them apart is the density, here at their model's maximum length."""
    return f"plan {plan.name} {plan.density(plan.geometry.max_length):.0%}"


def _measured(peer: str, plan: Path | None, prompt: int, block_size: int | None, quick: bool) -> dict[str, Any]:
    """`moa-lab bench engine` in a process of its own: its row and its session, or why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "engine.json"
        command = [sys.executable, "-m", "moa_lab", "bench", "engine", "--out", str(out), "--peer", peer, "--lengths", str(prompt)]
        command += ["--plan", str(plan)] if plan else []
        command += ["--block-size", str(block_size)] if block_size else []
        done = subprocess.run([*command, *(["--quick"] if quick else [])], capture_output=True, text=True, check=False)
        try:
            session = read_json(out, ENGINE_SCHEMA)
        except (OSError, RecordError):
            said = [line for line in done.stderr.splitlines() if line.strip()]
            return {"failed": said[-1][:MOST_SAID] if said else f"ended with {done.returncode}"}
    (row,) = session.pop("rows")
    return {**{key: value for key, value in row.items() if key != "prompt"}, "session": session}
