"""moa-lab capacity: what a GPU holds under a plan, and how fast it decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moa_lab.capacity import GPUS, Capacity, plan_capacity
from moa_lab.commands.terminal import lengths_of
from moa_lab.plan import Plan, dense_plan
from moa_lab.text import aligned


def capacity(
    plan: Annotated[Path, typer.Option("--plan", help="config card")],
    model: Annotated[str | None, typer.Option("--model", help="whose weights lie beside the cache, in 16 bits")] = None,
    weights: Annotated[float | None, typer.Option("--weights-gb", min=1e-3, help="what the weights take, instead of --model")] = None,
    gpu: Annotated[str, typer.Option("--gpu", help=f"one of {', '.join(GPUS)}, or here: this machine's, measured")] = "h100",
    memory: Annotated[float | None, typer.Option("--memory-gb", min=1e-3, help="of another GPU, in GB")] = None,
    bandwidth: Annotated[float | None, typer.Option("--read-gb-s", min=1e-3, help="of another GPU: GB/s of a pure read")] = None,
    tokens: Annotated[str, typer.Option("--tokens", help="lengths of a sequence, prompt and answer, in tokens")] = "4096,8192,16384,32768",
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="sequences at once; default as many as fit")] = None,
) -> None:
    """Foretell batch, bytes and tokens/s of decoding under a plan, beside the dense cache."""
    from moa_lab.bench.here import gpu_named
    from moa_lab.models import weight_count

    if (model is None) == (weights is None):
        raise ValueError("say --model NAME or --weights-gb NUMBER: the weights take their part of the memory and of every step")
    device = gpu_named(gpu, memory, bandwidth)
    card = Plan.load(plan)
    size = 2 * weight_count(model) if model is not None else int((weights or 0) * 1e9)
    rows: list[tuple[str, ...]] = [("tokens", "cache", "KV a sequence", "sequences", "ms a step", "tokens/s")]
    for n in lengths_of(tokens) or ():
        found = {"dense": plan_capacity(dense_plan(card.geometry), device, size, n, batch)}
        found[card.name] = plan_capacity(card, device, size, n, batch)
        rows += [_row(n, name, each, found["dense"]) for name, each in found.items()]
    typer.echo("\n".join(aligned(rows)))
    typer.echo(
        f"{device.name}: {device.memory_bytes / 1e9:.1f} GB, reads {device.read_bytes_s / 1e12:.2f} TB/s; weights {size / 1e9:.1f} GB; "
        "foretold from the bytes and products of a compiled step, within a tenth of 7 and 8 billion weights measured on H100 and H200"
    )


def _row(n: int, name: str, found: Capacity, dense: Capacity) -> tuple[str, ...]:
    times = f" ({found.tokens_s / dense.tokens_s:.1f} x)" if found is not dense and dense.tokens_s else ""
    fits = (f"{found.batch:,}", f"{1e3 * found.step_s:.1f}", f"{found.tokens_s:,.0f}{times}") if found.batch else ("none", "", "")
    return (f"{n:,}", name, f"{found.kv_bytes / 2**20:,.0f} MiB", *fits)
