"""moa-lab presses: plans against other people's ways to drop KV entries, in kvpress."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from moa_lab.commands.terminal import Bars, ModelOption, TestSeedOption, densities_of, folder_free, free, lengths_of
from moa_lab.presses.methods import METHODS

app = typer.Typer(help="Plans and kvpress's presses on the same questions, unseen while the context is compressed.", no_args_is_help=True)


@app.command()
def prepare(
    out: Annotated[Path, typer.Option("--out", help="folder for the model and the questions")],
    model: ModelOption = "smollm2",
    lengths: Annotated[str, typer.Option("--lengths", help="lengths in tokens")] = "2048,4096",
    n: Annotated[int, typer.Option("--n", min=1, help="needles a length")] = 64,
    test_seed: TestSeedOption = 0,
) -> None:
    """Write what the other environment needs; this side runs in the project's own."""
    from moa_lab.models import load_model
    from moa_lab.presses.preparing import prepare as write

    folder_free(out)
    loaded, tokenizer = load_model(model)
    questions = write(out, loaded, tokenizer, lengths_of(lengths) or (), n, test_seed)
    typer.echo(f"{len(questions.questions)} questions and the model in {loaded.dtype}: {out}")


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="what `moa-lab presses prepare` left")],
    out: Annotated[Path, typer.Option("--out", help="the record, JSON, written after every row; the same command goes on")],
    plan: Annotated[list[Path] | None, typer.Option("--plan", help="a config card; may be given several times")] = None,
    keep: Annotated[str, typer.Option("--keep", help="shares of the KV cache that presses keep")] = "0.5,0.25",
    methods: Annotated[str, typer.Option("--methods", help="some of them, separated by commas")] = ",".join(METHODS),
    n: Annotated[int | None, typer.Option("--n", min=1, help="questions a length at most")] = None,
) -> None:
    """Measure all of them; this side runs where kvpress is installed (`pip install kvpress==0.5.5`), as `python -m moa_lab presses run`."""
    from moa_lab.plan import Plan
    from moa_lab.presses.tables import table

    free(out, force=True)
    chosen = tuple(methods.split(","))
    unknown = sorted(set(chosen) - set(METHODS))
    if unknown:
        raise ValueError(f"methods must be among {', '.join(METHODS)}, got {', '.join(unknown)}")
    if find_spec("kvpress") is None:
        raise ValueError("kvpress is not installed here; pip install kvpress==0.5.5 in an environment of its own, and run this there")
    from moa_lab.presses.harness import run_presses

    # KVzip warns of its cost for every question; the table has it.
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    with Bars() as bars:
        # By the names of their files: many cards are called moa.
        plans = [Plan.load(card).renamed(card.stem) for card in plan or ()]
        record = run_presses(folder, densities_of(keep) or (), plans, out, chosen, n, bars)
    typer.echo(table(record))
