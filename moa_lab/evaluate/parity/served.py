"""Parity of what serves a plan: its greedy tokens against passes under full attention masks, on the same model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moa_lab.evaluate.parity.bench import Bench
from moa_lab.evaluate.parity.cases import words
from moa_lab.evaluate.parity.record import ParityRow
from moa_lab.evaluate.parity.tally import Tally
from moa_lab.serving import Answers

SAME_TOKENS = 0.99
"""Share of the positions, ties aside, that must be answered alike: an engine sums in another order."""
AT_ONCE = 8


@dataclass(frozen=True)
class ServedCase:
    """Requests that are asked at once. totals: prompt and new tokens of each."""

    name: str
    compared: str
    totals: tuple[int, ...]
    new: int


def served_cases(n: int, lengths: Sequence[int], at_once: int = AT_ONCE) -> list[ServedCase]:
    """Requests of up to `n` tokens, for windows that are taken at `lengths`."""
    new = max(min(n // 16, 64), 1)
    # Requests that fill a bucket, so that the windows are those of exactly their length; or of any length, where windows are fixed.
    full = [each for each in lengths if new < each <= n] if len(lengths) > 1 else list(range(n // at_once, n + 1, max(n // at_once, 1)))
    totals = tuple(max(each, new + 1) for each in (full[-1 - k * len(full) // at_once % len(full)] for k in range(at_once)))
    return [
        ServedCase("one prompt", f"a prompt of {n - new} tokens, {new} new", (n,), new),
        ServedCase("long answer", f"a prompt of {n // 16}, {n - n // 16} new", (n,), n - n // 16),
        ServedCase("requests at once", f"{at_once} requests of {words(sorted(set(totals)))} in all, {new} new", totals, new),
        ServedCase("asked again", "the same requests", totals, new),
    ]


def served_length(answers: Answers, wanted: int) -> int:
    """The length of the longest requests: the first that windows are taken at from `wanted` on, within what the server takes."""
    if len(answers.lengths) == 1:
        return min(wanted, answers.max_tokens)
    return next((each for each in answers.lengths if each >= wanted), answers.lengths[-1])


@torch.no_grad()
def served_row(bench: Bench, case: ServedCase, answers: Answers) -> ParityRow:
    """Ask, then hold every token against the reference's likeliest one after the tokens before it (teacher forcing)."""
    texts = bench.texts
    prompts = [texts[row % len(texts), : total - case.new] for row, total in enumerate(case.totals)]
    tally = Tally(2 * bench.tolerance, SAME_TOKENS)
    for prompt, said in zip(prompts, answers.tokens([prompt.tolist() for prompt in prompts], case.new), strict=True):
        answer = torch.tensor(said, device=texts.device)
        tokens = torch.cat([prompt, answer[:-1]])[None]
        at = torch.arange(len(prompt) - 1, tokens.shape[1], device=texts.device)
        total = len(prompt) + case.new
        windows_at = next((each for each in answers.lengths if each >= total), answers.lengths[-1])
        tally.add_tokens(answer, bench.reference(tokens, at, windows_at))
    return tally.row(case.name, case.compared)
