"""Bits are drawn as spans are: a slope for every width, and heads that rounding hurts keep 16 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from own_answers import DENSITY, LENGTHS, own_answer, own_answers
from tiny import tiny_model
from transformers import PreTrainedModel

from moa_lab.cache.storage import as_stored
from moa_lab.calibration.answers import answer_logits
from moa_lab.calibration.samples import Sample, SampleSet
from moa_lab.engines import EngineLimits
from moa_lab.interface import AttentionCall, Handler, route_attention
from moa_lab.kernels.mixture import BLOCK, mixed_windows
from moa_lab.learning import checkpoint, learn_spans
from moa_lab.learning.roundings import drawn_widths, widths_of
from moa_lab.learning.slopes import drawn_slopes
from moa_lab.plan import mixes_of, read_mixes
from moa_lab.profiling import profile
from moa_lab.records import LossTable
from moa_lab.search import loss_table

torch.set_num_threads(1)
LENGTH, MIXES = 320, read_mixes("16,8,4")
WIDTHS = widths_of(MIXES)
FRAGILE = (1, 0)
"""The layer and KV head that rounding hurts."""


def test_widths_are_those_of_keys_and_of_values() -> None:
    assert widths_of(read_mixes("16,8,8+4")) == ((8, 16), (4, 8, 16))


def test_what_is_drawn_is_what_the_cache_gives_back_and_slopes_are_gradients_times_what_rounding_changes() -> None:
    made = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, 5, 16, generator=made, requires_grad=True)
    slope, bits = torch.randn(values.shape, generator=made), torch.tensor([[4, 8, 16], [16, 4, 4]])
    shift = torch.zeros(2, 3, 3, requires_grad=True)
    found = drawn_widths(values, shift, bits, (4, 8, 16))
    here = torch.stack([as_stored(values[row, head].detach(), int(bits[row, head])) for row in range(2) for head in range(3)])
    here = here.unflatten(0, (2, 3))
    assert torch.equal(found, here)
    through, moved = torch.autograd.grad(found, [values, shift], slope)
    assert torch.equal(through, slope), "rounding has no slope of its own"
    for at, width in enumerate((4, 8, 16)):
        wanted = (slope * (as_stored(values.detach(), width) - here)).sum(dim=(-2, -1))
        torch.testing.assert_close(moved[..., at], wanted)
    assert (moved.gather(-1, torch.tensor([[0, 1, 2], [2, 0, 0]])[..., None]) == 0).all()


def lost(model: PreTrainedModel, batch: list[Sample], layer: int, head: int, part: int, share: float, width: int) -> float:
    """Divergence from the dense model where the K (0) or V (1) of a head, stored in 4 bits, is `share` of the way to another width."""

    def handler(at: int) -> Handler:
        def attend(call: AttentionCall) -> torch.Tensor:
            given = [call.key, call.value]
            if at == layer:
                parts = given[part].clone()
                own = as_stored(parts[:, head], 4)
                parts[:, head] = own + share * (as_stored(parts[:, head], width) - own)
                given[part] = parts
            blocks = -(-LENGTH // BLOCK)
            whole = torch.eye(blocks)[-1].expand(len(call.query), call.key.shape[1], -1)
            return mixed_windows(call.query, *given, call.positions >= 0, whole, 64, call.scale, call.softcap)

        return attend

    with torch.no_grad():
        dense = torch.cat(answer_logits(model, batch)).log_softmax(-1)
        with route_attention(model, handler):
            ours = torch.cat(answer_logits(model, batch)).log_softmax(-1)
    return float(torch.nn.functional.kl_div(ours, dense, reduction="batchmean", log_target=True))


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("recomputed", [False, True])
def test_slopes_are_those_of_a_little_weight_moved_to_another_width(layer: int, part: int, recomputed: bool) -> None:
    model = tiny_model("llama")
    batch = [own_answer(model, "questions", LENGTH, 0)]
    bits = torch.full((2, 1, 2, 2), 16)
    bits[layer, 0, 1, part] = 4
    counts = torch.full((2, 1, 2), LENGTH // BLOCK, dtype=torch.int32)
    told, _, moved = drawn_slopes(model, batch, counts, [1.0], 64, checkpoint=recomputed, drawn=(bits, WIDTHS))
    assert told[0] == pytest.approx(lost(model, batch, layer, 1, part, 0.0, 16), rel=1e-3)
    little = 0.02
    for at, width in enumerate(WIDTHS[part]):
        ends = [lost(model, batch, layer, 1, part, sign * little, width) for sign in (-1, 1)]
        assert moved[part][layer, 1, at] == pytest.approx((ends[1] - ends[0]) / (2 * little), rel=0.05, abs=1e-5)
    # Values that are drawn in 16 bits lose by the others.
    assert moved[part][layer, 1, -1] < 0


def fragile(times: float) -> PreTrainedModel:
    """A model in which one number of each value of a head is `times` larger and counts as much less: the dense model stays as it is, but
    the grid of few bits is wider by that."""
    made = tiny_model("llama", layers=3)
    layer, head = FRAGILE
    attention = made.model.layers[layer].self_attn
    with torch.no_grad():
        attention.v_proj.weight[16 * head] *= times
        for query_head in (2 * head, 2 * head + 1):
            attention.o_proj.weight[:, 16 * query_head] /= times
    return made


def table_of(model: PreTrainedModel, samples: SampleSet) -> LossTable:
    return loss_table(profile(model, samples, rounding=True), mixes=read_mixes("16,4"))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return fragile(200)


@pytest.fixture(scope="module")
def samples(model: PreTrainedModel) -> SampleSet:
    return own_answers(model, 2)


@pytest.fixture(scope="module")
def table(model: PreTrainedModel, samples: SampleSet) -> LossTable:
    return table_of(model, samples)


def test_the_head_that_rounding_hurts_keeps_its_bits_and_others_pay(model: PreTrainedModel, samples: SampleSet, table: LossTable) -> None:
    front = learn_spans(model, samples, table, DENSITY, steps=30)
    learned = front.points[0].plan
    assert learned.widths()[FRAGILE].tolist() == [16, 16]
    assert len(mixes_of(learned)) == 2
    for point in front:
        assert point.plan.name.startswith("learned")
        assert point.plan.name.endswith("@per-head")
        for n in LENGTHS:
            assert point.density[str(n)] == point.plan.density(n) <= DENSITY + 1e-9
    assert front.points[0].density[str(LENGTHS[-1])] > 0.97 * DENSITY
    sturdy = fragile(1)
    own = own_answers(sturdy, 2)
    assert learn_spans(sturdy, own, table_of(sturdy, own), DENSITY, steps=30).points[0].plan.widths()[FRAGILE].tolist() == [4, 4]


def test_a_killed_descent_over_bits_goes_on_where_it_was(
    model: PreTrainedModel, samples: SampleSet, table: LossTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(step: int, steps: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    told: list[int] = []
    monkeypatch.setattr(checkpoint, "SAVE_S", 0.0)
    whole = learn_spans(model, samples, table, DENSITY, steps=5)
    with pytest.raises(KeyboardInterrupt):
        learn_spans(model, samples, table, DENSITY, steps=5, parts_dir=tmp_path, progress=killed)
    resumed = learn_spans(model, samples, table, DENSITY, steps=5, parts_dir=tmp_path, progress=lambda step, _: told.append(step))
    assert told == [3, 4, 5]
    assert [point.plan.identity() for point in resumed] == [point.plan.identity() for point in whole]
    told.clear()
    fewer = loss_table(profile(model, samples)).in_mixes(read_mixes("16,8"))
    learn_spans(model, samples, fewer, DENSITY, steps=5, parts_dir=tmp_path, progress=lambda step, _: told.append(step))
    assert told[0] == 0, "other bits are another descent"


def test_nothing_is_learned_where_the_most_bits_hold_all_tokens_and_the_table_alone_says_which_there_are(
    model: PreTrainedModel, samples: SampleSet, table: LossTable
) -> None:
    bought = loss_table(profile(model, samples)).in_mixes(read_mixes("8,4"))
    assert not len(learn_spans(model, samples, bought, 0.7, steps=1))
    with pytest.raises(ValueError, match="the table says in which heads may be stored, 16, 4; leave bits out"):
        learn_spans(model, samples, table, DENSITY, steps=1, bits=8)
    with pytest.raises(ValueError, match="engine some knows no stored bits"):
        learn_spans(model, samples, table, DENSITY, steps=1, engine=EngineLimits("some", windows_per_model=2))
