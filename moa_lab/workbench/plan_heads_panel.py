"""Heads of a run that keeps no profile: what its plan keeps of each, beside scores that others publish."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as w
import numpy as np

from moa_lab.figures import score_map
from moa_lab.plan import Plan
from moa_lab.workbench.biography import Biography
from moa_lab.workbench.canvas import HALF, Canvas, ring
from moa_lab.workbench.heads import rule_text
from moa_lab.workbench.measuring import Plans
from moa_lab.workbench.profiles import profile_path
from moa_lab.workbench.published_scores import HeadScores, read_head_scores
from moa_lab.workbench.ranks_view import RanksView, scores_path
from moa_lab.workbench.room import WIDEST, room
from moa_lab.workbench.spans_map import SpansMap
from moa_lab.workbench.state import State
from moa_lab.workbench.widgets import Errors, choice, facts, row, side_by_side

NO_PROFILE = (
    "This run keeps no profile, so nothing was measured of its heads one by one: no influence, no kinds, no ranks. "
    "<code>moa-lab run</code> keeps one, profile.safetensors, in its folder; one of the same model can be loaded below."
)
NO_PLAN = "No plan is chosen either: click one in Front, and what it keeps of every head is shown here."
NO_SCORES = "no scores yet"


class PlanHeadsPanel:
    """Draws the state's plan; scores of DuoAttention and KVzip are loaded and held against its spans. known: these scores.

    take_profile: shows the run with the profile of a file or folder, in all panels; None: none can be loaded.

    Raises ValueError where no record tells the model's heads.
    """

    def __init__(self, state: State, take_profile: Callable[[str], object] | None = None) -> None:
        geometry = Plans(state).geometry
        if geometry is None:
            raise ValueError("no record tells the heads of the model: load a run")
        self.state, self.errors, self.known, self._geometry = state, Errors("heads"), Biography({}), geometry
        self.note, self.facts, self.agreed = w.HTML(), w.HTML(), w.HTML(layout=w.Layout(width="330px"))
        for box, name in ((self.note, "no-profile"), (self.facts, "head-facts"), (self.agreed, "scores-agree")):
            box.add_class(f"moa-{name}")
        self.map = SpansMap(state, geometry, self.errors, "head-spans", find="heads-find", order="heads-order")
        self.path, load = scores_path(self.errors, self.load)
        self.profile, take = profile_path(self.errors, take_profile or (lambda _: None))
        self.versus = choice("spans against", [(NO_SCORES, "")], "ranks-against", "380px")
        self.scores = Canvas("head-scores", HALF, self.errors.guard(self._clicked), on_hover=state.hover, keys=True)
        self.ranks = RanksView(state, "Heads", self.errors)
        self.versus.observe(self.errors.guard(lambda _: self.draw()), "value")
        self.spans = w.VBox([row(self.map.order, self.map.find), side_by_side(self.map.canvas.box, self.facts)])
        self.compared = side_by_side(self.scores.box, self.ranks.canvas.box, self.agreed)
        profiles = [row(self.profile, take)] if take_profile is not None else []
        self.box = w.VBox([self.note, *profiles, self.errors.box, self.spans, row(self.versus, self.path, load), self.compared])
        state.watch_in("Heads", ["hovered"], self._spot)
        state.watch_in("Heads", ["width"], self._fit)
        self._fit()
        state.watch_in("Heads", ["layer", "kv_head", "plan", "n_tokens", "dark"], self.errors.guard(self.draw))()

    def _fit(self) -> None:
        self.map.resize(min(room(self.state.width), WIDEST))

    def draw(self) -> None:
        """Draw the plan's spans, and the scores where some are loaded."""
        plan = self.state.plan
        self.note.value = f'<div class="moa-facts">{NO_PROFILE}{"" if plan is not None else f" {NO_PLAN}"}</div>'
        self.spans.layout.display = "" if plan is not None else "none"
        if plan is not None:
            plan.check_model(self._geometry)
            spans = plan.spans(self.state.n_tokens)
            self.map.show(plan, spans, self.state.n_tokens)
            self.map.draw()
            self.facts.value = facts(self._told(plan, spans))
        self._draw_scores()

    def load(self, path: str) -> None:
        """Read published scores, and hold the spans against them."""
        name = self.known.add_scores(read_head_scores(path, self._geometry))
        self.versus.options = [(f"{scores.method}: {key}", key) for key, scores in self.known.scores.items()]
        self.versus.value = name
        self.draw()

    def step(self, layers: int, rows: int) -> None:
        """As `SpansMap.step`."""
        self.map.step(layers, rows)

    def _draw_scores(self) -> None:
        scores, plan = self._theirs(), self.state.plan
        self.compared.layout.display = "" if scores is not None else "none"
        if scores is None:
            return
        fig = score_map(scores.values, f"{scores.method}: {scores.name}", "score")
        fig.add_scatter(**ring(self.state.layer, self.state.kv_head))
        self.scores.draw(fig.update_layout(showlegend=False), self.state.dark)
        for box in (self.ranks.canvas.box, self.agreed):
            box.layout.display = "" if plan is not None else "none"
        if plan is not None:
            n, by = self.state.n_tokens, f"by {scores.method}, {scores.name}"
            agreed = self.ranks.draw(plan.spans(n).astype(np.float64), scores.values, f"by span at {n:,} tokens", by)
            self.agreed.value = f'<div class="moa-facts"><p>{agreed}</p></div>'

    def _told(self, plan: Plan, spans: np.ndarray) -> list[tuple[str, str]]:
        layer, kv_head, n = self.state.layer, self.state.kv_head, self.state.n_tokens
        more, alike = int((spans > spans[layer, kv_head]).sum()), int((spans == spans[layer, kv_head]).sum())
        whole = f"{plan.geometry.whole_heads(spans, n)} of {spans.size} heads keep all"
        rows = [
            ("plan", f"{plan.name}, {plan.density(n):.1%} at {n:,} tokens: {whole}"),
            ("head", f"layer {layer}, KV head {kv_head}"),
            ("rule", rule_text(plan, layer, kv_head, n)),
            ("by span", f"{more} of {spans.size} heads keep more, {alike - 1} keep as much"),
        ]
        for name, scores in self.known.scores.items():
            higher = int((scores.values > scores.values[layer, kv_head]).sum())
            rows.append((f"{scores.method}, {name}", f"{scores.values[layer, kv_head]:.3g}, rank {higher + 1} of {spans.size}"))
        return rows

    def _theirs(self) -> HeadScores | None:
        return self.known.scores.get(self.versus.value)

    def _clicked(self, place: Any) -> None:
        kv_head, layer = (int(index) for index in place)
        self.state.set(layer=layer, kv_head=kv_head)

    def _spot(self) -> None:
        """Mark the head that the pointer is over elsewhere."""
        head = self.state.hovered
        if self.state.plan is not None:
            self.map.spot(head)
        self.scores.spot(head)
