"""The speed of a density: tokens per second, KV bytes and needles of the same plans.

Decoding is measured as in `moa-lab bench generate`: a whole model, caches of random keys and values, as many rows as fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, variance
from typing import Any

import pandas as pd
from scipy.stats import ttest_ind
from transformers import PreTrainedModel

from moa_lab.bench.endtoend import DYNAMIC, ours_name
from moa_lab.bench.generate import QUICK_BYTES, fitting_batch, measured_side
from moa_lab.bench.lab import device_name
from moa_lab.bench.prompts import our_prompt_ms, prompt_rows, transformers_prompt_ms
from moa_lab.bench.timing import COPY_BYTES, copy_rate
from moa_lab.evaluate.compare import ratio, row_of
from moa_lab.evaluate.intervals import Interval, mean, unknown
from moa_lab.evaluate.memory import memory_row
from moa_lab.pipeline import Run
from moa_lab.plan import Plan, dense_plan
from moa_lab.records import Measurement
from moa_lab.studies.plans import NEEDLES, candidates_of, chosen_plans, dense_and_uniform, equal_uniform, name_of, record_of
from moa_lab.studies.record import StudyRecord
from moa_lab.studies.scale import Scale
from moa_lab.studies.tables import scored
from moa_lab.text import has_interval, interval_text

TOKENS_PER_S = "tokens_per_s"
DECODE, DECODE_ONE, PREFILL = "decode", "decode one", "prefill"
"""Tasks of the rows of speed: tokens of all rows at the largest batch, tokens of one row alone, tokens of prompts."""

TRANSFORMERS = "transformers dense"
TIMED = (0.15, 0.25, 0.5)
"""Densities that are timed where they are among those asked for."""
REPEATS = 3
MOST_ROWS = 4096
"""With so many rows reading the KV cache dominates a step; more rows only take longer to measure."""
CPU_ROWS = 2
LEVELS = (0.95, 0.9)
"""Shares of the dense model's needles that a plan must find for its speed to be reported."""


def speed(run: Run, scale: Scale) -> StudyRecord:
    """Decoding, prefill, KV bytes and needles of dense, uniform and chosen plans at the longest profiled length."""
    length, model = max(run.lengths), run.model
    asked = [density for density in scale.densities if density in TIMED] or list(scale.densities)
    plans, left_out = chosen_plans(run, asked)
    every = [dense_plan(run.geometry)]
    for density, plan in plans.items():
        every += [plan, equal_uniform(plan, length, name_of("uniform", density))]
    rows = [*dense_and_uniform(run, plans.values(), lengths=[length], tasks=[NEEDLES])]
    rows += run.measure(list(plans.values()), lengths=[length], tasks=[NEEDLES])
    copy_bytes = copy_rate(model.device, COPY_BYTES if model.device.type == "cuda" else QUICK_BYTES)
    failed: dict[str, str] = {}
    for done, plan in enumerate((*every, replace(every[0], name=TRANSFORMERS))):
        run.progress("speed", done, len(every) + 1)
        rows += _decoded(model, plan, length, scale.new_tokens, copy_bytes, failed)
        rows.append(_prompted(model, plan, length))
        if plan.name != TRANSFORMERS:
            found = memory_row(plan, length, model.device)
            rows.append(replace(found, detail={"predicted": plan.kv_bytes(length)}))
    run.progress("speed", len(every) + 1, len(every) + 1)
    return record_of(
        run, "speed", "How much faster is a density, and what does it still find?", speed_answer(rows, length, device_name(model.device)),
        rows, densities=asked, left_out=left_out, chosen=candidates_of(plans.values()),
        failed=failed, length=length, new_tokens=scale.new_tokens, repeats=REPEATS,
        most_rows=MOST_ROWS if model.device.type == "cuda" else CPU_ROWS, copy_gb_per_s=copy_bytes / 1e9, device=device_name(model.device),
        decode="random keys and values in the caches of all sides, as in `moa-lab bench generate`",
    )  # fmt: skip


def speed_answer(rows: Sequence[Measurement], length: int, device: str) -> str:
    """Which density is fastest while it finds what the dense model finds, and how much faster it is. device: "cpu" or a GPU's name."""
    timed = {(row.plan, row.task): row for row in rows if row.metric == TOKENS_PER_S}
    if ("dense", DECODE) not in timed:
        return "The dense model could not be timed, so there is nothing to compare with."
    gains = {plan: speedup(row, timed["dense", DECODE]) for (plan, task), row in timed.items() if task == DECODE}
    searched = [plan for plan in gains if plan.startswith("moa")]
    if not searched:
        return "No density was both feasible and timed."
    dense = row_of(rows, "dense", NEEDLES, length)
    kept = {plan: ratio(row_of(rows, plan, NEEDLES, length), dense) for plan in gains if plan != TRANSFORMERS} if dense.value else {}
    best, said = _choice(gains, kept, searched, length)
    batches = f"each at its largest batch ({_batch(timed[best, DECODE])} and {_batch(timed['dense', DECODE])} rows of {length:,} tokens)"
    parts = [f"{said}, {batches}"]
    uniform = best.replace("moa", "uniform", 1)
    if uniform in gains:
        found = f" and find {kept[uniform].value:.0%} of the needles" if kept else ""
        parts.append(f"uniform spans of the same bytes decode {gains[uniform].value:.2f} times as many{found}")
    if TRANSFORMERS in gains:
        parts.append(f"transformers' own dense model {gains[TRANSFORMERS].value:.2f} times")
    sentences = ["; ".join(parts)]
    if (best, DECODE_ONE) in timed and ("dense", DECODE_ONE) in timed:
        sentences.append(_alone(timed[best, DECODE_ONE], timed["dense", DECODE_ONE], timed[best, DECODE], device))
    if device == "cpu":
        sentences.append("Times on a CPU say little about a GPU's")
    return ". ".join(sentences) + "."


def speedup(row: Measurement, against: Measurement) -> Interval:
    """Ratio of two rates, each measured several times: of geometric means, with Welch's t interval of the difference of logarithms."""
    ours, theirs = ([math.log(rate) for rate in one.detail["repeats"]] for one in (row, against))
    value = math.exp(fmean(ours) - fmean(theirs))
    n = min(len(ours), len(theirs))
    # Equal or single repeats give no variance, so no interval.
    if n < 2 or variance(ours) + variance(theirs) == 0:
        return unknown(value, n)
    ends = ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    return Interval(value, n, math.exp(ends.low), math.exp(ends.high))


def decode_table(rows: Sequence[Measurement]) -> pd.DataFrame:
    """Tokens per second of every plan, for as many rows at once as fit, for one row and for the prompt, and times the dense model's."""
    rates = {(row.plan, row.task): row for row in rows if row.metric == TOKENS_PER_S}
    columns = {"decode": "decode, all rows", "decode one": "decode, one row", "prefill": "prefill"}
    plans = dict.fromkeys(plan for plan, _ in rates)
    told = {title: {plan: f"{rates[plan, task].value:,.0f}" for plan in plans} for task, title in columns.items()}
    told["rows"] = {plan: f"{rates[plan, 'decode'].detail['batch']:,}" for plan in plans}
    told["times dense"] = {plan: scored(speedup(rates[plan, "decode"], rates["dense", "decode"])) for plan in plans if plan != "dense"}
    return pd.DataFrame(told).reindex(plans).fillna("1")


def _choice(gains: Mapping[str, Interval], kept: Mapping[str, Interval], searched: Sequence[str], length: int) -> tuple[str, str]:
    """The plan to report, and a clause on its needles and its speed."""
    fastest = max(searched, key=lambda plan: gains[plan].value)
    if not kept:
        none = f"The dense model finds no needle at {length:,} tokens, so none can be lost"
        return fastest, f"{none}; {fastest} decodes {_gain(gains[fastest])}"
    able = {level: [plan for plan in searched if kept[plan].value >= level] for level in LEVELS}
    if not able[min(LEVELS)]:
        best = max(searched, key=lambda plan: kept[plan].value)
        no = f"No density that was timed keeps {min(LEVELS):.0%} of the needles that the dense model finds at {length:,} tokens"
        return best, f"{no}; {best}, the nearest, keeps {_share(kept[best])} and decodes {_gain(gains[best])}"
    best, safest = (max(able[level], key=lambda plan: gains[plan].value, default="") for level in (min(LEVELS), max(LEVELS)))
    doubt = f" (not decided: below {min(LEVELS):.0%} lies within the interval)" if kept[best].low < min(LEVELS) else ""
    said = f"{best} finds {_share(kept[best])} of the needles that the dense model finds at {length:,} tokens{doubt}"
    if safest not in ("", best):
        said += f" ({safest}: {_share(kept[safest])}, {gains[safest].value:.2f} times as many tokens per second)"
    return best, f"{said} and decodes {_gain(gains[best])}"


def _gain(gain: Interval) -> str:
    told = interval_text(gain.low, gain.high, ".2f")
    doubt = " (not decided: 1 lies within the interval)" if gain.low <= 1 <= gain.high and has_interval(gain.low, gain.high) else ""
    return f"{gain.value:.2f} times {told} as many tokens per second{doubt}"


def _share(kept: Interval) -> str:
    return f"{kept.value:.0%} {interval_text(kept.low, kept.high, '.0%')}"


def _batch(row: Measurement) -> str:
    return f"{row.detail['batch']:,}"


def _alone(row: Measurement, dense: Measurement, full: Measurement, device: str) -> str:
    gain = speedup(row, dense)
    said = f"A single row decodes {_gain(gain)}"
    if device == "cpu":
        return said
    one, all_of_them = (1 / found.detail["over_roofline"] for found in (row, full))
    return f"{said}: reading weights and cache is {one:.0%} of such a step, and {all_of_them:.0%} of one at the largest batch"


def _decoded(
    model: PreTrainedModel, plan: Plan, length: int, new_tokens: int, copy_bytes: float, failed: dict[str, str]
) -> Iterator[Measurement]:
    """Rows of decoding at the largest batch and with one row; what did not run is noted in `failed`."""
    side = DYNAMIC if plan.name == TRANSFORMERS else ours_name(plan.name)
    fitting = fitting_batch(model, plan, side, length) if model.device.type == "cuda" else CPU_ROWS
    for task, batch in ((DECODE, min(fitting, MOST_ROWS)), (DECODE_ONE, 1)):
        found: list[dict[str, Any]] = []
        while len(found) < REPEATS:
            one = measured_side(model, plan, side, batch, length - new_tokens, new_tokens, copy_bytes)
            if "failed" in one:
                failed[f"{plan.name}, {task}"] = one["failed"]
                break
            # A batch that did not fit was made smaller: all repeats must have the same size.
            found, batch = [*(other for other in found if other["batch"] == one["batch"]), one], one["batch"]
        else:
            told: dict[str, Any] = {
                key: found[0][key] for key in ("batch", "kept_bytes", "roofline_ms", "allocated_bytes", "captured") if key in found[0]
            }
            ms = fmean(one["ms"] for one in found)
            told |= {"ms": ms, "over_roofline": ms / told["roofline_ms"], "fitting": fitting}
            yield _rates(plan, task, length, [one["rate"] for one in found], told)


def _prompted(model: PreTrainedModel, plan: Plan, length: int) -> Measurement:
    rows = prompt_rows(length) if model.device.type == "cuda" else 1
    if plan.name == TRANSFORMERS:
        ms = transformers_prompt_ms(model, rows, length, REPEATS)
    else:
        ms = our_prompt_ms(model, plan, rows, length, REPEATS)
    return _rates(plan, PREFILL, length, [rows * length / one * 1e3 for one in ms], {"batch": rows, "ms": fmean(ms)})


def _rates(plan: Plan, task: str, length: int, rates: Sequence[float], detail: Mapping[str, Any]) -> Measurement:
    # Of logarithms, as times vary in proportion: an interval of rates themselves may reach below 0.
    found = mean([math.log(rate) for rate in rates]).mapped(math.exp)
    return Measurement(plan.name, TOKENS_PER_S, task, length, *found, plan.density(length), {**detail, "repeats": list(rates)})
