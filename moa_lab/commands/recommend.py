"""moa-lab recommend: which of the measured plans to take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moa_lab.capacity import GPUS
from moa_lab.commands.terminal import lengths_of
from moa_lab.text import aligned

TOKENS = 8192
"""Of a sequence on a GPU, where none are given."""


def recommend(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs of one model")],
    needles: Annotated[
        float | None, typer.Option("--needles", help="share of the dense model's needles to be found, for instance 0.95")
    ] = None,
    perplexity: Annotated[
        float | None, typer.Option("--perplexity", help="most that the perplexity of documents and own answers may rise: 0.03 is 3%")
    ] = None,
    density: Annotated[float | None, typer.Option("--max-density", help="share of the dense cache's bytes to keep at most")] = None,
    tokens_s: Annotated[float | None, typer.Option("--tokens-s", help="tokens/s to be decoded at least, foretold (see --gpu)")] = None,
    sequences: Annotated[int | None, typer.Option("--sequences", help="sequences to be held at once at least (see --gpu)")] = None,
    lengths: Annotated[str | None, typer.Option("--lengths", help="where it must hold, in tokens; default wherever measured")] = None,
    gpu: Annotated[str, typer.Option("--gpu", help=f"one of {', '.join(GPUS)}, or here: this machine's, measured")] = "h100",
    memory: Annotated[float | None, typer.Option("--memory-gb", min=1e-3, help="of another GPU, in GB")] = None,
    bandwidth: Annotated[float | None, typer.Option("--read-gb-s", min=1e-3, help="of another GPU: GB/s of a pure read")] = None,
    weights: Annotated[float | None, typer.Option("--weights-gb", min=1e-3, help="what the weights take, where --gpu matters")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, help="of a sequence, prompt and answer; default 8192")] = None,
) -> None:
    """The measured plan of fewest bytes that meets a wish with 95% confidence, why, and what the next ones would cost."""
    from moa_lab.bench.here import gpu_named
    from moa_lab.evaluate.options import Wish, options_of
    from moa_lab.evaluate.recommend import advice_table
    from moa_lab.evaluate.recommend import recommend as advise

    is_served = tokens_s is not None or sequences is not None
    if is_served and weights is None:
        raise ValueError("--tokens-s and --sequences need --weights-gb: the weights take their part of the memory and of every step")
    wish = Wish(
        density, needles, perplexity, tokens_s, lengths_of(lengths), gpu_named(gpu, memory, bandwidth),
        None if weights is None else int(weights * 1e9), tokens or (TOKENS if is_served else None), sequences,
    )  # fmt: skip
    advice = advise(options_of(runs), wish)
    rows = advice_table(advice)
    typer.echo("\n".join(aligned([tuple(rows[0]), *(tuple(row.values()) for row in rows)])))
    typer.echo(str(advice))
