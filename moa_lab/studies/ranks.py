"""Whether profiles rank heads alike: between domains, within one, and the interval of each head's rank."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np

from moa_lab.evaluate.compare import spearman
from moa_lab.evaluate.intervals import Interval, mean, proportion
from moa_lab.figures import long_range_influence, percentile_ranks
from moa_lab.plan import MIN_SPAN
from moa_lab.profiling.subset import profile_part
from moa_lab.records import BLOCK_TOKENS, InfluenceProfile, Measurement
from moa_lab.search import head_scores, loss_table
from moa_lab.search.losses import Estimator

CORRELATION, WIDTH, SHARED = "rank_correlation", "rank_interval_width", "shared_top_heads"
ESTIMATORS: tuple[Estimator, ...] = ("span", "element")
TOP = 10
"""The strongest heads: one in ten."""


def correlation_rows(profiles: Mapping[str, InfluenceProfile]) -> list[Measurement]:
    """Rank correlation of the KV heads' influence beyond the floor (`search.head_scores`), over the heads.

    For every pair of `profiles` a row per task and estimator, its task for instance `addresses/code`; and for every profile
    `addresses/addresses`: its even samples against its odd ones, which shows the disagreement by chance. Tasks that not all profiles
    have are left out.
    """
    rows = []
    for task in _shared_tasks(profiles):
        for estimator in ESTIMATORS:
            scores = {name: _scores(profile, task, estimator) for name, profile in profiles.items()}
            found = {f"{a}/{b}": spearman(scores[a].tolist(), scores[b].tolist()) for a, b in combinations(profiles, 2)}
            for name, profile in profiles.items():
                if min(len(values) for key, values in profile.distances.items() if key[0] == task) > 1:
                    halves = [
                        _scores(profile_part(profile, tasks=[task], samples=slice(start, None, 2)), task, estimator) for start in (0, 1)
                    ]
                    found[f"{name}/{name}"] = spearman(halves[0].tolist(), halves[1].tolist())
            rows += [_row(f"{task}, {estimator}", CORRELATION, pair, interval) for pair, interval in found.items()]
    return rows


def confidence_rows(profiles: Mapping[str, InfluenceProfile]) -> list[Measurement]:
    """Per task: the width of the 95% intervals of the heads' percentile ranks, over all samples of all profiles, mean over query heads;
    and `shared_top`.

    The first row's detail has, as (layers, query_heads), `rank`, `low`, `high` (0 the weakest, 100 the strongest) and, by profile, the
    `influence` that `figures.rank_confidence` draws.
    """
    rows = []
    for task in _shared_tasks(profiles):
        ranks = np.concatenate([_sample_ranks(profile, task) for profile in profiles.values()])
        middle, low, high = _intervals(ranks)
        influence = {name: _influence(profile, task) for name, profile in profiles.items()}
        arrays = {"rank": middle, "low": low, "high": high}
        detail = {
            **{name: values.round(2).tolist() for name, values in arrays.items()},
            "samples": len(ranks), "influence": {name: _short(values) for name, values in influence.items()},
        }  # fmt: skip
        rows.append(_row(task, WIDTH, "all", mean((high - low).ravel().tolist()), detail))
        if len(influence) > 1:
            rows.append(_row(task, SHARED, "all", shared_top(influence)))
    return rows


def shared_top(influence: Mapping[str, np.ndarray]) -> Interval:
    """Of the heads among the strongest tenth in some set, the share among them in every set. `influence` as in `percentile_ranks`."""
    strong = percentile_ranks(influence) >= 100 - TOP
    return proportion(int(strong.all(axis=0).sum()), int(strong.any(axis=0).sum()))


def _shared_tasks(profiles: Mapping[str, InfluenceProfile]) -> list[str]:
    return sorted(set.intersection(*(set(profile.tasks) for profile in profiles.values())))


def _scores(profile: InfluenceProfile, task: str, estimator: Estimator) -> np.ndarray:
    return head_scores(loss_table(profile_part(profile, tasks=[task]), estimator=estimator), task)


def _influence(profile: InfluenceProfile, task: str) -> np.ndarray:
    """Influence beyond the floor, summed over the task's lengths: (layers, query_heads)."""
    lengths = [length for name, length in profile.keys if name == task]
    return np.sum([long_range_influence(profile, task, length, MIN_SPAN) for length in lengths], axis=0)


def _sample_ranks(profile: InfluenceProfile, task: str) -> np.ndarray:
    """Percentile ranks of the query heads in every single sample of a task, of all lengths: (samples, layers, query_heads)."""
    beyond = MIN_SPAN // BLOCK_TOKENS
    histograms = [values for (name, _), values in sorted(profile.distances.items()) if name == task]
    singles = [sample for values in histograms for sample in values[..., beyond:].astype(np.float64).sum(axis=-1)]
    # `percentile_ranks` needs two sets: the last sample is given twice, and its copy dropped.
    return percentile_ranks({str(index): values for index, values in enumerate([*singles, singles[-1]])})[:-1]


def _intervals(ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean rank of every head over the samples with the ends of its interval, each (layers, query_heads)."""
    shape = ranks.shape[1:]
    found = [mean(column.tolist()) for column in ranks.reshape(len(ranks), -1).T]
    columns = np.array([(interval.value, interval.low, interval.high) for interval in found]).T
    # A single sample has infinite ends: any percentile.
    columns = np.nan_to_num(columns, neginf=0.0, posinf=100.0)
    return columns[0].reshape(shape), columns[1].reshape(shape), columns[2].reshape(shape)


def _short(values: np.ndarray) -> list[list[float]]:
    """Four digits: a figure shows no more."""
    return [[float(f"{value:.4g}") for value in row] for row in values]


def _row(plan: str, metric: str, task: str, found: Interval, detail: dict[str, object] | None = None) -> Measurement:
    # No plan is applied: what is compared are profiles of the dense model.
    return Measurement(plan, metric, task, 0, *found, 1.0, detail or {})
