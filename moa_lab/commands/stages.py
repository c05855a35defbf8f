"""moa-lab calibrate, profile, search, refine, validate, evaluate: one stage each, record in, record out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moa_lab.commands.terminal import (
    AnyModelOption,
    Bars,
    BitsOption,
    EngineOption,
    ForceOption,
    MinSpanOption,
    ModelOption,
    PlainOption,
    PreferOption,
    SinkOption,
    UseLengthsOption,
    free,
    lengths_of,
    parts_of,
)
from moa_lab.plan import MIN_SPAN, SINK_TOKENS, WHOLE_BITS, mixes_of, read_mixes
from moa_lab.presets import DEFAULT_PREFERENCE, Preference
from moa_lab.text import interval_text


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
    from moa_lab.calibration.sources import named_documents
    from moa_lab.calibration.wordings import LESSONS
    from moa_lab.models import load_model

    free(out, force, ".safetensors")
    chosen = lengths_of(lengths) or ()
    wanted = requests(
        supervision, questions=questions, per_sample=per_sample, others=others, texts=texts, wordings=LESSONS if lessons else None
    )
    documents = named_documents(source, columns, seed)
    loaded, tokenizer = load_model(model, plain_prompts=plain_prompts)
    with Bars() as bars:
        samples = make(
            loaded, tokenizer, chosen, wanted=wanted, documents=documents, seed=seed,
            parts_dir=parts_of(out), progress=bars.steps("calibrate"),
        )  # fmt: skip
    samples.save(out)
    typer.echo(f"{len(samples)} samples: {out}")


def profile(
    samples: Annotated[Path, typer.Argument(help="samples file of `moa-lab calibrate`")],
    out: Annotated[Path, typer.Option("--out", help="profile file (.safetensors)")],
    model: ModelOption = "smollm2",
    sink: SinkOption = SINK_TOKENS,
    rounding: Annotated[
        bool, typer.Option("--rounding", help="also what fewer stored bits cost each head, for `search` with several --bits")
    ] = False,
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
            loaded, loaded_samples, sink_tokens=sink, parts_dir=parts_of(out), tokenizer=tokenizer, any_model=any_model,
            rounding=rounding, progress=bars.steps("profile"),
        )  # fmt: skip
    result.save(out)
    typer.echo(f"profile of {len(loaded_samples)} samples: {out}")


def search(
    profile: Annotated[Path, typer.Argument(help="profile file of `moa-lab profile`")],
    out: Annotated[Path, typer.Option("--out", help="front file (.json)")],
    density: Annotated[float, typer.Option("--density")] = 0.5,
    max_rules: Annotated[int | None, typer.Option("--max-rules-per-layer")] = None,
    min_span: MinSpanOption = MIN_SPAN,
    use_lengths: UseLengthsOption = None,
    bits: BitsOption = "16",
    engine: EngineOption = None,
    seconds: Annotated[float, typer.Option("--seconds", help="time for the exact solves")] = 60.0,
    points: Annotated[int, typer.Option("--points", help="plans to keep at most")] = 16,
    force: ForceOption = False,
) -> None:
    """Search candidate plans at a density; needs no model."""
    from moa_lab.records import InfluenceProfile
    from moa_lab.search import search as find
    from moa_lab.search import used_lengths

    free(out, force)
    loaded = InfluenceProfile.load(profile)
    used = used_lengths(loaded.lengths, loaded.geometry.max_length, lengths_of(use_lengths))
    with Bars() as bars:
        front = find(
            loaded, density, min_span=min_span, lengths=used, max_rules_per_layer=max_rules, time_limit_s=seconds, max_points=points,
            bits=bits, engine=engine,
            progress=lambda done, total, message: bars("search", done, total),
        )  # fmt: skip
    front.save(out)
    typer.echo(f"{len(front)} plans: {out}")


def refine(
    plan: Annotated[Path, typer.Argument(help="config card to start from, for instance of `moa-lab validate`")],
    samples: Annotated[Path, typer.Option("--samples", help="samples file of `moa-lab calibrate`")],
    profile: Annotated[Path, typer.Option("--profile", help="profile file of `moa-lab profile`, which names the rules and lengths")],
    out: Annotated[Path, typer.Option("--out", help="front file (.json), for `moa-lab validate`")],
    density: Annotated[float, typer.Option("--density")] = 0.5,
    model: ModelOption = "smollm2",
    rounds: Annotated[int, typer.Option("--rounds", help="rounds at most; each measures heads and moves some")] = 3,
    heads: Annotated[
        int | None,
        typer.Option(
            "--heads", help="heads measured in a round, two forward passes a sample each, and one for each other mix of bits; default all"
        ),
    ] = None,
    max_rules: Annotated[int | None, typer.Option("--max-rules-per-layer")] = None,
    bits: Annotated[
        str | None, typer.Option("--bits", help="that heads may move to, such as 16,8,8+4, beside those of the plan, the default")
    ] = None,
    engine: EngineOption = None,
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
    from moa_lab.search.holding import held_table
    from moa_lab.search.mixes import bits_table

    free(out, force)
    card = Plan.load(plan)
    own = tuple(mixes_of(card))
    mixes = own if bits is None else tuple(dict.fromkeys((*read_mixes(bits), *own)))
    loaded_samples, known = SampleSet.load(samples), InfluenceProfile.load(profile)
    table = bits_table(known, loss_table(known, min_span=card.min_span), mixes)
    feasible(held_table(table, engine), density, max_rules, mix=mixes[0] if len(mixes) == 1 else WHOLE_BITS)
    loaded, tokenizer = load_model(model)
    with Bars() as bars:
        front = improve(
            loaded, card, loaded_samples, table, density, rounds=rounds, heads=heads, max_rules_per_layer=max_rules,
            engine=engine, parts_dir=parts_of(out), tokenizer=tokenizer, any_model=any_model, progress=bars.steps("refine"),
        )  # fmt: skip
    front.save(out)
    typer.echo(f"{len(front)} better plans: {out}")


def validate(
    front: Annotated[Path, typer.Argument(help="front file of `moa-lab search`")],
    out: Annotated[Path, typer.Option("--out", help="config card of the best plan (.json)")],
    length: Annotated[int, typer.Option("--length", help="a length beyond the profiled ones")],
    model: ModelOption = "smollm2",
    questions: Annotated[int, typer.Option("--questions")] = 32,
    summaries: Annotated[int, typer.Option("--summaries")] = 8,
    texts: Annotated[int, typer.Option("--texts", help="plain texts")] = 0,
    prefer: PreferOption = DEFAULT_PREFERENCE,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    plain_prompts: PlainOption = False,
    force: ForceOption = False,
) -> None:
    """Measure the plans of a front and keep the one that loses least."""
    from moa_lab.evaluate import validate as measure
    from moa_lab.models import load_model
    from moa_lab.records import Front

    free(out, force)
    Preference.parse(prefer)
    candidates = Front.load(front)
    loaded, tokenizer = load_model(model, plain_prompts=plain_prompts)
    with Bars() as bars:
        best = measure(
            loaded, tokenizer, candidates, length=length, questions=questions, summaries=summaries, texts=texts, prefer=prefer,
            seed=seed, progress=bars.steps("validate"),
        )  # fmt: skip
    best.save(out)
    typer.echo(f"best of {len(candidates)} plans: {best.search['candidate']}, {best.search['excess_loss']:+.4f} nats a token over dense")
    typer.echo(f"config card: {out}")


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
    chosen = lengths_of(lengths) or ()
    loaded, tokenizer = load_model(model, plain_prompts=plain_prompts)
    card.check_model(geometry_of(loaded))
    with Bars() as bars:
        found = retrieval(loaded, tokenizer, card, lengths=chosen, n=n, seed=seed, progress=bars.steps("retrieval"))
        more = perplexity(loaded, tokenizer, card, lengths=chosen, n=max(1, n // 4), seed=seed, progress=bars.steps("perplexity"))
    found.plus(more).save(out)
    for row in (*found, *more):
        typer.echo(f"{row.metric} {row.task}@{row.length}: {row.value:.3f} {interval_text(row.low, row.high)} (n = {row.n})")
