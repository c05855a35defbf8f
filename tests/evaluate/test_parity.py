"""Parity on tiny models: it passes on what is there, and each of its cases sees what it is there for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import exit_code
from tiny import tiny_model, tiny_tokenizer
from tiny_plans import small_plan
from transformers import PreTrainedModel

from moa_lab.cache import LayerLayout, RingLayer, packed
from moa_lab.evaluate import parity as module
from moa_lab.evaluate.parity import Parity, default_tokens, parity, table
from moa_lab.geometry import ModelGeometry
from moa_lab.kernels import dispatch, reference, ring_reference
from moa_lab.masks import visible
from moa_lab.models import geometry_of, weights_fingerprint
from moa_lab.plan import Plan, SpanRule, dense_plan, uniform_plan
from moa_lab.provenance import Provenance
from moa_lab.runtime import RingCache, ring_cache
from moa_lab.runtime.sampling import Sampling
from moa_lab.storage import RecordError

torch.set_num_threads(1)

PASSES = {"one prompt", "padded batch", "ragged turns", "chunked prefill", "window boundary", "wrapped twice"}
LOOPS = {"long generation", "decode loop"}
ALL = PASSES | LOOPS | {"allocated bytes"}
N = 96


def mixed_plan(model: PreTrainedModel) -> Plan:
    """Heads with little, with more, and with everything, by turns."""
    geometry = geometry_of(model)
    rules = [SpanRule(9.0, 0.0), SpanRule(0.0, 0.3), SpanRule(0.0, 1.0)]
    dealt = tuple(tuple(rules[(2 * layer + head) % 3] for head in range(geometry.kv_heads)) for layer in range(geometry.layers))
    return Plan(geometry=geometry, rules=dealt, sink_tokens=4, min_span=5)


def compared(family: str = "llama", plan: Callable[[PreTrainedModel], Plan] = mixed_plan, **settings: Any) -> Parity:
    # Tied to its embeddings, a random model says the last token over and over.
    model = tiny_model(family, tie_word_embeddings=False, **settings)
    return parity(model, tiny_tokenizer(), plan(model), n_tokens=N)


def failed(found: Parity) -> set[str]:
    return {row.name for row in found.rows if not row.passed}


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt_neox"])
@pytest.mark.parametrize("plan", [small_plan, mixed_plan])
def test_what_runs_equals_masks_written_out(family: str, plan: Callable[[PreTrainedModel], Plan]) -> None:
    found = compared(family, plan)
    assert {row.name for row in found.rows} == ALL
    assert found.passed, table(found)
    assert all(row.difference is not None and row.difference <= 1e-4 for row in found.rows)
    assert all(row.decided > 0.9 * row.positions and row.agreement == 1 for row in found.rows)
    assert found.settings["tolerance"] == 1e-3


def stored_plan(model: PreTrainedModel) -> Plan:
    """The same spans, K in 8 bits and V in 4."""
    return mixed_plan(model).with_bits(np.array([8, 4]))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_stored_bits_are_compared_with_masks_over_what_comes_back_from_them(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(family, stored_plan)
    assert found.passed, table(found)
    assert "allocated bytes" not in failed(found)
    # A ring that stores one place off.
    right = packed.places
    monkeypatch.setattr(packed, "places", lambda values, bits: ((right(values, bits)[0] - 1).clamp(min=0), *right(values, bits)[1:]))
    assert failed(compared(family, stored_plan)) & PASSES


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_stored_bits_in_half_precision_pass_though_numbers_move_by_whole_steps(family: str) -> None:
    found = compared(family, lambda model: mixed_plan(model).with_bits(4), dtype=torch.bfloat16)
    assert found.passed, table(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_held_against_its_own_noise(dtype: torch.dtype) -> None:
    found = compared(dtype=dtype)
    assert found.passed, table(found)
    assert found.settings["noise"] > 0
    assert found.settings["tolerance"] == max(2 * found.settings["noise"], 8 * torch.finfo(dtype).eps)


# --- sabotage: what is broken, and which cases must see it


def shorter_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    own = LayerLayout.__post_init__

    def shorter(self: LayerLayout) -> None:
        object.__setattr__(self, "windows", tuple(window - 1 for window in self.windows))
        own(self)

    monkeypatch.setattr(LayerLayout, "__post_init__", shorter)


Seen = Callable[[Any, Any], tuple[Any, Any]]


def in_one_pass(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    """Prompts in one pass get another sink and other windows: padded ones go through `visible`, others block by block."""
    own = dispatch.blockwise_attention

    def blockwise(query: Any, key: Any, value: Any, sink: int, windows: Any, scale: float) -> torch.Tensor:
        return own(query, key, value, *seen(sink, windows), scale)

    monkeypatch.setattr(reference, "visible", lambda query, key, sink, windows: visible(query, key, *seen(sink, windows)))
    monkeypatch.setattr(dispatch, "blockwise_attention", blockwise)


def wider_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_pass(monkeypatch, lambda sink, windows: (sink, windows + 1))


def nothing_seen_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_pass(monkeypatch, lambda sink, windows: (0, windows * 0 + 1))


def smaller_sink_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_reference, "visible", lambda query, key, sink, window: visible(query, key, sink - 1, window))


def larger_sink_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_pass(monkeypatch, lambda sink, windows: (sink + 1, windows))


def wrong_slot_in_the_second_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    own = RingLayer.slots_of

    def slots_of(self: RingLayer, positions: torch.Tensor) -> torch.Tensor:
        starts, sinks, rings, _ = self.table.long().unbind(dim=1)
        late = positions[..., None] >= sinks + rings
        return torch.where(late, starts + sinks + (own(self, positions) - starts - sinks + 1).remainder(rings), own(self, positions))

    monkeypatch.setattr(RingLayer, "slots_of", slots_of)


def padding_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    rings = sys.modules[RingCache.__module__]
    monkeypatch.setattr(rings, "padding_of", lambda mask, tokens, lengths: (torch.zeros_like(lengths), None))


def rows_mixed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ring_reference.newest_attention

    def newest(query: torch.Tensor, ring: RingLayer, lengths: torch.Tensor, *others: Any) -> torch.Tensor:
        return own(query, ring, lengths.roll(1), *others)

    monkeypatch.setattr("moa_lab.kernels.dispatch.newest_attention", newest)


def never_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ring_reference.newest_attention
    monkeypatch.setattr("moa_lab.kernels.dispatch.newest_attention", lambda *others: own(*others) * float("nan"))


def answers_turned_round(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ring_reference.newest_attention
    monkeypatch.setattr("moa_lab.kernels.dispatch.newest_attention", lambda *others: own(*others) * -1)


def room_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    own = RingLayer.__init__

    def larger(self: RingLayer, *others: Any) -> None:
        own(self, *others)
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, 1))

    monkeypatch.setattr(RingLayer, "__init__", larger)


DECODING = {"padded batch", "ragged turns", "window boundary", "wrapped twice", "long generation"}
SABOTAGE: list[tuple[Callable[[pytest.MonkeyPatch], None], set[str], set[str]]] = [
    (shorter_windows, PASSES | {"allocated bytes"}, set()),
    (wider_in_one_pass, {"one prompt", "padded batch", "window boundary"}, {"allocated bytes"}),
    (larger_sink_in_one_pass, {"one prompt", "padded batch", "window boundary"}, {"allocated bytes"}),
    (smaller_sink_in_chunks, {"chunked prefill", "ragged turns"}, {"one prompt", "padded batch", "wrapped twice", "allocated bytes"}),
    (wrong_slot_in_the_second_turn, {"wrapped twice", "chunked prefill", "ragged turns"}, {"one prompt", "allocated bytes"}),
    (padding_ignored, {"padded batch", "ragged turns"}, {"one prompt", "chunked prefill", "window boundary", "wrapped twice"}),
    (rows_mixed_up, {"padded batch"}, {"one prompt", "chunked prefill", "wrapped twice", "allocated bytes"}),
    (never_a_number, DECODING, {"one prompt", "chunked prefill", "allocated bytes"}),
    (room_to_spare, {"allocated bytes"}, PASSES | LOOPS),
]  # fmt: skip


@pytest.mark.parametrize(("sabotage", "seen_by", "not_seen_by"), SABOTAGE, ids=[entry[0].__name__ for entry in SABOTAGE])
def test_a_broken_runtime_is_seen_by_the_cases_that_are_there_for_it(
    sabotage: Callable[[pytest.MonkeyPatch], None],
    seen_by: set[str],
    not_seen_by: set[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    sabotage(monkeypatch)
    found = compared()
    assert seen_by <= failed(found), table(found)
    assert not not_seen_by & failed(found), table(found)
    assert not found.passed
    assert Parity.load(found.save(tmp_path / "parity.json")) == found


def test_a_broken_runtime_is_seen_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    shorter_windows(monkeypatch)
    assert {"window boundary", "chunked prefill", "allocated bytes"} <= failed(compared(dtype=torch.float16))


@pytest.mark.parametrize("step", [1, 5])
def test_a_token_that_generate_chose_wrongly_is_seen(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own, calls = Sampling.pick, iter(range(1000))

    def pick(self: Sampling, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return logits.argmin(dim=-1) if next(calls) == step - 1 else own(self, logits, generator)

    # Seen at the step that went wrong, and at no other: what was said is what the reference goes on from.
    monkeypatch.setattr(Sampling, "pick", pick)
    found = compared()
    assert failed(found) == {"decode loop"}
    row = found.row("decode loop")
    assert row.agreement is not None
    assert round((1 - row.agreement) * row.decided) == 3


# --- what is compared


def test_a_dense_plan_leaves_out_what_it_has_no_head_for_and_says_so() -> None:
    found = compared(plan=lambda model: dense_plan(geometry_of(model)))
    assert found.passed
    assert {row.name for row in found.rows} == ALL - {"window boundary", "wrapped twice"}
    assert [line.split(":")[0] for line in found.settings["left_out"]] == ["window boundary", "wrapped twice"]
    assert "left out: wrapped twice: every head keeps everything" in table(found)


def test_the_default_length_lets_the_smallest_heads_wrap_twice_within_bounds() -> None:
    model = tiny_model("llama", max_length=2048)
    geometry = geometry_of(model)

    def constant(span: float, sink: int = 4) -> Plan:
        return Plan(geometry=geometry, rules=((SpanRule(span, 0.0), SpanRule(0.0, 1.0)),) * 2, sink_tokens=sink, min_span=sink + 1)

    assert default_tokens(model, constant(9.0)) == 256
    assert default_tokens(model, constant(200.0)) == 448
    assert default_tokens(model, constant(900.0)) == 1024
    assert default_tokens(tiny_model("llama", max_length=512), constant(900.0)) == 512
    assert default_tokens(model, dense_plan(geometry)) == 256


def test_the_texts_are_drawn_by_the_seed_and_progress_counts_the_cases() -> None:
    model, tokenizer, heard = tiny_model("llama"), tiny_tokenizer(), []
    found = parity(model, tokenizer, small_plan(model), n_tokens=40, seed=3, progress=lambda done, total: heard.append((done, total)))
    assert heard == [(done, 9) for done in range(1, 10)]
    assert found.provenance.seed == 3
    assert found.provenance.weights == weights_fingerprint(model)
    assert found.settings["plan_identity"] == small_plan(model).identity()


NEEDLE_TOKENS = 480
"""Room for a question, and for spans that cut into the text."""


def asked(needles: int = 4) -> Parity:
    model = tiny_model("llama", tie_word_embeddings=False)
    return parity(model, tiny_tokenizer(), mixed_plan(model), n_tokens=NEEDLE_TOKENS, needles=needles)


def test_needles_are_answered_as_the_reference_answers_them() -> None:
    row = asked().row("needles")
    assert row.passed
    assert (row.agreement, row.positions, row.decided) == (1, 4, 4)
    assert row.difference is not None
    assert row.difference < 1e-4
    assert f"in {NEEDLE_TOKENS} tokens: " in row.compared


@pytest.mark.parametrize(("sabotage", "told"), [(nothing_seen_in_one_pass, "loss"), (answers_turned_round, "answers")])
def test_needles_answered_otherwise_are_seen(
    sabotage: Callable[[pytest.MonkeyPatch], None], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    row = asked().row("needles")
    assert not row.passed
    assert (row.agreement is not None and row.agreement < 0.98) if told == "answers" else (row.difference or 1) > row.tolerance


def test_the_model_is_as_before() -> None:
    model = tiny_model("llama")
    before = dict(vars(model)), model.config._attn_implementation
    parity(model, tiny_tokenizer(), small_plan(model), n_tokens=40)
    assert (vars(model).keys(), model.config._attn_implementation) == (before[0].keys(), before[1])
    with pytest.raises(ValueError, match="no plan is applied"):
        ring_cache(model)


@pytest.mark.parametrize("n_tokens", [0, 31, 513])
def test_a_length_outside_the_model_is_refused(n_tokens: int) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"n_tokens must lie in 32\.\.512"):
        parity(model, tiny_tokenizer(), small_plan(model), n_tokens=n_tokens)


# --- the record


def test_the_record_round_trips_and_refuses_what_is_not_one(tmp_path: Path) -> None:
    found = compared()
    path = found.save(tmp_path / "parity.json")
    assert Parity.load(path) == found
    assert json.loads(path.read_text())["schema"] == module.PARITY_SCHEMA == "moa-lab/parity/1"
    path.write_text(path.read_text()[:100])
    with pytest.raises(RecordError, match=r"parity\.json"):
        Parity.load(path)
    path.write_text('{"schema": "moa-lab/plan/1"}')
    with pytest.raises(RecordError, match="moa-lab/parity/1"):
        Parity.load(path)


def test_nothing_compared_is_nothing_passed() -> None:
    assert not Parity(()).passed


# --- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    model = tiny_model("llama", tie_word_embeddings=False)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    mixed_plan(model).save(folder / "plan.json")
    uniform_plan(ModelGeometry(3, 4, 2, 8, 256), 0.5).save(folder / "foreign.json")
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    return exit_code(monkeypatch, "parity", *arguments)


def test_the_command_writes_the_record_and_says_so_in_its_exit_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "parity.json"
    arguments = ("--model", folder / "model", "--plan", folder / "plan.json", "--n-tokens", N, "--out", out)
    assert command(monkeypatch, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all 9 cases passed"
    assert len({line.index("passed") for line in lines if line.endswith("  passed")}) == 1
    assert Parity.load(out).passed
    assert command(monkeypatch, *arguments) == 2
    assert "pass --force to replace it" in capsys.readouterr().err
    padding_ignored(monkeypatch)
    assert command(monkeypatch, *arguments, "--force") == 1
    assert "cases failed" in capsys.readouterr().out
    assert not Parity.load(out).passed


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_command_compares_in_the_dtype_asked_for(
    dtype: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "parity.json"
    arguments = ("--model", folder / "model", "--plan", folder / "plan.json", "--n-tokens", N, "--dtype", dtype, "--out", out)
    assert command(monkeypatch, *arguments) == 0, capsys.readouterr().out
    found = Parity.load(out)
    assert found.settings["dtype"] == dtype
    assert (found.settings["tolerance"] == 1e-3) == (dtype == "float32"), "half precision is held against its own noise"


@pytest.mark.parametrize(("dtype", "warned"), [(torch.float16, False), (torch.bfloat16, True)])
def test_weights_of_another_fingerprint_are_warned_of_but_in_float16_where_it_would_be_another_anyway(
    dtype: torch.dtype, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama", tie_word_embeddings=False, dtype=dtype)
    parity(model, tiny_tokenizer(), replace(mixed_plan(model), provenance=Provenance(weights="of another model")), n_tokens=40)
    assert ("was made on weights" in caplog.text) == warned


@pytest.mark.parametrize(
    ("plan", "more", "message"),
    [
        ("foreign.json", (), "plan has 3 layers"),
        ("missing.json", (), "missing.json"),
        ("plan.json", ("--n-tokens", "600"), "n_tokens must lie in 32..512"),
        ("plan.json", ("--dtype", "int8"), "dtype must be one of float32, float16, bfloat16, got 'int8'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path, plan: str, more: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "--model", folder / "model", "--plan", folder / plan, *more) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
