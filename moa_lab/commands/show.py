"""One paragraph about any record, for `moa-lab show`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from moa_lab.bench.record import BENCH_SCHEMA, BenchRecord
from moa_lab.bench.record import table as bench_table
from moa_lab.bench.search import ROW as SEARCH_ROW
from moa_lab.bench.search import search_table
from moa_lab.calibration.samples import SAMPLES_SCHEMA, SampleSet
from moa_lab.evaluate.parity import PARITY_SCHEMA, Parity
from moa_lab.evaluate.parity import table as parity_table
from moa_lab.figures import CONFIG, goal_ratios
from moa_lab.plan import PLAN_SCHEMA, Plan
from moa_lab.provenance import Provenance
from moa_lab.records import (
    FRONT_SCHEMA,
    MEASUREMENTS_SCHEMA,
    PROFILE_SCHEMA,
    TABLE_SCHEMA,
    Front,
    InfluenceProfile,
    LossTable,
    Measurements,
)
from moa_lab.storage import RecordError
from moa_lab.studies import StudyRecord
from moa_lab.studies import table as study_table
from moa_lab.studies.record import STUDY_SCHEMA


def draw(path: Path, schema: str, out: Path) -> None:
    """Draw the record of a benchmark to an HTML file that needs no network. Raises ValueError for other records."""
    if schema != BENCH_SCHEMA:
        raise ValueError(f"{path}: only benchmarks are drawn to a file, this is {schema}; `moa-lab run` draws the others into its report")
    goal_ratios(BenchRecord.load(path)).write_html(out, include_plotlyjs=True, config={**CONFIG})  # a copy: plotly takes entries out


def describe(path: Path, schema: str) -> str:
    """Describe the record at `path`; raises RecordError for a schema that is not ours."""
    if schema not in _DESCRIPTIONS:
        raise RecordError(f"{path}: {schema} is none of {', '.join(_DESCRIPTIONS)}")
    return _DESCRIPTIONS[schema](path)


def _plan(path: Path) -> str:
    plan = Plan.load(path)
    lengths = plan.lengths or (plan.geometry.max_length,)
    rules: dict[str, int] = {}
    for row in plan.rules:
        for rule in row:
            rules[f"{rule.alpha:g} + {rule.beta:g} N"] = rules.get(f"{rule.alpha:g} + {rule.beta:g} N", 0) + 1
    lines = [f"plan {plan.name!r} for {plan.geometry}", f"sink {plan.sink_tokens}, min span {plan.min_span}"]
    lines += [
        f"at {n} tokens: density {plan.density(n):.1%}, KV {plan.kv_bytes(n) / 2**20:.1f} MiB at 2 bytes (predicted)" for n in lengths
    ]
    lines += [f"{count} heads: span = {rule}" for rule, count in sorted(rules.items(), key=lambda item: -item[1])]
    lines += [
        f"{name}: {score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}] (n = {score['n']})" for name, score in plan.scores.items()
    ]
    return "\n".join([*lines, _origin(plan.provenance)])


def _samples(path: Path) -> str:
    samples = SampleSet.load(path)
    lines = [f"{len(samples.select(task, length))} x {task} of {length} tokens" for task, length in samples.keys]
    return "\n".join([f"{len(samples)} samples, {samples.identity}", *lines, _origin(samples.provenance)])


def _profile(path: Path) -> str:
    profile = InfluenceProfile.load(path)
    lines = [f"{task}@{length}: {len(profile.distances[task, length])} samples" for task, length in profile.keys]
    return "\n".join([f"influence profile of {profile.geometry}", *lines, _origin(profile.provenance)])


def _table(path: Path) -> str:
    table = LossTable.load(path)
    names = [objective.name for objective in table.objectives]
    return "\n".join([f"loss table of {table.geometry}: {len(table.rules)} rules", *names, _origin(table.provenance)])


def _front(path: Path) -> str:
    front = Front.load(path)
    lines = [
        f"{point.plan.name} ({point.origin}): density " + ", ".join(f"{value:.1%} at {n}" for n, value in point.density.items())
        for point in front
    ]
    return "\n".join([f"front of {len(front)} plans", *lines, _origin(front.provenance)])


def _measurements(path: Path) -> str:
    found = Measurements.load(path)
    lines = [
        f"{row.plan}: {row.metric} {row.task}@{row.length} {row.value:.3f} [{row.low:.3f}, {row.high:.3f}] (n = {row.n})" for row in found
    ]
    return "\n".join([f"{len(found.rows)} measurements", *lines, _origin(found.provenance)])


def _bench(path: Path) -> str:
    record = BenchRecord.load(path)
    # What was asked of the search is no shape of a model: it has a table of its own.
    lines = search_table(record) if record.select(SEARCH_ROW) else bench_table(record)
    head = f"benchmark of {len(record.rows)} rows, {sum(row.meets for row in record)} of which meet their goals"
    return "\n".join([head, lines, _origin(record.provenance)])


def _parity(path: Path) -> str:
    found = Parity.load(path)
    head = f"parity of plan {found.settings.get('plan')!r} in {found.settings.get('dtype')}"
    return "\n".join([head, parity_table(found), _origin(found.provenance)])


def _study(path: Path) -> str:
    found = StudyRecord.load(path)
    return "\n".join([f"study {found.name!r}", study_table(found), _origin(found.provenance)])


def _origin(origin: Provenance) -> str:
    return (
        f"made {origin.created or 'at an unknown time'} on {origin.device}, model {origin.model} ({origin.weights}), by: {origin.command}"
    )


_DESCRIPTIONS: Mapping[str, Callable[[Path], str]] = {
    PLAN_SCHEMA: _plan,
    SAMPLES_SCHEMA: _samples,
    PROFILE_SCHEMA: _profile,
    TABLE_SCHEMA: _table,
    FRONT_SCHEMA: _front,
    MEASUREMENTS_SCHEMA: _measurements,
    BENCH_SCHEMA: _bench,
    PARITY_SCHEMA: _parity,
    STUDY_SCHEMA: _study,
}
