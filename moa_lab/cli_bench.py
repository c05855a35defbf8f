"""moa-lab bench: what is measured against goals and peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moa_lab.terminal import Bars, ForceOption, free

app = typer.Typer(help="Measure speed and memory against peers in the same process, and hold them against goals.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Speed and memory, measured."""


@app.command()
def kernels(
    out: Annotated[Path, typer.Option("--out", help="the record, JSON")],
    rows: Annotated[str | None, typer.Option("--rows", help="some of D1,D2,D3,P1,P2,M1; all when not given")] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="a config card whose spans are stretched to the shapes")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="tiny shapes: shows that everything runs, and no more")] = False,
    force: ForceOption = False,
) -> None:
    """The prefill and decode kernels, and the memory of the ring cache."""
    from moa_lab.bench import ROWS, bench_kernels, table

    free(out, force)
    with Bars() as bars:
        record = bench_kernels(tuple(rows.split(",")) if rows else ROWS, quick, plan, out, bars.steps("kernels"))
    typer.echo(table(record))
