"""Measured plans to choose from, and what is wished of one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from moa_lab.capacity import Gpu
from moa_lab.plan import Plan
from moa_lab.records import Measurement, Measurements
from moa_lab.text import told_apart

NEEDLES = "needles"
TEXTS = {"documents": "documents", "summaries": "own answers"}
"""Tasks of running text, and what they are called."""


@dataclass(frozen=True)
class Wish:
    """What a plan must hold; None for what does not matter. Raises ValueError for numbers that are none, and for no wish at all.

    density: bytes kept, as a share of the dense cache in 16 bits, at most. needles: share of the dense model's needles, at least.
    perplexity: of documents and own answers, at most so much above the dense model's (0.02: 2%). tokens_s: foretold tokens per second on
    `gpu` beside `weights_bytes`, at least, of sequences of `n_tokens`; sequences: of those, as many must fit there at once. lengths: where
    needles and perplexity must hold; None: wherever measured.
    """

    density: float | None = None
    needles: float | None = None
    perplexity: float | None = None
    tokens_s: float | None = None
    lengths: tuple[int, ...] | None = None
    gpu: Gpu | None = None
    weights_bytes: int | None = None
    n_tokens: int | None = None
    sequences: int | None = None

    def __post_init__(self) -> None:
        for name in ("density", "needles", "tokens_s", "sequences"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value}")
            if name in ("density", "needles") and value is not None and value > 1:
                raise ValueError(
                    f"{name} must be a share of the dense {'cache' if name == 'density' else 'model'}'s, at most 1, got {value}"
                )
        if self.perplexity is not None and not 0 <= self.perplexity < math.inf:
            raise ValueError(f"perplexity must be a share of at least 0 above the dense model's, got {self.perplexity}")
        if not any(value is not None for value in (self.density, self.needles, self.perplexity, self.tokens_s, self.sequences)):
            raise ValueError("wish for something: density, needles, perplexity, tokens_s or sequences")
        if self.is_served and None in (self.gpu, self.weights_bytes, self.n_tokens):
            raise ValueError("tokens_s and sequences need a gpu, the bytes of the weights, and the tokens of a sequence")

    @property
    def is_served(self) -> bool:
        """Whether it asks for something of a GPU."""
        return self.tokens_s is not None or self.sequences is not None


@dataclass(frozen=True)
class Option:
    """A measured plan: its scores and the dense model's (rows named "dense") on the same samples. source: its run; weights: the model's."""

    plan: Plan
    rows: tuple[Measurement, ...]
    source: str = ""
    weights: str | None = None

    @property
    def name(self) -> str:
        """The plan's name, with its source where there is one."""
        return f"{self.plan.name} ({self.source})" if self.source else self.plan.name

    def lengths(self, wish: Wish) -> tuple[int, ...]:
        """Where the wish must hold. Raises ValueError where nothing was measured, or not at a length that is asked for."""
        measured = {row.length for row in self.rows if row.plan == self.plan.name and row.task in (NEEDLES, *TEXTS)}
        wanted = tuple(sorted(measured)) if wish.lengths is None else wish.lengths
        missing = sorted({*wanted} - measured)
        if missing or not wanted:
            raise ValueError(f"{self.name} was not measured{f' at {missing[0]:,} tokens' if missing else ''}")
        return wanted

    def samples(self, wish: Wish) -> int:
        """The fewest samples that any score of the wish rests on; 0 where it asks for none."""
        lengths = self.lengths(wish)
        tasks = ([NEEDLES] if wish.needles is not None else []) + (list(TEXTS) if wish.perplexity is not None else [])
        counts = [row.n for row in self.rows if row.plan == self.plan.name and row.task in tasks and row.length in lengths]
        return min(counts, default=0)

    def density(self, wish: Wish) -> float:
        """Share of the dense bytes that it keeps, the most at any length of the wish."""
        return max(self.plan.density(n) for n in self.lengths(wish))


def options_of(folders: Iterable[str | Path]) -> tuple[Option, ...]:
    """Every run's chosen plan with its test scores: `plan.json` beside `measurements.json`, in a folder or anywhere below it.

    A plan that lies in several places counts once. Sources are the names of their folders, with as much of the path as tells them apart.
    Raises ValueError for a folder without any, and for runs of different models.
    """
    found: dict[tuple[object, ...], tuple[Path, Option]] = {}
    for folder in map(Path, folders):
        places = sorted({path.parent for path in folder.rglob("measurements.json") if (path.parent / "plan.json").exists()})
        if not places:
            raise ValueError(f"{folder} holds no measured plan: no plan.json beside a measurements.json")
        for place in places:
            plan, scores = Plan.load(place / "plan.json"), Measurements.load(place / "measurements.json")
            told = tuple((row.plan, row.task, row.length, row.value, row.n) for row in scores)
            key = (plan.rules, plan.bits, plan.sink_tokens, scores.provenance.weights, told)
            found.setdefault(key, (place.resolve(), Option(plan, scores.rows, weights=scores.provenance.weights)))
    options = [option for _, option in found.values()]
    if len({option.weights for option in options} - {None}) > 1:
        raise ValueError("the runs are of different models: their plans cannot be weighed against each other")
    names = told_apart([place for place, _ in found.values()])
    return tuple(replace(option, source=name) for option, name in zip(options, names, strict=True))
