"""moa-lab study: a question of the paper, answered on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moa_lab.presets import PRESETS, RunSettings
from moa_lab.terminal import Bars, ForceOption, densities_of, free, lengths_of


def study(
    name: Annotated[str, typer.Argument(help="retrieval or quality")],
    out: Annotated[Path, typer.Option("--out", help="the record, JSON")],
    work: Annotated[Path, typer.Option("--work", help="folder of what is made on the way; studies share it")] = Path("runs/studies"),
    model: Annotated[str, typer.Option("--model", help="smollm2 (embedded), a hub id, a folder, or a .gguf file")] = "smollm2",
    preset: Annotated[str, typer.Option("--preset", help=f"how much of everything: {', '.join(PRESETS)}")] = "study",
    densities: Annotated[str | None, typer.Option("--densities", help="shares of the KV cache, for instance 0.25,0.5")] = None,
    lengths: Annotated[str | None, typer.Option("--lengths", help="profiled lengths in tokens")] = None,
    test_lengths: Annotated[str | None, typer.Option("--test-lengths", help="tested lengths in tokens")] = None,
    source: Annotated[str | None, typer.Option("--source", help="documents: a JSONL, CSV or Parquet file, or a hub dataset")] = None,
    columns: Annotated[str | None, typer.Option("--columns", help="column mapping, for instance text=article,summary=highlights")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    force: ForceOption = False,
) -> None:
    """Answer a question with error bars: plans at many densities against dense and uniform ones of equal KV bytes."""
    from moa_lab.pipeline import Run
    from moa_lab.studies import DENSITIES, STUDIES, table

    if name not in STUDIES:
        raise ValueError(f"study must be one of {', '.join(STUDIES)}, got {name!r}")
    free(out, force)
    settings = RunSettings(
        model=model, lengths=lengths_of(lengths), test_lengths=lengths_of(test_lengths), preset=preset, seed=seed, source=source,
        columns=columns,
    )  # fmt: skip
    with Bars() as bars:
        run = Run(work, settings, bars)
        run.begin()
        record = STUDIES[name](run, densities_of(densities) or DENSITIES)
    record.save(out)
    typer.echo(table(record))
