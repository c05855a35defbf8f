"""Apply and measure: plans beside each other on one model, generation on a prompt, and a table that forgets nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.evaluate import perplexity, retrieval
from moa_lab.evaluate.memory import memory_row
from moa_lab.evaluate.parity import Parity, parity
from moa_lab.models import model_name, weights_fingerprint
from moa_lab.plan import Plan
from moa_lab.provenance import provenance
from moa_lab.records import Measurement, Measurements
from moa_lab.runtime.generate import Generation, generate
from moa_lab.workbench.exporting import PLAN
from moa_lab.workbench.jobs import Handle

KINDS = ("retrieval", "perplexity", "memory")
THROUGHPUT = "decode_tokens_per_s"


@dataclass(frozen=True)
class Entry:
    """One measured row, when it was measured and on what."""

    row: Measurement
    when: str
    device: str
    model: str


class Measuring:
    """Measures plans on one model. history: every row measured here, oldest first; nothing is ever replaced.

    A row's `detail["plan"]` is the plan's identity: plans of a slider all have one name.
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

    def generate(self, prompt: str, plans: Sequence[Plan], max_new_tokens: int, handle: Handle) -> dict[str, Generation]:
        """What the model says to `prompt` under each plan, by name; its tokens a second and bytes enter the history."""
        said: dict[str, Generation] = {}
        for done, plan in enumerate(plans):
            handle.progress(done, len(plans))
            found = generate(self.model, self.tokenizer, prompt, plan=plan, max_new_tokens=max_new_tokens, chat=self._chats)
            said[plan.name] = found
            length, rate = found.prompt_tokens[0] + len(found.tokens[0]), found.decode_tokens_per_s
            detail = {"kv_bytes_predicted": found.kv_bytes_predicted, "kv_bytes_allocated": found.kv_bytes_allocated}
            self._keep(plan, [Measurement(plan.name, THROUGHPUT, "prompt", length, rate, 1, rate, rate, plan.density(length), detail)])
        handle.progress(len(plans), len(plans))
        return said

    def parity(self, plan: Plan, handle: Handle, n_tokens: int | None = None) -> Parity:
        """`moa_lab.parity` of this model under `plan`."""
        return parity(self.model, self.tokenizer, plan, n_tokens=n_tokens, progress=handle.progress)

    def table(self) -> pd.DataFrame:
        """The history, newest first: plan, density, what was measured, value, interval, n, when, where."""
        fields = ("plan", "density", "metric", "task", "length", "value", "low", "high", "n")
        rows = [[*(getattr(entry.row, name) for name in fields), entry.when, entry.device, entry.model] for entry in self.history[::-1]]
        return pd.DataFrame(rows, columns=[*fields, "when", "device", "model"])

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
        measured = retrieval if kind == "retrieval" else perplexity
        return list(measured(self.model, self.tokenizer, plan, lengths=[length], n=n, seed=seed, progress=told))

    def _keep(self, plan: Plan, rows: Sequence[Measurement]) -> None:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        known = [replace(row, detail={**row.detail, PLAN: plan.identity()}) for row in rows]
        self.history += [Entry(row, when, str(self.model.device), model_name(self.model)) for row in known]
