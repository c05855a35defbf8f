"""Several runs over each other, also of different models: scores against each run's own dense model, and fronts of common goals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moa_lab.evaluate.compare import excess_perplexity, share_of_hits
from moa_lab.evaluate.options import NEEDLES, TEXTS
from moa_lab.figures.front import axes
from moa_lab.plan import Plan
from moa_lab.records import Front, InfluenceProfile, Measurement, Measurements
from moa_lab.text import given_path, told_apart
from moa_lab.workbench.biography import Biography
from moa_lab.workbench.opening import model_title, named

SHARE, EXCESS = "share_of_dense", "perplexity_excess"
"""Metrics of `Across.scores`: needles found, over those of the dense model; perplexity above the dense model's, as a share of it."""
DENSE, UNIFORM = "dense", "uniform"


@dataclass(frozen=True)
class RunScores:
    """What a run's folder holds of results. name: its folder's; model: as its records name it; weights: their fingerprint."""

    name: str
    model: str
    weights: str | None
    plan: Plan | None
    measurements: Measurements | None
    front: Front | None
    profile: InfluenceProfile | None = None


def read_run(folder: str | Path) -> RunScores:
    """Plan, measurements, front and profile of a run's folder, whichever are there; no profile or table is needed.

    Raises ValueError for a folder with neither measurements of a plan nor a front.
    """
    given = given_path(folder)
    plan = Plan.load(given / "plan.json") if (given / "plan.json").is_file() else None
    scores = Measurements.load(given / "measurements.json") if (given / "measurements.json").is_file() and plan is not None else None
    front = Front.load(given / "front.json") if (given / "front.json").is_file() else None
    if scores is None and not front:
        raise ValueError(f"{folder} holds neither measurements of a plan nor a front: name the folder of a run")
    origins = [record.provenance for record in (scores, plan, front) if record is not None]
    named_as = next((origin.model for origin in origins if origin.model), "a model without a name")
    weights = next((origin.weights for origin in origins if origin.weights), None)
    file = given / "profile.safetensors"
    profile = InfluenceProfile.load(file) if file.is_file() else None
    return RunScores(given.resolve().name, model_title(named_as), weights, plan, scores, front, profile)


class Across:
    """Runs that are compared, by the path that they were opened with."""

    def __init__(self, folders: Sequence[str | Path] = ()) -> None:
        self.runs: dict[str, RunScores] = {}
        for folder in folders:
            self.open(folder)

    def open(self, folder: str | Path) -> RunScores:
        """One more run; one that is open is read again. Raises ValueError as `read_run`."""
        if not str(folder).strip():
            raise ValueError("name the folder of a run")
        found = read_run(folder)
        self.runs[named(given_path(folder))] = found
        return found

    def close(self, path: str) -> None:
        """Leave a run out. Raises ValueError for one that is not open."""
        if path not in self.runs:
            raise ValueError(f"{path!r} is not open; there are {', '.join(self.runs) or 'none'}")
        del self.runs[path]

    def model(self, run: RunScores) -> str:
        """A run's model in words: with its weights where runs of one name have different ones."""
        alike = {other.weights for other in self.runs.values() if other.model == run.model}
        return run.model if len(alike) < 2 else f"{run.model} ({(run.weights or 'unknown weights')[:6]})"

    def places(self) -> list[tuple[str, int]]:
        """Tasks and lengths at which some run measured its plan and its dense model, those of most runs first."""
        found = [place for run in self.runs.values() for place in dict.fromkeys((row.task, row.length) for row, _ in self._pairs(run))]
        tasks = (NEEDLES, *TEXTS)
        return sorted(set(found), key=lambda place: (-found.count(place), tasks.index(place[0]), place[1]))

    def scores(self, task: str, length: int, *, every: bool = False) -> list[Measurement]:
        """Every run's plan and uniform windows against its own dense model, with 95% intervals. A row's plan names run and plan, "line" in
        its detail the model, the plan and the number of samples.

        Needles: `SHARE`; running text: `EXCESS`, of pairs. every: all plans that were measured. Raises ValueError where no run was
        measured there.
        """
        found = []
        for name, run in self._named():
            shown = {UNIFORM, run.plan.name if run.plan else ""}
            for row, dense in self._pairs(run):
                if (row.task, row.length) == (task, length) and (every or row.plan in shown):
                    found.append(self._against(name, run, row, dense))
        if not found:
            raise ValueError(f"no open run measured {task} at {length:,} tokens beside its dense model")
        return found

    def _against(self, name: str, run: RunScores, row: Measurement, dense: Measurement) -> Measurement:
        metric, of = (SHARE, share_of_hits) if row.task == NEEDLES else (EXCESS, excess_perplexity)
        against = of(row, dense)
        # By samples as well: a line must not join what few and what many samples say.
        detail = {"line": f"{self.model(run)}, {row.plan}, n = {against.n}"}
        ends = (against.value, against.n, against.low, against.high)
        return Measurement(f"{name}: {row.plan}", metric, row.task, row.length, *ends, row.density, detail)

    def goals(self) -> tuple[str, ...]:
        """Goals that all open fronts have, whole tasks first, the density at the end."""
        fronts = [set(axes(run.front)) for run in self.runs.values() if run.front]
        common = set.intersection(*fronts) if fronts else set()
        return tuple(sorted(common, key=lambda name: (name == "density", "@" in name, name)))

    def fronts(self) -> dict[str, Front]:
        """The open fronts, by model and run."""
        return {f"{self.model(run)}, {name}": run.front for name, run in self._named() if run.front}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """What is open: a head and a row per run."""
        rows = [
            [
                path, self.model(run), run.plan.name if run.plan else "-",
                str(len(run.measurements.rows)) if run.measurements else "-", str(len(run.front)) if run.front else "-",
            ]
            for path, run in self.runs.items()
        ]  # fmt: skip
        return ["run", "model", "plan", "measured rows", "plans of its front"], rows

    def head(self, layer: int, kv_head: int) -> tuple[list[str], list[list[str]]]:
        """One KV head in all open runs: what each run's plan keeps of it, and its kind and ranks where the run has its profile.

        A run of a model without this head says so.
        """
        rows = []
        for path, run in self.runs.items():
            plan = run.plan
            geometry = plan.geometry if plan is not None else run.profile.geometry if run.profile is not None else None
            if geometry is None or layer >= geometry.layers or kv_head >= geometry.kv_heads:
                rows.append(
                    [path, self.model(run), "-", "-", "-" if geometry is None else f"no such head: {geometry.layers} x {geometry.kv_heads}"]
                )
                continue
            told = "the run keeps no profile"
            if run.profile is not None:
                told = Biography({run.name: run.profile}).told(layer, kv_head).partition(": ")[2]
            rows.append([path, self.model(run), *(_kept(plan, layer, kv_head) if plan is not None else ("-", "-")), told])
        return ["run", "model", "density", "what its plan keeps", "kind and ranks"], rows

    def _named(self) -> list[tuple[str, RunScores]]:
        """The open runs, each with a name of its own."""
        names = told_apart([Path(path).resolve() for path in self.runs])
        return list(zip(names, self.runs.values(), strict=True))

    def _pairs(self, run: RunScores) -> list[tuple[Measurement, Measurement]]:
        """Rows of a run's plans, each with the dense model's row of the same task and length."""
        rows = [row for row in run.measurements or () if row.task in (NEEDLES, *TEXTS)]
        dense = {(row.metric, row.task, row.length): row for row in rows if row.plan == DENSE}
        return [(row, dense[key]) for row in rows if row.plan != DENSE and (key := (row.metric, row.task, row.length)) in dense]


def _kept(plan: Plan, layer: int, kv_head: int) -> tuple[str, str]:
    """A plan's density, and the span that it gives a head, at the longest length that it names."""
    n = plan.longest
    spans = plan.spans(n)
    rank = int((spans > spans[layer, kv_head]).sum()) + 1
    return f"{plan.density(n):.1%}", f"{int(spans[layer, kv_head]):,} of {n:,} tokens, rank {rank} of {spans.size}"
