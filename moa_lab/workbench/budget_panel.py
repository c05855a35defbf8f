"""Budget: a density slider that answers while it moves, pinned heads, an exact solve."""

from __future__ import annotations

import html
from collections.abc import Callable, Collection

import ipywidgets as w
import numpy as np

from moa_lab.plan import Plan
from moa_lab.search import limit_lengths
from moa_lab.workbench.ahead import Ahead
from moa_lab.workbench.budget import STEP, Answer, Budget
from moa_lab.workbench.budget_facts import kept, predicted
from moa_lab.workbench.curves import MeasuredCurves
from moa_lab.workbench.jobs import Handle
from moa_lab.workbench.measuring import Measuring
from moa_lab.workbench.on_gpu import OnGpu
from moa_lab.workbench.room import GAP, columns, room
from moa_lab.workbench.spans_map import SpansMap, is_large
from moa_lab.workbench.state import State
from moa_lab.workbench.widgets import Errors, Work, button, choice, facts, number, row, side_by_side, whole

MIB = 2**20
LARGE_STEP = 0.01
"""The slider's step for a large model, of which densities are solved before the slider gets there."""
FACTS, BESIDE = 360, 1240
"""Pixels of what is said of a density, and of a panel from which on it stands beside both figures."""
BITS = [("16 bits", "16"), ("8 bits", "8"), ("K in 8, V in 4 bits", "8+4"), ("4 bits", "4")]


class BudgetPanel:
    """Needs a loss table in the state; the plan it finds becomes the state's plan. measuring: as in `MeasuredCurves`.

    budget: one that found its plan already: it is shown, and the state keeps the plan that it has. None: one of `density`.
    """

    def __init__(
        self, state: State, density: float = 0.5, measuring: Callable[[], Measuring] | None = None, budget: Budget | None = None
    ) -> None:
        self.state, self.errors = state, Errors("budget")
        self.budget = budget or budget_of(state, density)
        density, table = self.budget.density, self.budget.table
        lengths, geometry = limit_lengths(table), table.geometry
        self._is_large = is_large(geometry)
        self._step = LARGE_STEP if self._is_large else STEP
        self._ahead = Ahead(lambda density: self.budget.solve(density))
        self.slider = w.FloatSlider(
            value=self._at_step(density), min=self._lowest, max=1.0, step=self._step, readout=False, layout=w.Layout(width="98%"),
        )  # fmt: skip
        self.slider.add_class("moa-density")
        self.number = number("density", density, 0.0, 1.0, STEP, "density-number", "120px")
        self.mib = number("KV MiB", 0.0, 0.0, self._dense_mib, 0.5, "kv-mib", "140px")
        self.mean = number("mean span", 0.0, 0.0, self.budget.n_tokens, 16.0, "mean-span", "140px")
        self.length = choice("at", [(f"{n:,} tokens", n) for n in lengths], "budget-length", "145px")
        self.length.value = self.budget.n_tokens
        self.bits = choice("stored in", BITS, "budget-bits", "195px")
        self._answer: Answer | None = None
        self._before: dict[str, tuple[float, dict[tuple[int, int], int]]] = {}
        self.served = OnGpu(state, "budget", self.errors.guard(self._tell))
        self.map = SpansMap(state, geometry, self.errors, "spans", find="budget-find", order="budget-order")
        self.layer = whole("layer", state.layer, 0, geometry.layers - 1, "layer", "120px")
        self.head = whole("KV head", state.kv_head, 0, geometry.kv_heads - 1, "kv-head", "130px")
        self.span = whole("span (tokens)", self.budget.n_tokens // 2, 1, max(lengths), "pin-span", "180px")
        self.rules = whole("rules per layer (0: any)", 0, 0, len(table.rules), "max-rules", "230px")
        full, to_span = button("Pin to full", "pin-full"), button("Pin to span", "pin-to-span")
        release, release_all = button("Release", "release"), button("Release all", "release-all")
        self.pins, self.facts = w.HTML(), w.HTML(layout=w.Layout(flex=f"1 1 {FACTS}px"))
        self.pins.add_class("moa-pins")
        self.facts.add_class("moa-budget-facts")
        self.exact = Work("Solve exactly", "exact", self.errors, lambda: self._exactly, self.show)
        self.curves = MeasuredCurves(state, self.errors, measuring)
        self._moving = False

        self.slider.observe(self.errors.guard(lambda change: self._slid(change["new"])), "value")
        self.number.observe(self.errors.guard(lambda change: self.solve(change["new"])), "value")
        self.mib.observe(self.errors.guard(lambda change: self.solve(self.budget.density_of_bytes(change["new"] * MIB))), "value")
        self.mean.observe(self.errors.guard(lambda change: self.solve(self.budget.density_of_span(change["new"]))), "value")
        self.length.observe(self.errors.guard(self._new_length), "value")
        self.layer.observe(self.errors.guard(lambda change: state.set(layer=change["new"])), "value")
        self.head.observe(self.errors.guard(lambda change: state.set(kv_head=change["new"])), "value")
        self.bits.observe(self.errors.guard(self._new_bits), "value")
        self.rules.observe(self.errors.guard(self._new_rules), "value")
        full.on_click(self.errors.guard(lambda _: self._pin(None)))
        to_span.on_click(self.errors.guard(lambda _: self._pin(self.span.value)))
        release.on_click(self.errors.guard(lambda _: self._release(all_heads=False)))
        release_all.on_click(self.errors.guard(lambda _: self._release(all_heads=True)))
        self.elsewhere = w.HTML()
        self.elsewhere.add_class("moa-elsewhere")
        state.watch_in("Budget", ["layer", "kv_head"], self._select)
        state.watch_in("Budget", ["plan"], self._tell_elsewhere)
        self._redraw = state.watch_in("Budget", ["dark"], self.map.draw)
        self.works = (self.exact, self._ahead, self.curves.work)
        pinning = row(self.layer, self.head, full, self.span, to_span, release, release_all)
        self._mapped = w.VBox(
            [row(self.map.order, self.map.find), self.map.canvas.box, pinning, self.pins, row(self.rules, self.exact.box)]
        )
        looked_at = side_by_side(self._mapped, self.curves.box, self.facts)
        looked_at.add_class("moa-budget")
        state.watch_in("Budget", ["width"], self.errors.guard(self._fit, keep=True))
        self._fit()
        self.box = w.VBox(
            [
                self.slider,
                row(self.number, self.mib, self.mean, self.length, self.bits, self.served.box),
                self.elsewhere,
                self.errors.box,
                self.curves.lost,
                looked_at,
            ]
        )
        if budget is None:
            self.solve(density)
        else:
            self._look_at(self.budget.answer())
            self._draw()
            self._solve_ahead()
        self._tell_elsewhere()

    def solve(self, density: float) -> None:
        """Solve for a density, and update the slider and the boxes."""
        if not self._moving:
            self._ahead.moved()
            self.show(self.budget.answer(density))
            self._solve_ahead()

    def _slid(self, density: float) -> None:
        # The page sends every value back that it was given, rounded to a step: nobody has moved the slider then.
        if abs(density - self._at_step(self.budget.density)) > 1e-9:
            self.solve(self._at_step(density))

    def show(self, answer: Answer) -> None:
        """Show an answer, and make its plan the state's."""
        self._look_at(answer)
        self.state.set(plan=answer.plan, n_tokens=self.budget.n_tokens)
        self._draw()

    def _look_at(self, answer: Answer) -> None:
        """What is shown of an answer, but for what is drawn."""
        self._answer, self._moving = answer, True
        try:
            self.slider.value, self.number.value = self._at_step(self.budget.density), round(self.budget.density, 4)
            self.mib.max = self._dense_mib
            self.mib.value = round(answer.kv_bytes / MIB, 2)
            self.mean.max = self.budget.n_tokens
            self.mean.value = round(float(answer.spans.mean()))
        finally:
            self._moving = False
        self._tell()
        pins = [f"layer {layer}, KV head {head}: {self._span(rule, layer):,} tokens" for (layer, head), rule in self.budget.pinned.items()]
        self.pins.value = f"pinned: {'; '.join(pins)}" if pins else "no head is pinned"
        self.map.show(answer.plan, answer.spans, self.budget.n_tokens, self.budget.pinned)

    def step(self, layers: int, rows: int) -> None:
        """As `SpansMap.step`."""
        self.map.step(layers, rows)

    def toggle_pin(self) -> None:
        """Pin the selected head to everything, or release it where it is pinned."""
        if (self.state.layer, self.state.kv_head) in self.budget.pinned:
            self._release(all_heads=False)
        else:
            self._pin(None)

    def holds(self, plan: Plan | None) -> bool:
        """Whether `plan` is what this panel found last."""
        if plan is None or self._answer is None:
            return False
        return plan is self._answer.plan or plan.identity() == self._answer.plan.identity()

    def pins_of(self, plan: Plan | None) -> Collection[tuple[int, int]]:
        """The heads that are pinned in `plan`: none where it is another than this panel's."""
        return self.budget.pinned if self.holds(plan) else ()

    def give(self, layer: int, kv_head: int, tokens: int, n_tokens: int) -> Plan:
        """Pin a head to the shortest span that keeps `tokens` at length `n_tokens`, and solve again; the plan becomes the state's.

        Raises ValueError as `Budget.pin`.
        """
        self._remember()
        self.budget.pin(layer, kv_head, tokens, n_tokens)
        answer = self.budget.answer()
        self.show(answer)
        self._remember()
        return answer.plan

    def back_to(self, plan: Plan) -> None:
        """Have the pins and the density again that `plan` was found with, before or after a `give`; of another plan nothing is known."""
        found = self._before.get(plan.identity())
        if found is not None and not self.holds(plan):
            density, pinned = found
            self.budget.pinned = dict(pinned)
            self.show(self.budget.answer(density))

    def _fit(self) -> None:
        """The map and the curves side by side, the facts beside them where there is room, or else below them."""
        free = room(self.state.width)
        free -= FACTS + GAP if free >= BESIDE else 0
        each = columns(free, 2 if self.curves.is_shown else 1)
        self.map.resize(each)
        self.curves.resize(each)
        self._mapped.layout.width = self.map.canvas.box.layout.width

    def _remember(self) -> None:
        if self._answer is not None:
            self._before[self._answer.plan.identity()] = (self.budget.density, dict(self.budget.pinned))

    def _draw(self) -> None:
        self._redraw()
        # After the map: the page draws in this order.
        answer = self._answer
        if answer is not None:
            self.curves.mark(answer.plan, lambda n: self.budget.density_at(answer, n))

    def _tell(self) -> None:
        answer = self._answer
        if answer is not None:
            known = answer.kv_bytes if self.served.n_tokens == self.budget.n_tokens else None
            self.facts.value = facts([*kept(answer, self.budget), *self.served.told(answer.plan, known), *predicted(answer)])

    def _tell_elsewhere(self) -> None:
        """Say so where the panels show another plan than this one found."""
        plan, told = self.state.plan, ""
        if plan is not None and not self.holds(plan):
            told = f"All panels show the plan {html.escape(plan.name)}, chosen elsewhere: a move of the density takes the one below."
        self.elsewhere.value = f'<div role="note">{told}</div>' if told else ""
        self.elsewhere.layout.display = "" if told else "none"

    def _solve_ahead(self) -> None:
        """Of a large model, where solving takes longer than a slider may: the slider's other steps, the nearest first."""
        if self._is_large:
            steps = np.arange(self._lowest, 1.0, self._step)
            self._ahead.start([float(step) for step in steps[np.argsort(np.abs(steps - self.budget.density), kind="stable")]])

    def _at_step(self, density: float) -> float:
        """The slider's step that is nearest to a density."""
        return round(min(max(round(density / self._step) * self._step, self._lowest), 1.0), 6)

    @property
    def _lowest(self) -> float:
        """The first step of the slider at which there is a plan."""
        return round(float(np.ceil(self.budget.least / self._step + 1e-6)) * self._step, 3)

    def _select(self) -> None:
        self.layer.value, self.head.value = self.state.layer, self.state.kv_head
        self.map.draw()

    def _pin(self, tokens: int | None) -> None:
        self.budget.pin(self.state.layer, self.state.kv_head, tokens)
        self.show(self.budget.answer())

    def _release(self, all_heads: bool) -> None:
        if all_heads:
            self.budget.release_all()
        else:
            self.budget.release(self.state.layer, self.state.kv_head)
        self.show(self.budget.answer())

    def _new_rules(self, change: dict[str, int]) -> None:
        self.budget.max_rules = change["new"] or None
        self.show(self.budget.answer())

    def _new_length(self, change: dict[str, int]) -> None:
        pinned, rules = self.budget.pinned, self.budget.max_rules
        if self.served.n_tokens == self.budget.n_tokens:
            self.served.tokens.value = change["new"]
        self.budget = Budget(self.budget.table, self.budget.density, change["new"], self.budget.goals, self.budget.bits)
        self.budget.pinned, self.budget.max_rules = pinned, rules
        self.show(self.budget.answer())

    def _new_bits(self, change: dict[str, str]) -> None:
        self.budget.bits = change["new"]
        least = self._lowest
        self._moving = True
        try:
            self.slider.min = least
        finally:
            self._moving = False
        self.show(self.budget.answer(max(self.budget.density, least)))

    def _exactly(self, handle: Handle) -> Answer:
        handle.progress(0, 1)
        found = self.budget.exact(cancel=handle.cancel)
        handle.check()
        return found

    def _span(self, rule: int, layer: int) -> int:
        return int(self.budget.table.span_tokens(self.budget.n_tokens)[layer, rule])

    @property
    def _dense_mib(self) -> float:
        return self.budget.dense_bytes / MIB


def budget_of(state: State, density: float = 0.5) -> Budget:
    """A budget over the state's loss table, at its length where the table keeps densities there. Raises ValueError without a table."""
    if state.table is None:
        raise ValueError("the budget needs a loss table: load a run, or make one with moa_lab.loss_table(profile)")
    return Budget(state.table, density, state.n_tokens if state.n_tokens in limit_lengths(state.table) else None)
