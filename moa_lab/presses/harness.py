"""All presses on the same questions: contexts read and compressed without the question, then the question answered greedily."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan, named_apart
from moa_lab.presses.attention import SpanMask, attending, without_masked_keys
from moa_lab.presses.footprint import read_densely, read_in_spans, spans_after_reading
from moa_lab.presses.kvpress_presses import BasePress, KVPressTextGenerationPipeline, Presses, SpanPress
from moa_lab.presses.methods import DENSE, METHODS, SPANS, SPANS_AFTER, Needs
from moa_lab.presses.questions import Question, QuestionSet, identity
from moa_lab.presses.tables import METRIC
from moa_lab.provenance import provenance
from moa_lab.records import Measurement, Measurements
from moa_lab.records.intervals import proportion
from moa_lab.shipped import data_folder

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Side:
    """A row's worth of work. press: for one question; None for the dense model. footprint: of a question, and the
    share of its tokens that was held at the end. plan: its identity."""

    name: str
    needs: Needs
    press: Callable[[Question], BasePress | None]
    footprint: Callable[[Question, float], float]
    plan: str | None = None


def run_presses(
    folder: Path, keeps: Sequence[float], plans: Iterable[Plan], out: Path, methods: Sequence[str] = tuple(METHODS),
    first: int | None = None, progress: Progress | None = None,
) -> Measurements:  # fmt: skip
    """Measure the dense model, `methods` at every share of `keeps`, and `plans`, on the questions of a folder that `prepare` left.

    first: questions of each length at most. out: written after every row; rows that it has are not measured again. A method that cannot
    keep so little is left out, with the reason in the record's settings. Raises ValueError for a plan of another model, and for a
    record of another, and for plans that `moa_lab.plan.named_apart` does not tell apart.
    """
    questions = QuestionSet.load(folder / "questions.json")
    model, pipeline = _loaded(folder / "model")
    plans = named_apart(list(plans))
    for plan in plans:
        plan.check_model(ModelGeometry.from_config(model.config), questions.provenance.weights)
        plan.check_untouched("the harness of presses")
        if any(plan.geometry.layer_windows):
            raise ValueError(f"plan {plan.name!r}: layers with a window of their own are not masked here")
    texts = [path.read_text(encoding="utf-8") for path in sorted((data_folder("texts") / "calibration").glob("*.txt"))]
    presses = Presses(model, pipeline, texts)
    record = _begun(out, questions, model)
    for (task, length), group in questions.groups(first).items():
        for side in _sides(presses, keeps, plans, methods):
            known = record.select(plan=side.name, task=task, length=length)
            if any((row.detail["samples"], row.detail["plan"]) != (identity(group), side.plan) for row in known):
                raise ValueError(f"{out}: {side.name!r} at {length} tokens is of other questions or of another plan; name another file")
            if known:
                continue
            try:
                row = _measured(model, pipeline, side, task, length, group, progress)
            except ValueError as error:
                record.settings["left_out"][f"{side.name} at {length} tokens"] = str(error)
            else:
                record = record.plus([row])
            record.save(out)
    return record


def _sides(presses: Presses, keeps: Sequence[float], plans: Sequence[Plan], methods: Sequence[str]) -> list[Side]:
    def press_side(name: str, keep: float) -> Side:
        method = METHODS[name]
        return Side(
            f"{name}-{100 * keep:g}", method.needs, lambda q: presses.press(name, keep, q),
            lambda q, share: method.footprint(len(q.context), q.asked_tokens, share * (q.length - 1) - (q.asked_tokens - 1)),
        )  # fmt: skip

    def plan_side(plan: Plan, reads_densely: bool) -> Side:
        footprint = spans_after_reading if reads_densely else read_in_spans
        return Side(
            f"{plan.name} after reading" if reads_densely else plan.name, SPANS_AFTER if reads_densely else SPANS,
            lambda q: SpanPress(SpanMask(plan, q.length, reads_densely)),
            lambda q, _: footprint(len(q.context), q.asked_tokens, plan.spans(q.length).ravel()), plan.identity(),
        )  # fmt: skip

    dense = Side("dense", DENSE, lambda q: None, lambda q, _: read_densely(len(q.context), q.asked_tokens, len(q.context)))
    ours = [plan_side(plan, reads_densely) for plan in plans for reads_densely in (False, True)]
    return [dense, *ours, *(press_side(name, keep) for keep in keeps for name in methods)]


@torch.inference_mode()
def _measured(
    model: PreTrainedModel, pipeline: KVPressTextGenerationPipeline, side: Side, task: str, length: int, group: Sequence[Question],
    progress: Progress | None,
) -> Measurement:  # fmt: skip
    hits, held = [], []
    for done, question in enumerate(group):
        press = side.press(question)
        cache = DynamicCache()
        with attending(model, without_masked_keys, "moa_lab_masked"):
            said = pipeline.forward(
                {"context_ids": torch.tensor([question.context]), "questions_ids": [torch.tensor([question.question])]},
                press=press, max_new_tokens=len(question.answer), cache=cache,
            )  # fmt: skip
        hits.append(int(said[0].strip() == question.text))
        held.append(_held(model, cache, press, question))
        if progress is not None:
            progress(f"{side.name} at {length}", done + 1, len(group))
    detail = {
        "per_sample": hits,
        "samples": identity(group),
        "plan": side.plan,
        "needs": asdict(side.needs),
        "footprint": sum(map(side.footprint, group, held)) / len(group),
    }
    return Measurement(side.name, METRIC, task, length, *proportion(sum(hits), len(hits)), sum(held) / len(held), detail)


def _held(model: PreTrainedModel, cache: DynamicCache, press: BasePress | None, question: Question) -> float:
    """Share of the keys before the answer's last token that its query could still see, counted and not predicted.

    The cache holds what is left of the context: the pipeline takes question and answer out again.
    """
    before = question.length - 1
    layers: Any = cache.layers
    heads = sum(layer.keys.shape[1] for layer in layers)
    if isinstance(press, SpanPress):
        kept = sum(int(count) for count in press.spans.held.values())
    else:
        masked = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
        dropped = sum(len(indices[0]) for indices in masked if indices is not None)
        kept = sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in layers) - dropped
        kept += heads * (before - len(question.context))
    return kept / (heads * before)


def _loaded(folder: Path) -> tuple[PreTrainedModel, KVPressTextGenerationPipeline]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Presses find the tokenizer by the model's name.
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", attn_implementation="sdpa")
    torch.nn.Module.to(model, device).eval().requires_grad_(False)
    return model, KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer, device=device)


def _begun(out: Path, questions: QuestionSet, model: PreTrainedModel) -> Measurements:
    """The record at `out`, or an empty one. Raises ValueError for a record of other questions or another model."""
    asked = questions.provenance
    if out.exists():
        found = Measurements.load(out)
        if (found.provenance.weights, found.provenance.tokenizer) != (asked.weights, asked.tokenizer):
            raise ValueError(f"{out} was measured on {found.provenance.model}, these questions are for {asked.model}; name another file")
        return found
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
    origin = provenance(asked.model, asked.weights, asked.tokenizer, seed=asked.seed, device=device)
    settings: dict[str, Any] = {"dtype": str(model.dtype).removeprefix("torch."), "kvpress": version("kvpress"), "left_out": {}}
    return Measurements((), settings, origin)
