from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import random_tokens, tiny_model
from transformers import DynamicCache, PreTrainedModel

from moa_lab.calibration.answers import answer_logits, score_answers
from moa_lab.calibration.samples import Sample
from moa_lab.evaluate.scoring import sample_loss
from moa_lab.interface import AttentionCall, Handler, route_attention
from moa_lab.kernels.dispatch import span_attention
from moa_lab.models import geometry_of
from moa_lab.pipeline import Run
from moa_lab.plan import Plan, SpanRule, dense_plan
from moa_lab.records import Measurement
from moa_lab.runtime import apply_plan
from moa_lab.search import InfeasibleError
from moa_lab.studies.bits.effects import bit_effects
from moa_lab.studies.bits.quantise import fake_quantise, linear_modules, quantised_cache, quantised_weights, stored_bytes
from moa_lab.studies.bits.scores import Variant, difference_rows, rank_rows, score_variant, untouched
from moa_lab.studies.bits.weights import KV_WIDTHS, Pair, best_predictor, kv_side, outcome, spans_and_bits, weights_answer
from moa_lab.studies.bits.widths import (
    ERROR,
    FIRST_ORDER,
    PREDICTORS,
    ROOT,
    SQUARES,
    Effects,
    allocate,
    kv_bytes,
    kv_costs,
    predicted,
    random_choices,
    weight_costs,
)
from moa_lab.studies.record import StudyRecord

TOKENS = 200


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, and far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


def sample(seed: int = 0, task: str = "questions", n: int = TOKENS) -> Sample:
    return Sample(task, random_tokens(1, n, seed)[0].numpy(), ((n - 20, n - 10), (n - 5, n)))


def plan_of(model: PreTrainedModel, spans: list[list[int]]) -> Plan:
    rules = tuple(tuple(SpanRule(float(span), 0.0) for span in row) for row in spans)
    return Plan(geometry_of(model), rules, sink_tokens=16, min_span=32, name="some")


def naive(vector: np.ndarray, bits: int) -> np.ndarray:
    low = np.float32(np.float16(vector.min()))
    step = np.float32(np.float16((vector.max() - low) / (2**bits - 1)))
    if step == 0:
        return np.full_like(vector, low)
    return np.array([low + step * min(max(round((x - low) / step), 0), 2**bits - 1) for x in vector], dtype=np.float32)


def test_values_come_back_as_a_loop_over_groups_gives_them() -> None:
    values = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0)) * 4
    values[0, 0, 0] = 1.5
    bits = torch.tensor([2, 3, 8])[:, None, None]
    found = fake_quantise(values, bits).numpy()
    for row, head, token in np.ndindex(2, 3, 5):
        np.testing.assert_allclose(found[row, head, token], naive(values[row, head, token].numpy(), (2, 3, 8)[head]), rtol=1e-5, atol=1e-6)


def test_a_last_group_may_be_shorter_and_bits_in_front_give_every_width_at_once() -> None:
    weight = torch.randn(6, 100, generator=torch.Generator().manual_seed(1))
    found = fake_quantise(weight, torch.tensor([2, 4])[:, None, None], group=64)
    assert found.shape == (2, 6, 100)
    for (index, bits), row in itertools.product(enumerate((2, 4)), range(6)):
        whole = [naive(part.numpy(), bits) for part in (weight[row, :64], weight[row, 64:])]
        np.testing.assert_allclose(found[index, row].numpy(), np.concatenate(whole), rtol=1e-5, atol=1e-6)


def test_sixteen_bits_are_the_values_themselves_and_eight_are_within_a_step() -> None:
    values = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(2))
    found = fake_quantise(values, torch.tensor([16, 8, 8])[:, None, None])
    assert torch.equal(found[0], values[0])
    step = (values.amax(-1, keepdim=True) - values.amin(-1, keepdim=True)) / 255
    error = (found - values).abs()
    assert (error[1:] <= 1.2 * step[1:]).all()
    assert (error[1:] > 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = fake_quantise(values, 4)
    assert found.dtype == dtype
    assert all(len(row.unique()) <= 16 for row in found)


def test_bytes_count_a_scale_and_a_smallest_value_per_group() -> None:
    assert stored_bytes(64, 1, 4) == 32 + 4
    assert stored_bytes(64, 1, 16) == 128
    assert weight_costs([(10, 100)], (3, 8))[0].tolist() == [[10 * 100 * 3 / 8 + 10 * 2 * 4, 1000 + 80]]


def test_kv_bytes_of_a_plan_are_its_spans_times_their_widths(model: PreTrainedModel) -> None:
    plan = plan_of(model, [[40, 100], [60, 200]])
    widths = np.full((2, 2, 2), 16)
    assert kv_bytes(plan, TOKENS, widths) == plan.kv_bytes(TOKENS)
    widths[0, 1] = (4, 8)
    expected = 2 * 32 * (40 + 60 + 200) + 100 * (16 * 4 / 8 + 4) + 100 * (16 + 4)
    assert kv_bytes(plan, TOKENS, widths) == expected
    side = kv_side(plan, (TOKENS,), effects_of(8, (4, 8, 16)))
    choice = np.array([2, 2, 0, 1, 2, 2, 2, 2])
    assert side.cost(choice) == pytest.approx([expected])
    np.testing.assert_array_equal(side.variant("x", choice).kv, widths)


def effects_of(items: int, widths: tuple[int, ...] = (2, 4, 8), samples: int = 2, seed: int = 0) -> Effects:
    random = np.random.default_rng(seed)
    parts = [random.normal(size=(samples, items, len(widths))) for _ in range(3)]
    return Effects(widths, parts[0], parts[1] ** 2, parts[2] ** 2, np.full(samples, 1 / samples))


@torch.inference_mode()
def test_sixteen_bits_under_a_plan_are_the_plan_and_few_bits_are_not(model: PreTrainedModel) -> None:
    tokens, plan = random_tokens(2, TOKENS), plan_of(model, [[40, 100], [60, 200]])
    with apply_plan(model, plan, TOKENS):
        expected = model(tokens, use_cache=False).logits
    with quantised_cache(model, untouched(plan), plan, TOKENS):
        torch.testing.assert_close(model(tokens, use_cache=False).logits, expected)
    with quantised_cache(model, np.full((2, 2, 2), 3), plan, TOKENS):
        assert (model(tokens, use_cache=False).logits - expected).abs().max() > 0.01


@torch.inference_mode()
def test_decoding_token_by_token_sees_what_one_pass_sees(model: PreTrainedModel) -> None:
    tokens = random_tokens(1, 60)
    widths = np.array([[[2, 4], [8, 3]], [[16, 2], [3, 16]]])
    with quantised_cache(model, widths, dense_plan(geometry_of(model)), 60):
        whole = model(tokens, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        pieces = [model(tokens[:, :40], past_key_values=cache).logits]
        pieces += [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(40, 60)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-3, atol=1e-3)


def test_each_head_has_its_own_bits(model: PreTrainedModel) -> None:
    """Heads that no query head of the first layer's other group reads change nothing there: seen at the attention itself."""
    seen: list[AttentionCall] = []
    plan = dense_plan(geometry_of(model))
    widths = untouched(plan)
    widths[0, 1, 0] = 2
    import moa_lab.studies.bits.quantise as module

    def watch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append((key, value))  # type: ignore[arg-type]
        return span_attention(query, key, value, *rest)  # type: ignore[arg-type]

    tokens = random_tokens(1, 50)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(module, "span_attention", watch)
        for kept in (untouched(plan), widths):
            with quantised_cache(model, kept, plan, 50):
                model(tokens, use_cache=False)
    (key, value), (other_key, other_value) = seen[0], seen[2]  # type: ignore[misc]
    assert torch.equal(key[:, 0], other_key[:, 0])
    assert torch.equal(value, other_value)
    assert all(len(vector.unique()) <= 4 for vector in other_key[0, 1])


def test_the_model_is_as_before_also_after_an_exception(model: PreTrainedModel) -> None:
    plan = dense_plan(geometry_of(model))
    modules = linear_modules(model)
    assert not any("lm_head" in name or "embed" in name for name in modules)
    assert len(modules) == 2 * 7
    pointers = {name: module.weight.data_ptr() for name, module in modules.items()}
    values = {name: module.weight.clone() for name, module in modules.items()}
    before = loss_of(model, sample())
    implementation = model.config._attn_implementation

    def fail() -> None:
        with quantised_weights(model, dict.fromkeys(modules, 2)), quantised_cache(model, np.full((2, 2, 2), 2), plan, TOKENS):
            assert loss_of(model, sample()) != before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with pytest.raises(ValueError, match="no linear module"), quantised_weights(model, {"nothing": 4}):
        pass
    bit_effects(model, [sample()], (2, 4), (2, 4))
    assert loss_of(model, sample()) == before
    assert model.config._attn_implementation == implementation
    for name, module in modules.items():
        assert module.weight.data_ptr() == pointers[name]
        assert torch.equal(module.weight, values[name])
        assert not module.weight.requires_grad
        assert module.weight.grad is None


def test_effects_under_a_plan_ask_for_no_weights_and_restore_after_an_exception(model: PreTrainedModel) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bit_effects(model, [sample()], (2,), (2,), progress=stop)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    _, none = bit_effects(model, [sample()], (2, 4), plan=plan_of(model, [[40, 100], [60, 200]]))
    assert none.signed.shape[1] == 0


@torch.no_grad()
def loss_of(model: PreTrainedModel, one: Sample) -> float:
    """Mean nats per answer token, in the model's own precision."""
    targets = torch.from_numpy(one.tokens[one.answer_positions])
    return float(torch.nn.functional.cross_entropy(answer_logits(model, [one])[0], targets))


def shifted_loss(model: PreTrainedModel, one: Sample, plan: Plan, head: tuple[int, int, int], bits: int, share: float) -> float:
    """The loss with K or V of one head moved a `share` of the way to its quantised values."""
    windows = plan.windows(one.length)

    def handler(layer: int) -> Handler:
        def attend(call: AttentionCall) -> torch.Tensor:
            pair = [call.key.clone(), call.value.clone()]
            if layer == head[0]:
                mine = pair[head[2]][:, head[1]]
                mine += share * (fake_quantise(mine, bits) - mine)
            return span_attention(
                call.query, *pair, call.mask, plan.sink_tokens, windows[layer], call.scale, call.softcap, call.sink_logits
            )

        return attend

    with route_attention(model, handler):
        return loss_of(model, one)


def test_first_order_effects_are_the_slope_of_the_loss() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    plan, one, widths = plan_of(model, [[40, 100], [60, 200]]), sample(), (2, 4)
    kv, _ = bit_effects(model, [one], widths, plan=plan)
    _, linear = bit_effects(model, [one], (2,), widths)
    small = 1e-3
    for item, head in enumerate(np.ndindex(2, 2, 2)):
        for index, bits in enumerate(widths):
            ends = [shifted_loss(model, one, plan, head, bits, share) for share in (-small, small)]
            slope = (ends[1] - ends[0]) / (2 * small)
            assert kv.signed[0, item, index] == pytest.approx(slope, rel=2e-3, abs=1e-4)
    assert np.abs(kv.signed).max() > 0.01
    for item, module in enumerate(linear_modules(model).values()):
        original = module.weight.data
        change = fake_quantise(original, 2, 64) - original
        ends = []
        for share in (-small, small):
            module.weight.data = original + share * change
            ends.append(loss_of(model, one))
        module.weight.data = original
        assert linear.signed[0, item, 0] == pytest.approx((ends[1] - ends[0]) / (2 * small), rel=2e-3, abs=1e-4)


def test_every_task_and_length_counts_alike(model: PreTrainedModel) -> None:
    kv, _ = bit_effects(model, [sample(0), sample(1), sample(2, "texts", 150)], (2, 16))
    np.testing.assert_allclose(kv.shares, [0.25, 0.25, 0.5])
    assert (kv.signed[..., 1] == 0).all()
    assert (kv.error[..., 0] > 0).all()


def test_signs_cancel_inside_a_sample_and_not_across_samples() -> None:
    signed = np.array([[[1.0, 0.1], [-3.0, 0.2]], [[-1.0, 0.1], [3.0, 0.2]]])
    effects = Effects((2, 4), signed, signed**2, np.abs(signed), np.array([0.5, 0.5]))
    np.testing.assert_allclose(predicted(effects, FIRST_ORDER), [[1, 0.1], [3, 0.2]])
    np.testing.assert_allclose(predicted(effects.paired(), FIRST_ORDER), [[2, 0.3]])
    np.testing.assert_allclose(predicted(effects.paired(), SQUARES), [[10, 0.05]])
    np.testing.assert_allclose(predicted(effects.paired(), ROOT), [[np.sqrt(10), np.sqrt(0.05)]])
    np.testing.assert_allclose(predicted(effects, ERROR), [[1, 0.1], [3, 0.2]])
    with pytest.raises(ValueError, match="predictor must be one of"):
        predicted(effects, "guess")


def test_fewer_bits_are_never_predicted_to_be_better() -> None:
    effects = effects_of(30)
    for predictor in PREDICTORS:
        assert (np.diff(predicted(effects, predictor), axis=1) <= 0).all()


def test_the_allocation_is_the_best_of_all_choices_within_every_budget() -> None:
    random = np.random.default_rng(0)
    for trial in range(5):
        losses = random.random((5, 3)) * 10.0 ** random.integers(-3, 3)
        costs = np.cumsum(random.random((2, 5, 3)) + 0.1, axis=2)
        budgets = costs[:, :, 1].sum(axis=1)
        every = np.array(list(itertools.product(range(3), repeat=5)))
        spent = costs[:, np.arange(5), every].sum(axis=2)
        fits = (spent <= budgets[:, None]).all(axis=0)
        best = losses[np.arange(5), every].sum(axis=1)[fits].min()
        choice = allocate(losses, costs, budgets)
        assert losses[np.arange(5), choice].sum() == pytest.approx(best, rel=2e-4), trial
        assert (costs[:, np.arange(5), choice].sum(axis=1) <= budgets * (1 + 1e-6)).all()


def test_a_budget_below_the_narrowest_widths_is_infeasible() -> None:
    costs = np.ones((1, 3, 2)) * [1, 2]
    for choose in (lambda: allocate(np.ones((3, 2)), costs, np.array([2.5])), lambda: random_choices(costs, np.array([2.5]), 2)):
        with pytest.raises(InfeasibleError, match="narrowest"):
            choose()


def test_random_choices_have_equal_bytes_and_differ(model: PreTrainedModel) -> None:
    plan = dense_plan(geometry_of(model))
    costs = kv_costs(plan, (128, 256), (2, 3, 4, 6, 8))
    budget = costs[:, :, 2].sum(axis=1)
    found = random_choices(costs, budget, 20, seed=1)
    spent = costs[:, np.arange(costs.shape[1]), found].sum(axis=2)
    assert (spent <= budget[:, None] * (1 + 1e-9)).all()
    # What is left over would not make any K or V one bit wider.
    assert (budget[:, None] - spent < (costs[:, 0, 1] - costs[:, 0, 0])[:, None] * 2).all()
    assert len({tuple(choice) for choice in found}) > 15
    np.testing.assert_array_equal(found, random_choices(costs, budget, 20, seed=1))


def test_mixed_widths_are_within_the_bytes_of_uniform_ones_and_random_ones_rank_against_measured_losses(model: PreTrainedModel) -> None:
    samples = [sample(0), sample(1)]
    kv, _ = bit_effects(model, samples, KV_WIDTHS)
    plan = dense_plan(geometry_of(model))
    side = kv_side(plan, (TOKENS,), kv.paired())
    uniform = side.uniform(4)
    mixed = side.mixed(side.cost(uniform), SQUARES)
    losses = predicted(side.effects, SQUARES)
    assert side.cost(mixed) <= side.cost(uniform)
    assert losses[np.arange(4), mixed].sum() <= losses[np.arange(4), uniform].sum()
    widths = side.variant("x", mixed).kv
    assert (widths[..., 0] == widths[..., 1]).all()
    choices = side.random(4, 3, 0)
    assert (np.array(KV_WIDTHS)[choices] < 16).all()
    rows = rank_rows(model, side, choices, samples, PREDICTORS)
    assert [row.plan for row in rows] == list(PREDICTORS)
    expected = []
    for choice in choices:
        scores = score_variant(model, side.variant("x", choice), samples)
        expected.append(np.mean([sample_loss(of_sample) for of_sample in scores]))
    assert rows[0].detail["measured"] == pytest.approx(expected)
    assert all(-1 <= row.low <= row.high <= 1 for row in rows)


def test_an_unchanged_variant_scores_as_the_model_does(model: PreTrainedModel) -> None:
    plan = dense_plan(geometry_of(model))
    samples = [sample(0), sample(3, "texts", 150), sample(1)]
    found = score_variant(model, Variant("dense", plan, untouched(plan)), samples)
    for scores, one in zip(found, samples, strict=True):
        expected = score_answers(model, [one])[0]
        assert [score.loss for score in scores] == pytest.approx([score.loss for score in expected], rel=1e-4)


def difference(task: str, low: float, high: float, density: float = 0.25) -> Measurement:
    metric = "retrieval_difference" if task == "needles" else "cross_entropy_difference"
    return Measurement("a", metric, task, 0, (low + high) / 2, 9, low, high, density, {"against": "b", "density_against": 0.2})


def test_a_lower_loss_and_a_higher_retrieval_are_better_and_zero_inside_decides_nothing() -> None:
    assert outcome([difference("needles", 0.1, 0.2), difference("documents", -0.2, -0.1)]) == "better on needles and documents"
    assert outcome([difference("needles", -0.2, -0.1), difference("documents", 0.1, 0.2)]) == "worse on needles and documents"
    assert outcome([difference("needles", -0.1, 0.2), difference("documents", -0.1, 0.2)]) == "not decided"
    mixed = [difference("needles", -0.1, 0.2), difference("documents", 0.1, 0.2), difference("summaries", -2, -1)]
    assert outcome([replace(difference("summaries", -0.2, -0.2), n=1)]) == "not decided"
    assert outcome(mixed) == "better on summaries, worse on documents, not decided on needles"


def ranks(label: str, **values: float) -> list[Measurement]:
    names = {"first": FIRST_ORDER, "squares": SQUARES, "error": ERROR}
    return [Measurement(names[name], "rank_correlation", label, 0, v, 9, v - 0.1, v + 0.1, 0.3) for name, v in values.items()]


def test_the_answer_says_yes_no_and_not_decided() -> None:
    found = [*ranks("kv", first=0.5, squares=0.9, error=0.95), *ranks("weights", first=0.8, squares=0.7, error=0.1)]
    best = {label: best_predictor(found, label) for label in ("kv", "weights")}
    assert best == {"kv": SQUARES, "weights": FIRST_ORDER}
    pairs = {
        Pair("kv mixed 4 bits", "kv uniform 4 bits", "KV values at 4 bits"): [difference("documents", -0.2, -0.1)],
        Pair("weights mixed 4 bits", "weights uniform 4 bits", "weights at 4 bits"): [difference("documents", 0.1, 0.2)],
        Pair("weights mixed 3 bits", "weights uniform 3 bits", "weights at 3 bits"): [difference("documents", -0.1, 0.2)],
        Pair("kv mixed 3 bits, first order", "kv uniform 3 bits"): [difference("documents", -9, -8)],
    }
    spans = {Pair("50% spans in 8 bits", "25% spans in 16 bits", "50% spans in 8 bits"): [difference("needles", 0.1, 0.2, 0.266)]}
    answer = weights_answer(pairs, spans, found, best, {}, unpacked=True)
    assert "better on documents for KV values at 4 bits; " in answer
    assert "worse on documents for weights at 4 bits (flattered: unpacked from 4-bit blocks); not decided for weights at 3 bits." in answer
    assert (
        "random ones of KV values: rank correlation with the measured loss 0.90 [0.80, 1.00] by squares, 0.95 by the error alone" in answer
    )
    assert "Against 25% spans in 16 bits (20.0% of the dense KV bytes): 50% spans in 8 bits (26.6%): better on needles." in answer
    assert "flattered" not in weights_answer(pairs, spans, found, best, {})
    assert "were not compared: too short." in weights_answer(pairs, {}, found, best, {"moa-25": "too short"})


def test_differences_pair_the_same_samples_over_all_lengths() -> None:
    rows = [
        Measurement(plan, "cross_entropy", "documents", length, float(np.mean(losses)), 2, 0, 9, density, {"per_sample": losses})
        for plan, density, shift in (("a", 0.5, 0.25), ("b", 0.4, 0.0))
        for length, losses in ((256, [1.0 + shift, 5.0 + shift]), (512, [3.0 + shift, 2.0 + shift]))
    ]
    (row,) = difference_rows(rows, "a", "b")
    assert (row.metric, row.task, row.length, row.n) == ("cross_entropy_difference", "documents", 0, 4)
    assert (row.value, row.low, row.high) == pytest.approx((0.25, 0.25, 0.25))
    assert (row.density, row.detail) == (0.5, {"against": "b", "density_against": 0.4})


@pytest.fixture(scope="module")
def record(records: dict[str, StudyRecord]) -> StudyRecord:
    return records["weights"]


def test_the_study_measures_every_variant_at_equal_bytes(record: StudyRecord) -> None:
    plans = {row.plan for row in record.rows}
    for label, bits in itertools.product(("kv", "weights"), (4, 3)):
        assert {f"{label} uniform {bits} bits", f"{label} mixed {bits} bits"} <= plans
        (uniform, *_), (mixed, *_) = (record.select(plan=f"{label} {kind} {bits} bits", task="documents") for kind in ("uniform", "mixed"))
        assert mixed.density <= uniform.density + 1e-9
    assert {"dense", "kv mixed 4 bits, K and V apart", "25% spans in 16 bits", "50% spans in 8 bits"} <= plans
    (quarter, *_) = record.select(plan="25% spans in 16 bits", task="documents")
    for share in ("50%", "100%"):
        (mixed, *_) = record.select(plan=f"{share} spans in mixed bits", task="documents")
        assert mixed.density <= quarter.density + 1e-9
    # 4 bits of 16 numbers with 4 bytes beside them.
    assert record.select(plan="kv uniform 4 bits", task="documents")[0].density == pytest.approx((8 + 4) / 32)


def test_the_study_has_ranks_differences_and_an_answer_and_can_be_saved(record: StudyRecord, tmp_path: Path) -> None:
    assert {row.plan for row in record.select(metric="rank_correlation")} == set(PREDICTORS)
    assert record.select(metric="cross_entropy_difference", plan="kv mixed 4 bits", task="summaries")
    assert record.select(metric="retrieval_difference", plan="50% spans in 8 bits")[0].detail["against"] == "25% spans in 16 bits"
    assert "KV values at 4 bits" in record.answer
    assert "50% spans in 8 bits (" in record.answer
    assert StudyRecord.load(record.save(tmp_path / "weights.json")).rows == record.rows


def test_the_study_leaves_the_model_and_its_scores_as_they_were(run: Run, record: StudyRecord) -> None:
    assert not any(parameter.requires_grad for parameter in run.model.parameters())
    dense = run.measure([dense_plan(run.geometry)], lengths=[512], tasks=["documents"])[0]
    assert record.select(plan="dense", task="documents")[0].value == pytest.approx(dense.value, rel=1e-4)


def test_densities_that_are_not_feasible_are_left_out_with_their_reason(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moa_lab.studies.bits.weights.chosen_plans", lambda run, densities: ({}, {"moa-25": "too short for this"}))
    assert spans_and_bits(run, effects_of(8, KV_WIDTHS), FIRST_ORDER) == ([], [], {"moa-25": "too short for this"})
