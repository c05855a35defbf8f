"""moa-lab engines: what serving engines allocate for a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moa_lab.capacity import GPUS, kv_room
from moa_lab.commands.terminal import lengths_of
from moa_lab.engines import ENGINES, engine_of, engine_table
from moa_lab.plan import Plan
from moa_lab.text import aligned, once


def engines(
    plan: Annotated[Path, typer.Argument(help="config card, or the folder of a run")],
    tokens: Annotated[str, typer.Option("--tokens", help="lengths in tokens, at which the windows are fixed")] = "2048,8192",
    engine: Annotated[
        list[str] | None, typer.Option("--engine", help="an engine, or limits such as windows_per_model=4 (repeatable); default all")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="whose weights lie beside the cache, in 16 bits: for the requests")] = None,
    weights: Annotated[float | None, typer.Option("--weights-gb", min=1e-3, help="what the weights take, instead of --model")] = None,
    gpu: Annotated[str, typer.Option("--gpu", help=f"one of {', '.join(GPUS)}, or here: this machine's, measured")] = "h100",
    memory: Annotated[float | None, typer.Option("--memory-gb", min=1e-3, help="of another GPU, in GB")] = None,
) -> None:
    """Show a plan under serving engines: rounded up to their windows or not, what they allocate, and how many requests that holds."""
    from moa_lab.bench.here import gpu_named

    if model is not None and weights is not None:
        raise ValueError("say --model NAME or --weights-gb NUMBER, not both")
    card = Plan.load(plan / "plan.json" if plan.is_dir() else plan)
    lengths = lengths_of(tokens) or ()
    chosen = [engine_of(name) for name in once(engine or ENGINES, "engines")]
    room = None
    if model is not None or weights is not None:
        room = kv_room(gpu_named(gpu, memory), _weight_bytes(model, weights))
    rows, refused = engine_table(card, chosen, lengths, room)
    typer.echo("\n".join(aligned(rows)))
    typer.echo()
    typer.echo("\n".join(aligned([(limits.name, limits.told(), limits.needs or "-") for limits in chosen])))
    for name, why in refused.items():
        typer.echo(f"{name} does not hold it: {why}")
    typer.echo("rounded: heads keep more than the plan says; `moa-lab search --engine NAME` finds plans of which none does")
    if any(not limits.keeps_sink for limits in chosen):
        typer.echo("windows have no sink: a window takes the whole span there, and what that costs is to be measured")


def _weight_bytes(model: str | None, weights: float | None) -> int:
    from moa_lab.models import weight_count

    return 2 * weight_count(model) if model is not None else int((weights or 0) * 1e9)
