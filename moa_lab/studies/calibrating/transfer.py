"""Transfer between domains: profiles and plans from three domains, each plan measured on test texts of all three."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from moa_lab.calibration import calibrate, requests
from moa_lab.calibration.documents import Document, split_documents
from moa_lab.calibration.domains import DOMAINS, domain_documents, enough_documents
from moa_lab.calibration.samples import Sample
from moa_lab.evaluate.compare import row_of
from moa_lab.evaluate.intervals import Interval, mean
from moa_lab.evaluate.scoring import score_rows, score_samples
from moa_lab.evaluate.store import ScoreStore
from moa_lab.evaluate.testsets import document_samples, needle_samples
from moa_lab.models import weights_fingerprint
from moa_lab.pipeline import Run
from moa_lab.plan import Plan, dense_plan
from moa_lab.profiling import profile
from moa_lab.records import InfluenceProfile, Measurement
from moa_lab.search import InfeasibleError, loss_table
from moa_lab.studies.gains import NATS_SAVED, NEEDLES_GAINED, Gain, gains
from moa_lab.studies.plans import DOCUMENTS, NEEDLES, equal_uniform, name_of, record_of, solved_plan
from moa_lab.studies.ranks import CORRELATION, confidence_rows, correlation_rows
from moa_lab.studies.record import StudyRecord
from moa_lab.studies.scale import Scale
from moa_lab.text import interval_text

QUESTION = "Do the heads that matter in one kind of text matter in another, and what does a plan made on another kind of text cost?"
ANSWER_TOKENS = 64
CHARACTERS_PER_TOKEN = 8
"""Characters of documents streamed per token of the samples: enough that no excerpt repeats, few enough to tokenize quickly."""
FOREIGN, EVERYWHERE = "foreign", "every domain"


def transfer(run: Run, scale: Scale) -> StudyRecord:
    """Profiles of `DOMAINS`, how they rank the heads, and a plan of each at `scale.density` on test texts of every domain."""
    texts = {domain: split_documents(domain_documents(domain), run.settings.seed) for domain in DOMAINS}
    profiles = {domain: domain_profile(run, domain, texts[domain]["calibration"]) for domain in DOMAINS}
    ranks = correlation_rows(profiles)
    rows = [*ranks, *confidence_rows(profiles)]
    plans, left_out = _plans(profiles, scale.density)
    costs: dict[str, dict[str, Interval]] = {}
    if plans:
        measured = _measured(run, plans, {domain: texts[domain]["test"] for domain in DOMAINS})
        others = {FOREIGN: tuple(plan.name for plan in plans.values()), "uniform": (name_of("uniform", scale.density),)}
        own = {domain: plan.name for domain, plan in plans.items()}
        costs = {name: {task: cost(measured, own, names, task) for task in (NEEDLES, DOCUMENTS)} for name, names in others.items()}
        gained = [one.row() for one in _gains(measured, own, run.lengths)]
        rows += [*measured, *gained, *_cost_rows(costs, scale.density)]
    return record_of(
        run, "transfer", QUESTION, f"{ranks_answer(ranks)} {cost_answer(costs, scale.density)}", rows,
        density=scale.density, domains=list(DOMAINS), left_out=left_out, answer_tokens=_answer_tokens(run), sizes=_sizes(run),
    )  # fmt: skip


def against_own(record: StudyRecord, metric: str, task: str) -> list[list[float]]:
    """Gained against the plan of the text's own domain, over all lengths: a row for a plan's domain, a column for a text's."""
    domains = record.settings["domains"]
    cells = {(row.plan, row.task): row.value for row in record.select(metric=metric, length=0)}
    return [[0.0 if plan == text else cells[f"{plan}-25", f"{text}/{task}"] for text in domains] for plan in domains]


def between_domains(record: StudyRecord, task: str) -> list[list[float]]:
    """How alike two domains rank the heads, by their span effects on `task`; on the diagonal two halves of one domain's own samples."""
    domains = record.settings["domains"]
    rows = {tuple(row.task.split("/")): row.value for row in record.select(plan=f"{task}, span", metric=CORRELATION)}
    return [[rows[a, b] if (a, b) in rows else rows[b, a] for b in domains] for a in domains]


def domain_profile(run: Run, domain: str, documents: Sequence[Document]) -> InfluenceProfile:
    """The profile of questions, own summaries and plain text of a domain, at the run's lengths; saved as `transfer/DOMAIN.safetensors`."""
    folder, sizes = run.folder / "transfer" / domain, _sizes(run)
    wanted = requests(
        questions=sizes["questions"], per_sample=run.preset.questions_per_sample, others=sizes["summaries"], texts=sizes["texts"],
        answer_tokens=_answer_tokens(run),
    )  # fmt: skip
    samples = calibrate(
        run.model, run.tokenizer, run.lengths, wanted=wanted, documents=_enough(documents, sum(r.count for r in wanted), run.lengths),
        seed=run.settings.seed, batch_size=run.answer_batch, parts_dir=folder / "answers",
        progress=partial(run.progress, f"calibrate {domain}"),
    )  # fmt: skip
    found = profile(run.model, samples, parts_dir=folder / "profile", progress=partial(run.progress, f"profile {domain}"))
    found.save(folder.with_suffix(".safetensors"))
    return found


def cost(rows: Sequence[Measurement], own: Mapping[str, str], others: Sequence[str], task: str) -> Interval:
    """Mean score of the plans `others` minus that of each domain's own plan, paired over all test samples of all domains and lengths.

    own: the plan's name by domain; a plan is not compared with itself.
    """
    pairs: list[float] = []
    for domain, name in own.items():
        for row in (row for row in rows if (row.plan, row.task) == (name, f"{domain}/{task}")):
            foreign = [row_of(rows, other, row.task, row.length).detail["per_sample"] for other in others if other != name]
            pairs += (np.mean(foreign, axis=0) - np.array(row.detail["per_sample"])).tolist()
    return mean(pairs)


def ranks_answer(rows: Sequence[Measurement]) -> str:
    """A sentence on the correlations of `correlation_rows` by the span estimator."""
    told = [row for row in rows if row.metric == CORRELATION and row.plan.endswith("span")]
    between = sorted((row for row in told if len(set(row.task.split("/"))) > 1), key=lambda row: row.value)
    within = [row.value for row in told if len(set(row.task.split("/"))) == 1]
    lowest, highest = between[0], between[-1]
    text = (
        f"Heads rank alike between domains to {lowest.value:.2f} ({_pair(lowest)}) at the least "
        f"and {highest.value:.2f} ({_pair(highest)}) at the most"
    )
    if not within:
        return f"{text} (Spearman)."
    return f"{text} (Spearman); two halves of one domain's own samples, to {min(within):.2f} to {max(within):.2f}."


def cost_answer(costs: Mapping[str, Mapping[str, Interval]], density: float) -> str:
    """A sentence on what plans of other domains, and uniform spans, cost against a domain's own plan."""
    if not costs:
        return f"No plan is feasible at {density:.1%}."
    foreign, uniform = costs[FOREIGN], costs["uniform"]
    return (
        f"At {density:.1%} kept, a plan of another domain against the domain's own: {_told(foreign[NEEDLES], 'needles found')}; "
        f"{_told(foreign[DOCUMENTS], 'nats')}. "
        f"Uniform spans: {_told(uniform[NEEDLES], 'needles found')}; {_told(uniform[DOCUMENTS], 'nats')}."
    )


def _told(found: Interval, unit: str) -> str:
    verdict = "not decided" if found.low <= 0 <= found.high else "decided"
    return f"{found.value:+.3f} {unit} {interval_text(found.low, found.high, '+.3f')}, {verdict}"


def _pair(row: Measurement) -> str:
    return f"{row.plan.partition(',')[0]}, {row.task.replace('/', ' and ')}"


def _plans(profiles: Mapping[str, InfluenceProfile], density: float) -> tuple[dict[str, Plan], dict[str, str]]:
    """A plan of each domain, solved from its profile alone; and, by name, why there is none."""
    plans, left_out = {}, {}
    for domain, found in profiles.items():
        name = name_of(domain, density)
        try:
            plans[domain] = solved_plan(loss_table(found), density, name)
        except InfeasibleError as error:
            left_out[name] = str(error)
    return plans, left_out


def _measured(run: Run, plans: Mapping[str, Plan], documents: Mapping[str, Sequence[Document]]) -> list[Measurement]:
    """Rows of dense, uniform and all `plans` on the test samples of every domain, their tasks for instance `code/needles`."""
    store = ScoreStore(run.folder / "transfer" / "scores", weights_fingerprint(run.model))
    rows = []
    for domain, own in documents.items():
        for length in run.lengths:
            # Uniform spans get the bytes of the plan that keeps most, so that no plan wins by bytes.
            fullest = max(plans.values(), key=lambda plan: plan.density(length))
            uniform = equal_uniform(fullest, length, f"uniform-{fullest.name.rpartition('-')[2]}")
            for samples in _tests(run, own, length):
                for plan in (dense_plan(run.geometry), uniform, *plans.values()):
                    scores = score_samples(run.model, plan, samples, store=store, progress=partial(run.progress, f"evaluate {domain}"))
                    rows += [replace(row, task=f"{domain}/{row.task}") for row in score_rows(plan, samples, scores)]
    return rows


def _tests(run: Run, documents: Sequence[Document], length: int) -> tuple[list[Sample], list[Sample]]:
    sizes, seed = _sizes(run), run.settings.test_seed
    streamed = _enough(documents, sizes["needles"] + sizes["documents"], [length])
    return (
        needle_samples(run.tokenizer, length, sizes["needles"], seed=seed, documents=streamed),
        document_samples(run.tokenizer, length, sizes["documents"], seed=seed, documents=streamed),
    )


def _gains(rows: Sequence[Measurement], own: Mapping[str, str], lengths: Sequence[int]) -> list[Gain]:
    """Every other plan against the domain's own, on the same samples: by domain, task and length, and over all lengths."""
    found = []
    for domain, name in own.items():
        here = [row for row in rows if row.task.partition("/")[0] == domain]
        found += gains(here, [(other, name) for other in dict.fromkeys(row.plan for row in here) if other != name], lengths)
    return found


def _cost_rows(costs: Mapping[str, Mapping[str, Interval]], density: float) -> list[Measurement]:
    rows = []
    for plan, tasks in costs.items():
        needles, nats = tasks[NEEDLES], tasks[DOCUMENTS]
        saved = Interval(-nats.value, nats.n, -nats.high, -nats.low)
        rows.append(Measurement(plan, NEEDLES_GAINED, f"{EVERYWHERE}/{NEEDLES}", 0, *needles, density, {"against": "own"}))
        rows.append(Measurement(plan, NATS_SAVED, f"{EVERYWHERE}/{DOCUMENTS}", 0, *saved, density, {"against": "own"}))
    return rows


def _sizes(run: Run) -> dict[str, int]:
    """Samples of each kind, per domain and length: parts of what the run's preset has."""
    preset = run.preset
    return {
        "questions": max(1, preset.questions * 3 // 8), "summaries": max(1, preset.summaries // 2), "texts": max(1, preset.texts // 2),
        "needles": max(2, preset.needles // 2), "documents": max(2, preset.documents // 2),
    }  # fmt: skip


def _answer_tokens(run: Run) -> int:
    return min(ANSWER_TOKENS, run.preset.answer_tokens)


def _enough(documents: Sequence[Document], samples: int, lengths: Sequence[int]) -> tuple[Document, ...]:
    return enough_documents(documents, CHARACTERS_PER_TOKEN * samples * max(lengths))
