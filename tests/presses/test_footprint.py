"""The footprint over time: formulas against a loop that holds entries one token at a time."""

from __future__ import annotations

import numpy as np
import pytest

from moa_lab.presses.footprint import read_densely, read_in_spans, read_twice, spans_after_reading, triangle

CONTEXT, REST = 300, 20


def dense_entries(n_tokens: int) -> int:
    return sum(range(1, n_tokens + 1))


def test_a_dense_model_has_a_footprint_of_1() -> None:
    assert triangle(CONTEXT) == dense_entries(CONTEXT)
    assert read_densely(CONTEXT, REST, CONTEXT) == 1
    assert read_in_spans(CONTEXT, REST, [CONTEXT + REST] * 3) == 1
    assert spans_after_reading(CONTEXT, REST, [CONTEXT + REST] * 3) == 1


def test_what_is_read_densely_pays_for_the_whole_context_whatever_it_drops_then() -> None:
    held = dense_entries(CONTEXT) + sum(30 + after for after in range(1, REST + 1))
    assert read_densely(CONTEXT, REST, 30) == held / dense_entries(CONTEXT + REST)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 300, 4096])
def test_spans_hold_what_the_loop_holds(chunk_tokens: int) -> None:
    spans = [10, 64, 299, 10_000]
    held = 0
    for span in spans:
        for token in range(CONTEXT + REST):
            # What was there when the token's chunk came, and of the chunk what is up to the token.
            start = token - token % chunk_tokens
            held += min(start, span) + token - start + 1 if token < CONTEXT else min(token + 1, span)
    expected = held / len(spans) / dense_entries(CONTEXT + REST)
    assert read_in_spans(CONTEXT, REST, spans, chunk_tokens) == pytest.approx(expected, rel=1e-12)


def test_spans_after_reading_hold_the_context_until_it_is_read() -> None:
    held = np.mean([dense_entries(CONTEXT) + sum(min(CONTEXT + 1 + t, span) for t in range(REST)) for span in (10, 310)])
    assert spans_after_reading(CONTEXT, REST, [10, 310]) == pytest.approx(held / dense_entries(CONTEXT + REST), rel=1e-12)


def test_reading_twice_holds_the_whole_context_and_the_chunk_that_is_repeated() -> None:
    again = sum(CONTEXT + token % 128 + 1 for token in range(CONTEXT))
    expected = read_densely(CONTEXT, REST, 30) + again / dense_entries(CONTEXT + REST)
    assert read_twice(CONTEXT, REST, 30, chunk_tokens=128) == pytest.approx(expected, rel=1e-12)
    assert expected > 2
