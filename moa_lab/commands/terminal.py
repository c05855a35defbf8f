"""What all commands share: progress bars, and outputs that nothing overwrites by accident."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from tqdm import tqdm

from moa_lab.presets import PREFERENCES
from moa_lab.text import once

Number = TypeVar("Number", int, float)

ModelOption = Annotated[str, typer.Option("--model", help="smollm2 (embedded), a hub id, a folder, a .gguf file, or OWNER/REPO:FILE.gguf")]
PlainOption = Annotated[bool, typer.Option("--plain-prompts", help="questions as plain text, without the model's chat template")]
LengthsOption = Annotated[str | None, typer.Option("--lengths", help="profiled lengths in tokens, for instance 1024,2048")]
ForceOption = Annotated[bool, typer.Option("--force", help="replace the output file if it exists")]
AnyModelOption = Annotated[bool, typer.Option("--any-model", help="take samples and a profile of other weights, of a sibling model say")]
TestSeedOption = Annotated[int, typer.Option("--test-seed", help="draws the test samples; what is chosen stays")]
MinSpanOption = Annotated[
    int, typer.Option("--min-span", help="the floor: tokens that every head keeps at least, the sink among them", show_default=True)
]
BitsOption = Annotated[
    str,
    typer.Option("--bits", help="of keys and values as stored, density being one of bytes: 16, 8, 8+4 (K+V), 4, or a choice: 16,8,8+4"),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="search plans that this engine holds, density being what it allocates: a name of `moa-lab engines`, or limits such as "
        "windows_per_model=4,windows_per_layer=1,block_tokens=16",
    ),
]
SinkOption = Annotated[
    int,
    typer.Option("--sink", min=0, help="first tokens that every head keeps for good; few where most layers have windows of their own"),
]

UseLengthsOption = Annotated[
    str | None,
    typer.Option("--use-lengths", help="where the plan will be used, in tokens; default up to twice the longest profiled length"),
]
PreferOption = Annotated[
    str, typer.Option("--prefer", help=f"what a plan is chosen by: {', '.join(PREFERENCES)}, or weights such as needles=2,words=1")
]


class Bars:
    """One progress bar with ETA per stage; none is shown where another process shows them."""

    def __init__(self, shown: bool = True) -> None:
        self._shown = shown
        self._bars: dict[str, tqdm[Any]] = {}
        self._ended: set[str] = set()

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars.values():
            bar.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self._shown:
            return
        if stage not in self._bars:
            if done == total and stage in self._ended:
                return
            self._bars[stage] = tqdm(total=total, desc=stage, initial=done, leave=True)
        bar = self._bars[stage]
        bar.total = total
        bar.update(max(done - bar.n, 0))
        bar.refresh()
        if done == total:
            # Its time stands still, and what is told next gets a line of its own.
            self._bars.pop(stage).close()
            self._ended.add(stage)

    def steps(self, stage: str) -> Callable[[int, int], None]:
        """A callback for one stage."""
        return lambda done, total: self(stage, done, total)


def free(out: Path, force: bool, suffix: str = ".json") -> None:
    """Raise ValueError where `out` exists and is not to be replaced, is a folder, or is named as another kind of file.

    suffix: of what will be written. A name without one is taken as it is.
    """
    if out.suffix.lower() not in ("", suffix):
        raise ValueError(f"{out}: what is written there is {suffix[1:]}; name it {out.stem}{suffix}")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name a file, for instance {out / f'record{suffix}'}")
    _check_parent(out)
    if out.exists() and not force:
        raise ValueError(f"{out} exists; choose another file, or pass --force to replace it")


def folder_free(out: Path) -> None:
    """Raise ValueError where `out` is to be a folder, and is a file or named like one."""
    if out.is_file() or out.suffix.lower() in (".json", ".safetensors", ".html"):
        raise ValueError(f"{out}: several files are written; name a folder")
    _check_parent(out / "file")


def parts_of(out: Path) -> Path:
    """Folder beside `out` for finished parts, from which the same command goes on after a kill."""
    return out.with_name(f"{out.stem}.parts")


def _check_parent(out: Path) -> None:
    """Raise ValueError where the folder of `out` cannot be made or written to: hours later would be too late."""
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ValueError(f"{out}: {parent} is a file and no folder; choose another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{out}: nothing can be written in {parent}; choose another place, or change its permissions")


def lengths_of(text: str | None) -> tuple[int, ...] | None:
    """Numbers of tokens, from "1024,2048"; None for None."""
    return _separated(text, int, "lengths must be whole numbers of tokens")


def densities_of(text: str | None) -> tuple[float, ...] | None:
    """Shares of the KV cache, from "0.25,0.5"; None for None."""
    return _separated(text, float, "densities must be numbers")


def weights_of(text: str | None) -> dict[str, float] | None:
    """Weights by task, from "summaries=2,text=3"; None for None."""
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    try:
        found = [(name.strip(), float(weight)) for name, _, weight in pairs]
    except ValueError:
        raise ValueError(f"weights must be task=number separated by commas, got {text!r}") from None
    if len(dict(found)) < len(found):
        raise ValueError(f"weights: a task is named twice in {text!r}; name it once")
    return dict(found)


def _separated(text: str | None, convert: Callable[[str], Number], wanted: str) -> tuple[Number, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(convert(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{wanted} separated by commas, got {text!r}") from None
    return once(numbers, wanted.partition(" ")[0])
