"""Apply and measure: plans beside each other on one model, generation on a prompt, and a history of all measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.calibration.documents import TextStream, embedded_documents
from moa_lab.evaluate import perplexity, retrieval
from moa_lab.evaluate.intervals import unknown
from moa_lab.evaluate.memory import memory_row
from moa_lab.evaluate.parity import Parity, parity
from moa_lab.geometry import ModelGeometry
from moa_lab.models import model_name, weights_fingerprint
from moa_lab.plan import Plan, dense_plan, uniform_plan
from moa_lab.provenance import provenance
from moa_lab.records import Measurement, Measurements
from moa_lab.runtime.generate import Generation, generate
from moa_lab.text import given_path
from moa_lab.workbench.exporting import PLAN
from moa_lab.workbench.jobs import Handle
from moa_lab.workbench.state import State

KINDS = ("retrieval", "perplexity", "throughput", "memory")
THROUGHPUT = "decode_tokens_per_s"
NEW_TOKENS = 32
"""Tokens decoded per text to measure throughput, at most half of its length."""
COLUMNS = ("plan", "density", "metric", "task", "length", "value", "low", "high", "n", "when", "device", "model")


@dataclass(frozen=True)
class Entry:
    """One measured row, when it was measured and on what."""

    row: Measurement
    when: str
    device: str
    model: str


def recorded(measurements: Measurements) -> list[Entry]:
    """The rows of a record, with time, device and model from its provenance."""
    origin = measurements.provenance
    return [Entry(row, origin.created, origin.device or "", origin.model or "") for row in measurements]


def history_table(entries: Sequence[Entry]) -> pd.DataFrame:
    """Entries, the last first: plan, density, what was measured, value, interval, n, when, where."""
    rows = [[*(getattr(entry.row, name) for name in COLUMNS[:9]), entry.when, entry.device, entry.model] for entry in entries[::-1]]
    return pd.DataFrame(rows, columns=list(COLUMNS))


class Plans:
    """Plans that can be measured: the state's plan and the one it is compared with, those of its run or loaded, dense, uniform.

    Names are unique: a plan with the name of another gets the start of its identity added.
    """

    def __init__(self, state: State) -> None:
        self.state = state

    @property
    def geometry(self) -> ModelGeometry | None:
        """Geometry of the state's model; None where no record tells it."""
        state = self.state
        records = (state.table, state.profile, state.plan, *state.plans, *(point.plan for point in state.front or ()))
        return next((record.geometry for record in records if record is not None), None)

    def offered(self, uniform: float, lengths: Sequence[int] = ()) -> list[Plan]:
        """All of them, the uniform one at density `uniform` and `lengths`; empty where no model is known."""
        geometry, state = self.geometry, self.state
        if geometry is None:
            return []
        known = [plan for plan in (state.plan, state.other, *state.plans) if plan is not None]
        found: dict[str, Plan] = {}
        for plan in (*known, dense_plan(geometry), uniform_plan(geometry, uniform, lengths)):
            if plan.identity() not in {each.identity() for each in found.values()}:
                name = _free(plan, found)
                found[name] = plan if name == plan.name else plan.renamed(name)
        return list(found.values())

    def load(self, path: str | Path) -> Plan:
        """Read a config card, or that of a run's folder, and offer it.

        Raises FileNotFoundError where there is none, RecordError for what is no card, ValueError for a plan of another model.
        """
        given = given_path(path)
        file = given / "plan.json" if given.is_dir() else given
        if not str(path).strip() or not file.is_file():
            raise FileNotFoundError(f"there is no plan at {str(path)!r}: name a config card, or the folder of a run")
        plan = Plan.load(file)
        if self.geometry is not None:
            plan.check_model(self.geometry)
        self.state.set(plans=(*self.state.plans, plan))
        return plan


class Measuring:
    """Measures plans on one model. history: every row measured here, oldest first; nothing is ever replaced.

    A row's `detail["plan"]` is the plan's identity, since all plans of a slider have the same name.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.history: list[Entry] = []

    def measure(self, plans: Sequence[Plan], kinds: Sequence[str], length: int, n: int, seed: int, handle: Handle) -> list[Entry]:
        """Measure every plan by every kind, on the same `n` texts of `length` tokens; rows enter the history as they are done.

        Raises ValueError for no plan, an unknown kind, and a length beyond the model; Cancelled when stopped, what was measured stays.
        """
        if not plans or not kinds or not set(kinds) <= set(KINDS):
            asked = f"{len(plans)} plans and {', '.join(kinds) or 'nothing'}"
            raise ValueError(f"choose at least one plan, and what to measure: {', '.join(KINDS)}; got {asked}")
        before, jobs = len(self.history), [(plan, kind) for plan in plans for kind in kinds]
        handle.progress(0, len(jobs) * n)
        for index, (plan, kind) in enumerate(jobs):

            def told(done: int, _: int, first: int = index * n) -> None:
                handle.progress(first + done, len(jobs) * n)

            self._keep(plan, self._rows(plan, kind, length, n, seed, told))
            handle.progress((index + 1) * n, len(jobs) * n)
        return self.history[before:]

    def generate(
        self, prompt: str, plans: Sequence[Plan], max_new_tokens: int, handle: Handle, text_tokens: int = 0
    ) -> dict[str, Generation]:
        """The model's answer to `prompt` under each plan, by name; its tokens per second and bytes enter the history.

        text_tokens: of an embedded document before the prompt; where prompt and answer are no longer than a plan's shortest span, the
        plan drops nothing. Raises ValueError for what `moa_lab.generate` refuses; Cancelled between plans.
        """
        said: dict[str, Generation] = {}
        asked = f"{self._texts(text_tokens, 1, 0)[0]}\n\n{prompt}" if text_tokens else prompt
        for done, plan in enumerate(plans):
            handle.progress(done, len(plans))
            found = generate(self.model, self.tokenizer, asked, plan=plan, max_new_tokens=max_new_tokens, chat=self._chats)
            said[plan.name] = found
            self._keep(plan, [_rate(plan, found, "prompt")])
        handle.progress(len(plans), len(plans))
        return said

    def parity(self, plan: Plan, handle: Handle, n_tokens: int | None = None) -> Parity:
        """`moa_lab.parity` of this model under `plan`."""
        return parity(self.model, self.tokenizer, plan, n_tokens=n_tokens, progress=handle.progress)

    def table(self) -> pd.DataFrame:
        """`history_table` of what was measured here."""
        return history_table(self.history)

    def save(self, path: str | Path) -> Path:
        """Write the history as one record of measurements; `settings["when"]` has the time of every row."""
        origin = provenance(model=model_name(self.model), weights=weights_fingerprint(self.model), device=str(self.model.device))
        settings: dict[str, Any] = {"when": [entry.when for entry in self.history]}
        return Measurements(tuple(entry.row for entry in self.history), settings, origin).save(path)

    @property
    def _chats(self) -> bool:
        return self.tokenizer.chat_template is not None

    def _rows(self, plan: Plan, kind: str, length: int, n: int, seed: int, told: Any) -> list[Measurement]:
        if kind == "memory":
            return [memory_row(plan, length, self.model.device)]
        if kind == "throughput":
            new = max(min(NEW_TOKENS, length // 2), 1)
            texts = self._texts(max(length - new, 1), n, seed)
            # No stop tokens: all plans decode the same number of tokens.
            return [_rate(plan, generate(self.model, self.tokenizer, texts, plan=plan, max_new_tokens=new, stop_tokens=()), "texts")]
        measured = retrieval if kind == "retrieval" else perplexity
        return list(measured(self.model, self.tokenizer, plan, lengths=[length], n=n, seed=seed, progress=told))

    def _texts(self, tokens: int, n: int, seed: int) -> list[str]:
        """Excerpts of the embedded test documents, of `tokens` tokens each."""
        stream = TextStream(embedded_documents("test"), self.tokenizer, seed)
        return [str(self.tokenizer.decode(stream.take(tokens))) for _ in range(n)]

    def _keep(self, plan: Plan, rows: Sequence[Measurement]) -> None:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        known = [replace(row, detail={**row.detail, PLAN: plan.identity()}) for row in rows]
        self.history += [Entry(row, when, str(self.model.device), model_name(self.model)) for row in known]


def _rate(plan: Plan, found: Generation, task: str) -> Measurement:
    """Tokens per second of all rows together, at the length of the longest with its answer; timed once, so without an interval."""
    length = max(prompt + len(answer) for prompt, answer in zip(found.prompt_tokens, found.tokens, strict=True))
    rate, rows = found.decode_tokens_per_s, len(found.texts)
    detail = {"kv_bytes_predicted": found.kv_bytes_predicted, "kv_bytes_allocated": found.kv_bytes_allocated, "prefill_s": found.prefill_s}
    return Measurement(plan.name, THROUGHPUT, task, length, *unknown(rate, rows), plan.density(length), detail)


def _free(plan: Plan, taken: Mapping[str, Plan]) -> str:
    """The plan's name, or one that is not taken."""
    return plan.name if plan.name not in taken else f"{plan.name} {plan.identity()[:6]}"
