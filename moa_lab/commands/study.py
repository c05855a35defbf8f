"""moa-lab study: the questions of the paper, answered on a model."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from moa_lab.commands.terminal import (
    Bars,
    ForceOption,
    ModelOption,
    PlainOption,
    TestSeedOption,
    densities_of,
    folder_free,
    free,
    lengths_of,
)
from moa_lab.presets import PRESETS, RunSettings
from moa_lab.text import one_line

EVERY = "all"
NAMES = "retrieval, quality, calibration, space, search, unseen, refine, rules, engines, low_density, transfer, weights, speed"
"""Of `moa_lab.studies.MODULES`, which would bring torch with them into every help text."""

logger = logging.getLogger(__name__)


def study(
    name: Annotated[str, typer.Argument(help=f"{EVERY}, or one or several of these, separated by commas: {NAMES}")],
    out: Annotated[Path, typer.Option("--out", help="the record, JSON; of several studies their folder")],
    work: Annotated[Path, typer.Option("--work", help="folder of what is made on the way; studies share it")] = Path("runs/studies"),
    model: ModelOption = "smollm2",
    preset: Annotated[str, typer.Option("--preset", help=f"how much of everything: {', '.join(PRESETS)}")] = "study",
    densities: Annotated[str | None, typer.Option("--densities", help="shares of the KV cache, for instance 0.25,0.5")] = None,
    lengths: Annotated[str | None, typer.Option("--lengths", help="profiled lengths in tokens")] = None,
    test_lengths: Annotated[str | None, typer.Option("--test-lengths", help="tested lengths in tokens")] = None,
    source: Annotated[str | None, typer.Option("--source", help="documents: a file (JSONL, CSV, text ...), folder or hub dataset")] = None,
    columns: Annotated[str | None, typer.Option("--columns", help="column mapping, for instance text=article,summary=highlights")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    test_seed: TestSeedOption = 0,
    plain_prompts: PlainOption = False,
    force: ForceOption = False,
) -> None:
    """Answer questions with error bars, a record each; of several studies, those whose record exists are not run again."""
    from moa_lab.pipeline import Run
    from moa_lab.studies import MODULES, scale_of, table
    from moa_lab.studies import study as study_of
    from moa_lab.studies.plans import check_some_feasible

    names = tuple(MODULES) if name == EVERY else tuple(dict.fromkeys(name.split(",")))
    studies = {one: study_of(one) for one in names}
    paths = {one: out / f"{one}.json" for one in names} if name == EVERY or len(names) > 1 else {names[0]: out}
    if len(paths) == 1:
        free(out, force)
    else:
        folder_free(out)
    settings = RunSettings(
        model=model, lengths=lengths_of(lengths), test_lengths=lengths_of(test_lengths), preset=preset, seed=seed,
        test_seed=test_seed, source=source, columns=columns, plain_prompts=plain_prompts,
    )  # fmt: skip
    scale = scale_of(preset)
    if asked := densities_of(densities):
        scale = replace(scale, densities=asked)
    with Bars() as bars:
        run = Run(work, settings, bars)
        missing = {one: path for one, path in paths.items() if force or not path.exists()}
        if not missing:
            typer.echo(f"all {len(paths)} records are in {out}; --force makes them again")
            return
        check_some_feasible(run, asked or (*scale.densities, scale.density, *scale.low))
        run.begin()
        failed = []
        for one, path in missing.items():
            try:
                record = studies[one](run, scale)
            except Exception as error:
                # Hours may lie before and behind it: what one study stumbles over does not cost the others.
                if len(paths) == 1:
                    raise
                logger.exception("study %s", one)
                failed.append(f"{one} ({one_line(error)})")
                continue
            record.save(path)
            typer.echo(f"{table(record)}\n")
    if failed:
        raise ValueError(f"without a record: {'; '.join(failed)}")
