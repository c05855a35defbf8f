"""Tokens as text, and long texts folded."""

from __future__ import annotations

from tiny import tiny_tokenizer

from moa_lab.trace.pieces import Fold, folded, label, piece, words


def test_tokens_within_a_character_say_nothing_and_the_last_one_says_it() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("né 🙂!", add_special_tokens=False).input_ids
    pieces = [piece(tokenizer, tokens, at) for at in range(len(tokens))]
    assert pieces == ["n", "", "é", " ", "", "", "", "🙂", "!"]
    assert [label(text) for text in pieces] == ["n", "…", "é", "␣", "…", "…", "…", "🙂", "!"]
    assert label("\n\n") == "↵↵"
    assert label("<script>") == "<script>"


def test_control_tokens_are_shown() -> None:
    tokenizer = tiny_tokenizer()
    assert piece(tokenizer, [tokenizer.eos_token_id], 0) == "<eos>"
    assert words(tokenizer, tokenizer("one  two\nthree").input_ids, 5) == "one two thr"


def test_a_long_text_shows_what_is_kept_and_small_gaps() -> None:
    assert folded(100, [(10, 20), (50, 60), (22, 25)]) == [
        Fold(0, 10, False), Fold(10, 25, True), Fold(25, 50, False), Fold(50, 60, True), Fold(60, 100, False),
    ]  # fmt: skip
    assert folded(30, [(-5, 4), (26, 99)]) == [Fold(0, 4, True), Fold(4, 26, False), Fold(26, 30, True)]
    assert folded(40, [(0, 10), (18, 40)]) == [Fold(0, 40, True)], "so few take no more room than a note that they are folded"
    assert folded(10, []) == [Fold(0, 10, False)]
    assert folded(10, [(2, 10)]) == [Fold(0, 10, True)]
