"""Export: the chosen plan as files that others read, each read back at once."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

from moa_lab.plan import Plan
from moa_lab.storage import write_json, write_text

FORMATS = {
    "config card": ".json", "published {alphas, betas}": ".published.json", "spans as CSV": ".csv", "Python snippet": ".py",
}  # fmt: skip


def export(plan: Plan, folder: str | Path, name: str, formats: tuple[str, ...], n_tokens: int, *, replace: bool = False) -> list[Path]:
    """Write `plan` to `folder` in each of `formats` (of `FORMATS`), named `name`; returns the paths, in that order.

    Every file that holds the whole plan is read back and compared. Raises FileExistsError, before anything is written, where a file is
    there and not to be replaced; ValueError for an unknown format, a name that is no file name, and a plan that a format cannot say.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise ValueError(f"formats must be among {', '.join(FORMATS)}, got {', '.join(unknown) or 'none'}")
    if not name or name in (".", "..") or Path(name).name != name or "\\" in name:
        raise ValueError(f"{name!r} is no file name")
    paths = {kind: Path(folder) / f"{name}{FORMATS[kind]}" for kind in FORMATS if kind in formats}
    present = [str(path) for path in paths.values() if path.exists()]
    if present and not replace:
        raise FileExistsError(f"{', '.join(present)} exists: allow replacing it, or choose another name")
    named = plan.renamed(name)
    if "published {alphas, betas}" in formats:
        named.to_published()
    Path(folder).mkdir(parents=True, exist_ok=True)
    for kind, path in paths.items():
        _WRITERS[kind](named, path, n_tokens)
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
    """Every head's rule and its span at `n_tokens`."""
    spans, text = plan.spans(n_tokens), io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["layer", "kv_head", "alpha_tokens", "beta", f"span_tokens_at_{n_tokens}", "share_of_n"])
    for layer, row in enumerate(plan.rules):
        for head, rule in enumerate(row):
            rows.writerow([layer, head, rule.alpha, rule.beta, int(spans[layer, head]), round(float(spans[layer, head]) / n_tokens, 6)])
    return text.getvalue()


def _card(plan: Plan, path: Path, _: int) -> None:
    plan.save(path)
    if Plan.load(path).identity() != plan.identity():
        raise ValueError(f"{path}: what was written is not what was read back")


def _published(plan: Plan, path: Path, _: int) -> None:
    write_json(path, plan.to_published())
    if Plan.from_published(path, plan.geometry).rules != plan.rules:
        raise ValueError(f"{path}: the published format does not give back this plan's rules")


def _csv(plan: Plan, path: Path, n_tokens: int) -> None:
    write_text(path, spans_csv(plan, n_tokens))


def _snippet(plan: Plan, path: Path, _: int) -> None:
    write_text(path, snippet(plan, path.with_suffix(".json")))


_WRITERS: dict[str, Callable[[Plan, Path, int], None]] = {
    "config card": _card, "published {alphas, betas}": _published, "spans as CSV": _csv, "Python snippet": _snippet,
}  # fmt: skip
