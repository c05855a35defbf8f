"""Decoding end to end: the jobs and sides of rows E1 to E6, and the findings."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moa_lab.bench.models import LLAMA2_7B, LLAMA3_8B, TINY, ModelShape
from moa_lab.bench.shapes import DEFAULT_PLANS
from moa_lab.plan import WHOLE_BITS, Bits, Plan, mixed_name

ROWS = ("E1", "E2", "E3", "E4", "E5", "E6")
STORED: Bits = (8, 8)
"""Bits of K and V in rows E5 and E6."""
DYNAMIC, STATIC, DENSE = "transformers DynamicCache", "transformers StaticCache compiled", "ours dense"
COMPILED = " compiled"
KINDS = ("plan", "dense", "dynamic", "static", "compiled")
"""Kinds of sides: ours under a plan, ours dense, transformers' two caches, ours under a plan after `torch.compile`."""

TOLD = ("vLLM-bf16", "vLLM-fp8")
"""Peers that cannot run in this process: rows E5 and E6 are held against what a run elsewhere told of them."""

LENGTHS, LONG = (4096, 8192, 16384), (32768, 65536)
QUICK_LENGTHS, QUICK_LONG = (64, 128), (192,)

Found = dict[str, Any]
Key = tuple[str, int, str]
"""Model, prompt tokens, side."""


@dataclass(frozen=True)
class Job:
    """A row of the table at one prompt length under one plan, stored in `bits` of K and V."""

    row: str
    shape: ModelShape
    prompt: int
    plan: str
    bits: Bits = WHOLE_BITS

    @property
    def stored(self) -> str:
        """The plan's name with its bits."""
        return mixed_name(self.plan, self.bits)

    @property
    def beside(self) -> str | None:
        """Our side under the same plan in 16 bits, where the row has fewer."""
        return None if self.bits == WHOLE_BITS else ours_name(self.plan)


@dataclass
class Findings:
    """What to measure, and what is measured so far.

    told: tokens/s of `TOLD` by (peer, prompt). found: a side that did not run has only "failed". used: the plan of each of our sides.
    checks: results of `check_tokens` by (model, plan with its bits).
    """

    device: torch.device
    dtype: torch.dtype
    plans: dict[str, Plan | str | Path]
    jobs: tuple[Job, ...]
    rows: Collection[str]
    kinds: Collection[str]
    new_tokens: int
    copy_bytes: float
    told: dict[tuple[str, int], float] = field(default_factory=dict)
    found: dict[Key, Found] = field(default_factory=dict)
    used: dict[Key, Plan] = field(default_factory=dict)
    checks: dict[tuple[str, str], Found] = field(default_factory=dict)

    @property
    def is_gpu(self) -> bool:
        """True on a GPU: times on a CPU are not meaningful."""
        return self.device.type == "cuda"

    def n_tokens(self, prompt: int) -> int:
        """Final length of a row in tokens."""
        return prompt + self.new_tokens


def jobs_of(rows: Collection[str], quick: bool, plans: Collection[str], lengths: Collection[int] | None = None) -> tuple[Job, ...]:
    """The jobs of the rows; E3 uses the jobs of the others, alone those of E1. lengths: of prompts, None for all."""
    halves, quarters = [(name,) for name in DEFAULT_PLANS] if set(DEFAULT_PLANS) <= set(plans) else [tuple(plans)] * 2
    short, long = (QUICK_LENGTHS, QUICK_LONG) if quick else (LENGTHS, LONG)
    every = {
        "E1": (LLAMA2_7B, short, halves, WHOLE_BITS),
        "E2": (LLAMA2_7B, short, quarters, WHOLE_BITS),
        "E4": (LLAMA3_8B, long, halves, WHOLE_BITS),
        "E5": (LLAMA2_7B, short, halves, STORED),
        "E6": (LLAMA2_7B, short, quarters, STORED),
    }
    wanted = [row for row in every if row in rows] or ["E1"]
    return tuple(
        Job(row, TINY if quick else shape, prompt, plan, bits)
        for row in wanted
        for shape, prompts, named, bits in [every[row]]
        for prompt in prompts
        if lengths is None or prompt in lengths
        for plan in named
    )


def tasks_of(state: Findings, shape: ModelShape) -> list[tuple[int, str]]:
    """(prompt, side) of a model that are not measured yet, each once; those that compile for up to a minute come last."""
    jobs = [job for job in state.jobs if job.shape == shape]
    prompts = list(dict.fromkeys(job.prompt for job in jobs))
    ours = list(dict.fromkeys((job.prompt, side) for job in jobs for side in (ours_name(job.stored), job.beside) if side))
    sides = {
        "plan": ours,
        "dense": [(prompt, DENSE) for prompt in prompts],
        "dynamic": [(prompt, DYNAMIC) for prompt in prompts],
        "static": [(prompt, STATIC) for prompt in prompts],
        "compiled": [(prompt, side + COMPILED) for prompt, side in ours],
    }
    return [task for kind in KINDS if kind in state.kinds for task in sides[kind] if (shape.name, *task) not in state.found]


def ours_name(plan: str) -> str:
    """Our side under a plan."""
    return f"ours {plan}"
