"""A random loss table of a 7B model's size, with heads as unequal as measured ones."""

from __future__ import annotations

import numpy as np

from moa_lab.geometry import ModelGeometry
from moa_lab.plan import SINK_TOKENS, SpanRule
from moa_lab.records import BLOCK_TOKENS, InfluenceProfile, LossTable
from moa_lab.search import loss_table, rule_grid
from moa_lab.search.goals import QUESTIONS

SEED = 0

LENGTHS = (2048, 4096)
TASKS = (QUESTIONS, "summaries")
MORE_RULES = (SpanRule(576.0, 0.0), SpanRule(896.0, 0.0), SpanRule(1792.0, 0.0))
QUICK_SPANS = (192.0, 256.0, 512.0, 1024.0, 1536.0, 2048.0)


def lifelike_table(quick: bool = False, seed: int = SEED) -> LossTable:
    """The losses of a random profile, (rows, 32, 32, 48) or, quick, (rows, 4, 4, 8): sum, all-or-nothing, worst distance."""
    side = 4 if quick else 32
    geometry = ModelGeometry(side, side, side, 128, 2 * max(LENGTHS))
    rules = rule_grid(LENGTHS, alphas=QUICK_SPANS) if quick else (*rule_grid(LENGTHS), *MORE_RULES)
    return loss_table(lifelike_profile(geometry, seed), rules, use_lengths=())


def lifelike_profile(geometry: ModelGeometry, seed: int = SEED) -> InfluenceProfile:
    """Random influence, distributed as measured on a small model: a few heads hold most of it (log-normal, deviation 1.3 for questions and
    0.95 for summaries), the same ones at both lengths and largely in both tasks; most is on near keys, some heads look far back."""
    random = np.random.default_rng(seed)
    heads = (geometry.layers, geometry.query_heads)
    common, far = random.normal(size=heads), random.lognormal(0.0, 1.2, heads)
    place, width = random.random(heads), 0.05 + 0.3 * random.random(heads)
    distances = {}
    for task, deviation in zip(TASKS, (1.3, 0.95), strict=True):
        strength = deviation * (0.9 * common + 0.44 * random.normal(size=heads))
        for length in LENGTHS:
            bins = length // BLOCK_TOKENS
            back = np.arange(bins)
            bump = np.exp(-(((back / bins - place[..., None]) / width[..., None]) ** 2)) / bins
            near = np.exp(-back / 4) + 0.3 / (1 + back)
            curve = np.exp(strength + 0.25 * random.normal(size=heads))[..., None] * (near + 4 * far[..., None] * bump)
            distances[task, length] = (curve * random.lognormal(0.0, 0.3, (*heads, bins)))[None].astype(np.float32)
    # A loss table reads distances only.
    return InfluenceProfile(geometry, SINK_TOKENS, {}, distances)
