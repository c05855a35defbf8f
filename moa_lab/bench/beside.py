"""Speeds of one session beside what plans keep: a benchmark knows tokens/s of each mix of bits and share of the cache, runs know quality.

Both were measured apart, speed on the geometry of a large model and quality on models that are small enough to search, and meet by the
bits and by the share of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_lab.bench.record import BENCH_SCHEMA, BenchRecord, BenchRow
from moa_lab.bench.serving import SERVING_SCHEMA
from moa_lab.evaluate.compare import excess_perplexity, row_of, share_of_hits
from moa_lab.plan import UNTOUCHED, Plan, bits_of, read_mix, token_price
from moa_lab.records import Measurement, Measurements
from moa_lab.records.intervals import Interval, unknown
from moa_lab.storage import RecordError, read_json, schema_of
from moa_lab.storage.json_text import short

PEERS = {"vLLM-bf16": "vLLM bf16", "vLLM-fp8": "vLLM fp8"}
ALIKE = 0.1
"""How far apart, as a share of it, the bytes of a speed and of a plan may be that stand beside each other."""


@dataclass(frozen=True)
class Speed:
    """Decoded tokens/s of a batch as large as fits. bits: as `bits_of` has them; share: of the bytes of the dense cache in 16 bits."""

    bits: str
    share: float
    rate: float
    batch: int | None = None


@dataclass(frozen=True)
class Session:
    """Speeds on one device at one prompt. peers: tokens/s by name; the dense model there, in bits of their own."""

    model: str
    device: str
    prompt: int
    speeds: tuple[Speed, ...]
    peers: Mapping[str, float]


@dataclass(frozen=True)
class Kept:
    """What a run's plan keeps at a length, with 95% intervals: needles as a share of the dense model's, and how far the perplexity of
    documents is above its. bits, share: as in `Speed`."""

    model: str
    bits: str
    share: float
    length: int
    needles: Interval
    documents: Interval


def session_of(path: Path, prompt: int | None = None) -> Session:
    """The speeds in a record of `moa-lab bench generate` or `moa-lab bench serving`, at one prompt (None: the shortest).

    Raises RecordError for another file, ValueError where nothing was measured, or not at that prompt.
    """
    schema = schema_of(path)
    if schema not in (BENCH_SCHEMA, SERVING_SCHEMA):
        raise RecordError(f"{path}: speeds are read from {BENCH_SCHEMA} or {SERVING_SCHEMA}, this is {schema}")
    try:
        found = _generated(BenchRecord.load(path)) if schema == BENCH_SCHEMA else _served(read_json(path, SERVING_SCHEMA))
    except (LookupError, TypeError, AttributeError) as error:
        # Shapes, settings and a server's rows are free: nobody has checked them.
        raise RecordError(f"{path}: {schema} lacks or garbles {short(error, 120)}") from error
    if not found or prompt not in (None, *found):
        at = "" if prompt is None else f" at {prompt:,} tokens"
        raise ValueError(f"{path}: no plan's tokens/s were measured{at}; it has prompts of {', '.join(map(str, found)) or 'none'}")
    return found[min(found) if prompt is None else prompt]


def kept_of(folder: Path, length: int) -> Kept:
    """What the plan of a run's folder keeps on its test samples (plan.json and measurements.json).

    Without pairs of samples needles have a wider interval and documents an unknown one. Raises RecordError for broken records, ValueError
    where needles or documents were not measured at that length.
    """
    plan, measured = Plan.load(folder / "plan.json"), Measurements.load(folder / "measurements.json")
    try:
        (needles, documents), dense = (
            [row_of(measured, name, task, length) for task in ("needles", "documents")] for name in (plan.name, "dense")
        )
    except KeyError as error:
        raise ValueError(f"{folder}: {error.args[0]}") from None
    model = Path(measured.provenance.model or "unknown").name.removesuffix(".gguf")
    return Kept(model, bits_of(plan), plan.density(length), length, share_of_hits(needles, dense[0]), _excess(documents, dense[1]))


def beside(session: Session, kept: Iterable[Kept]) -> tuple[list[tuple[Speed, Kept]], list[Kept]]:
    """Every plan with the speed of the nearest bytes in its bits, and those that no speed within `ALIKE` was measured for."""
    found, alone = [], []
    for one in kept:
        near = [speed for speed in session.speeds if speed.bits == one.bits and abs(speed.share - one.share) <= ALIKE * one.share]
        if near:
            found.append((min(near, key=lambda speed: abs(speed.share - one.share)), one))
        else:
            alone.append(one)
    return found, alone


def _excess(row: Measurement, dense: Measurement) -> Interval:
    if "per_sample" in row.detail and "per_sample" in dense.detail:
        return excess_perplexity(row, dense)
    return unknown(row.value - dense.value, row.n).mapped(math.expm1)


def _generated(record: BenchRecord) -> dict[int, Session]:
    """By prompt; of several measurements of a side the fastest."""
    told = {(entry["peer"], entry["prompt"]): entry["rate"] for entry in record.settings.get("told", ())}
    fastest: dict[int, dict[tuple[str, float], Speed]] = {}
    model = ""
    for row in record:
        if row.unit == "tokens/s" and "plan" in row.shape:
            model = model or row.shape["model"]
            prompt = row.shape["n_tokens"] - record.settings["new_tokens"]
            for speed in _speeds(row) if row.shape["model"] == model else ():
                known = fastest.setdefault(prompt, {})
                before = known.get((speed.bits, speed.share))
                known[speed.bits, speed.share] = max(filter(None, (before, speed)), key=lambda one: one.rate)
    device = record.settings.get("device", "unknown device")
    return {
        prompt: Session(
            model, device, prompt, tuple(known.values()),
            {shown: told[peer, prompt] for peer, shown in PEERS.items() if (peer, prompt) in told},
        )
        for prompt, known in fastest.items()
    }  # fmt: skip


def _speeds(row: BenchRow) -> list[Speed]:
    """Ours, and the same plan in 16 bits beside it."""
    shape = row.shape
    bits = str(shape.get("bits", UNTOUCHED))
    # Earlier records tell the share of tokens alone.
    share = shape["bytes"] if "bytes" in shape else shape["density"] * token_price(read_mix(bits), shape["head_dim"])
    found = [Speed(bits, share, row.ours, shape["batch"])]
    for peer, other in row.detail.get("peers", {}).items():
        if bits != str(UNTOUCHED) and peer.startswith("ours ") and peer != "ours dense" and "rate" in other:
            found.append(Speed(str(UNTOUCHED), shape["density"], other["rate"], other.get("batch")))
    return found


def _served(record: dict[str, Any]) -> dict[int, Session]:
    """By prompt; a server's plans store 16 bits."""
    rows = [row for row in record["rows"] if "rate" in row]
    return {
        prompt: Session(
            record["model"], record["device"], prompt,
            tuple(
                Speed(str(UNTOUCHED), row["density"], row["rate"], row["batch"])
                for row in rows if row["prompt"] == prompt and "density" in row
            ),
            {PEERS[row["side"]]: row["rate"] for row in rows if row["prompt"] == prompt and row["side"] in PEERS},
        )
        for prompt in sorted({row["prompt"] for row in rows if "density" in row})
    }  # fmt: skip
