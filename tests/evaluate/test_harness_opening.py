"""A BOS that the tokenizer adds opens the harness's prompts too, once, whether scored or continued, bare or as a chat."""

import json
from pathlib import Path

import pytest
import torch
from tiny import BOS, CHAT_TEMPLATE, SPECIAL, tiny_model, tiny_tokenizer

from moa_lab.evaluate.harness import harness
from moa_lab.evaluate.harness_tasks import MISSING

BOS_ID = SPECIAL.index(BOS)
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
doc_to_text: "{{{{text}}}}"
{rest}
"""
CHOOSE = """output_type: multiple_choice
doc_to_choice: [a, b]
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""
CONTINUE = """output_type: generate_until
doc_to_target: "{{said}}"
generation_kwargs: {until: ["<never>"], max_gen_toks: 2, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""
TEMPLATES = {"bare": None, "chat": CHAT_TEMPLATE, "chat with BOS": "{{ bos_token }}" + CHAT_TEMPLATE}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "two words", "gold": 0, "said": "a"}))
    for name, rest in (("choose", CHOOSE), ("continue", CONTINUE)):
        text = TASK.format(name=f"opening_{name}", data=tmp_path / "data.jsonl", cache=tmp_path / "cache", rest=rest)
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("adds", [False, True])
def test_every_prompt_begins_as_the_tokenizer_wants_it(folder: Path, monkeypatch: pytest.MonkeyPatch, template: str, adds: bool) -> None:
    evaluator = pytest.importorskip("lm_eval.evaluator", reason=MISSING)
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(chat_template=TEMPLATES[template])
    tokenizer.add_bos_token = adds
    prompts: list[torch.Tensor] = []

    def note(_: torch.nn.Module, arguments: tuple[object, ...], settings: dict[str, object]) -> None:
        ids = arguments[0] if arguments else settings["input_ids"]
        assert isinstance(ids, torch.Tensor)
        if ids.shape[1] > 1:
            prompts.append(ids)

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    harness(model, tokenizer, None, ["opening_choose", "opening_continue"], include_path=folder, chat_template=template != "bare")
    hook.remove()
    wanted = int(adds or template == "chat with BOS")
    # Choices of one token share a pass.
    assert len(prompts) == 2
    for ids in prompts:
        assert (ids == BOS_ID).sum() == wanted
        assert (ids[0, 0] == BOS_ID) == bool(wanted)
