"""Models whose layers or weights lie on several devices: plans hold on the first kind, the second is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import tiny_model, tiny_tokenizer
from tiny_plans import mixed_plan
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import distribute_tensor as over_processes

import moa_lab as ml
from moa_lab.geometry.wrappers import is_split
from moa_lab.interface import attention_sites
from moa_lab.models import load_model

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_model("llama", layers=4).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_map_of_one_device_changes_nothing(saved: Path) -> None:
    mapped, tokenizer = load_model(saved, device_map="auto")
    plain, _ = load_model(saved)
    assert not is_split(mapped)
    said = [ml.generate(model, tokenizer, ["ab cd ef"], plan=None, max_new_tokens=8, chat=False).tokens for model in (mapped, plain)]
    assert said[0] == said[1]


def test_a_device_beside_a_map_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"a device .*or a device_map .*not both"):
        load_model(saved, device="cpu", device_map="auto")


@pytest.mark.usefixtures("one_process")
def test_weights_split_among_processes_are_refused_in_words() -> None:
    model = tiny_model("llama")
    mesh = dist.init_device_mesh("cpu", (1,))
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(over_processes(layer.weight.detach(), mesh, [Replicate()]))
    assert isinstance(layer.weight, DTensor)
    with pytest.raises(ValueError, match="split among processes"):
        attention_sites(model)


@TWO_GPUS
def test_a_model_on_two_gpus_answers_profiles_and_learns_as_one_on_one(saved: Path) -> None:
    halves = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0, "model.layers.2": 1, "model.layers.3": 1}
    halves |= {"model.norm": 1, "model.rotary_emb": 1, "lm_head": 1}
    split, tokenizer = load_model(saved, dtype="float32", device_map=halves)
    whole, _ = load_model(saved, dtype="float32", device="cuda:0")
    assert is_split(split)
    plan = mixed_plan(whole)
    said, profiles, slopes = [], [], []
    for model in (split, whole):
        said.append(ml.generate(model, tokenizer, ["ab cd ef gh"], plan=plan, max_new_tokens=24, chat=False).tokens)
        samples = ml.calibrate(model, tokenizer, [384], wanted=ml.calibration.requests(questions=2, others=1, answer_tokens=8))
        profile = ml.profile(model, samples)
        profiles.append(profile)
        slopes.append(ml.learn_spans(model, samples, ml.loss_table(profile), 0.6, steps=2))
    assert said[0] == said[1]
    for key, found in profiles[0].span_effects.items():
        np.testing.assert_allclose(found, profiles[1].span_effects[key], rtol=1e-3, atol=1e-5)
    assert slopes[0].points[0].plan.rules == slopes[1].points[0].plan.rules
