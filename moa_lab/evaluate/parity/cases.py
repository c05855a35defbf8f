"""The parity cases: how many tokens are fed in which steps, chosen for the spans of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moa_lab.cache import layer_layouts
from moa_lab.plan import Plan

DECODED = 96
"""Most tokens that a case decodes one by one."""
ROWS = 3
"""Number of texts, and rows of the largest batch."""


@dataclass(frozen=True)
class Case:
    """Scripts that are run one after the other. A script is a list of steps; a step is the number of new tokens for every row."""

    name: str
    compared: str
    scripts: tuple[tuple[tuple[int, ...], ...], ...]


ONE = (1,)


def ring_sizes(plan: Plan, n_tokens: int) -> list[tuple[int, int]]:
    """(sink slots, ring slots) of every kind of head that does not keep everything, smallest first."""
    found = set()
    for layout in layer_layouts(plan, n_tokens):
        found |= set(zip(layout.sinks.tolist(), layout.rings.tolist(), strict=True))
    return sorted((pair for pair in found if sum(pair) < plan.geometry.max_length), key=lambda pair: (sum(pair), pair))


def all_cases(n: int, sizes: Sequence[tuple[int, int]]) -> tuple[list[Case], list[str]]:
    """The cases of length `n` for heads of these `sizes`, and what is left out, in words."""
    part, chunk = n // 16, n // 7 + 1
    chunks = tuple((min(chunk, n - start),) for start in range(0, n, chunk))
    ragged = (n - 8, n // 2, part)
    # In the third turn one row gets no tokens.
    turns = ((6 * part, part), *[(1, 1)] * 4, (part, 6 * part), *[(1, 1)] * 4, (2 * part, 0), (1, 1))
    cases = [
        Case("one prompt", f"a prompt of {n}", (((n,),),)),
        Case("padded batch", f"prompts of {words(ragged)}, padded on the left, then 8 each", ((ragged, *[(1,) * ROWS] * 8),)),
        Case("ragged turns", f"turns of {words(f'{a}+{b}' for a, b in turns if a > 1)} in two rows, answers between", (turns,)),
        Case("chunked prefill", f"a prompt of {n} in chunks of {chunk}", (chunks,)),
    ]
    wrapping, left_out = [size for size in sizes if sum(size) + 5 <= n], []
    if wrapping:
        spans = sorted({sum(size) for size in wrapping})
        chosen = sorted({spans[0], spans[len(spans) // 2]})
        scripts = tuple(((span + more,), *[ONE] * 4) for span in chosen for more in (-1, 0, 1))
        cases.append(Case("window boundary", f"prompts 1 below, at and 1 above spans of {words(chosen)}, then 4", scripts))
    else:
        left_out.append("window boundary: no head drops anything by then")
    twice = sum(sizes[0]) + sizes[0][1] + 8 if sizes else None
    if twice and twice <= n:
        decoded = min(sizes[0][1] + 8, DECODED, twice - 1)
        cases.append(Case("wrapped twice", f"{twice} tokens, the last {decoded} one by one", (((twice - decoded,), *[ONE] * decoded),)))
    else:
        left_out.append("wrapped twice: " + (f"needs {twice} tokens" if twice else "every head keeps everything"))
    return cases, left_out


def words(values: Any) -> str:
    return ", ".join(map(str, values))
