"""Which one: a wish, the measured plan that holds it for sure, why, and what the next would cost."""

from __future__ import annotations

import html

import ipywidgets as w

from moa_lab.evaluate.options import NEEDLES, Wish
from moa_lab.evaluate.over_bytes import measured_at, scores_over_bytes
from moa_lab.evaluate.recommend import advice_table
from moa_lab.figures.densities import score_by_density
from moa_lab.plan import dense_plan
from moa_lab.workbench.advising import FIRST, Advising
from moa_lab.workbench.canvas import HALF, WIDE, Canvas, with_legend
from moa_lab.workbench.on_gpu import OnGpu
from moa_lab.workbench.room import GAP, room
from moa_lab.workbench.state import State
from moa_lab.workbench.widgets import Errors, button, facts, grid, number, row, side_by_side

TAB = "Which one"
TABLE = 740
"""Pixels of a table of plans that wraps no number."""


class Wanted:
    """A number that may be wished for: a box to tick, and the number."""

    def __init__(self, label: str, value: float, low: float, high: float, step: float, name: str, wanted: bool = False) -> None:
        self.wanted = w.Checkbox(wanted, description=label, indent=False, layout=w.Layout(width="auto"))
        self.wanted.add_class(f"moa-want-{name}")
        self.number = number("", value, low, high, step, name, "90px")
        self.box = row(self.wanted, self.number)

    def value(self, scale: float = 1.0) -> float | None:
        """The number over `scale`; None where it is not wished for."""
        return self.number.value / scale if self.wanted.value else None


class AdvicePanel:
    """Recommends a measured plan of the state's model: at once, and whenever the wish or the GPU changes."""

    def __init__(self, state: State) -> None:
        self.state, self.errors, self.advising = state, Errors("advice"), Advising(state)
        self.needles = Wanted("needles, at least % of dense", 100 * FIRST, 1.0, 100.0, 1.0, "needles", wanted=True)
        self.perplexity = Wanted("perplexity, at most % above dense", 3.0, 0.0, 1000.0, 0.5, "perplexity")
        self.density = Wanted("bytes, at most % of dense", 50.0, 0.1, 100.0, 1.0, "bytes")
        self.speed = Wanted("tokens/s, at least", 1000.0, 1.0, 1e7, 100.0, "speed")
        self.sequences = Wanted("sequences at once, at least", 16.0, 1.0, 1e7, 1.0, "sequences")
        self._wishes = (self.needles, self.perplexity, self.density, self.sequences, self.speed)
        self._asked = self.errors.guard(lambda _=None: self.recommend(again=False))
        self.told, self.table, self.served = w.HTML(), w.HTML(layout=w.Layout(flex=f"1 1 {TABLE}px")), w.HTML()
        known = "runs of this model that are known; or folders, with commas"
        self.folders = w.Text(placeholder=known, continuous_update=False, layout=w.Layout(width="420px"))
        self.folders.add_class("moa-advice-folders")
        ask, self.take = button("Recommend", "recommend", "read the runs again"), button("Take it", "take-advice", "the plan of all panels")
        ask.on_click(self.errors.guard(lambda _: self.recommend()))
        self.take.on_click(self.errors.guard(lambda _: self.advising.take()))
        self.take.disabled = True
        self.table.add_class("moa-advice-table")
        self.served.add_class("moa-advice-served")
        self.told.add_class("moa-advice")
        self.canvas = Canvas("advice", HALF)
        self.on = OnGpu(state, "advice", lambda: self._asked() if self.advising.advice is not None else None)
        state.watch_in(TAB, ["dark"], self.errors.guard(self._draw))
        state.watch_in(TAB, ["width"], self._fit)
        self._fit()
        for wanted in self._wishes:
            wanted.wanted.observe(self._asked, "value")
            wanted.number.observe(lambda _, wanted=wanted: self._asked() if wanted.wanted.value else None, "value")
        self.folders.observe(self._asked, "value")
        self.box = w.VBox(
            [
                row(self.needles.box, self.perplexity.box, self.density.box),
                row(self.sequences.box, self.speed.box, self.on.box),
                row(self.folders, ask, self.take),
                self.errors.box,
                self.told,
                self.served,
                side_by_side(self.table, self.canvas.box),
            ]
        )
        self.canvas.box.layout.display = "none"
        try:
            self.recommend()
        except ValueError as error:
            # Nothing was asked yet, so nothing went wrong.
            self.told.value = f"<p>{html.escape(str(error))}</p>"

    def _fit(self) -> None:
        free = room(self.state.width)
        self.canvas.resize(HALF if free >= TABLE + GAP + HALF else min(free, WIDE))

    def wish(self) -> Wish:
        """What is ticked. Raises ValueError where nothing is."""
        if not any(wanted.wanted.value for wanted in self._wishes):
            raise ValueError("nothing is asked for: tick what the plan must hold")
        sequences = self.sequences.value()
        return Wish(
            self.density.value(100), self.needles.value(100), self.perplexity.value(100), self.speed.value(), gpu=self.on.device,
            weights_bytes=self.on.weights_bytes, n_tokens=self.on.n_tokens, sequences=None if sequences is None else round(sequences),
        )  # fmt: skip

    def recommend(self, again: bool = True) -> None:
        """Show the advice; nothing of an older one stays where there is none. again: as in `Advising.advise`."""
        try:
            advice = self.advising.advise(self.wish(), self.folders.value, again=again)
        except Exception:
            # Not before: what is shown would vanish and come again with every wish.
            self.told.value = self.table.value = self.served.value = ""
            self.take.disabled = True
            self.canvas.box.layout.display = "none"
            raise
        self.told.value = f"<p><b>{html.escape(advice.reason)}</b> {html.escape(f'{advice.beside} {advice.next_one}')}</p>"
        self.take.disabled = advice.plan is None
        self._serve()
        self._draw()

    def _serve(self) -> None:
        """What the chosen GPU does with the recommended plan, and with every other, and without one."""
        advice = self.advising.advice
        if advice is None:
            return
        self.served.value = "" if advice.plan is None else facts(self.on.told(advice.plan))
        plans, told = [one.option.plan for one in advice.judged], advice_table(advice)
        on = f"on {self.on.device.name}, {self.on.n_tokens:,} tokens each"
        dense = {"plan": "dense", "bytes": "100.0%", on: self.on.brief(dense_plan(plans[0].geometry)), "verdict": "", "why": ""}
        rows = [dense, *({**one, on: self.on.brief(plan)} for one, plan in zip(told, plans, strict=True))]
        # Said once: beside the recommended plan, where there is one.
        beyond = self.on.beyond(plans[0]) if advice.plan is None else ""
        table = grid(list(dense), [[one[name] for name in dense] for one in rows])
        self.table.value = table + (f"<div>Note: {beyond}.</div>" if beyond else "")

    def _draw(self) -> None:
        """Needles over density at the longest length that all plans were measured at."""
        advice = self.advising.advice
        if advice is None:
            return
        options = [one.option for one in advice.judged]
        places = measured_at(options, [NEEDLES])
        self.canvas.box.layout.display = "" if places else "none"
        if places:
            fig = score_by_density(scores_over_bytes(options, *places[0]), *places[0])
            self.canvas.draw(with_legend(fig, per_line=1), self.state.dark)
