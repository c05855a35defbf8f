"""The candidates of a validation: what each lost, and what kind of plan it is, in words."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from moa_lab.records.measurements import Measurements
from moa_lab.storage import RecordError, parse

KINDS = {
    "uniform": "uniform spans", "layers": "a span per layer", "ranked": "whole heads over a floor", "far": "whole far-seeing heads",
    "learned": "learned spans", "refined": "refined spans",
}  # fmt: skip
"""Kinds of plans by origin; the others were searched."""
SEARCHED = "searched spans"
SEARCHES = {
    "default": "", "given": "", "paper": "the paper's goals", "worst-questions": "questions at their worst distance",
    "worst-others": "other tasks at their worst distance", "budget": "as the slider does", "evolve": "NSGA-II", "milp": "exact",
}  # fmt: skip
"""What searches go by that are no others' way, by origin; "" for the usual one."""


def kind_text(origin: str) -> str:
    """What an origin of candidates is, in words."""
    return KINDS.get(origin, SEARCHED)


def origin_text(origin: str) -> str:
    """As `kind_text`, with what a search went by where that is not the usual goals."""
    by = "" if origin in KINDS else SEARCHES.get(origin, origin)
    return f"searched: {by}" if by else kind_text(origin)


@dataclass(frozen=True)
class Candidate:
    """A measured candidate, and what it loses against the dense model; None: no sample of that kind.

    score: what was chosen by, the least. needles, words: nats per answer token. facts: share of planted
    facts that are no longer found.
    """

    name: str
    origin: str
    score: float
    needles: float | None
    words: float | None
    facts: float
    chosen: bool

    @property
    def kind(self) -> str:
        """The kind of plan, in words."""
        return kind_text(self.origin)

    @property
    def has_both(self) -> bool:
        """Whether it was measured by needles and by words."""
        return self.needles is not None and self.words is not None


@dataclass(frozen=True)
class _Lost:
    nats: dict[str, float]
    facts: float = 0.0


@dataclass(frozen=True)
class _Told:
    """What a validation's settings tell of its candidates, by name."""

    scores: dict[str, float]
    losses: dict[str, _Lost]
    origins: dict[str, str]
    chosen: str


def candidates(validation: Measurements, where: str | Path = "validation") -> tuple[Candidate, ...]:
    """The candidates of a validation, best first; none where the record keeps no losses, as those of other measurements.

    where: what an error calls the record. Raises RecordError for losses that cannot be read.
    """
    if "losses" not in validation.settings:
        return ()
    names = {each.name for each in fields(_Told)}
    told = parse(_Told, {name: value for name, value in validation.settings.items() if name in names}, where)
    for name in told.scores:
        if name not in told.losses:
            raise RecordError(f"{where}: field losses: there are none of candidate {name!r}")
    found = [_candidate(told, name, score) for name, score in told.scores.items()]
    return tuple(sorted(found, key=lambda candidate: candidate.score))


def _candidate(told: _Told, name: str, score: float) -> Candidate:
    lost = told.losses[name]
    needles, words = lost.nats.get("needles"), lost.nats.get("words")
    return Candidate(name, told.origins.get(name, ""), score, needles, words, lost.facts, name == told.chosen)
