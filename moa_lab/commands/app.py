"""moa-lab: the stages on the command line."""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moa_lab.commands.bench import app as bench_app
from moa_lab.commands.doctor import diagnose
from moa_lab.commands.harness import harness
from moa_lab.commands.learn import learn
from moa_lab.commands.study import study
from moa_lab.commands.terminal import AnyModelOption, Bars, ForceOption, MinSpanOption, TestSeedOption, folder_free, free, lengths_of
from moa_lab.models import clear_kept
from moa_lab.plan import MIN_SPAN
from moa_lab.presets import PRESETS, RunSettings
from moa_lab.text import interval_text, one_line


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
app.command()(learn)
app.command()(study)
app.command()(harness)

ModelOption = Annotated[str, typer.Option("--model", help="smollm2 (embedded), a hub id, a folder, a .gguf file, or OWNER/REPO:FILE.gguf")]
PlainOption = Annotated[bool, typer.Option("--plain-prompts", help="questions as plain text, without the model's chat template")]
LengthsOption = Annotated[str | None, typer.Option("--lengths", help="profiled lengths in tokens, for instance 1024,2048")]


def main() -> None:
    """Run the command line; what the user can mend is one line on standard error and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    # What a profile will need is shown before it starts.
    logging.getLogger("moa_lab.profiling").setLevel(logging.INFO)
    # And what is fetched or unpacked once, which may take minutes and gigabytes.
    logging.getLogger("moa_lab.models").setLevel(logging.INFO)
    try:
        app()
    except (ValueError, OSError, MemoryError) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        typer.echo(f"error: {one_line(error)}", err=True)
        sys.exit(2)


@app.command()
def run(
    out: Annotated[Path, typer.Option("--out", help="folder of the run; the same command goes on where a killed run was")],
    model: ModelOption = "smollm2",
    density: Annotated[float, typer.Option("--density", help="share of the KV cache to keep, above 0 and at most 1")] = 0.5,
    lengths: LengthsOption = None,
    test_lengths: Annotated[str | None, typer.Option("--test-lengths", help="tested lengths in tokens")] = None,
    preset: Annotated[str, typer.Option("--preset", help=f"how much of everything: {', '.join(PRESETS)}")] = "quick",
    seed: Annotated[int, typer.Option("--seed")] = 0,
    test_seed: TestSeedOption = 0,
    supervision: Annotated[str, typer.Option("--supervision", help="who answers the calibration samples: model, human or text")] = "model",
    source: Annotated[str | None, typer.Option("--source", help="documents: a file (JSONL, CSV, text ...), folder or hub dataset")] = None,
    columns: Annotated[str | None, typer.Option("--columns", help="column mapping, for instance text=article,summary=highlights")] = None,
    max_rules: Annotated[int | None, typer.Option("--max-rules-per-layer", help="at most so many distinct rules in a layer")] = None,
    plain_prompts: PlainOption = False,
    min_span: MinSpanOption = MIN_SPAN,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """All stages: calibrate, profile, search, validate, evaluate, report."""
    from moa_lab.evaluate.summary import table
    from moa_lab.pipeline import Run

    folder_free(out)
    settings = RunSettings(
        model=model, density=density, lengths=lengths_of(lengths), test_lengths=lengths_of(test_lengths), preset=preset, seed=seed,
        test_seed=test_seed, supervision=supervision, source=source, columns=columns, plain_prompts=plain_prompts,
        max_rules_per_layer=max_rules, min_span=min_span,
    )  # fmt: skip
    with Bars() as bars:
        summary = Run(out, settings, bars).everything()
    typer.echo(table(summary))
    typer.echo(f"plan {out / 'plan.json'}, report {out / 'report.html'}")


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option("--out", help="samples file (.safetensors)")],
    lengths: Annotated[str, typer.Option("--lengths", help="lengths in tokens, for instance 1024,2048")],
    model: ModelOption = "smollm2",
    questions: Annotated[int, typer.Option("--questions", help="question samples per length")] = 16,
    others: Annotated[int, typer.Option("--others", help="other samples per length")] = 6,
    texts: Annotated[int, typer.Option("--texts", help="samples of plain text per length, of supervision `model`")] = 0,
    per_sample: Annotated[int, typer.Option("--per-sample", min=1, help="questions in one text")] = 1,
    lessons: Annotated[bool, typer.Option("--lessons", help="many kinds of questions, for `moa-lab learn`")] = False,
    supervision: Annotated[str, typer.Option("--supervision")] = "model",
    source: Annotated[str | None, typer.Option("--source")] = None,
    columns: Annotated[str | None, typer.Option("--columns")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    plain_prompts: PlainOption = False,
    force: ForceOption = False,
) -> None:
    """Make samples with long-range dependence, answered by the dense model."""
    from moa_lab.calibration import calibrate as make
    from moa_lab.calibration import requests
    from moa_lab.calibration.sources import ColumnMap, load_documents
    from moa_lab.calibration.wordings import LESSONS
    from moa_lab.models import load_model

    free(out, force, ".safetensors")
    wanted = requests(
        supervision, questions=questions, per_sample=per_sample, others=others, texts=texts, wordings=LESSONS if lessons else None
    )
    documents = load_documents(source, columns=ColumnMap.parse(columns) if columns else None, seed=seed) if source else None
    loaded, tokenizer = load_model(model, plain_prompts=plain_prompts)
    with Bars() as bars:
        samples = make(
            loaded, tokenizer, lengths_of(lengths) or (), wanted=wanted, documents=documents, seed=seed,
            parts_dir=_parts(out), progress=bars.steps("calibrate"),
        )  # fmt: skip
    samples.save(out)
    typer.echo(f"{len(samples)} samples: {out}")


@app.command()
def profile(
    samples: Annotated[Path, typer.Argument(help="samples file of `moa-lab calibrate`")],
    out: Annotated[Path, typer.Option("--out", help="profile file (.safetensors)")],
    model: ModelOption = "smollm2",
    any_model: AnyModelOption = False,
    force: ForceOption = False,
) -> None:
    """Measure the influence of every head on the samples' answers."""
    from moa_lab.calibration import SampleSet
    from moa_lab.models import load_model
    from moa_lab.profiling import profile as measure

    free(out, force, ".safetensors")
    loaded_samples = SampleSet.load(samples)
    loaded, tokenizer = load_model(model)
    with Bars() as bars:
        result = measure(
            loaded, loaded_samples, parts_dir=_parts(out), tokenizer=tokenizer, any_model=any_model, progress=bars.steps("profile")
        )
    result.save(out)
    typer.echo(f"profile of {len(loaded_samples)} samples: {out}")


@app.command()
def search(
    profile: Annotated[Path, typer.Argument(help="profile file of `moa-lab profile`")],
    out: Annotated[Path, typer.Option("--out", help="front file (.json)")],
    density: Annotated[float, typer.Option("--density")] = 0.5,
    max_rules: Annotated[int | None, typer.Option("--max-rules-per-layer")] = None,
    min_span: MinSpanOption = MIN_SPAN,
    seconds: Annotated[float, typer.Option("--seconds", help="time for the exact solves")] = 60.0,
    points: Annotated[int, typer.Option("--points", help="plans to keep at most")] = 16,
    force: ForceOption = False,
) -> None:
    """Search candidate plans at a density; needs no model."""
    from moa_lab.records import InfluenceProfile
    from moa_lab.search import search as find

    free(out, force)
    loaded = InfluenceProfile.load(profile)
    with Bars() as bars:
        front = find(
            loaded, density, min_span=min_span, max_rules_per_layer=max_rules, time_limit_s=seconds, max_points=points,
            progress=lambda done, total, message: bars("search", done, total),
        )  # fmt: skip
    front.save(out)
    typer.echo(f"{len(front)} plans: {out}")


@app.command()
def refine(
    plan: Annotated[Path, typer.Argument(help="config card to start from, for instance of `moa-lab validate`")],
    samples: Annotated[Path, typer.Option("--samples", help="samples file of `moa-lab calibrate`")],
    profile: Annotated[Path, typer.Option("--profile", help="profile file of `moa-lab profile`, which names the rules and lengths")],
    out: Annotated[Path, typer.Option("--out", help="front file (.json), for `moa-lab validate`")],
    density: Annotated[float, typer.Option("--density")] = 0.5,
    model: ModelOption = "smollm2",
    rounds: Annotated[int, typer.Option("--rounds", help="rounds at most; each measures heads and moves some")] = 3,
    heads: Annotated[
        int | None, typer.Option("--heads", help="heads measured in a round, two forward passes a sample each; default all")
    ] = None,
    max_rules: Annotated[int | None, typer.Option("--max-rules-per-layer")] = None,
    any_model: AnyModelOption = False,
    force: ForceOption = False,
) -> None:
    """Improve a plan by moving a few heads at a time, measured on the calibration samples."""
    from moa_lab.calibration import SampleSet
    from moa_lab.models import load_model
    from moa_lab.plan import Plan
    from moa_lab.records import InfluenceProfile
    from moa_lab.refinement import refine as improve
    from moa_lab.search import feasible, loss_table

    free(out, force)
    card, loaded_samples = Plan.load(plan), SampleSet.load(samples)
    table = loss_table(InfluenceProfile.load(profile), min_span=card.min_span)
    feasible(table, density, max_rules)
    loaded, tokenizer = load_model(model)
    with Bars() as bars:
        front = improve(
            loaded, card, loaded_samples, table, density, rounds=rounds, heads=heads, max_rules_per_layer=max_rules,
            parts_dir=_parts(out), tokenizer=tokenizer, any_model=any_model, progress=bars.steps("refine"),
        )  # fmt: skip
    front.save(out)
    typer.echo(f"{len(front)} better plans: {out}")


@app.command()
def validate(
    front: Annotated[Path, typer.Argument(help="front file of `moa-lab search`")],
    out: Annotated[Path, typer.Option("--out", help="config card of the best plan (.json)")],
    length: Annotated[int, typer.Option("--length", help="a length that was not profiled")],
    model: ModelOption = "smollm2",
    questions: Annotated[int, typer.Option("--questions")] = 32,
    summaries: Annotated[int, typer.Option("--summaries")] = 8,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    plain_prompts: PlainOption = False,
    force: ForceOption = False,
) -> None:
    """Measure the plans of a front and keep the one that loses least."""
    from moa_lab.evaluate import validate as measure
    from moa_lab.models import load_model
    from moa_lab.records import Front

    free(out, force)
    candidates = Front.load(front)
    loaded, tokenizer = load_model(model, plain_prompts=plain_prompts)
    with Bars() as bars:
        best = measure(
            loaded, tokenizer, candidates, length=length, questions=questions, summaries=summaries, seed=seed,
            progress=bars.steps("validate"),
        )  # fmt: skip
    best.save(out)
    typer.echo(f"best of {len(candidates)} plans: {best.search['candidate']}, {best.search['excess_loss']:+.4f} nats a token over dense")
    typer.echo(f"config card: {out}")


@app.command()
def evaluate(
    plan: Annotated[Path, typer.Argument(help="config card")],
    out: Annotated[Path, typer.Option("--out", help="measurements file (.json)")],
    lengths: Annotated[str, typer.Option("--lengths")],
    model: ModelOption = "smollm2",
    n: Annotated[int, typer.Option("--n", help="needles per length")] = 32,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    plain_prompts: PlainOption = False,
    force: ForceOption = False,
) -> None:
    """Measure retrieval and document perplexity of a plan."""
    from moa_lab.evaluate import perplexity, retrieval
    from moa_lab.models import geometry_of, load_model
    from moa_lab.plan import Plan

    free(out, force)
    card = Plan.load(plan)
    loaded, tokenizer = load_model(model, plain_prompts=plain_prompts)
    card.check_model(geometry_of(loaded))
    chosen = lengths_of(lengths) or ()
    with Bars() as bars:
        found = retrieval(loaded, tokenizer, card, lengths=chosen, n=n, seed=seed, progress=bars.steps("retrieval"))
        more = perplexity(loaded, tokenizer, card, lengths=chosen, n=max(1, n // 4), seed=seed, progress=bars.steps("perplexity"))
    found.plus(more).save(out)
    for row in (*found, *more):
        typer.echo(f"{row.metric} {row.task}@{row.length}: {row.value:.3f} {interval_text(row.low, row.high)} (n = {row.n})")


@app.command()
def parity(
    plan: Annotated[Path, typer.Option("--plan", help="config card")],
    model: ModelOption = "smollm2",
    n_tokens: Annotated[
        int | None, typer.Option("--n-tokens", help="length of the longest texts; default as long as the plan needs")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32 (the sharp test), float16 or bfloat16; default bfloat16 on a GPU that has it, else float32"),
    ] = None,
    needles: Annotated[int, typer.Option("--needles", min=0, help="needles to ask for as well, in texts of --n-tokens")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="record of the comparison (.json)")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    plain_prompts: PlainOption = False,
    force: ForceOption = False,
) -> None:
    """Hold the ring cache and the kernels against masks written out in full; exits with code 1 when a case fails."""
    from moa_lab.evaluate.parity import parity as compare
    from moa_lab.evaluate.parity import table
    from moa_lab.models import dtype_of, load_model
    from moa_lab.plan import Plan

    if out is not None:
        free(out, force)
    wanted = dtype_of(dtype)
    card = Plan.load(plan)
    loaded, tokenizer = load_model(model, dtype=wanted, plain_prompts=plain_prompts)
    with Bars() as bars:
        found = compare(loaded, tokenizer, card, n_tokens=n_tokens, needles=needles, seed=seed, progress=bars.steps("parity"))
    if out is not None:
        found.save(out)
    typer.echo(table(found))
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="any record or config card")],
    figure: Annotated[Path | None, typer.Option("--figure", help="draw a benchmark's record to this file (.html)")] = None,
    force: ForceOption = False,
) -> None:
    """Describe a record."""
    from moa_lab.commands.show import describe, draw, kind_of

    schema = kind_of(file)
    if figure is not None:
        free(figure, force, ".html")
        draw(file, schema, figure)
    typer.echo(describe(file, schema))


@app.command()
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


@app.command()
def doctor(
    clear_cache: Annotated[bool, typer.Option("--clear-cache", help="first remove the unpacked GGUF models that are kept")] = False,
) -> None:
    """What works here; exits with code 1 when something that is needed does not."""
    if clear_cache:
        typer.echo(f"removed {clear_kept() / 1e9:.1f} GB of unpacked models")
    findings = diagnose()
    for finding in findings:
        mark = "ok  " if finding.ok else "MISS" if finding.required else "no  "
        cure = "" if finding.ok or not finding.cure else f" -> {finding.cure}"
        typer.echo(f"{mark} {finding.name}: {finding.detail}{cure}")
    if any(finding.required and not finding.ok for finding in findings):
        raise typer.Exit(1)


def _parts(out: Path) -> Path:
    return out.with_name(f"{out.stem}.parts")
