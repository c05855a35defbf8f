"""moa-lab page: a run as one HTML file that moves without a kernel or a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moa_lab.commands.terminal import Bars, ForceOption, free

if TYPE_CHECKING:
    from moa_lab.workbench.state import State
    from moa_lab.workbench.tracing import Tracing

LEAST_TEXT = 64
"""Tokens of the shortest text with a needle."""


def page(
    run: Annotated[Path, typer.Argument(help="folder of a run, or of one density in it")],
    out: Annotated[Path, typer.Option("--out", help="the file (.html)")],
    runs: Annotated[
        list[Path] | None, typer.Option("--measured", help="folder of a measured run of the same model, may be repeated; default all known")
    ] = None,
    step: Annotated[float | None, typer.Option("--step", help="between two densities of the slider; default 0.025")] = None,
    needle: Annotated[
        int | None, typer.Option("--needle", min=LEAST_TEXT, help="trace a needle in a text of so many tokens: loads the model")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="for --needle; default the one that the run names")] = None,
    seed: Annotated[int, typer.Option("--seed", help="draws the needle")] = 0,
    force: ForceOption = False,
) -> None:
    """One HTML file of the whole desk: heads, a slider over densities, measured curves, the front and, on demand, a trace."""
    from moa_lab.report.desk import STEP, desk_page
    from moa_lab.storage import write_text
    from moa_lab.workbench.desk_page import desk_records
    from moa_lab.workbench.opening import open_run

    free(out, force, ".html")
    state = open_run(run)
    tracing = None if needle is None else _traced(state, needle, model, seed)
    name = state.plan.provenance.model if state.plan is not None and state.plan.provenance.model else run.resolve().name
    text = desk_page(desk_records(state, tracing, runs), f"Mixture of attention spans: {name}", STEP if step is None else step)
    write_text(out, text)
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB, opens in any browser")


def _traced(state: State, length: int, model: str | None, seed: int) -> Tracing:
    """A needle under the run's plan, all tokens of its answer looked at."""
    import threading

    from moa_lab.models import load_model
    from moa_lab.workbench.jobs import Handle
    from moa_lab.workbench.opening import model_of
    from moa_lab.workbench.tracing import Tracing

    if state.plan is None:
        raise ValueError("--needle traces the answer under the run's plan, and this run has none")
    tracing, quiet = Tracing(*load_model(model or model_of(state))), Handle(threading.Event(), lambda *_: None)
    case = tracing.draw("needle", length, seed, quiet)
    tracing.try_plan(state.plan, "the run's plan", quiet)
    with Bars() as bars:
        for index in range(len(case.answer)):
            tracing.look(index, quiet)
            bars("trace", index + 1, len(case.answer))
    return tracing
