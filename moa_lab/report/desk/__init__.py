"""A desk page: heads, budget, front, measured curves and a trace in one HTML file that moves without a kernel or a server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from moa_lab.evaluate.options import Option
from moa_lab.plan import Plan
from moa_lab.records import Front, InfluenceProfile, LossTable, Measurement
from moa_lab.report.desk.data import influence_data, stops_data
from moa_lab.report.desk.sections import curves, figure_sections
from moa_lab.report.desk.stops import STEP, Progress, Stop, all_stops, longest
from moa_lab.report.desk.traced import TracedAnswer, TracedHead, TracedToken
from moa_lab.report.page import Section, page, script_safe

__all__ = ["MAX_BYTES", "STEP", "DeskRecords", "TracedAnswer", "TracedHead", "TracedToken", "desk_page"]

MAX_BYTES = 5_000_000
"""Of a page: what a mail carries."""
MAX_LENGTHS = 8
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class DeskRecords:
    """What a desk page is made from; whatever is None or empty is left out of it.

    plan: the one that is shown first; rows: its scores. measured: plans with test scores, of this model. traced: an answer, token by token.
    """

    profile: InfluenceProfile | None = None
    table: LossTable | None = None
    front: Front | None = None
    plan: Plan | None = None
    rows: tuple[Measurement, ...] = ()
    measured: tuple[Option, ...] = ()
    traced: TracedAnswer | None = None


def desk_page(
    records: DeskRecords, title: str = "Mixture of attention spans", step: float = STEP, progress: Progress = lambda done, total: None
) -> str:
    """The page as HTML. step: between two densities of its slider, which are solved here, from the loss table. progress: called with the
    densities that are solved, and all of them; what it raises ends the work.

    Raises ValueError where the records hold no plan, for records of different geometries, for a step outside (0, 0.5], and where the
    page would be larger than MAX_BYTES.
    """
    stops = all_stops(records.table, records.front, records.measured, step, records.plan, records.rows, progress)
    geometry = stops[0].plan.geometry
    if records.profile is not None:
        stops[0].plan.check_model(records.profile.geometry)
    lengths = _lengths(stops, records)
    # Where losses are predicted; other runs may have measured far beyond it.
    main = max(records.table.lengths) if records.table is not None else lengths[-1]
    data = {
        "layers": geometry.layers,
        "heads": geometry.kv_heads,
        "first": _first(stops, records.plan),
        "first_length": lengths.index(
            max((n for n in (records.plan.lengths if records.plan else ()) if n in lengths), default=lengths[-1])
        ),
        "main_length": lengths.index(main),
        "influence": influence_data(records.profile),
        "front": _places(stops, records.front),
        "curves": curves(records.measured),
        "trace": None if records.traced is None else asdict(records.traced),
        **stops_data(stops, lengths),
    }
    model = stops[0].plan.provenance.model
    opening = (
        f'<p class="second">{escape(f"{model}: " if model else "")}{geometry.layers} layers of {geometry.kv_heads} KV heads; '
        f"{len(stops)} plans. Move the density, click a head or a plan; arrow keys move the head, space keeps it.</p>"
    )
    made = [*figure_sections(records, stops, lengths, main), *_trace(records.traced)]
    style = (_HERE / "desk.css").read_text(encoding="utf-8") + (records.traced.style if records.traced else "")
    held = f'<script type="application/json" id="desk-data">{script_safe(data)}</script>'
    made[0] = Section(made[0].anchor, made[0].heading, made[0].body + held)
    text = page(title, opening, made, style=style, script=(_HERE / "desk.js").read_text(encoding="utf-8"))
    size = len(text.encode())
    if size > MAX_BYTES:
        raise ValueError(
            f"the page would have {size / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.0f} are allowed: take a longer step than {step}"
        )
    return text


def _lengths(stops: Sequence[Stop], records: DeskRecords) -> list[int]:
    """Lengths that spans are shown at: predicted, measured or named by a plan; of many the longest."""
    named: Iterable[int] = (n for stop in stops for n in (*stop.plan.lengths, *(row.length for row in stop.rows)))
    known = {*named, *(records.table.lengths if records.table is not None else ())} or {longest(stops)}
    longest_first = sorted(known, reverse=True)
    # Those of the table first: there losses are predicted.
    longest_first.sort(key=lambda n: records.table is None or n not in records.table.lengths)
    return sorted(longest_first[:MAX_LENGTHS])


def _places(stops: Sequence[Stop], front: Front | None) -> dict[str, int]:
    """Number of the stop of every plan of the front, by its name there: a plan that was measured has another name among the stops."""
    known = {stop.plan.identity(): index for index, stop in enumerate(stops)}
    return {point.plan.name: known.get(point.plan.identity(), len(stops) - 1) for point in front or ()}


def _first(stops: Sequence[Stop], plan: Plan | None) -> int:
    """Number of the stop that is shown first: the plan itself, else the one of half the cache."""
    if plan is not None:
        for index, stop in enumerate(stops):
            if stop.plan.identity() == plan.identity():
                return index
    length = longest(stops)
    return min(range(len(stops)), key=lambda index: abs(stops[index].plan.density(length) - 0.5))


def _first_length(lengths: Sequence[int], plan: Plan | None) -> int:
    """Number of the length that is shown first: the longest that the plan names, else the longest of all."""
    named = [n for n in (plan.lengths if plan is not None else ()) if n in lengths]
    return lengths.index(max(named, default=lengths[-1]))


def _trace(traced: TracedAnswer | None) -> list[Section]:
    if traced is None:
        return []
    body = (
        f'<div class="card">{traced.said}<div id="trace-tokens" class="moa-chips moa-tokens"></div><p id="trace-why" class="moa-why"></p>'
        f'<div class="moa-columns">{escape(traced.columns)}</div><div id="trace-heads" class="moa-chips moa-share"></div>'
        '<div id="trace-text"></div></div>'
    )
    return [Section("trace", "Which heads brought an answer", body)]
