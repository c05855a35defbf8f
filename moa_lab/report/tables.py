"""The tables of the page: scores, rules, spans and provenance."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from html import escape
from typing import Any

from moa_lab.figures.intervals import told
from moa_lab.figures.measurements import Score, metric_label, shown
from moa_lab.figures.theme import Style, byte_size, percent, series_styles
from moa_lab.plan import Plan, SpanRule
from moa_lab.provenance import Provenance
from moa_lab.report.facts import Facts, density_text
from moa_lab.storage import to_json
from moa_lab.text import has_interval

MAX_RULES = 16
_GLYPHS = {"circle": "●", "diamond": "◆", "triangle-up": "▲", "star": "★", "cross": "✚", "pentagon": "⬟", "square": "■"}


def score_table(facts: Facts) -> str:
    """Plans in rows, lengths in columns; one group of rows per metric, then density and predicted bytes."""
    lengths = facts.lengths() or (facts.main_length,)
    styles = series_styles(facts.names)
    groups = []
    for metric in facts.metrics:
        groups += [_score_rows(facts, metric, task, lengths, styles) for task in facts.tasks(metric)]
    groups.append(
        _size_rows(facts, "Density (share of the dense KV cache)", lengths, styles, lambda plan, n: density_text(plan.density(n)))
    )
    groups.append(_size_rows(facts, "KV cache of one sequence, predicted", lengths, styles, lambda plan, n: byte_size(plan.kv_bytes(n))))
    if any(facts.allocated(plan.name, n) is not None for plan in facts.plans for n in lengths):
        groups.append(_size_rows(facts, "KV cache of one sequence, allocated", lengths, styles, lambda plan, n: _allocated(facts, plan, n)))
    columns = "".join(f'<th scope="col">{length:,}<span class="unit"> tokens</span></th>' for length in lengths)
    caption = "Small print in a cell: 95% interval, and the number n of observations." if facts.metrics else "Nothing was measured yet."
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Scores"><table><caption>{caption}</caption>'
        f'<thead><tr><th scope="col">Plan</th>{columns}</tr></thead>{"".join(groups)}</table></div>'
    )


def _allocated(facts: Facts, plan: Plan, length: int) -> str:
    size = facts.allocated(plan.name, length)
    return "&ndash;" if size is None else byte_size(size)


def rules_table(plan: Plan, n_tokens: int) -> str:
    """The rules of a plan with how many heads use each, the most used first, and what these keep: of layers with windows of their own
    and others that may differ."""
    kept: dict[SpanRule, set[int]] = {}
    for row, spans in zip(plan.rules, plan.spans(n_tokens).tolist(), strict=True):
        for rule, span in zip(row, spans, strict=True):
            kept.setdefault(rule, set()).add(span)
    counts = Counter(rule for row in plan.rules for rule in row)
    total = sum(counts.values())
    common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows = [
        f'<tr><th scope="row">{rule_text(rule)}</th><td>{count:,}</td><td>{percent(count / total)}</td>'
        f"<td>{' or '.join(f'{span:,}' for span in sorted(kept[rule]))}</td></tr>"
        for rule, count in common[:MAX_RULES]
    ]
    rest = common[MAX_RULES:]
    if rest:
        heads = sum(count for _, count in rest)
        rows.append(
            f'<tr><th scope="row">{len(rest):,} other rules</th><td>{heads:,}</td><td>{percent(heads / total)}</td><td>&ndash;</td></tr>'
        )
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">Span of a head at length N</th><th scope="col">KV heads</th>'
        f'<th scope="col">Share</th><th scope="col">Tokens at {n_tokens:,}</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def rule_text(rule: SpanRule) -> str:
    """A rule as a formula: `256 + 0.25 N`."""
    slope = f"{rule.beta:.4g} N" if rule.beta != 1 else "N"
    if not rule.beta:
        return f"{rule.alpha:,.6g}"
    if not rule.alpha:
        return f"{slope}, everything" if rule.beta == 1 else slope
    return f"{slope} {'+' if rule.alpha > 0 else '&minus;'} {abs(rule.alpha):,.6g}"


def span_table(plan: Plan, n_tokens: int) -> str:
    """The numbers behind the span map: one row per layer."""
    spans = plan.spans(n_tokens)
    columns = "".join(f'<th scope="col">head {head}</th>' for head in range(spans.shape[1]))
    rows = "".join(
        f'<tr><th scope="row">{layer}</th>{"".join(f"<td>{span:,}</td>" for span in row)}</tr>' for layer, row in enumerate(spans.tolist())
    )
    return (
        f'<details><summary>The same as a table</summary><div class="scroll narrow"><table><thead><tr><th scope="col">Layer</th>{columns}'
        f"</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def candidates_table(facts: Facts) -> str:
    """The numbers behind the measured front: one row per candidate, the best first."""
    rows = []
    for one in facts.candidates():
        cells = [one.kind, f"{one.score:.3f}", percent(one.facts, 1), _nats(one.needles), _nats(one.words)]
        main = ' class="main"' if one.chosen else ""
        rows.append(f'<tr{main}><th scope="row">{escape(one.name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    titles = ("Candidate", "Kind", "Score", "Facts lost", "Needles lost (nats)", "Words lost (nats)")
    columns = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return (
        '<details><summary>The same as a table</summary><div class="scroll narrow"><table><caption>The least score was chosen.</caption>'
        f"<thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def provenance_list(facts: Facts) -> str:
    """Model, versions, device, command and time of the records, as far as they are known."""
    records = _records(facts)
    versions = next((record.versions for record, _ in records.values() if record.versions), {})
    geometry = facts.plan.geometry
    entries = [
        ("Model", _all(records, "model")),
        ("Geometry", [str(geometry)]),
        ("Weights", _all(records, "weights")),
        ("Tokenizer", _all(records, "tokenizer")),
        ("Calibration set", _all(records, "calibration")),
        ("Seed", _all(records, "seed")),
        ("Device", _all(records, "device")),
        ("Versions", [", ".join(f"{name} {version}" for name, version in versions.items())]),
        ("Command", _all(records, "command")),
        ("Time (UTC)", _all(records, "created")),
        ("Plan", [f"{facts.plan.name}, identity {facts.plan.identity()}"]),
        ("Sink and floor", [f"{facts.plan.sink_tokens:,} tokens in the sink, no span below {facts.plan.min_span:,}"]),
        ("Stored bits", facts.plan.stored_text()),
    ]
    code = {"Weights", "Tokenizer", "Calibration set", "Command"}
    rows = "".join(
        f"<dt>{name}</dt><dd>{'<br>'.join(f'<code>{escape(v)}</code>' if name in code else escape(v) for v in values)}</dd>"
        for name, values in entries
        if any(values)
    )
    return f"<dl>{rows}</dl>"


def settings_details(facts: Facts) -> str:
    """All settings and the full provenance of each record, collapsed."""
    parts = []
    for name, (record, settings) in _records(facts).items():
        content = {**({"settings": settings} if settings else {}), "provenance": to_json(record)}
        # default=str: a setting that JSON cannot hold must not fail the page.
        text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
        parts.append(f"<details><summary>Settings of the {name}</summary><pre>{escape(text)}</pre></details>")
    return "".join(parts)


def _records(facts: Facts) -> dict[str, tuple[Provenance, dict[str, Any]]]:
    records: dict[str, tuple[Provenance, dict[str, Any]]] = {"plan": (facts.plan.provenance, facts.plan.search)}
    if facts.profile is not None:
        records["profile"] = (facts.profile.provenance, {})
    if len(facts.front):
        records["search"] = (facts.front.provenance, facts.front.settings)
    if facts.validation is not None and facts.candidates():
        records["validation"] = (facts.validation.provenance, facts.validation.settings)
    if facts.measurements.rows:
        records["measurements"] = (facts.measurements.provenance, facts.measurements.settings)
    return records


def _all(records: dict[str, tuple[Provenance, dict[str, Any]]], name: str) -> list[str]:
    """The distinct values of a provenance field, with the records' names where they differ."""
    found = {kind: str(getattr(record, name)) for kind, (record, _) in records.items() if getattr(record, name) not in (None, "")}
    if len(set(found.values())) <= 1:
        return list(found.values())[:1]
    return [f"{value} ({kind})" for kind, value in found.items()]


def _score_rows(facts: Facts, metric: str, task: str, lengths: Iterable[int], styles: dict[str, Style]) -> str:
    heading = f"{escape(facts.heading(metric, task))} ({metric_label(metric)[1]})"
    rows = []
    for name in facts.names:
        cells = [_score_cell(metric, facts.score(name, metric, length, task)) for length in lengths]
        rows.append(_row(facts, name, styles, cells))
    return _group(heading, rows, len(cells))


def _size_rows(facts: Facts, heading: str, lengths: Iterable[int], styles: dict[str, Style], show: Any) -> str:
    rows = [_row(facts, plan.name, styles, [f"<td>{show(plan, length)}</td>" for length in lengths]) for plan in facts.plans]
    return _group(heading, rows, len(list(lengths)))


def _score_cell(metric: str, score: Score | None) -> str:
    if score is None:
        return '<td><span aria-label="not measured">&ndash;</span></td>'
    is_share = metric_label(metric)[1] == "%"
    number = (lambda end: f"{100 * end:.0f}") if is_share else (lambda end: shown(metric, end))
    interval = told(score, number, "&ndash;") + ("%" if is_share and has_interval(score.low, score.high) else "")
    bar = f' class="share" style="--of:{min(max(score.value, 0), 1):.3f}"' if is_share else ""
    return f"<td{bar}><b>{shown(metric, score.value)}</b><small><span>{interval}</span> <span>n = {score.n:,}</span></small></td>"


def _nats(lost: float | None) -> str:
    return "&ndash;" if lost is None else f"{lost:.4f}"


def _row(facts: Facts, name: str, styles: dict[str, Style], cells: list[str]) -> str:
    main = ' class="main"' if name == facts.plan.name else ""
    short = ' class="short"' if len(name) <= 12 else ""
    return f'<tr{main}><th scope="row"{short}>{mark(styles[name])}{escape(name)}</th>{"".join(cells)}</tr>'


def mark(style: Style) -> str:
    """The shape and colour of a plan, as in the figures."""
    return f'<span class="mark" aria-hidden="true" style="color:{style.color}">{_GLYPHS[style.symbol]}</span>'


def _group(heading: str, rows: list[str], columns: int) -> str:
    return f'<tbody><tr><th scope="rowgroup" colspan="{columns + 1}">{heading}</th></tr>{"".join(rows)}</tbody>'
