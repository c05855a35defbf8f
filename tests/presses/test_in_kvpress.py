"""The harness on a tiny model. In kvpress's environment: python -m pytest --noconftest tests/presses/test_in_kvpress.py."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

if find_spec("kvpress") is None:
    pytest.skip("kvpress wants an older transformers: this file runs in an environment of its own", allow_module_level=True)

import torch
from tiny import random_tokens, tiny_model, tiny_tokenizer
from transformers import DynamicCache

from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan, SpanRule, uniform_plan
from moa_lab.presses import harness, kvpress_presses
from moa_lab.presses.attention import SpanMask, attending
from moa_lab.presses.harness import run_presses
from moa_lab.presses.methods import METHODS
from moa_lab.presses.questions import Question, QuestionSet
from moa_lab.records import Measurements

CONTEXT, ASKED, ANSWER = 380, 12, 8
LENGTH = CONTEXT + ASKED + ANSWER
SIZES = {"duo": (16, 40), "duo-192": (8, 24), "kvzip-heads": (8, 24)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kvpress_presses, "TEXT_CHARACTERS", 300)
    monkeypatch.setattr(kvpress_presses, "KVZIP_CHARACTERS", 300)
    monkeypatch.setattr(kvpress_presses, "SPLITS", SIZES)
    tiny_model("qwen2", tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [random_tokens(1, LENGTH, seed=seed)[0].tolist() for seed in range(2)]
    parts = [(tuple(ids[:CONTEXT]), tuple(ids[CONTEXT : CONTEXT + ASKED]), tuple(ids[CONTEXT + ASKED :])) for ids in rows]
    QuestionSet(tuple(Question("needles", *part, "1234567", str(i)) for i, part in enumerate(parts))).save(tmp_path / "questions.json")
    return tmp_path


def uniform(folder: Path, density: float) -> Plan:
    model, _ = harness._loaded(folder / "model")
    return uniform_plan(ModelGeometry.from_config(model.config), density, min_span=72)


def test_every_method_holds_the_share_that_was_asked_for(folder: Path) -> None:
    keeps = (0.5, 0.3)
    plans = [uniform(folder, keep).renamed(f"ours-{keep}") for keep in keeps]
    record = run_presses(folder, keeps, plans, folder / "out.json")
    assert not record.settings["left_out"]
    found = {row.plan: row.density for row in record}
    assert found.pop("dense") == 1
    assert len(found) == 2 * len(METHODS) + 4
    for name, share in found.items():
        keep = 0.5 if "5" in name.split("-")[-1] else 0.3
        # Entries are rounded down, and the answer's last token is held by nobody.
        assert share == pytest.approx(keep, abs=0.006), name
    assert all(row.n == 2 and len(row.detail["per_sample"]) == 2 and row.low <= row.value <= row.high for row in record)
    assert Measurements.load(folder / "out.json") == record


def test_a_plan_answers_in_the_pipeline_as_a_loop_under_its_mask_does(folder: Path) -> None:
    model, pipeline = harness._loaded(folder / "model")
    rules = ((SpanRule(80, 0), SpanRule(0, 0.5)), (SpanRule(0, 1), SpanRule(100, 0)))
    plan = Plan(ModelGeometry.from_config(model.config), rules, sink_tokens=8, min_span=16)
    for question in QuestionSet.load(folder / "questions.json"):
        said = []
        for dense in (False, True):
            press = kvpress_presses.SpanPress(SpanMask(plan, LENGTH, reads_densely=dense))
            inputs = {"context_ids": torch.tensor([question.context]), "questions_ids": [torch.tensor([question.question])]}
            said.append(pipeline.forward(inputs, press=press, max_new_tokens=ANSWER, cache=DynamicCache())[0])
        ids = [*question.context, *question.question]
        with torch.inference_mode(), attending(model, SpanMask(plan, LENGTH), "spans"):
            for _ in range(ANSWER):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert said[0] == pipeline.tokenizer.decode(ids[-ANSWER:], skip_special_tokens=True)
        assert said[1] != said[0]


def test_the_same_command_goes_on_and_another_plan_of_a_known_name_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder / "out.json"
    plan = uniform(folder, 0.5)
    first = run_presses(folder, [0.5], [plan], out, ["streaming"])
    measured: list[str] = []
    original = harness._measured
    monkeypatch.setattr(harness, "_measured", lambda *given: (measured.append(given[2].name), original(*given))[1])
    both = run_presses(folder, [0.5], [plan], out, ["streaming", "snapkv"])
    assert measured == ["snapkv-50"]
    assert both.rows[: len(first.rows)] == first.rows
    with pytest.raises(ValueError, match="another plan"):
        run_presses(folder, [0.5], [uniform(folder, 0.3).renamed(plan.name)], out, ["streaming"])
    with pytest.raises(ValueError, match="names of their own"):
        run_presses(folder, [0.5], [plan, plan], out, ["streaming"])


def test_what_cannot_keep_so_little_is_left_out_with_the_reason(folder: Path) -> None:
    record = run_presses(folder, [0.1], [], folder / "out.json", ["streaming", "duo"])
    assert [row.plan for row in record] == ["dense", "streaming-10"]
    assert "cannot keep" in record.settings["left_out"]["duo-10 at 400 tokens"]


def test_heads_are_scored_on_our_texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pipeline = harness._loaded(folder / "model")

    def scores(texts: Sequence[str]) -> list[np.ndarray]:
        kvpress_presses.duo_attention_press.cache.clear()
        presses = kvpress_presses.Presses(model, pipeline, texts, n_texts=2)
        return [presses.duo_scores, presses.kvzip_scores]

    texts = ["to be or not to be " * 60, "the quick brown fox " * 50]
    ours, again, others = scores(texts), scores(texts), scores([text.upper() for text in texts])
    for mine, same, other in zip(ours, again, others, strict=True):
        assert mine.shape == (2, 2)
        np.testing.assert_array_equal(mine, same)
        assert (mine != other).all()
