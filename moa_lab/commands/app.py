"""moa-lab: all commands, and how they end."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moa_lab.commands.bench import app as bench_app
from moa_lab.commands.capacity import capacity
from moa_lab.commands.engines import engines
from moa_lab.commands.harness import harness
from moa_lab.commands.learn import learn
from moa_lab.commands.page import page
from moa_lab.commands.parity import parity
from moa_lab.commands.presses import app as presses_app
from moa_lab.commands.recommend import recommend
from moa_lab.commands.serve import PASSED_ON, serve
from moa_lab.commands.stages import calibrate, evaluate, profile, refine, search, validate
from moa_lab.commands.study import study
from moa_lab.commands.terminal import (
    Bars,
    BitsOption,
    EngineOption,
    ForceOption,
    LengthsOption,
    MinSpanOption,
    ModelOption,
    PlainOption,
    PreferOption,
    SinkOption,
    TestSeedOption,
    UseLengthsOption,
    folder_free,
    free,
    lengths_of,
)
from moa_lab.plan import MIN_SPAN, SINK_TOKENS
from moa_lab.presets import DEFAULT_PREFERENCE, PRESETS, RunSettings
from moa_lab.text import one_line


class _Commands(TyperGroup):
    """`study harness` is `harness`, which takes tasks and not a study's settings."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args[1:] if args[:2] == ["study", "harness"] else args)


app = typer.Typer(
    cls=_Commands,
    help="How much of each head's attention can be dropped, what it costs, and how much is saved.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip

app.add_typer(bench_app, name="bench")
app.add_typer(presses_app, name="presses")


def main() -> None:
    """Run the command line; what the user can mend is one line on standard error and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    # What a run or a profile will need is shown before it starts.
    for name in ("moa_lab.pipeline", "moa_lab.records", "moa_lab.forecast", "moa_lab.profiling"):
        logging.getLogger(name).setLevel(logging.INFO)
    # And what is fetched or unpacked once, which may take minutes and gigabytes.
    logging.getLogger("moa_lab.models").setLevel(logging.INFO)
    # Large pages for torch's CPU tensors (Linux): a fifth less time for a long prompt. torch reads this before its first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        _check_processes()
        app()
    except (ValueError, OSError, MemoryError) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        rank = int(os.environ.get("RANK", "0"))
        typer.echo(f"error{f' in process {rank + 1}' if rank else ''}: {one_line(error)}", err=True)
        sys.exit(2)


def _check_processes() -> None:
    if "WORLD_SIZE" not in os.environ or sys.argv[1:2] == ["run"] or sys.argv[1:3] == ["bench", "profile"]:
        return
    # Imported here, since torch comes with it.
    from moa_lab.processes import asked_for

    if asked_for() > 1:
        raise ValueError(
            "of what torchrun starts, `moa-lab run` and `moa-lab bench profile` are shared out among processes: "
            "start other commands without it"
        )


def run(
    out: Annotated[Path, typer.Option("--out", help="folder of the run; the same command goes on where a killed run was")],
    model: ModelOption = "smollm2",
    density: Annotated[float, typer.Option("--density", help="share of the KV cache to keep, above 0 and at most 1")] = 0.5,
    lengths: LengthsOption = None,
    test_lengths: Annotated[
        str | None, typer.Option("--test-lengths", help="tested lengths in tokens; the plan will be used there too")
    ] = None,
    use_lengths: UseLengthsOption = None,
    prefer: PreferOption = DEFAULT_PREFERENCE,
    preset: Annotated[str, typer.Option("--preset", help=f"how much of everything: {', '.join(PRESETS)}")] = "quick",
    seed: Annotated[int, typer.Option("--seed")] = 0,
    test_seed: TestSeedOption = 0,
    supervision: Annotated[str, typer.Option("--supervision", help="who answers the calibration samples: model, human or text")] = "model",
    source: Annotated[str | None, typer.Option("--source", help="documents: a file (JSONL, CSV, text ...), folder or hub dataset")] = None,
    columns: Annotated[str | None, typer.Option("--columns", help="column mapping, for instance text=article,summary=highlights")] = None,
    max_rules: Annotated[int | None, typer.Option("--max-rules-per-layer", help="at most so many distinct rules in a layer")] = None,
    plain_prompts: PlainOption = False,
    min_span: MinSpanOption = MIN_SPAN,
    sink: SinkOption = SINK_TOKENS,
    bits: BitsOption = "16",
    engine: EngineOption = None,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """All stages: calibrate, profile, search, validate, evaluate, report."""
    from moa_lab import processes
    from moa_lab.evaluate.summary import table
    from moa_lab.pipeline import Run

    folder_free(out)
    settings = RunSettings(
        model=model, density=density, lengths=lengths_of(lengths), test_lengths=lengths_of(test_lengths), preset=preset, seed=seed,
        test_seed=test_seed, supervision=supervision, source=source, columns=columns, plain_prompts=plain_prompts,
        max_rules_per_layer=max_rules, min_span=min_span, sink_tokens=sink, bits=bits, use_lengths=lengths_of(use_lengths), prefer=prefer,
        engine=engine,
    )  # fmt: skip
    with processes.joined(), Bars(shown=processes.is_first()) as bars:
        summary = Run(out, settings, bars).everything()
        if not processes.is_first():
            return
    typer.echo(table(summary))
    typer.echo(f"plan {out / 'plan.json'}, report {out / 'report.html'}")


def show(
    file: Annotated[Path, typer.Argument(help="any record or config card, or the folder of a run or of a shared plan")],
    figure: Annotated[Path | None, typer.Option("--figure", help="draw a benchmark's record to this file (.html, or .png)")] = None,
    quality: Annotated[
        list[Path] | None, typer.Option("--quality", help="folder of a run, whose needles and perplexity --figure draws over the speeds")
    ] = None,
    length: Annotated[int | None, typer.Option("--length", help="of the samples of --quality; default the benchmark's prompt")] = None,
    force: ForceOption = False,
) -> None:
    """Describe a record."""
    from moa_lab.commands.draw import draw
    from moa_lab.commands.show import describe, kind_of, record_of

    file = record_of(file)
    schema = kind_of(file)
    if figure is None and (quality or length):
        raise ValueError("--quality and --length say what --figure draws: name a file with --figure")
    left_out = ""
    if figure is not None:
        free(figure, force, ".png" if figure.suffix.lower() == ".png" else ".html")
        left_out = draw(file, schema, figure, quality or (), length)
    typer.echo(describe(file, schema))
    if left_out:
        typer.echo(left_out)


def lab(
    run: Annotated[Path | None, typer.Option("--run", help="folder of a run to open; default the recorded demo")] = None,
    port: Annotated[int | None, typer.Option("--port", help="default the first that is free from 8888 on")] = None,
    browser: Annotated[bool, typer.Option(help="open a browser")] = True,
    notebooks: Annotated[
        Path | None, typer.Option("--notebooks", help="folder to copy them to; default those of the checkout, else ./moa-lab-notebooks")
    ] = None,
) -> None:
    """Open JupyterLab on the notebooks, for this machine alone. Files of yours are never written over."""
    from moa_lab.workbench.folder import lay_out, user_folder
    from moa_lab.workbench.launch import check_installed, environment, launch

    check_installed()
    environment(run)
    folder = notebooks or user_folder()
    if folder is not None:
        folder = (laid_out := lay_out(folder)).folder / "notebooks"
        typer.echo(str(laid_out))
    launch(run, port, browser, folder)


def doctor(
    clear_cache: Annotated[bool, typer.Option("--clear-cache", help="first remove the unpacked GGUF models that are kept")] = False,
) -> None:
    """What works here; exits with code 1 when something that is needed does not."""
    from moa_lab.commands.doctor import diagnose
    from moa_lab.models import clear_kept

    if clear_cache:
        typer.echo(f"removed {clear_kept() / 1e9:.1f} GB of unpacked models")
    findings = diagnose()
    for finding in findings:
        mark = "ok  " if finding.ok else "MISS" if finding.required else "no  "
        cure = "" if finding.ok or not finding.cure else f" -> {finding.cure}"
        typer.echo(f"{mark} {finding.name}: {finding.detail}{cure}")
    if any(finding.required and not finding.ok for finding in findings):
        raise typer.Exit(1)


for command in (
    run,
    calibrate,
    profile,
    search,
    learn,
    refine,
    validate,
    evaluate,
    parity,
    study,
    harness,
    recommend,
    capacity,
    engines,
    page,
    show,
    lab,
    doctor,
):
    app.command()(command)
app.command(context_settings=PASSED_ON)(serve)
