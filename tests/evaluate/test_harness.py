"""The bridge to the evaluation harness: the dense model scores as itself, and a plan is in force wherever the harness asks the model."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tiny import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from moa_lab.commands.harness import harness as command
from moa_lab.evaluate.harness import harness, harness_rows
from moa_lab.evaluate.harness_tasks import MISSING
from moa_lab.models import geometry_of
from moa_lab.plan import Plan, SpanRule, dense_plan, uniform_plan
from moa_lab.records import Measurement, Measurements
from moa_lab.records.intervals import Z, proportion
from moa_lab.runtime import apply_plan

torch.set_num_threads(1)

CHOICES, NEW_TOKENS, DOCUMENTS = "abcd", 6, 8

CHOOSE = """
task: moa_choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [a, b, c, d]
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
CONTINUE = """
task: moa_continue
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{said}}}}"
generation_kwargs: {{until: ["<never>"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Without what takes the harness seconds each time: a list of all packages here, and the thousands of tasks that it brings."""
    if find_spec("lm_eval") is None:
        yield
        return
    import lm_eval.evaluator
    import lm_eval.tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        whole = lm_eval.tasks.TaskManager
        patch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, metadata=None, **_: whole(None, include_path, False, metadata))
        yield


def tiny_plan(model: PreTrainedModel) -> Plan:
    rules = ((SpanRule(12.0, 0.0),) * 2,) * 2
    return Plan(geometry_of(model), rules, sink_tokens=2, min_span=4, name="tiny")


@torch.no_grad()
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str, plan: Plan | None) -> tuple[int, str]:
    """The likeliest of the choices, and the text that greedy decoding writes, without cache and harness."""
    tokens = tokenizer(text, return_tensors="pt").input_ids
    first = tokens.shape[1]
    likely: torch.Tensor | None = None
    for _ in range(NEW_TOKENS):
        if plan is None:
            logits = model(input_ids=tokens, use_cache=False).logits[0, -1]
        else:
            with apply_plan(model, plan):
                logits = model(input_ids=tokens, use_cache=False).logits[0, -1]
        likely = logits if likely is None else likely
        tokens = torch.cat([tokens, logits.argmax()[None, None]], dim=1)
    assert likely is not None
    choices = tokenizer.convert_tokens_to_ids(list(CHOICES))
    return int(likely[choices].argmax()), tokenizer.decode(tokens[0, first:], skip_special_tokens=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks whose right answers are the dense model's, on texts of ragged lengths where the small plan's are others."""
    folder = tmp_path_factory.mktemp("tasks")
    source, lines = random.Random(0), []
    while len(lines) < DOCUMENTS:
        text = "".join(source.choice("abcdefgh xyz") for _ in range(source.randrange(40, 90))) + "."
        (gold, said), (other, otherwise) = (answers(model, tokenizer, text, plan) for plan in (None, tiny_plan(model)))
        if gold != other and said != otherwise and said == said.strip() and said:
            lines.append(json.dumps({"text": text, "gold": gold, "said": said}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    for name, text in (("choose", CHOOSE), ("continue", CONTINUE)):
        (folder / f"{name}.yaml").write_text(text.format(data=folder / "data.jsonl", cache=folder / "cache"))
    return folder


def scored(rows: Measurements, metric: str) -> Measurement:
    (row,) = rows.select(metric=metric)
    return row


TASKS = ["moa_choose", "moa_continue"]


@pytest.fixture(scope="module")
def measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, Measurements]:
    pytest.importorskip("lm_eval", reason=MISSING)
    plans = {"none": None, "dense": dense_plan(geometry_of(model)), "tiny": tiny_plan(model)}
    found = {name: harness(model, tokenizer, plan, TASKS, include_path=folder) for name, plan in plans.items()}
    found["batched"] = harness(model, tokenizer, tiny_plan(model), TASKS, include_path=folder, batch_size=4)
    return found


def test_the_dense_plan_scores_as_the_model_that_no_plan_is_applied_to(measured: dict[str, Measurements]) -> None:
    for metric in ("acc", "exact_match"):
        bare, dense = (scored(measured[name], metric) for name in ("none", "dense"))
        assert bare == dense
        assert (bare.plan, bare.value, bare.n, bare.density) == ("dense", 1.0, DOCUMENTS, 1.0)


@pytest.mark.parametrize("name", ["tiny", "batched"])
def test_a_plan_is_in_force_where_answers_are_scored_and_where_they_are_written(measured: dict[str, Measurements], name: str) -> None:
    for metric in ("acc", "exact_match"):
        row = scored(measured[name], metric)
        assert (row.plan, row.value, row.n) == ("tiny", 0.0, DOCUMENTS)
        assert (row.value, row.n, row.low, row.high) == proportion(0, DOCUMENTS)
        assert row.detail["per_sample"] == [0.0] * DOCUMENTS


def test_a_row_says_how_long_the_prompts_were_and_what_was_kept_of_them(
    measured: dict[str, Measurements], model: PreTrainedModel, folder: Path
) -> None:
    sizes = [len(json.loads(line)["text"]) for line in (folder / "data.jsonl").read_text().splitlines()]
    row = scored(measured["tiny"], "exact_match")
    assert row.length == round(sum(sizes) / len(sizes))
    assert row.density == pytest.approx(sum(12 / size for size in sizes) / len(sizes))
    assert measured["tiny"].settings["task_versions"] == {"moa_choose": 1.0, "moa_continue": 1.0}
    assert measured["tiny"].provenance.weights


def test_the_model_and_the_tokenizer_are_as_before(model: PreTrainedModel, folder: Path) -> None:
    pytest.importorskip("lm_eval", reason=MISSING)
    bare = tiny_tokenizer()
    bare.pad_token = None
    text = "a question of some length."
    before = answers(model, bare, text, None)
    hooks = len(model._forward_pre_hooks)
    harness(model, bare, tiny_plan(model), ["moa_continue"], include_path=folder, limit=2)
    assert bare.pad_token is None
    assert (answers(model, bare, text, None), len(model._forward_pre_hooks)) == (before, hooks)


def test_a_fixed_length_decides_elastic_rules(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    pytest.importorskip("lm_eval", reason=MISSING)
    plan = uniform_plan(geometry_of(model), 0.2, sink_tokens=2, min_span=4)
    wide = harness(model, tokenizer, plan, ["moa_choose"], include_path=folder, limit=3, n_tokens=500)
    own = harness(model, tokenizer, plan, ["moa_choose"], include_path=folder, limit=3)
    assert scored(wide, "acc").value == 1.0
    assert scored(wide, "acc").n == scored(own, "acc").n == 3
    assert scored(own, "acc").density < 0.3
    with pytest.raises(ValueError, match="n_tokens"):
        harness(model, tokenizer, plan, ["moa_choose"], include_path=folder, n_tokens=5000)


def test_unknown_tasks_and_folders_are_refused_by_name(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    pytest.importorskip("lm_eval", reason=MISSING)
    with pytest.raises(ValueError, match="no task 'moa_choos'; names like it: moa_choose"):
        harness(model, tokenizer, None, ["moa_choos"], include_path=folder)
    with pytest.raises(ValueError, match="not a folder"):
        harness(model, tokenizer, None, ["moa_choose"], include_path=folder / "nowhere")
    with pytest.raises(ValueError, match="at least one name"):
        harness(model, tokenizer, None, [])
    with pytest.raises(ValueError, match="batch_size"):
        harness(model, tokenizer, None, ["moa_choose"], batch_size=0)


def test_without_the_harness_the_error_names_what_to_install(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r'pip install "moa-lab\[eval\]"'):
        harness(model, tokenizer, None, ["anything"])


def results(**scores: Any) -> dict[str, Any]:
    samples = [{"doc_id": 1, "filter": "none", "f1": 0.25}, {"doc_id": 0, "filter": "none", "f1": 0.75}]
    return {
        "results": {"whole": {"alias": "whole", "sample_len": 2, **scores}},
        "n-samples": {"part": {"original": 9, "effective": 2}, "other": {"original": 9, "effective": 5}},
        "group_subtasks": {"whole": ["part", "other"]},
        "samples": {"whole": samples, "part": samples},
    }


def test_rows_of_groups_filters_and_metrics_without_a_standard_error(model: PreTrainedModel) -> None:
    plan = uniform_plan(geometry_of(model), 0.5, sink_tokens=2, min_span=4)
    told = {"f1,none": 0.5, "f1_stderr,none": 0.1, "perplexity,strict": 7.0, "perplexity_stderr,strict": "N/A", "note,none": "text"}
    found, other = harness_rows(results(**told), plan, {100: 3, 200: 1})
    assert (found.metric, found.task, found.length, found.n) == ("f1", "whole", 125, 7)
    assert (found.low, found.high) == (0.5 - 0.1 * Z, 0.5 + 0.1 * Z)
    assert found.detail == {"filter": "none", "stderr": 0.1, "per_sample": [0.75, 0.25], "members": ["part", "other"]}
    assert (other.metric, other.value, other.low, other.high, other.detail["stderr"]) == ("perplexity_strict", 7.0, -inf, inf, None)
    assert found.density == pytest.approx((3 * plan.density(100) + plan.density(200)) / 4)
    assert harness_rows(results(**told), plan, {100: 3}, n_tokens=400)[0].density == plan.density(400)


def test_the_command_leaves_a_record_and_a_table(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason=MISSING)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_plan(model).save(tmp_path / "plan.json")
    app = typer.Typer()
    app.command()(command)
    arguments = ["--model", str(tmp_path / "model"), "--include-path", str(folder), "--limit", "3", "--tasks", "moa_choose, moa_continue"]
    for name, extra in (("dense", []), ("tiny", ["--plan", str(tmp_path / "plan.json"), "--batch-size", "2"])):
        done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / f"{name}.json"), *extra])
        assert done.exit_code == 0, done.output
        rows = Measurements.load(tmp_path / f"{name}.json")
        assert [(row.task, row.metric, row.plan, row.n) for row in rows] == [
            ("moa_choose", "acc", name, 3), ("moa_continue", "exact_match", name, 3),
        ]  # fmt: skip
        assert {row.value for row in rows} == {1.0 if name == "dense" else 0.0}
        assert "moa_choose" in done.output
    again = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "dense.json")])
    assert again.exit_code != 0
    assert "--force" in str(again.exception)


def test_a_special_token_in_a_document_is_text_and_told(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("lm_eval", reason=MISSING)
    text = "a text<|im_end|> and more<bos>."
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": text, "gold": 0, "said": "x"}))
    (tmp_path / "continue.yaml").write_text(CONTINUE.format(data=tmp_path / "data.jsonl", cache=tmp_path / "cache"))
    (row,) = harness(model, tokenizer, None, ["moa_continue"], include_path=tmp_path)
    # A byte is a token: were the two special, the prompt would have 13 fewer.
    assert row.length == len(text)
    assert "prompts of moa_continue spell 2 control tokens (<|im_end|> 1, <bos> 1)" in caplog.text
    assert tokenizer.split_special_tokens is False
    harness(model, tokenizer, None, ["moa_continue"], include_path=tmp_path, chat_template=True)
    assert "documents of moa_continue spell 2 control tokens (<|im_end|> 1, <bos> 1); in the harness's chats they count" in caplog.text
