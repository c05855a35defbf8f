"""What a server is told through the environment, and the plans and models that are refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan
from moa_lab.serving.page_layout import PAGE_TOKENS, PageShape, bucket_lengths
from moa_lab.serving.shares import HeadShares

PLAN_VARIABLE = "MOA_LAB_PLAN"
"""Path of the config card that all requests are served under."""
PLAN_LENGTH_VARIABLE = "MOA_LAB_PLAN_LENGTH"
"""The length N in tokens at which the rules of all requests are evaluated; unless given, a request's own."""

GPU_VARIABLE = "MOA_LAB_SERVE_ON_GPU"
"""Set to 1 to serve on an NVIDIA GPU what was not seen to work there: with another version of vLLM, or in stored bits."""
SEEN_ON_GPU = "0.26."
"""What the versions of vLLM that served plans on an NVIDIA GPU (H200) begin with."""


@dataclass(frozen=True)
class ServedPlan:
    """A plan, and the length N at which the windows of all requests are fixed (None: that of each request)."""

    plan: Plan
    n_tokens: int | None = None

    def lengths(self, max_tokens: int, page_tokens: int = PAGE_TOKENS) -> tuple[int, ...]:
        """The lengths N, rising, that windows are taken at where requests have up to `max_tokens`: each takes the next that holds it."""
        return (self.n_tokens,) if self.n_tokens else bucket_lengths(max_tokens, page_tokens)

    def told(
        self, max_tokens: int, page_tokens: int = PAGE_TOKENS, shares: HeadShares | None = None, shape: PageShape | None = None
    ) -> str:
        """A line for the log: the plan, what it keeps, which length a request's windows are taken at, and what that takes on devices, in
        pages of that shape."""
        lengths = self.lengths(max_tokens, page_tokens)
        kept = f"keeps {self.plan.density(lengths[-1]):.1%} of {lengths[-1]:,} tokens"
        at = f"windows as at {lengths[0]:,} tokens" if self.n_tokens else _at_lengths(lengths)
        devices = self._on_devices(shares, lengths[-1], page_tokens, shape)
        return f"plan {self.plan.name!r} ({self.plan.identity()}), {at}: {kept}{devices}"

    def _on_devices(self, shares: HeadShares | None, n_tokens: int, page_tokens: int, shape: PageShape | None) -> str:
        if shares is None or shares.count == 1:
            return ""
        held = "in the model's order" if shares.is_natural else "dealt so that devices hold about as many pages"
        taken = f"{shares.density(self.plan, n_tokens, page_tokens, shape):.1%}"
        return f"; in {shares.count} shares of the heads, {held}, a request takes {taken} of a dense cache's bytes on each device"


def _at_lengths(lengths: tuple[int, ...]) -> str:
    return f"windows as at the length of each request (prompt and max_tokens), rounded up to a multiple of {lengths[0]:,} tokens"


def served_plan(environment: Mapping[str, str] = os.environ) -> ServedPlan | None:
    """The plan that the environment names; None where it names none.

    Raises ValueError for a file that is no config card, and for a length that is no whole number from 1 on.
    """
    path = environment.get(PLAN_VARIABLE)
    if not path:
        return None
    plan = Plan.load(path)
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


def check_device(served: ServedPlan, device: str, version: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError where requests cannot be served under the plan on a device of this type ("cpu", "cuda"), by this version of vLLM."""
    if device == "cpu":
        return
    if device != "cuda":
        raise ValueError(f"a device of type {device} cannot be combined with a plan yet, only cpu and cuda")
    if not version.startswith(SEEN_ON_GPU) and environment.get(GPU_VARIABLE) != "1":
        raise ValueError(f"on a GPU plans were seen to be served by vLLM {SEEN_ON_GPU}x, and this is {version}; {GPU_VARIABLE}=1 tries it")
    if served.plan.bits and environment.get(GPU_VARIABLE) != "1":
        raise ValueError(
            f"stored bits were not yet seen to be served on a GPU, and plan {served.plan.name!r} has some: "
            f"pass plan.with_bits(16), or {GPU_VARIABLE}=1 to try it"
        )
