"""The paper's calibration ablation (arXiv 2406.14909, sec. 5.4): supervision, tasks, number of samples, lengths.

Every plan is solved from a profile alone, without validation: in the paper's way (sum of lost influence of single values) and in ours.
Supervisions are compared on the same source files, which hold a summary by a human: the human's answers, the model's answers to the
same prompts, and plain text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from moa_lab.calibration import Request, SampleSet, calibrate
from moa_lab.calibration.answers import fill_greedily
from moa_lab.calibration.dataset import end_tokens
from moa_lab.calibration.domains import domain_documents, enough_documents
from moa_lab.calibration.prompts import encode
from moa_lab.calibration.samples import Sample, group_by_shape
from moa_lab.calibration.tasks import HumanAnswers, PlainText
from moa_lab.models import weights_fingerprint
from moa_lab.pipeline import Run
from moa_lab.plan import Plan, SpanRule
from moa_lab.profiling import profile
from moa_lab.profiling.subset import profile_part
from moa_lab.records import InfluenceProfile
from moa_lab.search import InfeasibleError, limit_lengths, loss_table, paper_goals, rule_grid
from moa_lab.storage import is_intact
from moa_lab.studies.calibrating.answer import HUMAN, LONG_RANGE, MODEL, PAPER, PUBLISHED, TEXT, WHOLE_TEXT, calibration_answer, compared
from moa_lab.studies.plans import DOCUMENTS, NEEDLES, SUMMARIES, dense_and_uniform, name_of, record_of, solved_plan
from moa_lab.studies.record import StudyRecord
from moa_lab.studies.scale import Scale

QUESTION = "Whose words, which tasks and how much of them must a model be profiled on: is the paper's calibration ablation reproduced?"
ANSWER_TOKENS = 96
CHARACTERS_PER_TOKEN = 32
"""Characters of source files per token of the samples: many files, so that each sample has one of its own."""
TASKS = (NEEDLES, DOCUMENTS, SUMMARIES)


@dataclass(frozen=True)
class Variant:
    """One way to calibrate. paper: also solved in the paper's way."""

    profile: InfluenceProfile
    paper: bool = False


def calibration(run: Run, scale: Scale) -> StudyRecord:
    """Plans of every variant at `scale.density`, on the run's test needles, documents and own answers at its profiled lengths."""
    base = run.profile()
    supervised = supervised_samples(run)
    folder = run.folder / "calibration"
    found = profile(run.model, supervised, parts_dir=folder / "profile", progress=partial(run.progress, "profile supervision"))
    variants = {**task_variants(base, scale.samples), **supervision_variants(found)}
    plans, left_out = variant_plans(variants, rule_grid(run.lengths), dict.fromkeys(limit_lengths(run.table()), scale.density))
    rows = run.measure(plans, lengths=run.lengths, tasks=TASKS)
    if plans:
        kept = replace(plans[0], name=name_of("moa", scale.density))
        rows = [*dense_and_uniform(run, [kept], lengths=run.lengths, tasks=TASKS), *rows]
    gained = compared(rows, run.lengths)
    return record_of(
        run, "calibration", QUESTION, calibration_answer(rows, gained, run.lengths, scale.density), [*rows, *(one.row() for one in gained)],
        density=scale.density, left_out=left_out, published={name: list(pair) for name, pair in PUBLISHED.items()},
        samples={name: {f"{t}@{n}": len(v.profile.distances[t, n]) for t, n in v.profile.keys} for name, v in variants.items()},
        supervision_samples=supervised.settings,
    )  # fmt: skip


def supervised_samples(run: Run) -> SampleSet:
    """Samples of the tasks human, model and whole-text at the run's lengths, all of the same source files.

    The model answers the human's prompts, in as many tokens.
    """
    tokens = min(ANSWER_TOKENS, run.preset.answer_tokens)
    documents = [one for one in domain_documents("code") if len(encode(run.tokenizer, one.summary or "")) >= tokens]
    count = max(1, min(run.preset.summaries, len(documents)))
    streamed = enough_documents(documents, CHARACTERS_PER_TOKEN * count * max(run.lengths))
    wanted = (Request(HumanAnswers(tokens), count), Request(PlainText(name=WHOLE_TEXT), count))
    drafts = calibrate(run.model, run.tokenizer, run.lengths, wanted=wanted, documents=streamed, seed=run.settings.seed)
    path = run.folder / "calibration" / f"answers-{drafts.identity}-{weights_fingerprint(run.model)}.safetensors"
    if not is_intact(path, SampleSet.load):
        SampleSet(tuple(_answered(run, drafts))).save(path)
    return replace(drafts, samples=(*drafts, *SampleSet.load(path)))


def supervision_variants(found: InfluenceProfile) -> dict[str, Variant]:
    """A variant per supervision."""
    return {task: Variant(profile_part(found, tasks=[task]), paper=True) for task in (MODEL, HUMAN, WHOLE_TEXT)}


def task_variants(base: InfluenceProfile, samples: Sequence[int]) -> dict[str, Variant]:
    """Parts of a run's profile: its plain text, its other tasks one by one and together, fewer samples of those, single lengths.

    samples: numbers of samples of the most frequent task; other tasks keep the same share. Numbers that leave out none are skipped.
    """
    long_range = [task for task in base.tasks if task != TEXT]
    variants = {task: Variant(profile_part(base, tasks=[task]), paper=True) for task in base.tasks}
    whole = profile_part(base, tasks=long_range) if long_range else base
    variants[LONG_RANGE] = Variant(whole, paper=True)
    most = max(len(values) for values in whole.distances.values())
    for count in (count for count in samples if count < most):
        picks = {key: slice(max(1, round(count * len(values) / most))) for key, values in whole.distances.items()}
        variants[f"samples-{count}"] = Variant(profile_part(whole, samples=picks))
    for length in dict.fromkeys((min(whole.lengths), max(whole.lengths))) if len(whole.lengths) > 1 else ():
        variants[f"length-{length}"] = Variant(profile_part(whole, lengths=[length]))
    return variants


def variant_plans(
    variants: Mapping[str, Variant], rules: Sequence[SpanRule], limits: Mapping[int, float]
) -> tuple[list[Plan], dict[str, str]]:
    """A plan of every variant, and `NAME/paper` where it is also solved in the paper's way; and, by name, why there is none.

    rules, limits (density by length): the same for all, whatever lengths a variant was profiled at.
    """
    plans, left_out = [], {}
    for name, variant in variants.items():
        table = loss_table(variant.profile, rules)
        try:
            plans.append(solved_plan(table, limits, name))
            if variant.paper:
                single = loss_table(variant.profile, rules, estimator="element")
                plans.append(solved_plan(single, limits, f"{name}{PAPER}", paper_goals(single)))
        except InfeasibleError as error:
            left_out[name] = str(error)
    return plans, left_out


def _answered(run: Run, drafts: SampleSet) -> list[Sample]:
    """The human's samples with the model's own greedy answers instead of the human's."""
    size, never = run.answer_batch, end_tokens(run.model, run.tokenizer)
    filled: list[Sample] = []
    for group in group_by_shape(sample for sample in drafts if sample.task == HUMAN).values():
        for start in range(0, len(group), size):
            filled += fill_greedily(run.model, group[start : start + size], never)
            run.progress("answer as the model", len(filled), len(drafts) // 2)
    return [replace(sample, task=MODEL, detail={**sample.detail, "fill": "generate"}) for sample in filled]
