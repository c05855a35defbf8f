"""Parity of what serves a plan, with the model itself in the place of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import exit_code
from served_engine import expected
from texts import bpe_tokenizer
from tiny import tiny_model
from tiny_plans import mixed_plan
from transformers import PreTrainedModel

from moa_lab.evaluate.parity import Parity, served_parity
from moa_lab.plan import Plan, SpanRule
from moa_lab.serving import bucket_lengths


def growing(model: PreTrainedModel, share: float = 1 / 3) -> Plan:
    plan = mixed_plan(model)
    return replace(plan, rules=tuple(tuple(SpanRule(3.0, share) for _ in row) for row in plan.rules))


class Itself:
    """The model under a plan, as a server would answer. wrong: last tokens that are others."""

    def __init__(self, model: PreTrainedModel, plan: Plan, lengths: tuple[int, ...], wrong: int = 0) -> None:
        self.model, self.plan, self.lengths, self.max_tokens, self.wrong = model, plan, lengths, lengths[-1], wrong
        self.asked: list[list[int]] = []

    def tokens(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        self.asked.append([len(prompt) + new for prompt in prompts])
        found = []
        for prompt in prompts:
            at = next((each for each in self.lengths if each >= len(prompt) + new), self.lengths[-1])
            tokens, _ = expected(self.model, self.plan, list(prompt), new, at)
            found.append([(token + 1) % 512 if index >= new - self.wrong else token for index, token in enumerate(tokens)])
        return found


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", max_length=512)


def compare(model: PreTrainedModel, plan: Plan, answers: Itself, n_tokens: int = 90) -> Parity:
    return served_parity(model, bpe_tokenizer(), plan, answers, n_tokens=n_tokens)


def test_a_server_of_the_plan_passes_at_windows_of_every_length(model: PreTrainedModel) -> None:
    answers = Itself(model, growing(model), bucket_lengths(256, 16))
    found = compare(model, growing(model), answers)
    assert found.passed
    assert found.settings["n_tokens"] == 96
    assert [row.name for row in found.rows] == ["one prompt", "long answer", "requests at once", "asked again"]
    assert answers.asked[0] == [96]
    assert set(answers.asked[2]) == {16, 32, 48, 64, 80, 96}
    assert all(row.decided > 0.8 * row.positions for row in found.rows)


def test_windows_of_one_length_are_those_of_the_server(model: PreTrainedModel) -> None:
    assert compare(model, growing(model), Itself(model, growing(model), (70,)), 70).passed


def test_a_server_of_another_plan_or_of_other_windows_is_seen(model: PreTrainedModel) -> None:
    lengths = bucket_lengths(256, 16)
    assert not compare(model, growing(model), Itself(model, growing(model, 1 / 2), lengths)).passed
    fixed = Itself(model, growing(model), (256,))
    fixed.lengths = lengths
    fixed.tokens = lambda prompts, new: [expected(model, fixed.plan, list(prompt), new, 256)[0] for prompt in prompts]  # type: ignore[method-assign]
    assert not compare(model, growing(model), fixed).passed


def test_a_hundredth_of_the_tokens_may_differ_and_no_more(model: PreTrainedModel) -> None:
    plan, lengths = growing(model), bucket_lengths(512, 16)
    assert compare(model, plan, Itself(model, plan, lengths, wrong=1), 512).row("long answer").passed
    assert not compare(model, plan, Itself(model, plan, lengths, wrong=12), 512).row("long answer").passed


def test_the_command_asks_a_server_and_refuses_needles(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path)
    bpe_tokenizer().save_pretrained(tmp_path)
    plan = growing(model).save(tmp_path / "plan.json")
    asked = ["parity", "--model", tmp_path, "--plan", plan, "--server", "http://127.0.0.1:1"]
    assert exit_code(monkeypatch, *asked) == 2
    assert "no server answers at http://127.0.0.1:1" in capsys.readouterr().err
    assert exit_code(monkeypatch, *asked, "--needles", "4") == 2
    assert "not of a --server" in capsys.readouterr().err
    answers = Itself(model, growing(model), bucket_lengths(256, 16))
    monkeypatch.setattr("moa_lab.serving.Server", lambda url, length: answers)
    assert exit_code(monkeypatch, *asked, "--n-tokens", "64", "--out", tmp_path / "parity.json") == 0
    assert Parity.load(tmp_path / "parity.json").passed
