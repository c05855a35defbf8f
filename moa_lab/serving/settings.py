"""What a server is told through the environment, and the plans and models that are refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan

PLAN_VARIABLE = "MOA_LAB_PLAN"
"""Path of the config card that all requests are served under."""
PLAN_LENGTH_VARIABLE = "MOA_LAB_PLAN_LENGTH"
"""The length N in tokens at which elastic rules are evaluated; unless given, the longest request that the server takes."""


@dataclass(frozen=True)
class ServedPlan:
    """A plan, and the length N at which its windows are fixed (None: the longest request)."""

    plan: Plan
    n_tokens: int | None = None

    def length(self, max_tokens: int) -> int:
        """The length N of the windows, where requests have up to `max_tokens`."""
        return self.n_tokens or max_tokens

    def told(self, max_tokens: int) -> str:
        """A line for the log: the plan, and what it keeps."""
        n = self.length(max_tokens)
        return f"plan {self.plan.name!r} ({self.plan.identity()}), windows as at {n:,} tokens: keeps {self.plan.density(n):.1%} there"


def served_plan(environment: Mapping[str, str] = os.environ) -> ServedPlan | None:
    """The plan that the environment names; None where it names none.

    Raises ValueError for a file that is no config card, for stored bits, and for a length that is no whole number from 1 on.
    """
    path = environment.get(PLAN_VARIABLE)
    if not path:
        return None
    plan = Plan.load(path)
    plan.check_untouched("serving")
    text = environment.get(PLAN_LENGTH_VARIABLE)
    if not text:
        return ServedPlan(plan)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{PLAN_LENGTH_VARIABLE} must be a whole number of tokens, at least 1, got {text!r}")
    return ServedPlan(plan, int(text))


def check_served(served: ServedPlan, config: Any, max_tokens: int) -> None:
    """Raise ValueError where the model of `config` (of transformers) cannot be served under the plan.

    max_tokens: of the longest request.
    """
    served.plan.check_model(ModelGeometry.from_config(config))
    if served.n_tokens is not None and served.n_tokens > max_tokens:
        raise ValueError(f"{PLAN_LENGTH_VARIABLE} is {served.n_tokens}, and the server takes requests of at most {max_tokens} tokens")
