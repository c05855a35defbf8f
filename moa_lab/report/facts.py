"""The records behind the page, and the sentences made from their numbers."""

from __future__ import annotations

from dataclasses import dataclass

from moa_lab.evaluate.equal_bytes import unequal_plans
from moa_lab.evaluate.worse import worse_than_simple
from moa_lab.figures import pooled
from moa_lab.figures.measurements import Score, metric_label, shown
from moa_lab.figures.theme import byte_size
from moa_lab.plan import UNTOUCHED, Plan, told_mixes
from moa_lab.records import ALLOCATED, Candidate, Front, FrontPoint, InfluenceProfile, Measurements, candidates

DENSE_ROLE, UNIFORM_ROLE = "dense", "uniform window"
LEADING_TASKS = {"retrieval": "needles", "cross_entropy": "summaries"}

BYTES_NOTE = (
    "KV bytes are for one sequence at 2 bytes a number: predicted from the spans and, where that was measured, as allocated for the "
    "ring cache. Scores were taken in one pass over each text, which needs no cache."
)


@dataclass(frozen=True)
class Facts:
    """The records behind a page.

    rivals: plans to compare with, the dense one first. density: the one all are compared at. validation: what the plan was chosen by.
    """

    plan: Plan
    rivals: tuple[Plan, ...]
    profile: InfluenceProfile | None
    front: Front
    measurements: Measurements
    reference: tuple[FrontPoint, ...]
    density: float | None = None
    validation: Measurements | None = None

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Rivals first, the plan of the page last."""
        return (*self.rivals, self.plan)

    @property
    def names(self) -> tuple[str, ...]:
        """Plans of the score table: rivals, other measured plans that are no candidates of the front, and last the plan."""
        known = [plan.name for plan in self.rivals]
        candidates = {point.plan.name for point in self.front} | {self.plan.name}
        others = [row.plan for row in self.measurements if row.plan not in candidates]
        return (*dict.fromkeys([*known, *others]), self.plan.name)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics measured for a plan of the table; retrieval first, then cross-entropy."""
        found = dict.fromkeys(row.metric for row in self.measurements if row.plan in self.names and row.metric != ALLOCATED)
        first = [metric for metric in ("retrieval", "cross_entropy") if metric in found]
        return tuple(dict.fromkeys([*first, *found]))

    def tasks(self, metric: str) -> tuple[str, ...]:
        """Tasks measured with `metric` for a plan of the table, its leading task first. They are never pooled: needles and lines are
        not equally hard, and losses of different texts have no common scale."""
        found = {row.task for row in self.measurements.select(metric=metric) if row.plan in self.names}
        return tuple(sorted(found, key=lambda task: (task != LEADING_TASKS.get(metric), task)))

    def heading(self, metric: str, task: str) -> str:
        """Heading of a score: the metric, and the task where there are several."""
        label = metric_label(metric)[0].capitalize()
        if len(self.tasks(metric)) == 1:
            return label
        return f"{task.capitalize()} retrieved" if metric == "retrieval" else f"{label}, {task}"

    def role(self, name: str) -> str:
        """A plan's name in sentences: dense or uniform window (with its bits where it is stored in fewer), or its own name."""
        plan = next((plan for plan in self.plans if plan.name == name), None)
        stored = f" in {told_mixes(plan)}" if plan and plan.bits else ""
        if plan.with_bits(UNTOUCHED).is_dense if plan else name == "dense":
            return DENSE_ROLE + stored
        is_uniform = _is_uniform(plan) if plan else name == "uniform"
        return UNIFORM_ROLE + stored if is_uniform else name

    def lengths(self, metric: str | None = None) -> tuple[int, ...]:
        """Lengths measured (with `metric`) for a plan of the table, ascending."""
        return tuple(sorted({row.length for row in self.measurements if row.plan in self.names and metric in (None, row.metric)}))

    @property
    def main_length(self) -> int:
        """The length at which spans are drawn: the longest measured, else of the plan, else profiled, else the model's maximum."""
        profiled = self.profile.lengths if self.profile else ()
        return max(self.lengths() or self.plan.lengths or profiled or (self.plan.geometry.max_length,))

    def unequal(self) -> list[str]:
        """A clause for every plan of the page and length, measured or made for, where it does not keep the density asked for; and why."""
        return unequal_plans(self.plans, self.density, self.lengths()) if self.density is not None else []

    def warnings(self) -> list[str]:
        """A sentence for every simple plan of the page that is decidedly better than the plan in some score."""
        return worse_than_simple(self.plan, self.rivals, self.measurements)

    def candidates(self) -> tuple[Candidate, ...]:
        """The candidates that the plan was chosen from, best first; none where the validation is of another plan."""
        found = candidates(self.validation) if self.validation is not None else ()
        return found if any(one.chosen and one.name == self.plan.search.get("candidate") for one in found) else ()

    def score(self, name: str, metric: str, length: int, task: str | None = None) -> Score | None:
        """The score of a plan in a task (None: the metric's leading task)."""
        return pooled(self.measurements, name, metric, length, task or next(iter(self.tasks(metric)), None))

    def allocated(self, name: str, length: int) -> int | None:
        """Bytes that were allocated for the cache of a plan; None where that was not measured."""
        rows = self.measurements.select(plan=name, metric=ALLOCATED, length=length)
        return int(rows[0].value) if rows else None

    def answer_length(self, metric: str) -> int | None:
        """The longest of the lengths at which the plan and most of the others were measured; None when the plan was not."""
        own = [length for length in self.lengths(metric) if self.score(self.plan.name, metric, length)]
        return max(own, key=lambda length: (sum(self.score(name, metric, length) is not None for name in self.names), length), default=None)


def _is_uniform(plan: Plan) -> bool:
    """One rule for all heads, or one for each kind of layer where some layers have a window of their own."""
    kinds = {(plan.geometry.layer_windows[layer], rule) for layer, row in enumerate(plan.rules) for rule in row}
    return len(kinds) == len({window for window, _ in kinds})


def density_text(density: float) -> str:
    """`0.5` as `50%`, `0.125` as `12.5%`."""
    return f"{100 * density:.3g}%"


def answer(facts: Facts) -> str:
    """The headline as HTML, from the measurements alone."""
    metric = next((name for name in ("retrieval", *facts.metrics) if facts.answer_length(name)), None)
    if metric is None:
        length = facts.main_length
        kept = density_text(facts.plan.density(length))
        return f"This plan keeps <strong>{kept}</strong> of the KV cache at {length:,} tokens; no score was measured yet."
    length = facts.answer_length(metric) or 0
    own = facts.score(facts.plan.name, metric, length)
    assert own is not None
    value = f"<strong>{shown(metric, own.value)}</strong>"
    kept = f"At {density_text(facts.plan.density(length))} of the KV cache, this plan"
    others = comparison(facts, metric, length)
    if metric == "retrieval":
        told = facts.tasks(metric)[0] if len(facts.tasks(metric)) > 1 else "needles"
        return f"{kept} retrieves {value} of {told} at {length:,} tokens{others}."
    label, unit = metric_label(metric)
    return f"{kept} has a {label} of {value}{'' if unit == '%' else f' {unit}'} at {length:,} tokens{others}."


def second_sentence(facts: Facts) -> str:
    """What the headline leaves out: cross-entropy, and the size of the cache; HTML."""
    parts = []
    length = facts.answer_length("cross_entropy")
    if length and facts.answer_length("retrieval"):
        own = facts.score(facts.plan.name, "cross_entropy", length)
        assert own is not None
        tasks = facts.tasks("cross_entropy")
        on = f" on {tasks[0]}" if len(tasks) > 1 else ""
        parts.append(
            f"Its cross-entropy{on} at {length:,} tokens is {own.value:.3f} nats per token{comparison(facts, 'cross_entropy', length)}."
        )
    size, dense = facts.plan.kv_bytes(facts.main_length), _dense_bytes(facts.plan, facts.main_length)
    parts.append(
        f"The cache of one sequence of {facts.main_length:,} tokens needs {byte_size(size)} instead of {byte_size(dense)}, "
        f"predicted from the spans{_allocated(facts)}."
    )
    return " ".join(parts)


def _allocated(facts: Facts) -> str:
    size = facts.allocated(facts.plan.name, facts.main_length)
    return f"; {byte_size(size)} were allocated" if size is not None else ""


def comparison(facts: Facts, metric: str, length: int) -> str:
    """` (dense 97%, uniform window 47%)` as HTML, or nothing."""
    found = []
    for name in facts.names[:-1]:
        score, role = facts.score(name, metric, length), facts.role(name)
        if score is not None and role.startswith((DENSE_ROLE, UNIFORM_ROLE)):
            found.append(f"{role} {shown(metric, score.value)}")
    return f" ({', '.join(found)})" if found else ""


def _dense_bytes(plan: Plan, n_tokens: int) -> int:
    geometry = plan.geometry
    tokens = sum(geometry.dense_span_tokens(layer, n_tokens) for layer in range(geometry.layers)) * geometry.kv_heads
    return tokens * geometry.kv_bytes_per_token()
