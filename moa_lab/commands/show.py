"""One paragraph about any record, for `moa-lab show`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moa_lab.bench.compiled import COMPILED_SCHEMA, chips_table
from moa_lab.bench.engine import ENGINE_SCHEMA
from moa_lab.bench.record import BENCH_SCHEMA, BenchRecord
from moa_lab.bench.record import table as bench_table
from moa_lab.bench.search import ROW as SEARCH_ROW
from moa_lab.bench.search import search_table
from moa_lab.bench.serving import SERVING_SCHEMA, serving_table
from moa_lab.calibration.samples import SAMPLES_SCHEMA, SampleSet
from moa_lab.evaluate.parity import PARITY_SCHEMA, Parity
from moa_lab.evaluate.parity import table as parity_table
from moa_lab.evaluate.summary import table as summary_table
from moa_lab.geometry import MAX_TOKENS
from moa_lab.plan import PLAN_SCHEMA, PLAN_WITH_BITS_SCHEMA, Plan
from moa_lab.plan.rules import MIN_SPAN, PUBLISHED_MULTIPLE, Rules, is_published, published_rules
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
    candidates,
)
from moa_lab.storage import RecordError, parse, read_description, read_json, read_plain, schema_of
from moa_lab.storage.json_text import short
from moa_lab.studies import StudyRecord
from moa_lab.studies import table as study_table
from moa_lab.studies.record import STUDY_SCHEMA
from moa_lab.text import aligned, interval_text

PUBLISHED = "alphas and betas"
"""What `kind_of` calls the authors' files, which name no schema."""
PUBLISHED_LENGTHS = (2048, 4096, 8192, 16384)


SUMMARY = "summary of a run"
"""What `kind_of` calls the summary.json of a run, which names no schema either."""


def record_of(path: Path) -> Path:
    """The record that stands for a folder: a run's summary, or its plan while there is none; the card of a shared plan."""
    found = (path / name for name in ("summary.json", "plan.json") if path.is_dir())
    return next((one for one in found if one.is_file()), path)


def kind_of(path: Path) -> str:
    """The schema of a record, PUBLISHED or SUMMARY. Raises RecordError for another file."""
    data = read_description(path)
    if isinstance(data, dict) and "schema" not in data and {"plans", "n_tokens"} <= set(data):
        return SUMMARY
    return PUBLISHED if is_published(data) else schema_of(path)


def describe(path: Path, schema: str) -> str:
    """Describe the record at `path`; raises RecordError for a schema that is not ours, and for what cannot be shown."""
    if schema not in _DESCRIPTIONS:
        raise RecordError(f"{path}: {short(schema)} is none of {', '.join(_DESCRIPTIONS)}")
    try:
        return _printable(_DESCRIPTIONS[schema](path))
    except RecordError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        # What a benchmark tells of its shapes, for instance, is free: nobody has checked it before it is printed.
        raise RecordError(f"{path}: {schema} lacks or garbles {short(error, 120)}") from error


def _printable(text: str) -> str:
    """`text` with control characters escaped: a name in a file must not steer the terminal that shows it."""
    lines = text.split("\n")
    return "\n".join("".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line) for line in lines)


def _plan(path: Path) -> str:
    plan = Plan.load(path)
    lengths = dict.fromkeys(plan.lengths) or (plan.geometry.max_length,)
    lines = [f"plan {plan.name!r} for {plan.geometry}", f"sink {plan.sink_tokens}, min span {plan.min_span}"]
    lines += [
        f"at {n} tokens: density {plan.density(n):.1%}, KV {plan.kv_bytes(n) / 2**20:.1f} MiB at 2 bytes (predicted)" for n in lengths
    ]
    return "\n".join([*lines, *_counted(plan.rules), *plan.stored_text(), *_scores(plan.scores), _origin(plan.provenance)])


def _published(path: Path) -> str:
    rules = published_rules(path)
    heads = sorted({len(row) for row in rules})
    if len(heads) > 1:
        raise RecordError(f"{path}: {len(rules)} layers of {heads} heads; all layers of a model have as many")
    lines = [f"one of the authors' plans: {len(rules)} layers of {heads[0]} heads, for a model that the file does not name"]
    for n in PUBLISHED_LENGTHS:
        spans = [rule.span_tokens(n, MIN_SPAN, PUBLISHED_MULTIPLE) for row in rules for rule in row]
        lines.append(f"at {n} tokens: heads keep {sum(spans) / len(spans) / n:.1%} on average")
    return "\n".join([*lines, *_counted(rules), "for your model: moa_lab.Plan.from_published(path, geometry), then .save(card)"])


def _summary(path: Path) -> str:
    data = read_plain(path)
    return "\n".join([summary_table(data), _origin(parse(Provenance, data["provenance"], path))])


def _counted(rules: Rules) -> list[str]:
    counts = Counter(f"{rule.alpha:g} + {rule.beta:g} N" for row in rules for rule in row)
    return [f"{count} heads: span = {rule}" for rule, count in counts.most_common()]


def _scores(scores: Mapping[str, Any]) -> list[str]:
    """A line for every score; a card's owner may have written one in any form, for instance as a number alone."""
    lines = []
    for name, score in scores.items():
        if isinstance(score, dict) and _is_score(score):
            lines.append(f"{short(name)}: {score['value']:.3f} {interval_text(score['low'], score['high'])} (n = {score['n']})")
        else:
            lines.append(f"{short(name)}: {short(score, 120)} (as the card has it, without interval or n)")
    return lines


def _is_score(score: Mapping[str, Any]) -> bool:
    """Whether value, low, high and n can be those of a measurement; ends that are null are of an interval that is not known."""
    value, low, high, n = (score.get(part) for part in ("value", "low", "high", "n"))
    ends = [end for end in (low, high) if end is not None]
    if not {"value", "low", "high"} <= set(score) or not all(type(number) in (int, float) for number in (value, *ends)):
        return False
    return type(n) is int and 1 <= n <= MAX_TOKENS and (len(ends) < 2 or ends[0] <= ends[1]) and abs(value or 0) <= MAX_TOKENS


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
        f"{row.plan}: {row.metric} {row.task}@{row.length} {row.value:.3f} {interval_text(row.low, row.high)} (n = {row.n})"
        for row in found
    ]
    return "\n".join([f"{len(found.rows)} measurements", *lines, *_candidates(found, path), _origin(found.provenance)])


def _candidates(found: Measurements, path: Path) -> list[str]:
    """A validation's candidates as a table, the best first; empty for other measurements."""
    rows = [
        [one.name, one.kind, f"{one.score:.3f}", f"{one.facts:.1%}", _nats(one.needles), _nats(one.words), "chosen" if one.chosen else ""]
        for one in candidates(found, path)
    ]
    head = ["candidate", "kind", "score", "facts lost", "needles lost (nats)", "words lost (nats)", ""]
    note = f"{len(rows)} candidates, the least score first; losses are against the dense model, nats per answer token"
    return [note, *aligned([head, *rows])] if rows else []


def _nats(lost: float | None) -> str:
    return "-" if lost is None else f"{lost:.4f}"


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


def _engine(path: Path) -> str:
    data = read_json(path, ENGINE_SCHEMA)
    lines = [f"{data['peer']} on {data['device']}: {data['model']}, vllm {data['vllm']}, a cache of {data['cache_tokens']:,} tokens"]
    lines += [
        f"prompts of {row['prompt']:,}: {row['batch']} at once, {row['rate']:,.0f} tokens/s ({row['ms']:.1f} ms a step), "
        f"prefill {row['prefill_rate']:,.0f} tokens/s"
        for row in data["rows"]
    ]
    return "\n".join([*lines, _origin(parse(Provenance, data["provenance"], path))])


def _serving(path: Path) -> str:
    data = read_json(path, SERVING_SCHEMA)
    # Where every side failed, nothing is known of the session.
    head = f"{data['model']} on {data['device']}, vllm {data['vllm']}" if "model" in data else "no side was measured"
    return "\n".join([head, serving_table(data)])


def _compiled(path: Path) -> str:
    chips = [
        {name: str(told) for name, told in row.items() if name not in ("run on", "spill here alone", "bytes")}
        for row in chips_table(path, ())
    ]
    lines = aligned([list(chips[0]), *(list(row.values()) for row in chips)]) if chips else []
    return "\n".join(["what kernels take where they were compiled, at most", *lines])


def _study(path: Path) -> str:
    found = StudyRecord.load(path)
    return "\n".join([f"study {found.name!r}", study_table(found), _origin(found.provenance)])


def _origin(origin: Provenance) -> str:
    return (
        f"made {origin.created or 'at an unknown time'} on {origin.device}, model {origin.model} ({origin.weights}), by: {origin.command}"
    )


_DESCRIPTIONS: Mapping[str, Callable[[Path], str]] = {
    PLAN_SCHEMA: _plan,
    PLAN_WITH_BITS_SCHEMA: _plan,
    PUBLISHED: _published,
    SUMMARY: _summary,
    SAMPLES_SCHEMA: _samples,
    PROFILE_SCHEMA: _profile,
    TABLE_SCHEMA: _table,
    FRONT_SCHEMA: _front,
    MEASUREMENTS_SCHEMA: _measurements,
    BENCH_SCHEMA: _bench,
    ENGINE_SCHEMA: _engine,
    SERVING_SCHEMA: _serving,
    COMPILED_SCHEMA: _compiled,
    PARITY_SCHEMA: _parity,
    STUDY_SCHEMA: _study,
}
