"""What fewer bits cost to first order, against autograd alone and against the loss itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_model

from moa_lab.cache.storage import as_stored
from moa_lab.calibration.answers import answer_logits
from moa_lab.calibration.samples import Sample, SampleSet
from moa_lab.interface import AttentionCall, route_attention
from moa_lab.kernels.reference import dense_attention
from moa_lab.profiling import profile
from moa_lab.records import ROUNDED_BITS, InfluenceProfile
from moa_lab.studies.bits.effects import bit_effects

torch.set_num_threads(1)

SAMPLES = SampleSet(
    tuple(Sample("text", np.random.default_rng(seed).integers(5, VOCABULARY, n), ((n - 9, n),)) for seed, n in ((0, 70), (1, 70), (2, 96)))
)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_every_head_and_width_has_the_root_of_the_squares_that_autograd_alone_gives(family: str) -> None:
    model = tiny_model(family)
    found, (effects, _) = profile(model, SAMPLES, rounding=True), bit_effects(model, SAMPLES.samples, ROUNDED_BITS)
    # (samples, layer, head, K or V, width)
    expected = np.sqrt(effects.squared).reshape(3, 2, -1, 2, len(ROUNDED_BITS)).swapaxes(3, 4)
    np.testing.assert_allclose(found.rounding["text", 70], expected[:2], rtol=2e-4)
    np.testing.assert_allclose(found.rounding["text", 96], expected[2:], rtol=2e-4)


@pytest.mark.parametrize("part", [0, 1])
def test_it_is_the_size_of_the_loss_change_by_errors_of_random_sign(part: int) -> None:
    model, (sample, *_) = tiny_model("llama", dtype=torch.float64), SAMPLES.samples
    layer, head, width, small = 1, 0, ROUNDED_BITS.index(4), 1e-3
    random = torch.Generator().manual_seed(0)

    def loss(signs: torch.Tensor | None, times: float) -> float:
        def handler(at: int):  # type: ignore[no-untyped-def]
            def attend(call: AttentionCall) -> torch.Tensor:
                parts = [call.key.clone(), call.value.clone()]
                if at == layer and signs is not None:
                    exact = parts[part][:, head]
                    parts[part][:, head] += times * signs * (as_stored(exact.float(), 4).double() - exact)
                return dense_attention(call.query, *parts, call.mask, call.scale, call.softcap, call.sink_logits)

            return attend

        with torch.no_grad(), route_attention(model, handler):
            logits = answer_logits(model, [sample])[0]
            targets = torch.from_numpy(sample.tokens[sample.answer_positions])
            return float(torch.nn.functional.cross_entropy(logits, targets))

    changes = []
    for _ in range(200):
        signs = torch.randint(0, 2, (1, 70, 16), generator=random).double() * 2 - 1
        changes.append((loss(signs, small) - loss(signs, -small)) / (2 * small))
    found = profile(model, SAMPLES, rounding=True).rounding["text", 70][0, layer, head, width, part]
    # 200 draws tell a standard deviation to 5%.
    assert found == pytest.approx(float(np.sqrt(np.mean(np.square(changes)))), rel=0.15)


def test_it_is_kept_for_who_asks_and_changes_nothing_else(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plain = profile(model, SAMPLES, parts_dir=tmp_path)
    more = profile(model, SAMPLES, parts_dir=tmp_path, rounding=True)
    assert plain.rounding == {}
    assert set(more.rounding) == set(plain.keys)
    for kind in ("blocks", "distances", "span_effects"):
        for key in plain.keys:
            np.testing.assert_array_equal(getattr(more, kind)[key], getattr(plain, kind)[key])
    loaded = InfluenceProfile.load(more.save(tmp_path / "profile.safetensors"))
    np.testing.assert_array_equal(loaded.rounding["text", 96], more.rounding["text", 96])
    assert InfluenceProfile.load(plain.save(tmp_path / "plain.safetensors")).rounding == {}
