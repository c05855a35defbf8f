"""moa-lab harness: the tasks of EleutherAI's lm-evaluation-harness under a plan."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from moa_lab.commands.terminal import ForceOption, ModelOption, free, lengths_of
from moa_lab.text import aligned, interval_text


def harness(
    tasks: Annotated[str, typer.Option("--tasks", help="names of the harness's tasks, separated by commas")],
    out: Annotated[Path, typer.Option("--out", help="measurements file (.json)")],
    model: ModelOption = "smollm2",
    plan: Annotated[Path | None, typer.Option("--plan", help="config card; without one the dense model is measured")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="documents a task at most")] = None,
    include_path: Annotated[Path | None, typer.Option("--include-path", help="folder with task files (.yaml) of your own")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 1,
    n_tokens: Annotated[
        int | None, typer.Option("--n-tokens", min=1, help="length that elastic rules are evaluated at; default each prompt's own")
    ] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="prompts as turns of a chat")] = False,
    few_shot: Annotated[int | None, typer.Option("--few-shot", min=0, help="examples in a prompt; default as the task says")] = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="tokens of the texts of tasks that make their own (RULER), for instance 4096,8192")
    ] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    force: ForceOption = False,
) -> None:
    """Run tasks of the lm-evaluation-harness (extra "eval") on a model, with a plan or dense."""
    from moa_lab.evaluate.harness import harness as measure
    from moa_lab.models import geometry_of, load_model
    from moa_lab.plan import Plan

    free(out, force)
    card, chosen = None if plan is None else Plan.load(plan), lengths_of(lengths)
    loaded, tokenizer = load_model(model)
    if card is not None:
        card.check_model(geometry_of(loaded))
    # It warns of every model that is handed over loaded.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = measure(
        loaded, tokenizer, card, [name.strip() for name in tasks.split(",") if name.strip()], limit=limit, include_path=include_path,
        batch_size=batch_size, n_tokens=n_tokens, chat_template=chat_template, few_shot=few_shot, lengths=chosen, seed=seed,
    )  # fmt: skip
    found.save(out)
    lines = [["task", "length", "metric", "value", "95% interval", "n", "density"]]
    for row in found:
        scores = (f"{row.value:.3f}", interval_text(row.low, row.high), str(row.n), f"{row.density:.1%}")
        lines.append([row.task, str(row.length), row.metric, *scores])
    typer.echo("\n".join(aligned(lines)))
    typer.echo(f"measurements: {out}")
