"""What the trace panel shows, as chips and HTML: answers, tokens, heads, plans tried."""

from __future__ import annotations

import html

import numpy as np
import plotly.graph_objects as go

from moa_lab.figures import token_map
from moa_lab.figures.theme import percent, plain
from moa_lab.trace import MATTERS, HeadShare, TokenTrace, label
from moa_lab.workbench.chips import Chip
from moa_lab.workbench.tracing import FEW, TokenRow, Tracing
from moa_lab.workbench.trials import Trial

STYLE = """<style>
.moa-chips .moa-chip { white-space: pre; line-height: 1.3; padding: 3px 8px; margin: 2px; text-align: left; overflow: visible;
  border: 1px solid var(--jp-border-color1, #bbb); border-radius: 4px; background: transparent; color: var(--jp-ui-font-color1, inherit);
  font-size: 13px; flex: 0 0 auto; }
.moa-chips .moa-chip:hover, .moa-chips .moa-chip:focus-visible, .moa-chips .moa-chip.pointed { border-color: #1a80c4;
  box-shadow: 0 0 0 1px #1a80c4; }
.moa-tokens .moa-chip { text-align: center; border-bottom: 4px solid rgba(128, 128, 128, 0.35); min-width: 46px; }
.moa-tokens .moa-chip.worse { border-bottom-color: rgba(213, 94, 0, 0.55); }
.moa-tokens .moa-chip.much-worse { border-bottom-color: #d55e00; background: rgba(213, 94, 0, 0.14); }
.moa-tokens .moa-chip.better { border-bottom-color: #009e73; }
.moa-chips .moa-chip.selected { outline: 2px solid #ff5c39; outline-offset: 0; }
.moa-tried .moa-chip { white-space: pre-wrap; }
.moa-share .moa-chip, .moa-tried .moa-chip { font-family: var(--jp-code-font-family, monospace); font-size: 12px;
  border-color: transparent; }
.moa-share .moa-chip.cut { border-left: 4px solid #d55e00; }
.moa-share .moa-chip.sees { border-left: 4px solid #1a80c4; }
.moa-columns { font-family: var(--jp-code-font-family, monospace); font-size: 12px; white-space: pre; padding-left: 15px;
  color: var(--jp-ui-font-color2, #59616b); line-height: 1.3; }
.moa-head { font-size: 15px; font-weight: 600; margin: 10px 0 2px; }
.moa-hint { font-size: 12px; color: var(--jp-ui-font-color2, #59616b); line-height: 1.4; }
.moa-why { font-size: 14px; line-height: 1.5; max-width: 1120px; border-left: 4px solid #1a80c4; padding: 4px 12px; margin: 6px 0; }
.moa-said-two { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 2px 14px; max-width: 1120px; line-height: 1.5; }
.moa-older { border-left: 4px solid #d55e00; padding: 2px 10px; margin: 4px 0; }
.moa-said-two .what { color: var(--jp-ui-font-color2, #59616b); }
.moa-said-two .words { white-space: pre-wrap; overflow-wrap: anywhere; }
</style>"""

KINDS = {"prompt": "your own prompt", "needle": "a needle", "line": "a line of a register"}
"""Kinds of cases, in words."""
START_HINT = "Press Answer: the model answers with everything kept and under the plan, and each token of the answer can be clicked."
TOKENS_HINT = (
    "Below each token: its probability with everything kept → under the plan. ▲ the first token that the plan would not say; "
    "orange: less likely under the plan. Click a token to see the heads behind it."
)
HEADS_HINT = (
    "Nats of log-odds, to first order. brought: by reading far back, with everything kept; regained: under the plan, if this head saw all; "
    "back: tokens to its source; orange: the plan hides that source."
)

MANY = 1.0
"""Nats a token loses from which it is marked strongly; from `FEW` on it is marked."""
SHOWN_HEADS = 8


def heading(text: str, hint: str = "") -> str:
    """A heading of a part of the panel, and what to do there."""
    return f'<div class="moa-head">{html.escape(text)}</div><div class="moa-hint">{html.escape(hint)}</div>'


def said_html(tracing: Tracing, trial: Trial | None, is_older: bool = False) -> str:
    """What is asked for, and what the dense model and the plan say. is_older: another question was asked since, without an answer."""
    case, dense = tracing.case, tracing.dense
    if case is None or dense is None:
        return ""
    asked = str(tracing.tokenizer.decode(case.answer.tolist(), skip_special_tokens=True))
    rows = [] if case.kind == "prompt" else [("asked for", asked)]
    rows.append((f"dense, {dense.loss:.3f} nats a token", tracing.said(dense)))
    if trial is not None:
        name = f"{trial.plan.name}, {percent(trial.density, 1)} kept, {trial.answer.loss:.3f} nats a token"
        rows.append((name, tracing.said(trial.answer)))
    cells = "".join(
        f'<div class="what">{html.escape(what)}</div><div class="words">{html.escape(said.strip()) or "(nothing)"}</div>'
        for what, said in rows
    )
    older = '<div class="moa-older" role="note">Below is the answer before: the last question has none.</div>' if is_older else ""
    told = f"{KINDS.get(case.kind, case.kind)}: {case.start:,} tokens of prompt, {len(case.answer)} of answer"
    return f'{older}<div class="moa-hint">{html.escape(told)}</div><div class="moa-said-two">{cells}</div>'


def token_chips(rows: list[TokenRow], selected: int | None) -> list[Chip]:
    """The answer's tokens: each with its probability in the dense model and under the plan."""
    return [_token_chip(row, index == selected) for index, row in enumerate(rows)]


def _token_chip(row: TokenRow, selected: bool) -> Chip:
    classes = ["selected"] if selected else []
    if row.loss_change > FEW:
        classes.append("much-worse" if row.loss_change > MANY else "worse")
    elif row.loss_change < -FEW:
        classes.append("better")
    mark = "▲ " if row.is_first_difference else ""
    dense, cut = percent(row.dense), percent(row.cut)
    instead = "" if row.instead is None else f"; the plan says {label(row.instead)!r} here"
    first = "the first token that differs; " if row.is_first_difference else ""
    tip = f"{first}dense {percent(row.dense, 1)}, plan {percent(row.cut, 1)}: {row.loss_change:+.3f} nats{instead}"
    return Chip(f"{mark}{label(row.text)}\n{dense if dense == cut else f'{dense} → {cut}'}", tip, tuple(classes))


COLUMNS = "layer  KV head  brought  regained   back   span  misses by"


def head_chips(trace: TokenTrace, selected: tuple[int, int], pointed: tuple[int, int] | None = None) -> list[Chip]:
    """The heads that have most to do with a token, in columns under `COLUMNS`; pointed: the one that the pointer is over somewhere."""
    marks = {pointed: "pointed", selected: "selected"}
    return [_head_chip(share, marks.get((share.layer, share.kv_head))) for share in shown_shares(trace, selected)]


def shown_shares(trace: TokenTrace, selected: tuple[int, int]) -> list[HeadShare]:
    """The heads of `head_chips`: those that the plan took most from, those that brought most, and the selected one; each once."""
    most = sorted(trace.shares, key=lambda share: -share.brought)
    shown = list(dict.fromkeys([*trace.shares[: SHOWN_HEADS // 2], *most]))[:SHOWN_HEADS]
    return list(dict.fromkeys([*shown, trace.share(*selected)]))


def map_of(trace: TokenTrace, word: str, *, regained: bool) -> go.Figure:
    """A map of what every head brought to the token `word`, or would give back under the plan."""
    shape = (trace.plan.geometry.layers, trace.plan.geometry.kv_heads)
    values, spans, misses = np.zeros(shape), np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    most = max(max(share.lost, share.regained) for share in trace.shares)
    for share in trace.shares:
        at = (share.layer, share.kv_head)
        values[at], spans[at] = share.regained if regained else share.brought, share.span
        # Many heads miss some source of theirs: those are crossed to which it matters.
        misses[at] = share.misses if max(share.lost, share.regained) >= MATTERS * most else 0
    title = f"What would bring “{word}” back" if regained else f"What brought “{word}”"
    return token_map(values, spans, misses, plain(title), "nats of log-odds")


def _head_chip(share: HeadShare, mark: str | None) -> Chip:
    back = f"{share.distance:,}" if share.source >= 0 else "-"
    misses = f"{share.misses:,}" if share.is_cut else "seen" if share.source >= 0 else "-"
    text = f"{share.layer:>5}  {share.kv_head:>7}  {share.brought:>+7.2f}  {share.regained:>+8.2f}  {back:>5}  {share.span:>5}  {misses:>9}"
    classes = ("cut" if share.is_cut else "sees", *((mark,) if mark else ()))
    return Chip(text, f"show layer {share.layer}, KV head {share.kv_head}", classes)


TRIED = "       kept  nats a token over dense  tokens that differ  plan"


def trial_chips(trials: list[Trial], current: int) -> list[Chip]:
    """The plans tried, the latest first, in columns under `TRIED`."""
    return [_trial_chip(index, trial, index == current) for index, trial in reversed(list(enumerate(trials)))]


def _trial_chip(index: int, trial: Trial, selected: bool) -> Chip:
    differ = int((trial.answer.likeliest != trial.answer.wanted).sum())
    told = "none" if not differ else f"{differ} of {len(trial.answer.likeliest)}"
    text = f"{index + 1:>3}  {percent(trial.density, 1):>6}  {trial.loss_change:>+23.3f}  {told:>18}  {trial.what}"
    return Chip(text, f"back to this plan: {trial.plan.name}", ("selected",) if selected else ())
