"""Which tasks of the harness make their texts, and that all that was named is loaded before the first is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer

from moa_lab.evaluate.harness import harness
from moa_lab.evaluate.harness_tasks import MISSING, HarnessTasks

lm_eval = pytest.importorskip("lm_eval", reason=MISSING)

GIVEN = ("arc_easy", "ai2_arc", "mmlu", "wikitext", "passkey", "libra", "graphwalks_128k")
MADE = ("niah_single_1", "ruler_vt", "ruler", "longcxt")
TASK = """
task: moa_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: "a"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def named() -> HarnessTasks:
    from lm_eval.tasks import TaskManager

    # A name that no single folder has: all tasks of the harness are read.
    return HarnessTasks(TaskManager, ["arc_easy", "niah_single_1"], None, tiny_tokenizer())


def test_tasks_that_make_their_texts_to_a_length_are_told_from_those_whose_texts_are_given(named: HarnessTasks) -> None:
    assert {name: named.makes_texts(name) for name in (*GIVEN, *MADE)} == dict.fromkeys(GIVEN, False) | dict.fromkeys(MADE, True)


@pytest.mark.parametrize("lengths", ["4096", 4096, [4096.5], ["4096"], [True]])
def test_lengths_that_are_no_whole_numbers_are_refused(named: HarnessTasks, lengths: Any) -> None:
    with pytest.raises(ValueError, match=r"length.* whole number"):
        named.check_lengths(lengths, 8192)


def test_a_task_that_cannot_be_loaded_is_refused_before_another_is_measured(tmp_path: Path) -> None:
    for name in ("here", "missing"):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, folder=tmp_path))
    (tmp_path / "here.jsonl").write_text('{"text": "abc"}\n')
    model, passes = tiny_model("llama"), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError, match="cannot load task 'moa_missing'"):
        harness(model, tiny_tokenizer(), None, ["moa_here", "moa_missing"], include_path=tmp_path)
    assert not passes


@pytest.mark.parametrize(
    "wrong", [{"limit": 0.5}, {"batch_size": "auto"}, {"few_shot": -1}, {"seed": -1}, {"tasks": [None]}, {"tasks": "arc_easy"}], ids=str
)
def test_an_argument_of_another_kind_is_refused(wrong: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"tasks": ["moa_here"], **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        harness(tiny_model("llama"), tiny_tokenizer(), None, **settings)
