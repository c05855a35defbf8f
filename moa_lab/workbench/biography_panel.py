"""The biography of the selected head, and the ranks of all heads here and in another profile or in scores that others publish."""

from __future__ import annotations

import html
from typing import Any

import ipywidgets as w

from moa_lab.workbench.biography import Biography
from moa_lab.workbench.heads import OWN, Heads, described
from moa_lab.workbench.published_scores import HeadScores, read_head_scores
from moa_lab.workbench.ranks_view import RanksView, scores_path
from moa_lab.workbench.state import State
from moa_lab.workbench.widgets import Errors, choice, grid, row, side_by_side

RULE = (
    "Retrieval: without its far past (128 tokens back and more) the loss rises by at least twice the mean of all heads, surely above 0. "
    "Sink or local: half or more of its influence is on the first 64 positions, or within about 128 tokens. Mixed: none of these."
)
NO_BLOCKS = "This profile does not keep where its heads look, block by block: sink, local and mixed heads cannot be told apart in it."


class BiographyPanel:
    """Drawn below the map of the heads panel, for the state's head."""

    def __init__(self, state: State, heads: Heads, errors: Errors) -> None:
        self.state, self.heads, self.errors = state, heads, errors
        self.biography = Biography(heads.profiles)
        self._shown: tuple[Any, ...] = ()
        self.path, load = scores_path(errors, self.load)
        self.versus = choice("ranks against", self._sources(), "ranks-against", "380px")
        self.table = w.HTML()
        self.table.add_class("moa-biography-table")
        self.ranks = RanksView(state, "Heads", errors)
        self.counts = w.HTML(layout=w.Layout(width="330px"))
        self.counts.add_class("moa-kind-counts")
        title = w.HTML("<b>Biography of the selected head</b>")
        compared = side_by_side(self.ranks.canvas.box, self.counts)
        self.box = w.VBox([title, self.table, row(self.versus, self.path, load), compared])

    def draw(self) -> None:
        """The selected head's chapters, and the ranks of all heads."""
        self.table.value = grid(*self.biography.table(self.state.layer, self.state.kv_head))
        self._draw_ranks()

    @property
    def scores(self) -> HeadScores | None:
        """The published scores that ours are held against; None where it is a profile."""
        name, other = self.versus.value
        return self.biography.scores[name] if other is None else None

    def offer(self) -> None:
        """Offer what was loaded since."""
        chosen = self.versus.value
        self.versus.options = self._sources()
        self.versus.value = chosen

    def load(self, path: str) -> None:
        """Read published scores, and hold ours against them."""
        scores = read_head_scores(path, self.heads.profile.geometry)
        name = self.biography.add_scores(scores)
        self.versus.options = self._sources()
        self.versus.value = (name, None)

    def _draw_ranks(self) -> None:
        """All heads in both rankings, unless they are drawn already."""
        key, (name, other) = self.heads.key, self.versus.value
        shown = (key, self.heads.beyond, name, other, self.state.dark)
        if shown == self._shown:
            return
        self.biography.beyond = self.heads.beyond
        kinds = self.biography.patterns(OWN, key).kinds
        ours, ours_title = self.biography.influence(OWN, key), f"by influence, {key[0]}, {key[1]:,} tokens"
        if other is None:
            theirs, title = self.biography.scores[name].values, f"by {self.biography.scores[name].method}, {name}"
        else:
            theirs, title = self.biography.influence(name, other), f"by influence, {described((name, other))}"
        agreed = self.ranks.draw(ours, theirs, ours_title, title, kinds)
        counted = ", ".join(f"{count} {kind}" for kind, count in self.biography.counts(OWN, key).items())
        said = [agreed, f"Kinds at {html.escape(key[0])}, {key[1]:,} tokens: {counted}.", RULE]
        if not self.heads.profile.has_blocks(*key):
            said.append(NO_BLOCKS)
        self.counts.value = f'<div class="moa-facts">{"".join(f"<p>{line}</p>" for line in said)}</div>'
        self._shown = shown

    def _sources(self) -> list[tuple[str, Any]]:
        known = [(described(source), source) for source in self.heads.sources]
        return [*known, *((f"{one.method}: {name}", (name, None)) for name, one in self.biography.scores.items())]
