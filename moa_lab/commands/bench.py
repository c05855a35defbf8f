"""moa-lab bench: what is measured against goals and peers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moa_lab.commands.terminal import Bars, ForceOption, free, lengths_of

if TYPE_CHECKING:
    from moa_lab.bench import BenchRecord

app = typer.Typer(help="Measure speed and memory against peers in the same process, and hold them against goals.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Speed and memory, measured."""


@app.command()
def kernels(
    out: Annotated[Path, typer.Option("--out", help="the record, JSON")],
    rows: Annotated[str | None, typer.Option("--rows", help="some of D1,D2,D3,D4,P1,P2,P3,P4,M1,B1,B2,B3,B4; all when not given")] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="a config card whose spans are stretched to the shapes")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="tiny shapes: shows that everything runs, and no more")] = False,
    force: ForceOption = False,
) -> None:
    """The prefill and decode kernels, also over stored bits (B1 to B4), and the memory of the ring cache."""
    from moa_lab.bench import ROWS, bench_kernels, table

    free(out, force)
    with Bars() as bars:
        record = bench_kernels(_names(rows, ROWS), quick, plan, out, bars.steps("kernels"))
    typer.echo(table(record))


@app.command()
def generate(
    out: Annotated[Path, typer.Option("--out", help="the record, JSON, written after every side")],
    rows: Annotated[str | None, typer.Option("--rows", help="some of E1,E2,E3,E4,E5,E6; all when not given")] = None,
    sides: Annotated[str | None, typer.Option("--sides", help="some of plan,dense,dynamic,static,compiled; all when not given")] = None,
    lengths: Annotated[str | None, typer.Option("--lengths", help="some prompt lengths, for instance 4096,8192")] = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option("--plan", help="a config card or published plan, stretched where the model is another; may be given again"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a tiny model: shows that everything runs, and no more")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="keep the sides that the record at --out has, measure the others")] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            help="what vLLM-bf16 or vLLM-fp8 told elsewhere, for E5, E6 and figures: NAME@PROMPT=TOKENS_PER_S, or `bench engine`'s record",
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Decoding end to end on the geometry of 7B and 8B models, in 16 bits and in 8 (E5, E6), every side at its largest batch."""
    from moa_lab.bench import table
    from moa_lab.bench.endtoend import KINDS, ROWS
    from moa_lab.bench.generate import bench_generate

    free(out, force or resume)
    with Bars() as bars:
        record = bench_generate(
            _names(rows, ROWS), quick, plan or (), out, _names(sides, KINDS), lengths_of(lengths), resume,
            bars.steps("generate"), _told(peer or []),
        )  # fmt: skip
    typer.echo(table(record))


@app.command()
def answering(
    out: Annotated[Path, typer.Option("--out", help="the record, JSON")],
    batches: Annotated[str, typer.Option("--batches", help="prompts at once, separated by commas")] = "8,64",
    prompt: Annotated[int, typer.Option("--prompt", min=16, help="tokens of a prompt")] = 4096,
    peer: Annotated[
        list[str] | None, typer.Option("--peer", help="vLLM-bf16@PROMPT=PROMPT_TOKENS_PER_S, or the record of `bench engine`")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a tiny model: shows that everything runs, and no more")] = False,
    force: ForceOption = False,
) -> None:
    """Prompts of the 7B geometry as `generate` takes them in (E7): tokens/s until the first new token."""
    from moa_lab.bench import table
    from moa_lab.bench.answering import bench_answering

    told = _told(peer or [], "prefill_rate")
    sizes = lengths_of(batches) or ()
    _measure("answering", out, force, lambda progress: bench_answering(prompt, sizes, quick, told, progress), table)


@app.command()
def engine(
    out: Annotated[Path, typer.Option("--out", help="the record, JSON")],
    peer: Annotated[
        str, typer.Option("--peer", help="vLLM-bf16 or vLLM-fp8: how K and V are stored; vLLM-plan, with --plan")
    ] = "vLLM-bf16",
    lengths: Annotated[str, typer.Option("--lengths", help="prompt lengths, separated by commas")] = "4096,8192,16384",
    plan: Annotated[Path | None, typer.Option("--plan", help="for vLLM-plan: a config card, stretched to the geometry")] = None,
    block_size: Annotated[
        int | None, typer.Option("--block-size", min=16, help="tokens of a page, where vLLM's default is not wanted")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a tiny model: shows that everything runs, and no more")] = False,
    force: ForceOption = False,
) -> None:
    """Decoding and prefill of the 7B geometry by vLLM, which must be installed here: the peer of E5 to E7, for `bench generate --peer`."""
    from moa_lab.bench.engine import bench_engine, quick_settings, told_by
    from moa_lab.plan import Plan
    from moa_lab.storage import write_json

    free(out, force)
    settings = (quick_settings() if quick else {}) | ({"block_size": block_size} if block_size else {})
    with Bars() as bars:
        card = None if plan is None else Plan.load(plan)
        record = bench_engine(peer, lengths_of(lengths) or (), progress=bars.steps("engine"), plan=card, **settings)
    write_json(out, record)
    typer.echo("\n".join(told_by(record)))


@app.command()
def serving(
    out: Annotated[Path, typer.Option("--out", help="the record, JSON; what it has is not measured again")],
    plan: Annotated[list[Path], typer.Option("--plan", help="a config card, stretched to the geometry; may be given again")],
    lengths: Annotated[str, typer.Option("--lengths", help="prompt lengths, separated by commas")] = "4096,16384",
    block_size: Annotated[int | None, typer.Option("--block-size", min=16, help="tokens of a page of plans")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a tiny model: shows that everything runs, and no more")] = False,
) -> None:
    """vLLM with its own cache in 16 and 8 bits and under plans, every side and length in a process of its own (`bench engine`)."""
    from moa_lab.bench.serving import bench_serving, serving_table

    with Bars() as bars:
        record = bench_serving(out, plan, lengths_of(lengths) or (), block_size, quick, bars.steps("serving"))
    typer.echo(serving_table(record))


@app.command()
def search(
    out: Annotated[Path, typer.Option("--out", help="the record, JSON")],
    quick: Annotated[bool, typer.Option("--quick", help="a tiny table: shows that everything runs, and no more")] = False,
    force: ForceOption = False,
) -> None:
    """The search on a table as large as a 7B model's: a density slider, the exact program, a front. No GPU is used."""
    from moa_lab.bench.search import bench_search, search_table

    _measure("search", out, force, lambda progress: bench_search(progress, quick), search_table)


@app.command()
def profile(
    out: Annotated[Path, typer.Option("--out", help="the record, JSON")],
    quick: Annotated[bool, typer.Option("--quick", help="a tiny model: shows that everything runs, and no more")] = False,
    force: ForceOption = False,
) -> None:
    """The influence profile of a 7B geometry at 4k: seconds a sample, memory. On several GPUs: torchrun -m moa_lab bench profile."""
    from moa_lab import processes
    from moa_lab.bench import table
    from moa_lab.bench.profile import bench_profile

    with processes.joined():
        _measure("profile", out, force, lambda progress: bench_profile(quick, progress), table)


def _measure(
    stage: str, out: Path, force: bool, bench: Callable[[Callable[[int, int], None]], BenchRecord], table: Callable[[BenchRecord], str]
) -> None:
    """Run a bench that is done in one piece, write its record, show it; of several processes, the first does."""
    from moa_lab import processes

    processes.from_first(lambda: free(out, force))
    with Bars(shown=processes.is_first()) as bars:
        record = bench(bars.steps(stage))
    if processes.is_first():
        record.save(out)
        typer.echo(table(record))


def _told(peers: list[str], rate: str = "rate") -> dict[tuple[str, int], float]:
    """Tokens/s by (peer, prompt tokens). Raises ValueError for what is neither NAME@PROMPT=TOKENS_PER_S nor a record of `bench engine`."""
    from moa_lab.bench.engine import ENGINE_SCHEMA, told_by
    from moa_lab.storage import read_json

    found: dict[tuple[str, int], float] = {}
    records = [text for text in peers if text.endswith(".json")]
    for text in [*(told for path in records for told in told_by(read_json(path, ENGINE_SCHEMA), rate)), *(set(peers) - set(records))]:
        name, _, rate = text.partition("=")
        name, _, prompt = name.partition("@")
        try:
            found[name, int(prompt)] = float(rate)
        except ValueError:
            raise ValueError(f"--peer must be NAME@PROMPT=TOKENS_PER_S, for instance vLLM-fp8@4096=1500, got {text!r}") from None
    return found


def _names(text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """What is named, separated by commas; all that is known where nothing is."""
    return tuple(text.split(",")) if text else known
