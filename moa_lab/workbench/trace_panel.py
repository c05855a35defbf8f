"""Trace: an answer dense against plan, the heads and texts behind each token, and what changes when a head gets another span."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import ipywidgets as w

from moa_lab.plan import Plan, uniform_plan
from moa_lab.trace import TokenTrace, culprit
from moa_lab.workbench import trace_views
from moa_lab.workbench.budget_panel import BudgetPanel
from moa_lab.workbench.chips import Chips
from moa_lab.workbench.jobs import Handle
from moa_lab.workbench.measure_panel import PROMPT, TEXT_TOKENS
from moa_lab.workbench.measuring import Plans
from moa_lab.workbench.state import State
from moa_lab.workbench.token_heads import TokenHeads
from moa_lab.workbench.tracing import DENSE_STEP, HEADS_STEP, LOST_STEP, PLAN_STEP, Tracing, given
from moa_lab.workbench.what_if import WhatIf
from moa_lab.workbench.widgets import OWN_WIDTH, Errors, Work, button, choice, row, whole

TAB = "Trace"
OWN, NEEDLE, LOST, LINE, LOST_LINE = "prompt", "needle", "lost needle", "line", "lost line"
KINDS = [
    ("a needle", NEEDLE), ("a needle that the plan loses", LOST), ("your own prompt", OWN), ("a line of a register", LINE),
    ("a line that the plan loses", LOST_LINE),
]  # fmt: skip

Todo = Callable[[Tracing, Handle], object]


class TracePanel:
    """tracing: makes the controller, and with it loads the model, when it is first needed. budget: tells where heads that get room are
    pinned, if the plan is that panel's; None: the head alone is changed.
    """

    def __init__(
        self, state: State, tracing: Callable[[], Tracing], budget: Callable[[], BudgetPanel | None] = lambda: None, length: int = 1024
    ) -> None:
        self.state, self.errors, self._make, self._budget = state, Errors("trace"), tracing, budget
        self._tracing: Tracing | None = None
        self._todo: Todo | None = None
        self._wanted: int | None = None
        # The state's plan when the job that runs was started.
        self._chosen: Plan | None = None
        self._giving = self._has_given = False
        self._is_older = False
        geometry = Plans(state).geometry
        longest = geometry.max_length if geometry else 131072
        self.kind = choice("trace", KINDS, "trace-kind", "290px")
        self.length = whole("of (tokens)", min(length, longest), 64, longest, "trace-length", "170px")
        self.seed = whole("seed", 0, 0, 2**31 - 1, "trace-seed", "120px")
        self.prompt = w.Textarea(value=PROMPT, description="prompt", layout=w.Layout(width="400px", height="60px"), style=OWN_WIDTH)
        self.prompt.add_class("moa-trace-prompt")
        self.text = whole("after a text of (tokens)", min(TEXT_TOKENS, longest // 2), 0, longest, "trace-text", "230px")
        self.new = whole("new tokens", 32, 1, 512, "trace-new", "170px")
        self.own, self.test = row(self.prompt, self.text, self.new), row(self.length, self.seed)
        self.work = Work("Answer", "trace-work", self.errors, self._begin, lambda _: self._ended())
        self.said, self.hint, self.why = w.HTML(), w.HTML(), w.HTML()
        self.said.add_class("moa-trace-said")
        self.why.add_class("moa-trace-why")
        self.tokens = Chips("tokens", self.errors.guard(self.look))
        self.room = button("Give that head the room", "trace-room", "pin the head to the span that shows it what it lost, and answer again")
        self.rooms = button("Give room until the answer is back", "trace-rooms", "to all heads that lost it, at the cost of density")
        self.token = TokenHeads(state, self.errors, TAB)
        self.what_if = WhatIf(state, self.errors, self._change, self._again, longest)
        self.works = (self.work,)
        self.kind.observe(lambda _: self._offer(), "value")
        self.room.on_click(self.errors.guard(lambda _: self.give_room()))
        self.rooms.on_click(self.errors.guard(lambda _: self._step(lambda tracing, handle: tracing.rescue(handle))))
        self.behind = w.VBox([row(self.why), row(self.room, self.rooms), self.token.box, self.what_if.box])
        asked = row(self.kind, self.test, self.own)
        answered = [self.work.box, self.errors.box, self.said, self.hint, self.tokens.box]
        self.box = w.VBox([w.HTML(trace_views.STYLE), asked, *answered, self.behind])
        self._offer()
        state.watch_in(TAB, ["plan"], self.errors.guard(self._new_plan))
        state.watch_in(TAB, ["layer", "kv_head", "dark"], self.errors.guard(self.draw))
        self.show()

    @property
    def tracing(self) -> Tracing | None:
        """The answer that is traced; None before the first, and while another is being made."""
        return None if self.work.is_running else self._tracing

    def look(self, index: int) -> None:
        """Trace token `index` of the answer; while another is traced, it comes next."""
        self._wanted = index
        if not self.work.is_running:
            self._do(lambda tracing, handle: tracing.look(index, handle.part(0, 1, HEADS_STEP)))

    def give_room(self) -> None:
        """Give the head that lost the token the span it needs, and answer again.

        Raises ValueError where no head lost it, and where the budget cannot hold it.
        """
        tracing = self._held()
        layer, kv_head, tokens = tracing.room()
        self.check_idle()
        self.state.set(layer=layer, kv_head=kv_head)
        budget = self._budget()
        if budget is None or tracing.case is None or not budget.holds(self._plan(tracing)):
            return self._step(lambda tracing, handle: tracing.change(layer, kv_head, tokens, handle))
        self._giving = self._has_given = True
        try:
            plan = budget.give(layer, kv_head, tokens, tracing.case.n_tokens)
        finally:
            self._giving = False
        self._try(plan, f"{given([(layer, kv_head, tokens)])}, the rest solved again")

    def another_model(self) -> None:
        """Load the model named now when it is next needed. Raises ValueError while something runs."""
        self.check_idle()
        self._tracing = None
        self.show()

    def show(self) -> None:
        """Show the answers, the tokens and, where one was looked at, what is behind it."""
        tracing = self._tracing
        trial = None if tracing is None else tracing.trials.current
        if tracing is None or trial is None:
            self.tokens.show([])
            self.hint.value = trace_views.heading("", trace_views.START_HINT)
            self.said.value = "" if tracing is None else trace_views.said_html(tracing, None, self._is_older)
            self.behind.layout.display = "none"
            return
        self.said.value = trace_views.said_html(tracing, trial, self._is_older)
        self.hint.value = trace_views.heading("Token by token", trace_views.TOKENS_HINT)
        trace = self._trace()
        self.tokens.show(trace_views.token_chips(tracing.rows(), None if trace is None else trace.index))
        self.what_if.show(tracing.trials)
        self.behind.layout.display = "none" if trace is None else ""
        self.draw()

    def draw(self) -> None:
        """Draw what is behind the token: the sentence, the heads, and the text as one of them read it."""
        tracing, trace = self._tracing, self._trace()
        if tracing is None or trace is None:
            return
        self.what_if.show(tracing.trials)
        self.why.value = f'<div class="moa-why" role="status">{html.escape(tracing.why())}</div>'
        # The head of the sentence, if that lost something.
        lost_it = culprit(trace)
        self.room.disabled = lost_it is None or tracing.head() is not lost_it
        self.rooms.disabled = tracing.trials.current is None or tracing.trials.current.is_same
        self.token.show(tracing, trace)

    def _offer(self) -> None:
        own = self.kind.value == OWN
        self.own.layout.display, self.test.layout.display = ("", "none") if own else ("none", "")

    def _begin(self) -> Callable[[Handle], Any]:
        asks = self._todo is None
        todo, self._todo = self._todo or self._ask(), None
        self._wanted, self._chosen = None, self.state.plan
        before = None if self._tracing is None else self._tracing.case

        def work(handle: Handle) -> None:
            # Of the answer before, until there is another.
            self._is_older = self._is_older or (asks and before is not None)
            try:
                todo(self._model(), handle)
            finally:
                self._is_older = self._is_older and self._tracing is not None and self._tracing.case is before
                # Also what was done before a cancellation.
                self.errors.guard(self.show)()

        return work

    def _ask(self) -> Todo:
        """What the button does, with what the boxes hold now."""
        kind, length, seed = self.kind.value, self.length.value, self.seed.value
        prompt, new, text = self.prompt.value, self.new.value, self.text.value

        def todo(tracing: Tracing, handle: Handle) -> None:
            plan = self._plan(tracing)
            asking = handle.part(0, 3, LOST_STEP if kind in (LOST, LOST_LINE) else DENSE_STEP)
            if kind == OWN:
                tracing.ask(prompt, new, asking, text)
            elif kind in (LOST, LOST_LINE):
                tracing.draw_lost(kind.split()[-1], length, seed, plan, asking)
            else:
                tracing.draw(kind, length, seed, asking)
            self._follow(tracing, plan, plan.name, handle, 1)

        return todo

    def _follow(self, tracing: Tracing, plan: Plan, what: str, handle: Handle, done: int = 0) -> None:
        """Answer under `plan`, and look at the same token as before, or else at the first that differs; after so many steps."""
        before = tracing.trace
        tracing.try_plan(plan, what, handle.part(done, done + 2, PLAN_STEP))
        tracing.look(tracing.telling() if before is None else before.index, handle.part(done + 1, done + 2, HEADS_STEP))
        if before is None:
            share = tracing.head()
            self.state.set(layer=share.layer, kv_head=share.kv_head)
        if self._keeps_plan:
            self.state.set(plan=tracing.trials.current.plan if tracing.trials.current else plan)

    def _try(self, plan: Plan, what: str) -> None:
        self._do(lambda tracing, handle: self._follow(tracing, plan, what, handle))

    def _change(self, layer: int, kv_head: int | None, tokens: int | None) -> None:
        def change(tracing: Tracing, handle: Handle) -> object:
            return tracing.change(layer, kv_head, self._plan(tracing).min_span if tokens == 0 else tokens, handle)

        self._held()
        self._step(change)

    def _step(self, change: Todo) -> None:
        """Change the plan, answer again, and look at the same token."""

        def todo(tracing: Tracing, handle: Handle) -> None:
            change(tracing, handle.part(0, 2, PLAN_STEP))
            self._again_in(tracing, handle.part(1, 2, HEADS_STEP))

        self._do(todo)

    def _again(self) -> None:
        self._do(lambda tracing, handle: self._again_in(tracing, handle.part(0, 1, HEADS_STEP)))

    def _again_in(self, tracing: Tracing, handle: Handle) -> None:
        """Look at the same token under the current trial's plan, which becomes the state's."""
        tracing.look(tracing.telling() if tracing.trace is None else tracing.trace.index, handle)
        if tracing.trials.current is not None and self._keeps_plan:
            plan = tracing.trials.current.plan
            budget = self._budget() if self._has_given else None
            if budget is not None:
                budget.back_to(plan)
            self.state.set(plan=plan)

    def _new_plan(self) -> None:
        """Another panel chose a plan: answer again under it."""
        tracing, plan = self._tracing, self.state.plan
        if self._giving or tracing is None or tracing.trials.current is None or plan is None or self.work.is_running:
            return
        if plan.identity() != tracing.trials.current.plan.identity():
            self._try(plan, plan.name)

    @property
    def _keeps_plan(self) -> bool:
        """Whether no other panel has chosen a plan since the job that runs was started."""
        return self.state.plan is self._chosen

    def _do(self, todo: Todo) -> None:
        self.check_idle()
        self._todo = todo
        self.work.start.click()

    def _ended(self) -> None:
        wanted, self._wanted = self._wanted, None
        trace = self._trace()
        if wanted is not None and trace is not None and trace.index != wanted:
            self.look(wanted)
        elif self.state.tab in ("", TAB):
            # A plan that was chosen meanwhile.
            self._new_plan()

    def _trace(self) -> TokenTrace | None:
        """What is shown: the trace of a token under the current trial's plan, or none."""
        tracing = self._tracing
        if tracing is None or tracing.trace is None or tracing.trials.current is None:
            return None
        same = tracing.trace.plan.identity() == tracing.trials.current.plan.identity()
        return tracing.trace if same else None

    def _plan(self, tracing: Tracing) -> Plan:
        current = tracing.trials.current
        return self.state.plan or (current.plan if current else uniform_plan(tracing.geometry, 0.5))

    def _model(self) -> Tracing:
        if self._tracing is None:
            self.work.label.value = "loading the model"
            self._tracing = self._make()
        return self._tracing

    def _held(self) -> Tracing:
        if self._tracing is None or self._tracing.case is None:
            raise ValueError("nothing was asked yet: press Answer first")
        return self._tracing

    def check_idle(self) -> None:
        """Raise ValueError while a job runs."""
        if self.work.is_running:
            raise ValueError("an answer is under way: cancel it first, or wait for its end")
