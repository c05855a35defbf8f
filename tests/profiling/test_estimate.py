"""The estimate before a profile: it grows as the work does, and refuses what would not fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_model

from moa_lab.calibration.samples import Sample
from moa_lab.profiling import estimate
from moa_lab.profiling.estimate import Estimate, estimate_cost

torch.set_num_threads(1)


def random_sample(n_tokens: int, seed: int = 0) -> Sample:
    return Sample("random", np.random.default_rng(seed).integers(5, VOCABULARY, n_tokens), ((n_tokens - 10, n_tokens),))


def free(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    monkeypatch.setattr(estimate, "free_bytes", lambda device: n_bytes)


def test_longer_samples_need_more_memory_and_more_samples_more_time() -> None:
    model = tiny_model("llama", max_length=4096)
    short, long = estimate_cost(model, [random_sample(512)]), estimate_cost(model, [random_sample(4096)])
    assert short.longest_tokens == 512
    assert long.needed_bytes > short.needed_bytes
    assert long.checkpointed_bytes > short.checkpointed_bytes
    assert short.checkpointed_bytes < short.needed_bytes
    many = estimate_cost(model, [random_sample(512, seed) for seed in range(50)])
    assert many.needed_bytes == short.needed_bytes, "memory follows the longest sample, not their number"
    assert many.seconds > 5 * short.seconds > 0


def test_what_autograd_saves_grows_with_layers_and_leaves_parameters_out() -> None:
    two, four = (estimate_cost(tiny_model("llama", layers=layers), [random_sample(256)]) for layers in (2, 4))
    assert 1.6 < four.bytes_per_token / two.bytes_per_token < 2.1
    # Every saved activation is a row of the hidden size, the MLP's or the vocabulary: dozens of them, not the weights.
    assert two.bytes_per_token < 2 * 40 * 96 * 4


def test_an_estimate_of_a_model_shorter_than_the_probe_works() -> None:
    found = estimate_cost(tiny_model("llama", max_length=96), [random_sample(96)])
    assert found.longest_tokens == 96
    assert found.needed_bytes > 0


@pytest.mark.parametrize("longest", [96, 128, 136])
def test_a_pass_that_took_a_little_longer_says_little_of_a_model_shorter_than_the_probe(
    longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = iter((1.0, 1.0, 1.1))
    monkeypatch.setattr(estimate, "_probe", lambda model, n, vocabulary, sink_tokens: (n * next(noise), n))
    found = estimate_cost(tiny_model("llama", max_length=longest), [random_sample(longest)])
    assert found.seconds_each(longest) == pytest.approx(1.1 * longest)
    assert 0.9 < found.seconds_each(longest // 2) / (longest // 2) < 1.2


def test_what_does_not_fit_is_refused_with_its_length_and_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 2**20)
    found = estimate_cost(tiny_model("llama"), [random_sample(300), random_sample(100)])
    with pytest.raises(ValueError, match=r"300 tokens needs about \d+\.\d GiB beyond the weights, 0\.0 GiB are free on cpu; use shorter"):
        found.require_fit()


def test_activations_are_recomputed_only_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = tiny_model("llama"), [random_sample(500)]
    free(monkeypatch, 2**40)
    plenty = estimate_cost(model, samples)
    assert not plenty.checkpoint
    assert "recomputed" not in str(plenty)
    free(monkeypatch, (plenty.needed_bytes + plenty.checkpointed_bytes) // 2)
    tight = estimate_cost(model, samples)
    tight.require_fit()
    assert tight.checkpoint
    assert "recomputed" in str(tight)


def test_samples_in_flight_fit_in_half_the_free_memory_of_a_gpu() -> None:
    fields = {"longest_tokens": 1024, "needed_bytes": 0, "checkpointed_bytes": 0, "seconds": 1.0, "bytes_per_token": 2.0**20}
    gpu = Estimate(free_bytes=2**34, device="cuda:0", **fields)
    assert 1 <= gpu.samples_in_flight(1024) * 1024 * 2**20 <= 2**33
    assert gpu.samples_in_flight(1024) > 1
    assert gpu.samples_in_flight(10**6) == 1
    assert Estimate(free_bytes=2**34, device="cpu", **fields).samples_in_flight(1024) == 1


def test_a_gpu_is_spared_what_recomputing_saves_and_a_cpu_is_not() -> None:
    fields = {"longest_tokens": 4096, "checkpointed_bytes": 4 * 10**9, "free_bytes": 64 * 10**9, "seconds": 1.0, "bytes_per_token": 10**6}
    gpu = Estimate(needed_bytes=estimate.GPU_BYTES + 1, device="cuda:0", **fields)
    assert gpu.checkpoint
    assert gpu.samples_in_flight(512) == 1
    gpu.require_fit()
    assert not Estimate(needed_bytes=estimate.GPU_BYTES, device="cuda:0", **fields).checkpoint
    assert not Estimate(needed_bytes=estimate.GPU_BYTES + 1, device="cpu", **fields).checkpoint


def test_what_recomputing_cannot_spare_may_take_all_of_a_gpu() -> None:
    fields = {"longest_tokens": 10**5, "free_bytes": 64 * 10**9, "seconds": 1.0, "bytes_per_token": 10.0**6, "device": "cuda:0"}
    Estimate(needed_bytes=10**12, checkpointed_bytes=60 * 10**9, **fields).require_fit()
    with pytest.raises(ValueError, match="are free on cuda:0"):
        Estimate(needed_bytes=10**12, checkpointed_bytes=65 * 10**9, **fields).require_fit()


def test_samples_in_flight_take_no_more_of_a_gpu_than_one_may() -> None:
    fields = {"longest_tokens": 1024, "needed_bytes": 0, "checkpointed_bytes": 0, "seconds": 1.0, "bytes_per_token": 2.0**20}
    large, larger = (Estimate(free_bytes=free, device="cuda:0", **fields) for free in (2**36, 2**37))
    assert large.samples_in_flight(1024) == larger.samples_in_flight(1024)
    assert 1 < large.samples_in_flight(1024) * 1024 * 2**20 <= estimate.GPU_BYTES / 2


def test_an_estimate_leaves_no_gradients() -> None:
    model = tiny_model("llama").requires_grad_(True)
    estimate_cost(model, [random_sample(100)])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.usefixtures("two_threads")
def test_the_short_runs_take_one_core_and_the_profile_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    threads: list[int] = []
    original = estimate.backward_pass

    def watched(*given: Any) -> None:
        threads.append(torch.get_num_threads())
        original(*given)

    monkeypatch.setattr(estimate, "backward_pass", watched)
    # The short runs take one second and three, and the first pass, which does not count, nine.
    times = iter([0.0, 9.0, 0.0, 1.0, 0.0, 3.0] * 2)
    monkeypatch.setattr(estimate, "clock", lambda device: next(times))
    one, four = (estimate_cost(model, [random_sample(128, seed) for seed in range(count)]).seconds for count in (1, 4))
    assert set(threads) == {1}
    # One second for 128 tokens and three for 384: twice the tokens would take twice as long.
    assert one == pytest.approx(1.0)
    assert four == pytest.approx(4 * one / 2)


def test_a_gpu_too_small_for_the_longer_probes_is_asked_for_shorter_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def rates(model: Any, lengths: tuple[int, int], *_: int) -> str:
        asked.append(lengths)
        if lengths[1] > 1000:
            raise torch.OutOfMemoryError("no room")
        return "rates"

    monkeypatch.setattr(estimate, "_rates", rates)
    on_gpu: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    assert estimate._measured(on_gpu, 8192, 256, 4) == "rates"
    assert asked == [estimate.PROBE_TOKENS["cuda"], estimate.PROBE_TOKENS["cpu"]]
