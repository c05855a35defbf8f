"""Export: the chosen plan as files that others read, each read back at once, a report about it, and a page of the whole desk."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moa_lab.plan import BITS_FIELDS, Plan, uniform_plan
from moa_lab.records import Front, InfluenceProfile, Measurement, Measurements
from moa_lab.report import build_report
from moa_lab.report.desk import DeskRecords, desk_page
from moa_lab.storage import write_json, write_text

FORMATS = {
    "config card": ".json", "published {alphas, betas}": ".published.json", "spans as CSV": ".csv", "Python snippet": ".py",
    "HTML report": ".html", "desk page": ".desk.html",
}  # fmt: skip
Progress = Callable[[int, int], object]
PLAN = "plan"
"""Key in a measured row's detail: the identity of its plan, since names are not unique."""
SAME_DENSITY = 0.02
"""Largest difference in density for a uniform plan to be a baseline."""


@dataclass(frozen=True)
class Sources:
    """Records for a report, beside its plan. n_tokens: the length at which spans are given. desk: what a desk page shows beside the plan
    and its scores; None: the profile and the front.
    """

    n_tokens: int
    profile: InfluenceProfile | None = None
    front: Front | None = None
    measurements: Measurements | None = None
    validation: Measurements | None = None
    desk: DeskRecords | None = None


def export(
    plan: Plan,
    folder: str | Path,
    name: str,
    formats: tuple[str, ...],
    sources: Sources | int,
    *,
    replace: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[Path]:
    """Write `plan` to `folder` in each of `formats` (of `FORMATS`), named `name`; returns the paths, in the order of `FORMATS`.

    A Python snippet comes with the config card that it loads. sources: records for a report, or the length in tokens alone. Every file
    that holds the whole plan is read back and compared; a report and a desk page must be complete, hold the plan's identity and load
    nothing from the network. progress: called with the steps done, and all of them, before each; what it raises ends the work, and files
    that were written before stay. Raises FileExistsError, before anything is written, where a file exists and `replace` is False;
    ValueError for an unknown format, a name that is no file name, a folder that is none, and a plan that a format or a record does not fit.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise ValueError(f"choose at least one of {', '.join(FORMATS)}; got {', '.join(unknown) or 'none'}")
    if not name or name in (".", "..") or Path(name).name != name or "\\" in name:
        raise ValueError(f"{name!r} is no file name: the files need one, without slashes")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"{folder} is a file: name a folder")
    if "Python snippet" in formats:
        formats = (*formats, "config card")
    paths = {kind: Path(folder) / f"{name}{FORMATS[kind]}" for kind in FORMATS if kind in formats}
    present = [str(path) for path in paths.values() if path.exists()]
    if present and not replace:
        raise FileExistsError(f"{', '.join(present)} exists: allow replacing it, or choose another name")
    named = plan.renamed(name)
    found = Sources(sources) if isinstance(sources, int) else sources
    if "published {alphas, betas}" in formats:
        named.to_published()
    if {"HTML report", "desk page"} & set(formats):
        for record in (found.profile, *(point.plan for point in found.front or ())):
            if record is not None:
                named.check_model(record.geometry)
    Path(folder).mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[Plan, Path, Sources], None]] = {**_WRITERS, "desk page": partial(_desk_page, progress=progress)}
    for done, (kind, path) in enumerate(paths.items()):
        progress(done, len(paths))
        writers[kind](named, path, found)
    return list(paths.values())


def snippet(plan: Plan, path: Path) -> str:
    """Python that applies the config card at `path`."""
    return f'''"""Generate under the plan {plan.name!r}."""

import moa_lab as ml

model, tokenizer = ml.load_model({plan.provenance.model or "smollm2"!r})
plan = ml.Plan.load({path.name!r})
answer = ml.generate(model, tokenizer, ["Once upon a time"], plan=plan, max_new_tokens=64)
print(answer.texts[0])
print(f"{{answer.kv_bytes_allocated / 2**20:.1f}} MiB of keys and values")
'''


def spans_csv(plan: Plan, n_tokens: int) -> str:
    """Every head's rule and its span at `n_tokens`; and its bits of K and V, where some are stored in fewer than the model's own."""
    spans, text = plan.spans(n_tokens), io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(
        ["layer", "kv_head", "alpha_tokens", "beta", f"span_tokens_at_{n_tokens}", "share_of_n", *(BITS_FIELDS if plan.bits else ())]
    )
    for layer, row in enumerate(plan.rules):
        for head, rule in enumerate(row):
            kept, bits = int(spans[layer, head]), plan.bits[layer][head] if plan.bits else ()
            rows.writerow([layer, head, rule.alpha, rule.beta, kept, round(kept / n_tokens, 6), *bits])
    return text.getvalue()


def known_of(plan: Plan, measurements: Measurements | None) -> Measurements:
    """Measurements of `plan` (found by its identity), under its name, and of the dense plan and a uniform one of its density.

    Of a score that was measured twice, the last one counts.
    """
    if measurements is None:
        return Measurements(())
    identity = plan.identity()
    kept: dict[tuple[str, str, str, int], Measurement] = {}
    for row in measurements:
        own = row.detail.get(PLAN) == identity
        uniform = row.plan == "uniform" and abs(row.density - plan.density(row.length)) <= SAME_DENSITY
        if own or uniform or row.plan == "dense":
            name = plan.name if own else row.plan
            kept[name, row.metric, row.task, row.length] = dataclasses.replace(row, plan=name)
    return dataclasses.replace(measurements, rows=tuple(kept.values()))


def _card(plan: Plan, path: Path, _: Sources) -> None:
    plan.save(path)
    if Plan.load(path).identity() != plan.identity():
        raise ValueError(f"{path}: what was written is not what was read back")


def _published(plan: Plan, path: Path, _: Sources) -> None:
    write_json(path, plan.to_published())
    if Plan.from_published(path, plan.geometry).rules != plan.rules:
        raise ValueError(f"{path}: the published format does not give back this plan's rules")


def _csv(plan: Plan, path: Path, sources: Sources) -> None:
    write_text(path, spans_csv(plan, sources.n_tokens))


def _snippet(plan: Plan, path: Path, _: Sources) -> None:
    write_text(path, snippet(plan, path.with_suffix(".json")))


def _report(plan: Plan, path: Path, sources: Sources) -> None:
    known = known_of(plan, sources.measurements)
    rivals = [uniform_plan(plan.geometry, row.density, (row.length,)) for row in known.select(plan="uniform")[:1]]
    title = f"Mixture of attention spans: {plan.name}"
    text = build_report(plan, sources.profile, sources.front, known, title=title, baselines=rivals, validation=sources.validation)
    _write_page(plan, path, text)


def _desk_page(plan: Plan, path: Path, sources: Sources, progress: Progress) -> None:
    desk = sources.desk or DeskRecords(sources.profile, None, sources.front)
    rows = known_of(plan, sources.measurements).select(plan=plan.name)
    text = desk_page(dataclasses.replace(desk, plan=plan, rows=rows), f"Mixture of attention spans: {plan.name}", progress=progress)
    _write_page(plan, path, text)


def _write_page(plan: Plan, path: Path, text: str) -> None:
    write_text(path, text)
    read = path.read_text(encoding="utf-8")
    if read != text or plan.identity() not in read:
        raise ValueError(f"{path}: what was written is not what was read back")
    fetched = re.search(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?!data:)[^\"]*\"", read)
    if fetched:
        raise ValueError(f"{path}: the page is not self-contained: {fetched[0]}")


_WRITERS: dict[str, Callable[[Plan, Path, Sources], None]] = {
    "config card": _card, "published {alphas, betas}": _published, "spans as CSV": _csv, "Python snippet": _snippet,
    "HTML report": _report,
}  # fmt: skip
