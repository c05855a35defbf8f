"""Trace and what if: one answer dense and under plans that are changed head by head, and the heads behind each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.geometry.wrappers import plain_model
from moa_lab.models import geometry_of
from moa_lab.plan import Plan, dense_plan, with_span
from moa_lab.runtime.arguments import stop_ids
from moa_lab.trace import (
    Answer,
    Case,
    HeadShare,
    TokenTrace,
    Tracer,
    answer,
    culprit,
    culprits,
    drawn_cases,
    first_lost,
    named_head,
    piece,
    prompt_case,
    why,
)
from moa_lab.workbench.jobs import Handle
from moa_lab.workbench.trials import Trial, Trials

TRIED_SAMPLES = 16
"""Test samples among which a lost one is looked for."""


Room = tuple[int, int, int]
"""Layer, KV head, and the span in tokens that it needs."""
NO_HEAD = "no head that the plan cuts would bring this token back: choose another token, or set a span yourself"
FEW = 0.1
"""Nats that a token loses from which it counts as less likely."""
DENSE_STEP, PLAN_STEP, HEADS_STEP = "the dense model answers", "the plan answers", "heads behind the token"
LOST_STEP = "looking for a lost sample, at most in 16"
"""What a job says that it does."""
ROUNDS = 6
"""Of `Tracing.rescue`."""
NAMED = 2
"""Heads that are named one by one."""


@dataclass(frozen=True)
class TokenRow:
    """One token of the answer: its text, its probability dense and under the plan, what it loses in nats, the plan's own word there
    (where another is likelier), and whether it is the first that differs.
    """

    text: str
    dense: float
    cut: float
    loss_change: float
    instead: str | None
    is_first_difference: bool


class Tracing:
    """One case on one model. dense: its answer in the dense model. trials: the plans tried on it. trace: of the token looked at last.

    Raises ValueError, in all that needs one, where nothing was asked yet.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = plain_model(model), tokenizer
        self.geometry = geometry_of(self.model)
        self.case: Case | None = None
        self.dense: Answer | None = None
        self.trials = Trials()
        self.trace: TokenTrace | None = None
        self._tracer: Tracer | None = None
        self._traced: dict[tuple[str, int], TokenTrace] = {}
        self._known: dict[str, Answer] = {}
        self._stops = stop_ids(self.model, tokenizer, None)

    def ask(self, prompt: str, max_new_tokens: int, handle: Handle, text_tokens: int = 0) -> Case:
        """Trace `prompt` and the dense model's answer to it (`moa_lab.trace.prompt_case`)."""
        asking = handle.part(0, 2)
        case = prompt_case(
            self.model, self.tokenizer, prompt, max_new_tokens, text_tokens=text_tokens, progress=asking.progress
        )  # fmt: skip
        return self.take(case, handle.part(1, 2))

    def draw(self, kind: str, length: int, seed: int, handle: Handle) -> Case:
        """Trace a test sample of `length` tokens, "needle" or "line" (`moa_lab.trace.drawn_cases`)."""
        return self.take(drawn_cases(self.tokenizer, kind, length, 1, seed)[0], handle)

    def draw_lost(self, kind: str, length: int, seed: int, plan: Plan, handle: Handle, n: int = TRIED_SAMPLES) -> Case:
        """Trace the first of `n` test samples that the dense model answers and `plan` does not. Raises ValueError where there is none."""
        cases = drawn_cases(self.tokenizer, kind, length, n, seed)
        lost = first_lost(self.model, plan, cases, self._stops, handle.progress)
        if lost is None:
            raise ValueError(
                f"plan {plan.name!r} loses none of {n} samples ({kind}, {length:,} tokens) that the dense model answers: "
                "try a lower density, a longer text or another seed"
            )
        self._begin(lost.case, lost.dense)
        self._known[plan.identity()] = lost.cut
        return lost.case

    def take(self, case: Case, handle: Handle) -> Case:
        """Trace `case` from now on; trials of another one are forgotten."""
        self._begin(case, answer(self.model, case, dense_plan(self.geometry), self._stops, handle.progress))
        return case

    def _begin(self, case: Case, dense: Answer) -> None:
        self.case, self.dense, self.trials, self.trace = case, dense, Trials(), None
        self._tracer, self._traced, self._known = Tracer(self.model, case), {}, {}

    def try_plan(self, plan: Plan, what: str, handle: Handle) -> Trial:
        """Answer under `plan`, which becomes the current trial. what: how it came about, in words. A plan tried before is not run again."""
        case, dense = self._asked()
        plan.check_model(self.geometry)
        trial = self.trials.find(plan)
        if trial is None:
            known = dense if plan.is_dense else self._known.get(plan.identity())
            found = known or answer(self.model, case, plan, self._stops, handle.progress)
            trial = Trial(plan, found, what, plan.density(case.n_tokens), found.loss - dense.loss)
        self.trials.keep(trial)
        return trial

    def change(self, layer: int, kv_head: int | None, tokens: int | None, handle: Handle) -> Trial:
        """`try_plan` with a span of `tokens` (None: everything) in a KV head (None: the whole layer) of the current trial's plan.

        Raises ValueError where that is what it keeps of this text already: the answer would be the same.
        """
        case, _ = self._asked()
        before = self._current().plan
        plan = with_span(before, layer, kv_head, tokens)
        if np.array_equal(plan.spans(case.n_tokens), before.spans(case.n_tokens)):
            raise ValueError(f"{changed(layer, kv_head, tokens)} of these {case.n_tokens:,} is what it keeps already")
        return self.try_plan(plan, changed(layer, kv_head, tokens), handle)

    def look(self, index: int, handle: Handle) -> TokenTrace:
        """Trace token `index` of the answer under the current trial's plan."""
        self._asked()
        assert self._tracer is not None
        plan = self._current().plan
        key = (plan.identity(), index)
        if key not in self._traced:
            self._traced[key] = self._tracer.token(index, plan, handle.progress)
        self.trace = self._traced[key]
        return self.trace

    def telling(self) -> int:
        """The token that tells most: the first that differs under the current plan, or else the one that loses most; where none loses
        `FEW` nats, the first that is more than space.
        """
        case, dense = self._asked()
        found = self._current().answer
        if found.first_difference is not None:
            return found.first_difference
        lost = found.losses - dense.losses
        if lost.max() >= FEW:
            return int(np.argmax(lost))
        return next((index for index in range(len(case.answer)) if self.piece(case.start + index).strip()), 0)

    def rows(self) -> list[TokenRow]:
        """The answer's tokens, in order, under the current plan."""
        case, dense = self._asked()
        cut = self._current().answer
        told = []
        for index, token in enumerate(case.answer):
            likeliest = int(cut.likeliest[index])
            spelled = [*case.tokens[: case.start + index], likeliest]
            told.append(
                TokenRow(
                    text=self.piece(case.start + index),
                    dense=float(dense.probabilities[index]),
                    cut=float(cut.probabilities[index]),
                    loss_change=float(cut.losses[index] - dense.losses[index]),
                    instead=None if likeliest == token else piece(self.tokenizer, spelled, len(spelled) - 1),
                    is_first_difference=index == cut.first_difference,
                )
            )
        return told

    def piece(self, position: int) -> str:
        """The text of the token at a position of the case."""
        return piece(self.tokenizer, self._asked()[0].tokens, position)

    def said(self, found: Answer) -> str:
        """An answer as text, without the token that ends it."""
        tokens = [token for token in found.said if token not in self._stops]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))

    def looked(self) -> dict[int, TokenTrace]:
        """The tokens of the answer that were looked at under the current plan, by number."""
        identity = self._current().plan.identity()
        return {index: trace for (plan, index), trace in sorted(self._traced.items()) if plan == identity}

    def why(self, trace: TokenTrace | None = None) -> str:
        """One sentence on a token that was looked at under the current plan; None: the last one."""
        return why(self.tokenizer, trace or self._looked(), self._current().answer, self.dense)

    def head(self) -> HeadShare:
        """The head of the token that was looked at last which `why` names, or else the first of its heads."""
        trace = self._looked()
        return named_head(trace, self._current().answer, self.dense) or trace.shares[0]

    def room(self) -> Room:
        """The span that the head needs which lost the token looked at last. Raises ValueError where no head did."""
        share = culprit(self._looked())
        if share is None:
            raise ValueError(NO_HEAD)
        return share.layer, share.kv_head, max(share.room, self._looked().plan.min_span)

    def rescue(self, handle: Handle, rounds: int = ROUNDS) -> Trial:
        """Give room to all heads to which the cut of the first lost token matters, answer again, and so on until the answer is back.

        Every round is a trial; other heads keep what they had, so density grows. Raises ValueError where no head would bring a token
        back, and where the answer is still another after `rounds`.
        """
        for number in range(rounds):
            trial = self._current()
            if trial.answer.first_difference is None:
                return trial
            looking, giving = 2 * number, 2 * number + 1
            shares = culprits(self.look(trial.answer.first_difference, handle.part(looking, 2 * rounds, HEADS_STEP)))
            if not shares:
                raise ValueError(NO_HEAD)
            self._give(
                [(share.layer, share.kv_head, max(share.room, trial.plan.min_span)) for share in shares],
                handle.part(giving, 2 * rounds, PLAN_STEP),
            )
        if not self._current().is_same:
            raise ValueError(f"after {rounds} rounds the answer is still another one; a further press goes on")
        return self._current()

    def _give(self, rooms: Sequence[Room], handle: Handle) -> None:
        plan = self._current().plan
        for layer, kv_head, tokens in rooms:
            plan = with_span(plan, layer, kv_head, tokens)
        self.try_plan(plan, given(rooms), handle)

    def _looked(self) -> TokenTrace:
        if self.trace is None:
            raise ValueError("choose a token of the answer first")
        return self.trace

    def _current(self) -> Trial:
        if self.trials.current is None:
            raise ValueError("no plan was tried yet")
        return self.trials.current

    def _asked(self) -> tuple[Case, Answer]:
        if self.case is None or self.dense is None:
            raise ValueError("nothing was asked yet: press Answer first")
        return self.case, self.dense


def given(rooms: Sequence[Room]) -> str:
    """Heads that got room, in words."""
    named = [f"layer {layer}, KV head {kv_head}" for layer, kv_head, _ in rooms[:NAMED]]
    more = f" and {len(rooms) - NAMED} more" if len(rooms) > NAMED else ""
    return f"{'; '.join(named)}{more}: room for {'its source' if len(rooms) == 1 else 'their sources'}"


def changed(layer: int, kv_head: int | None, tokens: int | None) -> str:
    """A change of a head's or a layer's span, in words."""
    where = f"layer {layer}" if kv_head is None else f"layer {layer}, KV head {kv_head}"
    return f"{where}: {'everything' if tokens is None else f'{tokens:,} tokens'}"
