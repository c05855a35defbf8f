"""The sections of the page; a section without records is left out."""

from __future__ import annotations

from html import escape

import numpy as np

from moa_lab import figures
from moa_lab.evaluate.worse import chosen_text
from moa_lab.figures.front import goal, goal_label, goals
from moa_lab.figures.measurements import metric_label, shown
from moa_lab.figures.theme import percent, series_styles
from moa_lab.plan import Plan
from moa_lab.records import FrontPoint, InfluenceProfile
from moa_lab.report import tables
from moa_lab.report.facts import BYTES_NOTE, DENSE_ROLE, Facts, answer, second_sentence
from moa_lab.report.page import Section, columns, panel

BEYOND_TOKENS = 128
MAX_MAPS = 4
MAX_DEPTH_MAPS = 6

__all__ = ["Facts", "all_sections", "opening"]


def opening(facts: Facts) -> str:
    """The headline, a second sentence, and a tile per plan."""
    return f'<p class="answer">{answer(facts)}</p><p class="second">{second_sentence(facts)}</p>{_tiles(facts)}'


def all_sections(facts: Facts) -> list[Section]:
    """Every section that has something to show, in reading order."""
    made = [_scores(facts), _depths(facts), _spans(facts), _influence(facts), _front(facts), _validation(facts), _origin(facts)]
    return [section for section in made if section is not None]


def _tiles(facts: Facts) -> str:
    length = facts.answer_length("retrieval")
    if length is None:
        return ""
    styles = series_styles(facts.names)
    tiles = []
    for name in facts.names:
        score = facts.score(name, "retrieval", length)
        if score is None:
            continue
        style = styles[name]
        low, high = max(score.low, 0.0), min(score.high, 1.0)
        reach = f'<u style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></u>'
        tiles.append(
            f'<li style="--of:{style.color}"><span class="who">{tables.mark(style)}{escape(name)}</span>'
            f"<b>{shown('retrieval', score.value)}</b>"
            f'<span class="meter" aria-hidden="true"><i style="width:{100 * score.value:.1f}%"></i>{reach}</span>'
            f"<small>95% interval {100 * low:.0f} to {percent(high)}, n = {score.n:,}</small></li>"
        )
    return f'<ul class="tiles" aria-label="Needles retrieved at {length:,} tokens">{"".join(tiles)}</ul>' if len(tiles) > 1 else ""


def _scores(facts: Facts) -> Section:
    panels = []
    for metric in facts.metrics:
        unit = metric_label(metric)[1]
        for task in facts.tasks(metric):
            heading = facts.heading(metric, task)
            caption = (
                "Higher is better." if unit == "%" else "Lower is better; the axis does not start at 0." if "entropy" in metric else ""
            )
            fig = figures.score_bars(facts.measurements, metric, task, facts.names)
            alt = f"{heading} per plan and length, with 95% intervals; the table above holds the numbers."
            panels.append(panel(fig, heading, alt, caption))
    table = f'<div class="card">{tables.score_table(facts)}</div>'
    clauses = "; ".join(facts.unequal())
    unequal = f"<p>Not all keep the density asked for. {escape(clauses)}.</p>" if clauses else ""
    return Section("scores", "Scores", f"{table}{unequal}<p>{escape(BYTES_NOTE)}</p>{columns(panels) if panels else ''}")


def _depths(facts: Facts) -> Section | None:
    task = next(iter(facts.tasks("retrieval")), None)
    measured = {row.plan for row in facts.measurements.select(metric="retrieval") if row.task == task and row.detail.get("by_depth")}
    names = [name for name in reversed(facts.names) if name in measured][:MAX_DEPTH_MAPS]
    if not names:
        return None
    panels = []
    for name in names:
        fig = figures.retrieval_heatmap(facts.measurements, name, task=task).update_traces(showscale=False)
        shares = [value for row in fig.data[0].z for value in row if value is not None]
        alt = f"Needles retrieved under {name} by depth and length: between {min(shares):.0f}% and {max(shares):.0f}%."
        panels.append(panel(fig, name, alt))
    text = "Depth is where in the text the needle lies: 0% is the beginning, the far end of a long look back. Dark is 0%, bright is 100%."
    return Section("depths", "Needles by depth and length", f"<p>{text}</p>{columns(panels)}")


def _spans(facts: Facts) -> Section:
    plan, length = facts.plan, facts.main_length
    spans = plan.spans(length)
    lead = (
        f"Each cell is one KV head and how many tokens it keeps at {length:,} tokens. "
        f"The shortest span is {spans.min():,}, the longest {spans.max():,}, the mean {spans.mean():,.0f} tokens."
    )
    if plan.bits:
        lead += f" Not all is stored in the model's own type: {'; '.join(plan.stored_text())}."
    whole = plan.geometry.whole_heads(spans, length)
    alt = (
        f"Heat-map of spans: {plan.geometry.layers} layers by {plan.geometry.kv_heads} KV heads, "
        f"{whole:,} of {spans.size:,} heads keep everything; the table below it holds the numbers."
    )
    map_panel = panel(figures.span_map(plan, length), f"Span of every head at {length:,} tokens", alt, tables.span_table(plan, length))
    rules = f'<div class="card"><h3>Rules used</h3>{tables.rules_table(plan, length)}</div>'
    body = f"<p>{lead}</p>{map_panel}{rules}{_masks(plan, length)}{_bytes(facts, length)}"
    return Section("spans", "What the plan keeps", body)


def _masks(plan: Plan, length: int) -> str:
    """Masks of a head with the shortest, the middle and the longest span, where they differ."""
    spans = plan.spans(length)
    distinct = np.unique(spans)
    picked = dict.fromkeys([int(distinct[0]), int(distinct[len(distinct) // 2]), int(distinct[-1])])
    panels = []
    for span in picked:
        layer, head = (int(index) for index in np.argwhere(spans == span)[0])
        fig = figures.mask_preview(plan, layer, head, length).update_traces(showscale=False).update_layout(height=340)
        heading = f"{span:,} tokens" + (", everything" if span == length else "")
        alt = f"Mask of layer {layer}, KV head {head}: the sink of {plan.sink_tokens} tokens and a band of the newest tokens are visible."
        panels.append(panel(fig, heading, alt, f"Layer {layer}, KV head {head}."))
    intro = "<p>What such heads see: every row is a query, bright is visible, dark is skipped. The left edge is the sink.</p>"
    return f"{intro}{columns(panels)}" if len(panels) > 1 else ""


def _bytes(facts: Facts, length: int) -> str:
    if len(facts.plans) < 2:
        return ""
    alt = f"Predicted KV bytes at {length:,} tokens per plan; the score table holds the numbers."
    return panel(figures.kv_bytes_bars(facts.plans, length), f"Predicted KV cache at {length:,} tokens", alt, escape(BYTES_NOTE))


def _influence(facts: Facts) -> Section | None:
    profile = facts.profile
    if profile is None or not profile.keys:
        return None
    longest = {task: max(length for name, length in profile.keys if name == task) for task in profile.tasks}
    far = {task: figures.long_range_influence(profile, task, length, BEYOND_TOKENS) for task, length in longest.items()}
    maps = []
    for task in profile.tasks[:MAX_MAPS]:
        layer, head = _place(far[task].argmax(), far[task])
        alt = f"Heat-map of long-range influence, layers by query heads; most: layer {layer}, head {head}, {far[task].max():.3g} nats."
        maps.append(panel(figures.influence_map(profile, task, longest[task], BEYOND_TOKENS), f"{task}, {longest[task]:,} tokens", alt))
    task = max(profile.tasks, key=lambda name: float(far[name].sum()))
    top = np.sort(far[task].ravel())[::-1]
    tenth = max(len(top) // 10, 1)
    lead = (
        "How much the loss is expected to change when one attention value is masked, "
        f"summed over keys at least {BEYOND_TOKENS} tokens back. "
        f"On {task}, the top {tenth:,} of {len(top):,} query heads hold {percent(top[:tenth].sum() / max(top.sum(), 1e-12))} of it."
    )
    heads = _two_heads(facts, profile, task, longest[task], far[task])
    return Section("influence", "Which heads look far back", f"<p>{escape(lead)}</p>{''.join(maps)}{heads}")


def _two_heads(facts: Facts, profile: InfluenceProfile, task: str, length: int, far: np.ndarray) -> str:
    """The heads with the most and the least long-range influence: by distance, then by position."""
    curves, blocks = [], []
    where = f"On {escape(task)} at {length:,} tokens."
    for word, flat in (("most", far.argmax()), ("least", far.argmin())):
        layer, head = _place(flat, far)
        fig = figures.influence_by_distance(profile, task, length, layer, head, facts.plan)
        alt = f"Influence by distance on a log scale; {fig.layout.annotations[0].text}."
        caption = f"{where} Shaded: what the plan cuts off." if fig.layout.shapes else where
        curves.append(panel(fig, f"Looks back {word}: layer {layer}, query head {head}", alt, caption))
        if profile.has_blocks(task, length):
            fig = figures.head_blocks(profile, task, length, layer, head, facts.plan)
            alt = f"Influence of layer {layer}, query head {head} by query and key position; what the plan lets it see is outlined."
            blocks.append(panel(fig, f"Where it looks: layer {layer}, query head {head}", alt, "Outlined: what the plan lets it see."))
    return columns(curves) + (columns(blocks) if blocks else "")


def _place(flat: np.intp, values: np.ndarray) -> tuple[int, int]:
    layer, head = np.unravel_index(flat, values.shape)
    return int(layer), int(head)


def _front(facts: Facts) -> Section | None:
    front = facts.front
    names = [name for name in dict.fromkeys((*goals(front), "density")) if any(goal(point, name) is not None for point in front)]
    axes = _axes(names, any(name.startswith("density") for name in front.objectives))
    if axes is None or not any(goal(point, axes[0]) is not None and goal(point, axes[1]) is not None for point in front):
        return None
    fig = figures.front_scatter(front, *axes, facts.plan, (*_dense_reference(facts, names), *facts.reference))
    alt = f"{len(front):,} plans: {goal_label(front, axes[0])} against {goal_label(front, axes[1])}.".replace("<br>", " ")
    chosen = any(point.plan.identity() == facts.plan.identity() for point in front)
    caption = "Lower left is better." + (" The ring marks the plan of this page." if chosen else "")
    heading = f"{len(front):,} plans, none beaten by another in every goal" if len(front) > 1 else "One plan"
    panels = [panel(fig, heading, alt, caption)]
    candidates = {point.plan.name for point in front}
    # One marker would say nothing of a prediction.
    if len({row.plan for row in facts.measurements} & candidates) > 1:
        fig = figures.predicted_against_measured(front, facts.measurements)
        correlation = (fig.layout.meta or {}).get("rank_correlation")
        caption = "Each marker is one plan of the front, with its 95% interval."
        if correlation is not None:
            caption += f" Rank correlation {correlation:+.2f}; a perfect predictor has &minus;1 where more is better, +1 where less is."
        panels.append(panel(fig, "Does the prediction hold?", "Predicted loss against the measured score, one marker per plan.", caption))
    return Section("front", "What the search found", columns(panels))


def _validation(facts: Facts) -> Section | None:
    """Which candidate won, and what all of them lost."""
    told, found = chosen_text(facts.plan), facts.candidates()
    if not told and not found:
        return None
    lead = f"<p>{escape(told)}</p>" if told else ""
    drawn = ""
    if facts.validation is not None and any(one.has_both for one in found):
        alt = f"Needles lost against words lost, one marker for each of {len(found)} candidates; the table below it holds the numbers."
        caption = (
            "Measured on validation samples, which no test uses. Lower left is better; the line joins candidates that none beats in both. "
            "The ring marks the one that was chosen."
        )
        heading = "Needles and words that each candidate loses"
        drawn = panel(figures.measured_front(facts.validation), heading, alt, caption + tables.candidates_table(facts))
    elif found:
        drawn = f'<div class="card">{tables.candidates_table(facts)}</div>'
    return Section("validation", "What was measured to choose it", lead + drawn)


def _axes(names: list[str], has_density: bool) -> tuple[str, str] | None:
    """The two goals to draw: density first where it is an objective of the front, else the first two."""
    density = [name for name in names if name.startswith("density")]
    others = [name for name in names if name not in density]
    pair = [*density[:1], *others] if has_density else [*others, *density]
    return (pair[0], pair[1]) if len(pair) > 1 else None


def _dense_reference(facts: Facts, names: list[str]) -> list[FrontPoint]:
    """The dense plan: predicted losses are scaled so that it scores 0."""
    known = {point.plan.name for point in facts.reference}
    densities = {length: 1.0 for point in facts.front for length in point.density}
    dense = [plan for plan in facts.rivals if plan.is_dense and plan.name not in known]
    return [FrontPoint(plan, dict.fromkeys(names, 0.0), densities, DENSE_ROLE) for plan in dense]


def _origin(facts: Facts) -> Section:
    body = f'<div class="card wide-label">{tables.provenance_list(facts)}{tables.settings_details(facts)}</div>'
    return Section("origin", "How this was made", body)
