"""What is open at the desk as one HTML page: its records, the measured plans of its model, and the answer that was traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from moa_lab.evaluate.options import Option
from moa_lab.report.desk import DeskRecords, TracedAnswer, TracedHead, TracedToken
from moa_lab.trace import HeadShare, TokenTrace
from moa_lab.workbench.advising import Advising
from moa_lab.workbench.exporting import known_of
from moa_lab.workbench.state import State
from moa_lab.workbench.trace_text import STYLE as TEXT_STYLE
from moa_lab.workbench.trace_text import reach_html, text_html
from moa_lab.workbench.trace_views import COLUMNS, head_chips, said_html, shown_shares, token_chips
from moa_lab.workbench.trace_views import STYLE as CHIP_STYLE
from moa_lab.workbench.tracing import Tracing


def desk_records(state: State, tracing: Tracing | None = None, runs: Iterable[str | Path] | None = None) -> DeskRecords:
    """The state's records for `moa_lab.report.desk.desk_page`.

    tracing: an answer that was looked at. runs: folders of measured runs of the same model; None: those that are known, if any. Raises
    ValueError for folders without a measured plan, and of several models.
    """
    measured: tuple[Option, ...] = ()
    if runs is not None:
        folders = ",".join(str(run) for run in runs)
        measured = Advising(state).options(folders) if folders else ()
    else:
        # Where no run of this model was measured, the page goes without.
        with contextlib.suppress(ValueError):
            measured = Advising(state).options()
    traced = traced_answer(tracing) if tracing is not None and tracing.trace is not None else None
    rows = known_of(state.plan, state.measurements).select(plan=state.plan.name) if state.plan is not None else ()
    return DeskRecords(state.profile, state.table, state.front, state.plan, rows, measured, traced)


def traced_answer(tracing: Tracing) -> TracedAnswer:
    """The answer under the current plan with all its tokens; those that were looked at, with their heads.

    Raises ValueError where nothing was asked.
    """
    looked = tracing.looked()
    chips = token_chips(tracing.rows(), None)
    tokens = tuple(
        TracedToken(chip.text, chip.tooltip, chip.classes, *(_looked(tracing, looked[index]) if index in looked else ()))
        for index, chip in enumerate(chips)
    )
    style = _css(CHIP_STYLE) + _css(TEXT_STYLE)
    return TracedAnswer(said_html(tracing, tracing.trials.current), tokens, COLUMNS, style)


def _looked(tracing: Tracing, trace: TokenTrace) -> tuple[str, tuple[TracedHead, ...]]:
    """Why the token became what it is, and the heads that have most to do with it."""
    first = trace.shares[0]
    at = (first.layer, first.kv_head)
    heads = tuple(
        TracedHead(share.layer, share.kv_head, chip.text, _read(tracing, trace, share))
        for share, chip in zip(shown_shares(trace, at), head_chips(trace, at), strict=True)
    )
    return tracing.why(trace), heads


def _read(tracing: Tracing, trace: TokenTrace, share: HeadShare) -> str:
    return text_html(tracing, trace, share).removeprefix(TEXT_STYLE) + reach_html(trace, share)


def _css(style: str) -> str:
    return style.removeprefix("<style>").removesuffix("</style>")
