"""moa-lab learn: spans by descent, on samples of your own."""

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
    free,
    parts_of,
    weights_of,
)
from moa_lab.plan import MIN_SPAN, WHOLE_BITS, name_of_bits, read_mixes, share_bought, told_bits


def learn(
    samples: Annotated[Path, typer.Argument(help="samples file of `moa-lab calibrate --lessons --texts N`")],
    profile: Annotated[Path, typer.Option("--profile", help="profile file of `moa-lab profile`, which names the rules and lengths")],
    out: Annotated[Path, typer.Option("--out", help="front file (.json), for `moa-lab validate`")],
    density: Annotated[float, typer.Option("--density")] = 0.5,
    model: ModelOption = "smollm2",
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="steps of the descent; on a GPU some 0.2 s each with the embedded model")
    ] = 400,
    weights: Annotated[
        str | None, typer.Option("--weights", help="of tasks in the loss, 1 each unless given: summaries=2,text=3 puts words first")
    ] = None,
    max_rules: Annotated[int | None, typer.Option("--max-rules-per-layer")] = None,
    min_span: MinSpanOption = MIN_SPAN,
    bits: BitsOption = "16",
    engine: EngineOption = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    any_model: AnyModelOption = False,
    force: ForceOption = False,
) -> None:
    """Learn the spans of all heads, and of several --bits each head's, by descent, with the budget in force."""
    from moa_lab.calibration import SampleSet
    from moa_lab.learning import learn_spans
    from moa_lab.models import load_model
    from moa_lab.records import InfluenceProfile
    from moa_lab.search import feasible, loss_table
    from moa_lab.search.holding import held_table
    from moa_lab.search.mixes import bits_table

    free(out, force)
    weighed, mixes = weights_of(weights), read_mixes(bits)
    loaded_samples, known = SampleSet.load(samples), InfluenceProfile.load(profile)
    table = bits_table(known, loss_table(known, min_span=min_span), mixes)
    mix = mixes[0] if len(mixes) == 1 else WHOLE_BITS
    feasible(held_table(table, engine), density, max_rules, mix=mix)
    # The first mix has the most bits.
    if share_bought(density, mixes[0], table.geometry) == 1:
        raise ValueError(f"density {density:g} holds all tokens in {bits} bits: there is nothing to learn; lower --density")
    loaded, tokenizer = load_model(model)
    with Bars() as bars:
        front = learn_spans(
            loaded, loaded_samples, table, density, steps=steps, weights=weighed, max_rules_per_layer=max_rules, bits=told_bits(mix),
            engine=engine, seed=seed, parts_dir=parts_of(out), tokenizer=tokenizer, any_model=any_model,
            progress=bars.steps(f"learn {name_of_bits('learned', mixes)}"),
        )  # fmt: skip
    front.save(out)
    typer.echo(f"{len(front)} plans: {out}")
