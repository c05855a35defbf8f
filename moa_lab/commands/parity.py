"""moa-lab parity: what runs a plan held against masks written out in full."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moa_lab.commands.terminal import Bars, ForceOption, ModelOption, PlainOption, free

if TYPE_CHECKING:
    from moa_lab.serving import Answers


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
    server: Annotated[
        str | None,
        typer.Option(
            "--server", help="instead, what serves the plan: the URL of a server of vLLM, or vllm, to start it here; in --dtype too"
        ),
    ] = None,
    plan_length: Annotated[int | None, typer.Option("--plan-length", min=1, help="with --server: the server's, if it has one")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="record of the comparison (.json)")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    plain_prompts: PlainOption = False,
    force: ForceOption = False,
) -> None:
    """Hold the ring cache and the kernels, or a server, against masks written out in full; exits with code 1 when a case fails."""
    from moa_lab.evaluate.parity import parity as compare
    from moa_lab.evaluate.parity import served_parity, table
    from moa_lab.models import dtype_of, load_model
    from moa_lab.plan import Plan

    if out is not None:
        free(out, force)
    wanted = dtype_of(dtype)
    card = Plan.load(plan)
    if server and needles:
        raise ValueError("--needles are asked of the ring cache and the kernels, not of a --server")
    loaded, tokenizer = load_model(model, dtype=wanted, plain_prompts=plain_prompts)
    with Bars() as bars:
        if server:
            answers = _answers(server, plan_length, model, plan, str(loaded.dtype).removeprefix("torch."))
            found = served_parity(loaded, tokenizer, card, answers, n_tokens=n_tokens, seed=seed, progress=bars.steps("parity"))
        else:
            found = compare(loaded, tokenizer, card, n_tokens=n_tokens, needles=needles, seed=seed, progress=bars.steps("parity"))
    if out is not None:
        found.save(out)
    typer.echo(table(found))
    if not found.passed:
        raise typer.Exit(1)


def _answers(server: str, plan_length: int | None, model: str, plan: Path, dtype: str) -> Answers:
    """What serves: a running server, or vLLM in this process."""
    from moa_lab.models import model_folder
    from moa_lab.serving import PLAN_LENGTH_VARIABLE, Server

    if server != "vllm":
        return Server(server, plan_length)
    if find_spec("vllm") is None:
        raise ValueError('vLLM is not installed here; pip install "moa-lab[serve]" in an environment of its own, and run this there')
    from moa_lab.serving.vllm.in_process import InProcess

    if plan_length:
        os.environ[PLAN_LENGTH_VARIABLE] = str(plan_length)
    # Compiling takes longer than comparing.
    return InProcess(model_folder(model), plan, dtype=dtype, gpu_memory_utilization=0.5, enforce_eager=True)
