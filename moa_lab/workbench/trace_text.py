"""The text behind a token as HTML: folded to what matters, its sources coloured; and where a head's span ends, as a drawing."""

from __future__ import annotations

import html
from collections.abc import Iterator

from moa_lab.trace import HeadShare, TokenTrace, folded
from moa_lab.workbench.tracing import Tracing

STYLE = """<style>
.moa-text { max-width: 1120px; line-height: 1.75; font-size: 14px; white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0; }
.moa-text .fold { color: var(--jp-ui-font-color2, #59616b); font-size: 12px; white-space: nowrap; border: 1px dashed currentColor;
  border-radius: 8px; padding: 0 8px; margin: 0 4px; }
.moa-text .seen { background: rgba(26, 128, 196, var(--strength)); border-radius: 3px; box-shadow: 0 2px 0 #1a80c4; }
.moa-text .hidden { background: rgba(213, 94, 0, var(--strength)); border-radius: 3px; border-bottom: 2px dashed #d55e00; }
.moa-text .edge { color: #1a80c4; font-size: 12px; white-space: nowrap; border-left: 3px solid #1a80c4; padding: 0 4px; }
.moa-text .planted { font-weight: 600; }
.moa-text .replied { border-bottom: 1px solid currentColor; }
.moa-text .asked { outline: 2px solid #ff5c39; outline-offset: 1px; border-radius: 3px; font-weight: 600; }
.moa-reach svg { display: block; width: 100%; max-width: 1120px; height: auto; overflow: visible; }
.moa-reach text { fill: currentColor; font-size: 13px; font-family: var(--jp-ui-font-family, sans-serif); }
.moa-key { font-size: 12px; color: var(--jp-ui-font-color2, #59616b); }
.moa-key .seen, .moa-key .hidden { padding: 0 5px; color: var(--jp-ui-font-color1, inherit); border-radius: 3px; }
.moa-key .seen { background: rgba(26, 128, 196, 0.35); box-shadow: 0 2px 0 #1a80c4; }
.moa-key .hidden { background: rgba(213, 94, 0, 0.35); border-bottom: 2px dashed #d55e00; }
</style>"""

AROUND = 9
"""Tokens shown on either side of a source."""
KEY = (
    '<div class="moa-key"><span class="seen">blue</span> read by this head, and seen under the plan &nbsp; '
    '<span class="hidden">orange, dashed</span> read by this head, and hidden by the plan &nbsp; bold: where the prompt spells the answer'
    "</div>"
)


def text_html(tracing: Tracing, trace: TokenTrace, share: HeadShare) -> str:
    """The case's text up to the token, with the sources of one head; what lies far from all of them is folded."""
    case, start = trace.case, trace.window_start(share.layer, share.kv_head)
    sources = trace.sources(share.layer, share.kv_head)
    kept = [(0, 8), (case.start - 32, trace.position + 1), (start - 4, start + 5)]
    kept += [(source - AROUND, source + AROUND + 1) for source in sources]
    kept += [(first - AROUND, last + AROUND) for first, last in case.planted]
    parts = []
    for fold in folded(trace.position + 1, kept):
        if not fold.shown:
            parts.append(f'<span class="fold">{fold.stop - fold.start:,} tokens</span>')
            continue
        for position in range(fold.start, fold.stop):
            if position == start and position > trace.plan.sink_tokens:
                parts.append('<span class="edge" title="tokens before this one are hidden from the head">its window begins</span>')
            parts.append(_token(tracing, trace, share, sources, position))
    return f'{STYLE}{KEY}<div class="moa-text">{"".join(parts)}</div>'


def _token(tracing: Tracing, trace: TokenTrace, share: HeadShare, sources: dict[int, float], position: int) -> str:
    case, classes, style, tip = trace.case, [], "", f"position {position:,}"
    if position in sources:
        strength = 0.15 + 0.6 * sources[position] / max(sources.values())
        classes.append("seen" if is_seen(trace, share, position) else "hidden")
        style = f' style="--strength: {strength:.2f}"'
        tip += f", brought {sources[position]:.3f} nats"
    if any(first <= position < last for first, last in case.planted):
        classes.append("planted")
    if position >= case.start:
        classes.append("asked" if position == trace.position else "replied")
    told = html.escape(tracing.piece(position))
    return f'<span class="{" ".join(classes)}"{style} title="{tip}">{told}</span>' if classes else told


def is_seen(trace: TokenTrace, share: HeadShare, position: int) -> bool:
    """Whether the head sees a position when the token is said."""
    return position < trace.plan.sink_tokens or position >= trace.window_start(share.layer, share.kv_head)


def reach_html(trace: TokenTrace, share: HeadShare) -> str:
    """The whole prompt as a line: the sink and the window of one head, and an arc from the token to each of its sources."""
    n = trace.position
    sink, start = min(trace.plan.sink_tokens, n), trace.window_start(share.layer, share.kv_head)
    parts = [_bar(0, n, n, "rgba(128,128,128,0.22)"), *(_bar(a, b, n, "#1a80c4") for a, b in ((0, sink), (max(start, sink), n)) if a < b)]
    parts += _arcs(trace, share, n)
    parts += [_text(0, 118, f"sink, {sink} tokens", "start"), _text(1000, 118, f"window, {max(n - max(start, sink), 0):,} tokens", "end")]
    if share.misses:
        middle = 1000 * (share.source + start) / 2 / n
        line = f'<path d="M{_x(share.source, n)} 128 H{_x(start, n)}" stroke="#d55e00" stroke-width="2" stroke-dasharray="5 4"/>'
        parts += [line, _text(min(max(middle, 190), 810), 146, f"{share.misses:,} tokens short of the source", "middle")]
    words = f"layer {share.layer}, KV head {share.kv_head}: sources, sink and window over {n:,} tokens"
    return f'<div class="moa-reach"><svg viewBox="-6 0 1012 152" role="img" aria-label="{words}">{"".join(parts)}</svg></div>'


def _arcs(trace: TokenTrace, share: HeadShare, n: int) -> Iterator[str]:
    sources = trace.sources(share.layer, share.kv_head)
    for source, brought in sources.items():
        seen, strength = is_seen(trace, share, source), brought / max(sources.values())
        color, dashes = ("#1a80c4", "") if seen else ("#d55e00", ' stroke-dasharray="6 3"')
        left, right = float(_x(source, n)), float(_x(n - 1, n))
        height = 88 - min(84.0, 10 + 0.16 * (right - left))
        yield (
            f'<path d="M{right:.1f} 88 C{right:.1f} {height:.1f} {left:.1f} {height:.1f} {left:.1f} 88" fill="none" stroke="{color}" '
            f'stroke-width="{0.8 + 2.4 * strength:.1f}" opacity="{0.35 + 0.6 * strength:.2f}"{dashes}>'
            f"<title>position {source:,}: {brought:.3f} nats</title></path>"
        )


def _x(position: int, n: int) -> str:
    return f"{1000 * (position + 0.5) / n:.1f}"


def _bar(start: int, stop: int, n: int, color: str) -> str:
    width = max(1000 * (stop - start) / n, 2)
    return f'<rect x="{1000 * start / n:.1f}" y="90" width="{width:.1f}" height="11" rx="2" fill="{color}"/>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{words}</text>'
