"""The model card of a plan: what it keeps, what was measured, and how to serve it, as Markdown with the hub's metadata."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from moa_lab.text import interval_text

Shown = Any
"""A `moa_lab.plan.Plan`, which shows itself by this module and so cannot be imported here."""

BEGIN, END = "<!-- moa-lab plan: written by save_pretrained -->", "<!-- end of moa-lab plan -->"
"""Around the section of a plan, so that it can be replaced."""
USUAL_LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Tokens at which a card that names no lengths is described, as far as the model reaches."""
COMPARED = ("dense", "uniform")
METRICS = {"retrieval": "answers found", "cross_entropy": "nats a token"}
CODE = """```python
import moa_lab as ml

model, tokenizer = ml.load_model("{model}")
plan = ml.Plan.from_pretrained("{place}", geometry=ml.ModelGeometry.from_config(model.config))
with ml.apply_plan(model, plan):
    model.generate(**tokenizer("...", return_tensors="pt"), max_new_tokens=64)
```

An OpenAI-compatible server of vLLM (`pip install "moa-lab[serve]"`): `moa-lab serve --model {model} --plan plan.json`. What other engines
allocate for it: `moa-lab engines plan.json`."""


class Score(Protocol):
    """A measurement: `value` with the 95% interval from `low` to `high`, of n samples."""

    @property
    def plan(self) -> str:
        """Name of the plan."""

    @property
    def metric(self) -> str:
        """For instance `retrieval`."""

    @property
    def task(self) -> str:
        """For instance `needles`."""

    @property
    def length(self) -> int:
        """Tokens of a sample."""

    @property
    def value(self) -> float:
        """The mean."""

    @property
    def n(self) -> int:
        """Samples."""

    @property
    def low(self) -> float:
        """Lower end."""

    @property
    def high(self) -> float:
        """Upper end."""


def model_card(section: str, base_model: str | None, license: str | None) -> str:
    """A model card of one plan: the hub's metadata, then the section."""
    from huggingface_hub import ModelCardData

    told = ModelCardData(base_model=base_model, license=license, library_name="moa-lab", tags=["kv-cache", "attention", "long-context"])
    return f"---\n{told.to_yaml()}\n---\n\n{section}\n"


def section_in(text: str, section: str) -> str:
    """`text` with the section in place of the one that it has, or behind it."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{section}{after}" if begin and end else f"{text.rstrip()}\n\n{section}\n"


def as_section(plan: Shown, scores: Iterable[Score], base_model: str | None) -> str:
    """The section of `plan` between its marks."""
    made = plan.provenance
    origin = [f"weights `{made.weights}`" if made.weights else "", f"made {made.created[:10]}" if made.created else ""]
    parts = [
        BEGIN, f"# {plan.name}: a span for every attention head", _about(plan), "## What it keeps", _kept(plan),
        *(["## What was measured", table] if (table := _measured(plan, list(scores))) else []),
        "## How to use it", CODE.format(model=base_model or made.model or "MODEL", place="FOLDER or OWNER/NAME"),
        f"Plan `{plan.identity()}`" + "".join(f", {one}" for one in origin if one) + ".", END,
    ]  # fmt: skip
    return "\n\n".join(parts)


def _about(plan: Shown) -> str:
    stored = f" ({'; '.join(plan.stored_text())})" if plan.bits else ""
    return (
        f"A plan of moa-lab (mixture of attention spans, arXiv 2406.14909) for {plan.geometry}: each KV head keeps the first "
        f"{plan.sink_tokens} tokens and a window of the latest ones, of its own size{stored}. It changes no weights."
    )


def _kept(plan: Shown) -> str:
    lengths = plan.lengths or [n for n in USUAL_LENGTHS if n <= plan.geometry.max_length] or [plan.geometry.max_length]
    rows = []
    for n in lengths:
        whole = int((plan.spans(n) >= n).sum())
        rows.append((f"{n:,}", f"{plan.density(n):.1%}", f"{plan.kv_bytes(n) / 2**20:,.1f} MiB", f"{whole} of {plan.spans(n).size}"))
    return _table(("tokens", "KV cache kept", "a sequence, 16 bits", "heads that keep everything"), rows)


def _measured(plan: Shown, scores: list[Score]) -> str:
    """The card's own scores and those of `scores`; empty where there are none."""
    names = dict.fromkeys([plan.name, *COMPARED])
    found: dict[tuple[str, int, str], dict[str, str]] = {}
    for row in scores:
        if row.plan in names and row.metric in METRICS:
            told = f"{row.value:.3f} {interval_text(row.low, row.high)} (n = {row.n})"
            found.setdefault((row.task, row.length, METRICS[row.metric]), {})[row.plan] = told
    shown = [name for name in names if any(name in cells for cells in found.values())]
    rows = [(f"{task}, {length:,} tokens: {metric}", *(cells.get(name, "") for name in shown))
            for (task, length, metric), cells in found.items()]  # fmt: skip
    parts = [_table(("task", *shown), rows)] if rows else []
    own = [(name, _told(score)) for name, score in plan.scores.items()]
    parts += [_table(("of the card", "score"), own)] if own else []
    return "\n\n".join([*parts, "In brackets: 95% intervals."]) if parts else ""


def _told(score: Any) -> str:
    """A score of a card, which may have any form."""
    try:
        return f"{score['value']:.3f} {interval_text(score['low'], score['high'])} (n = {score['n']})"
    except (TypeError, KeyError, ValueError):
        return str(score)[:80].replace("\n", " ").replace("|", "/")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows))
