from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from served_engine import Engine, Start
from tiny import random_tokens, tiny_model
from tiny_plans import mixed_plan, small_plan
from transformers import PreTrainedModel

from moa_lab.plan import Plan, full_or_floor_plan
from moa_lab.serving import page_layout

RUNS = Path(__file__).parents[3] / "data/runs"
LENGTH = 512
PAGE_TOKENS = HEAD_DIM = 32
"""The fewest that vLLM's own attention takes."""
PAGE_BYTES = 2 * PAGE_TOKENS * HEAD_DIM * 4
"""Of one head, K and V, in float32."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Four layers of two KV heads."""
    return tiny_model("llama", layers=4, max_length=1024, head_dim=HEAD_DIM)


def sparse(model: PreTrainedModel) -> Plan:
    """One head of eight keeps everything, the others an eighth of the length."""
    geometry = mixed_plan(model).geometry
    plan = full_or_floor_plan(geometry, [(1, 0)], floor_tokens=LENGTH // 8)
    return Plan(geometry=geometry, rules=plan.rules, sink_tokens=16, min_span=17)


def at_once(engine: Engine) -> int:
    """How many requests of the greatest length run at once, when more are asked."""
    prompts = [random_tokens(1, LENGTH - 8, seed=seed)[0].tolist() for seed in range(40)]
    engine.tokens(prompts, 8)
    assert engine.most_preemptions == 0
    return engine.most_running


def test_as_many_requests_run_at_once_as_the_plan_leaves_room_for(start: Start, model: PreTrainedModel) -> None:
    plan = sparse(model)
    settings = {
        "block_size": PAGE_TOKENS,
        "max_model_len": LENGTH,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": 600 * PAGE_BYTES,
    }
    dense = start(model, None, **settings)
    told = dense.concurrency
    count = at_once(dense)
    engine = start(model, plan, **settings)
    assert plan.density(LENGTH) < 0.25
    assert engine.concurrency >= 0.9 / plan.density(LENGTH) * told
    assert at_once(engine) >= int(0.9 / plan.density(LENGTH) * count)
    # The pool holds a page that belongs to nobody.
    assert engine.most_running == 599 // page_layout(plan, LENGTH, LENGTH, PAGE_TOKENS).pages_for(LENGTH)


@pytest.mark.parametrize("name", ["standard-50", "standard-25"])
def test_requests_of_4k_run_at_once_as_the_density_of_a_recorded_plan_says(start: Start, name: str, dense_concurrency: list[float]) -> None:
    """By the engine's own figures, on SmolLM2's geometry."""
    model, plan = smollm2_geometry(), Plan.load(RUNS / name / "plan.json")
    settings = {"max_model_len": 4096, "dtype": "bfloat16", "block_size": 64, "kv_cache_memory_bytes": 256 << 20, "load_format": "dummy"}
    if not dense_concurrency:
        dense_concurrency.append(start(model, None, **settings).concurrency)
    found = start(model, plan, **settings).concurrency
    print(f"{name}: {found:.2f} requests of 4,096 tokens, dense {dense_concurrency[0]:.2f}, density {plan.density(4096):.3f}")
    assert found >= 0.9 / plan.density(4096) * dense_concurrency[0]


@pytest.fixture(scope="module")
def dense_concurrency() -> list[float]:
    """Of vLLM's own cache, once it was asked."""
    return []


def smollm2_geometry() -> PreTrainedModel:
    """Of SmolLM2-135M the attention alone: narrow elsewhere."""
    return tiny_model(
        "llama", layers=30, max_length=8192, num_attention_heads=9, num_key_value_heads=3, head_dim=64, hidden_size=72, vocab_size=128
    )


def test_what_a_request_leaves_serves_the_next(start: Start, llama: PreTrainedModel) -> None:
    plan = mixed_plan(llama)
    engine = start(llama, plan, max_num_seqs=2)
    prompts = [random_tokens(1, 100, seed=seed)[0].tolist() for seed in range(6)]
    together = engine.tokens(prompts, 20)
    assert engine.usage == 0
    assert [engine.tokens([prompt], 20)[0] for prompt in prompts] == together


def test_the_card_is_read_at_the_start_and_not_in_every_step(start: Start, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    load = Plan.load
    monkeypatch.setattr(Plan, "load", lambda path: (read.append(path), load(path))[1])
    engine = start(llama, small_plan(llama), max_model_len=256)
    at_start = len(read)
    assert at_start
    engine.tokens([random_tokens(1, 40, seed=seed)[0].tolist() for seed in range(3)], 20)
    assert len(read) == at_start


def test_prefix_caching_is_off_also_where_it_is_asked_for(start: Start, llama: PreTrainedModel) -> None:
    engine = start(llama, mixed_plan(llama), enable_prefix_caching=True)
    prompt = random_tokens(1, 100)[0].tolist()
    assert engine.tokens([prompt], 10) == engine.tokens([prompt], 10)
    assert not engine.caches_prefixes


def test_engines_of_one_process_keep_what_each_was_started_with(start: Start, model: PreTrainedModel) -> None:
    """Without a plan, under one, and under another one of the same file."""
    prompts = [random_tokens(1, 100, seed=seed)[0].tolist() for seed in range(2)]
    engines = [start(model, plan, block_size=PAGE_TOKENS) for plan in (None, small_plan(model), sparse(model))]
    found = [engine.tokens(prompts, 20) for engine in engines]
    assert [engine.tokens(prompts, 20) for engine in engines] == found
    assert len({engine.concurrency for engine in engines}) == 3
    assert [engine.caches_prefixes for engine in engines] == [True, False, False]


def test_an_engine_whose_processes_do_not_know_of_its_plan_does_not_start(
    start: Start, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moa_lab.serving.vllm import engine

    own = engine.check_engine

    def lose(*given: object) -> None:
        own(*given)
        monkeypatch.delenv("MOA_LAB_PLAN")

    monkeypatch.setattr(engine, "check_engine", lose)
    plan = small_plan(model)
    with pytest.raises(ValueError, match=f"started under plan {plan.identity()}, of which not all its processes know"):
        start(model, plan, block_size=PAGE_TOKENS)


def test_other_geometry_is_refused_with_both(start: Start, llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"another geometry: plan has 3 layers .* model has 2 layers"):
        start(llama, small_plan(tiny_model("llama", layers=3)))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}}, "speculative decoding"),
    ],
)
def test_settings_that_rule_a_plan_out_are_refused_by_name(
    start: Start, llama: PreTrainedModel, settings: dict[str, object], what: str
) -> None:
    with pytest.raises(ValueError, match=f"{what} cannot be combined with a plan yet"):
        start(llama, small_plan(llama), **settings)


def test_broken_cards_are_refused(start: Start, llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    monkeypatch.setenv("MOA_LAB_PLAN", str(broken))
    with pytest.raises(ValueError, match=r"broken\.json"):
        start(llama, None)


def test_a_version_of_vllm_that_was_not_seen_to_work_is_left_alone_without_a_plan_and_refused_with_one(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    script = """
import os, sys
import vllm
vllm.__version__ = "0.99.1"
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.scheduler import Scheduler
from moa_lab.serving.vllm.plugin import register
own = EngineArgs.create_engine_config, Scheduler.__init__
register()
assert (EngineArgs.create_engine_config, Scheduler.__init__) == own
os.environ["MOA_LAB_PLAN"] = sys.argv[1]
register()
"""
    card = small_plan(llama).save(tmp_path / "plan.json")
    clean = {name: value for name, value in os.environ.items() if name != "MOA_LAB_PLAN"}
    ended = subprocess.run([sys.executable, "-c", script, str(card)], capture_output=True, text=True, timeout=300, env=clean, check=False)
    assert ended.returncode == 1
    assert "plans are served by vLLM 0.26.x and 0.32.x, which were seen to work, and this is 0.99.1" in ended.stderr


def test_an_engine_warms_up_every_layer_and_answers_as_before(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it does so when it starts."""
    from moa_lab.serving.vllm import attention

    model, warmed = tiny_model("gemma2"), []
    engine = start(model, mixed_plan(model).with_bits([[(8, 8), (16, 4)]] * model.config.num_hidden_layers))
    worker = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    (group,) = getattr(worker, "worker", worker).model_runner.attn_groups[0]
    builder, own = group.get_metadata_builder(), attention.warm_up
    monkeypatch.setattr(attention, "warm_up", lambda *given: (warmed.append(given), own(*given)))
    before = engine.tokens([[5, 6, 7] * 9], 30)
    builder.warm_up(builder.kv_cache_spec.page_size_bytes, engine.llm.llm_engine.vllm_config, builder.device)
    assert len(warmed) == model.config.num_hidden_layers
    assert {given[-2].softcap for given in warmed} == {model.config.attn_logit_softcapping}
    assert engine.tokens([[5, 6, 7] * 9], 30) == before
