"""The heads controller: what is looked at, facts of a head, and another profile, task or length held against it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from figure_records import SMOL, make_plan, make_profile

from moa_lab.figures import HeadPool, long_range_influence
from moa_lab.geometry import ModelGeometry
from moa_lab.records import InfluenceProfile
from moa_lab.storage import RecordError
from moa_lab.workbench.heads import ALIKE, OWN, Heads, rank_stability
from moa_lab.workbench.state import State

PROFILE = make_profile(lengths=(512, 1024), samples=2)
OTHER_MODEL = make_profile(ModelGeometry(2, 4, 2, 16, 4096), lengths=(512,), samples=1)


def changed(profile: InfluenceProfile, factor: np.ndarray) -> InfluenceProfile:
    """The profile with every head's influence multiplied: factor (layers, query_heads)."""
    distances = {key: (values * factor[None, :, :, None]).astype(np.float32) for key, values in profile.distances.items()}
    return InfluenceProfile(profile.geometry, profile.sink_tokens, profile.blocks, distances, profile.provenance)


@pytest.fixture
def heads() -> Heads:
    return Heads(State(profile=PROFILE))


def test_the_longest_length_is_looked_at_first_and_something_else_is_compared_with(heads: Heads) -> None:
    assert heads.key == ("questions", 1024)
    assert heads.against == (OWN, ("questions", 512))
    assert set(heads.sources) == {(OWN, key) for key in PROFILE.keys}


def test_another_task_or_length_becomes_the_states_and_one_that_there_is_not_is_refused(heads: Heads) -> None:
    heads.choose_key("summaries", 512)
    assert (heads.state.task, heads.state.length) == ("summaries", 512)
    assert np.array_equal(heads.influence(), long_range_influence(PROFILE, "summaries", 512, 128))
    with pytest.raises(ValueError, match="'poems' at 512 tokens was not profiled"):
        heads.choose_key("poems", 512)
    assert heads.key == ("summaries", 512)


def test_a_chosen_query_head_makes_its_kv_head_the_states(heads: Heads) -> None:
    assert heads.choose(12, 7)
    assert (heads.state.layer, heads.state.kv_head, heads.follow()) == (12, 2, 7)
    assert not heads.choose(12, 6), "the same KV head: nobody else has to hear of it"
    assert heads.follow() == 6
    for layer, head in ((30, 0), (0, 9), (-1, 0)):
        with pytest.raises(ValueError, match=r"30 layers of 9 query heads"):
            heads.choose(layer, head)
    assert (heads.state.layer, heads.follow()) == (12, 6)


def test_a_kv_head_chosen_elsewhere_is_followed_by_the_query_head_that_looks_furthest(heads: Heads) -> None:
    heads.choose(4, 0)
    heads.state.set(layer=9, kv_head=1)
    far = long_range_influence(PROFILE, "questions", 1024, 128)[9, 3:6]
    assert heads.follow() == 3 + int(far.argmax())


def test_facts_of_a_head_are_its_influence_and_rank_here_and_there_and_its_rule(heads: Heads) -> None:
    plan = make_plan()
    far = heads.influence()
    layer, head = (int(index) for index in np.unravel_index(far.argmax(), far.shape))
    heads.choose(layer, head)
    heads.compare((OWN, ("summaries", 1024)))
    heads.state.set(plan=plan, n_tokens=2048)
    facts = dict(heads.facts())
    assert facts["head"] == f"layer {layer}, query head {head} (KV head {head // 3})"
    assert facts["influence"] == f"{far.max():.3g} nats beyond 128 tokens, rank 1 of 270"
    there = heads.influence(heads.against)
    assert facts["in this profile: summaries, 1,024 tokens"].startswith(f"{there[layer, head]:.3g} nats")
    assert facts["confidence"].startswith("rank 1")
    assert f"in {len(PROFILE.distances[heads.key])} samples, one by one" in facts["confidence"]
    assert facts["rule"].endswith(f"{int(plan.spans(2048)[layer, head // 3]):,} of 2,048 tokens")
    heads.beyond = 512
    assert "beyond 512 tokens" in dict(heads.facts())["influence"]
    heads.state.set(plan=make_plan(OTHER_MODEL.geometry))
    with pytest.raises(ValueError, match="another geometry"):
        heads.facts()


def test_confidence_is_the_range_of_ranks_over_samples_and_sources(heads: Heads) -> None:
    heads.choose(3, 4)
    far = [PROFILE.distances[heads.key][index, :, :, 2:].sum(axis=2) for index in range(len(PROFILE.distances[heads.key]))]
    ranks = [int((one > one[3, 4]).sum()) + 1 for one in far]
    there = [heads.influence(source) for source in heads.sources]
    others = [int((one > one[3, 4]).sum()) + 1 for one in there]
    assert min(ranks) < max(ranks)
    told = dict(heads.facts())["confidence"]
    assert told.startswith(f"rank {min(ranks)} to {max(ranks)} in {len(ranks)} samples, one by one; ")
    assert f"{min(others)}" in told.partition("; ")[2]
    assert told.endswith(f"in {len(others)} tasks and lengths")


def test_ranks_agree_with_themselves_are_turned_by_an_inversion_and_told_apart_where_they_differ() -> None:
    key = ("questions", 1024)
    far = long_range_influence(PROFILE, *key, 128)
    assert rank_stability(PROFILE, key, PROFILE, key, 128) == pytest.approx(1)
    assert rank_stability(PROFILE, key, changed(PROFILE, far**-2), key, 128) == pytest.approx(-1)
    assert -0.3 < rank_stability(PROFILE, key, changed(PROFILE, np.random.default_rng(0).lognormal(0, 9, far.shape)), key, 128) < 0.3
    assert math.isnan(rank_stability(PROFILE, key, PROFILE, ("questions", 512), 1000)), "no influence that far back"
    with pytest.raises(ValueError, match="different geometry"):
        rank_stability(PROFILE, key, OTHER_MODEL, ("questions", 512), 128)


def test_what_is_compared_with_is_one_of_the_sources(heads: Heads) -> None:
    heads.compare((OWN, ("questions", 1024)))
    assert heads.stability() == pytest.approx(1)
    with pytest.raises(ValueError, match="no other: questions, 1,024 tokens"):
        heads.compare(("other", ("questions", 1024)))
    assert heads.against == (OWN, ("questions", 1024))


def test_pooled_heads_are_chosen_ranked_and_compared_as_kv_heads(heads: Heads) -> None:
    far = heads.influence()
    heads.pool = "max"
    pooled = heads.influence()
    assert pooled.shape == (SMOL.layers, SMOL.kv_heads)
    assert np.array_equal(pooled, far.reshape(SMOL.layers, SMOL.kv_heads, -1).max(axis=2))
    layer, kv_head = (int(index) for index in np.unravel_index(pooled.argmax(), pooled.shape))
    assert heads.choose_row(layer, kv_head)
    assert (heads.state.layer, heads.state.kv_head, heads.row()) == (layer, kv_head, kv_head)
    assert far[layer, heads.follow()] == pooled.max(), "the query head that looks furthest"
    assert dict(heads.facts())["influence"] == f"{pooled.max():.3g} nats beyond 128 tokens, rank 1 of 90"
    each = rank_stability(PROFILE, heads.key, PROFILE, heads.against[1], 128)
    assert heads.stability() == rank_stability(PROFILE, heads.key, PROFILE, heads.against[1], 128, "max") != each
    heads.pool = None
    assert heads.row() == heads.follow()


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_profile_from_a_path_is_compared_with_at_the_same_task_and_length(as_folder: bool, heads: Heads, tmp_path: Path) -> None:
    other = changed(PROFILE, np.random.default_rng(1).lognormal(0, 0.2, (SMOL.layers, SMOL.query_heads)))
    file = tmp_path / "second" / "profile.safetensors"
    other.save(file)
    assert heads.load(file.parent if as_folder else file) == "second"
    assert heads.against == ("second", ("questions", 1024))
    assert 0.5 < heads.stability() < 1
    assert np.array_equal(heads.influence(heads.against), long_range_influence(other, "questions", 1024, 128))
    with pytest.raises(ValueError, match="there already"):
        heads.load(file)


def test_what_is_no_profile_of_this_model_is_refused_and_changes_nothing(heads: Heads, tmp_path: Path) -> None:
    before = heads.sources
    OTHER_MODEL.save(tmp_path / "foreign.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    for path, error, words in (
        (tmp_path / "foreign.safetensors", ValueError, "different geometry"),
        (tmp_path / "broken.safetensors", RecordError, "broken"),
        (tmp_path, FileNotFoundError, "folder of a run"),
        ("", FileNotFoundError, "no profile at ''"),
    ):
        with pytest.raises(error, match=words):
            heads.load(path)
    assert heads.sources == before


def test_without_a_profile_there_are_no_heads() -> None:
    with pytest.raises(ValueError, match="load a run"):
        Heads(State())


@pytest.mark.parametrize("pool", [None, "max"])
def test_heads_that_look_equally_far_stand_together(heads: Heads, pool: HeadPool | None) -> None:
    near, far = np.eye(16)[0], np.eye(16)[15]
    geometry = ModelGeometry(2, 8, 4, 16, 4096)
    # By KV head: near, far, near, far.
    looks = np.stack([near, near, far, far, near, near, far, far])
    distances = {("questions", 1024): np.broadcast_to(looks, (1, 2, 8, 16)).astype(np.float32)}
    heads = Heads(State(profile=InfluenceProfile(geometry, 64, {}, distances, PROFILE.provenance)))
    heads.pool, heads.order = pool, ALIKE
    order = heads.ordered()
    assert order is not None
    kinds = [["near", "far"][(head if pool else head // 2) % 2] for head in order[0]]
    assert kinds in (sorted(kinds), sorted(kinds, reverse=True))
    assert sorted(order[1].tolist()) == list(range(len(kinds)))
