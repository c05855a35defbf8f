"""Spans, and bits, learned by gradient descent under the budget: plans are drawn, and rules are judged by what they would have changed.

A profile measures each head while all others are whole, and adds that up. Heads are redundant, so such sums mislead where few heads
are left. Here every head has a distribution over rules ("chances"). A step draws plans and computes the gradient ("slope") of their loss
in all chances at once: for each rule, the first-order change if the head had followed it in that plan. Its mean over plans is the
gradient of the expected loss (the multilinear extension of a set function: Calinescu et al., 2011), which the chances descend by
exponentiated gradients (Kivinen and Warmuth, 1997). The budget begins at nearly the whole cache and shrinks, so that heads give up
their tokens, and bits, one after another.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab import processes
from moa_lab.calibration.samples import SampleSet
from moa_lab.engines import Engine, check_stored, engine_of, meets
from moa_lab.geometry.wrappers import plain_model
from moa_lab.interface.compiled import compiled_layers
from moa_lab.learning.batches import Batches, batch_tokens
from moa_lab.learning.checkpoint import Checkpoint, course_of
from moa_lab.learning.mixtures import Mixtures
from moa_lab.learning.slopes import SlopeSampler
from moa_lab.plan import WHOLE_BITS, name_of_bits, read_mix, tokens_bought
from moa_lab.profiling.inputs import check_inputs
from moa_lab.records import Front, LossTable
from moa_lab.search.front import DENSITY, distinct, point, spent_point
from moa_lab.search.goals import default_goals
from moa_lab.search.holding import told_front
from moa_lab.search.mixes import check_one_say, named_front, stored_front
from moa_lab.search.problem import Density, feasible

logger = logging.getLogger(__name__)

STEPS = 400
RATE = 0.2
FIRST_DENSITY = 0.95
SHRINKING = 0.3
"""Share of the steps in which the budget shrinks; in the others, plans are drawn at the final density."""
FLOOR_SHARES = (0.25, 0.5, 0.75)
"""Floors of further plans of a descent, as shares of the density."""

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


def learn_spans(
    model: PreTrainedModel,
    samples: SampleSet,
    table: LossTable,
    density: Density,
    *,
    steps: int = STEPS,
    rate: float = RATE,
    weights: Mapping[str, float] | None = None,
    name: str = "learned",
    max_rules_per_layer: int | None = None,
    bits: int | str = 16,
    engine: Engine | None = None,
    seed: int = 0,
    parts_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    any_model: bool = False,
    progress: Progress | None = None,
) -> Front:
    """The plan that the descent ends at, and the same with floors that grow with the length, as points `name`, `name-0.0625`, ...

    A descent knows the lengths of its samples, and text beyond them suffers where many heads keep a few hundred tokens whatever the
    length; so of the same evidence plans are made in which every head keeps a share of what it sees, `FLOOR_SHARES` of the density.

    The loss is the divergence of the answers of `samples` from the dense model's, in nats per answer token, the sum of the tasks'
    means, each times its weight (`weights`, 1 where not given); a step takes samples of one length. table: the rules to choose from; its
    predicted losses are reported for the point, but not used in learning. `density`, its lengths and max_rules_per_layer, which only
    the final plan keeps to, are as in `search`. bits: in how many keys and values are stored, one mix of those of `search`, which names
    the plans; none is made where the budget holds all tokens so. With a table of several mixes (see `loss_table`) the bits of every head
    are drawn and learned as its rule is, under one budget of bytes, and plans are called `...@per-head`. engine: as in `search`; the
    descent counts the tokens that it allocates, and plans keep its windows in the end. rate: nats by which a step changes the evidence for
    a rule with a slope of average size. parts_dir: keeps the state of the descent every half a minute, from which the same call goes on
    after a kill. tokenizer, any_model: as in `profile`, of samples and table. Raises ValueError for samples or a table of another model,
    fewer than one step, no samples, several mixes or others than the table's, a task that lacks a length, weights that are negative, not
    finite, all 0 or of unknown tasks, or samples that do not fit in memory, and InfeasibleError as `search` does.
    """
    model = plain_model(model)
    if steps < 1 or not len(samples):
        raise ValueError(f"learning needs at least one step and one sample, got {steps} and {len(samples)}")
    weights, batches = dict(weights or {}), Batches(samples, batch_tokens(model), seed)
    counted = [weights.get(task, 1.0) for task in batches.tasks]
    if weights.keys() - set(batches.tasks) or not all(0 <= weight < math.inf for weight in counted) or not any(counted):
        raise ValueError(f"weights must be at least 0, one above it, and of the tasks {', '.join(batches.tasks)}, got {weights}")
    check_inputs(model, samples, table, tokenizer, any_model=any_model)
    mix, limits = read_mix(bits), None if engine is None else engine_of(engine)
    check_one_say(table, (mix,))
    if limits is not None:
        for each in (mix, *table.mixes):
            check_stored(limits, each)
        table = replace(table, engine=limits)
    targets = feasible(table, density, max_rules_per_layer, mix=mix)
    objectives = (*(objective.name for objective in table.objectives), DENSITY)
    if min(tokens_bought(targets, max(table.mixes, key=sum), table.geometry).values()) == 1:
        logger.info("nothing to learn: the density holds all tokens in the bits that are asked for")
        return Front((), objectives, {"solver": "learn", "density": {str(n): d for n, d in targets.items()}}, table.provenance)
    mixtures = Mixtures(table, targets, rate)
    sampler = SlopeSampler.fitting(model, table, samples, seed, weights, bits=mix)
    history: list[dict[str, float]] = []
    generators = (batches.rng, sampler.rng)
    course = {
        **course_of(model, samples, table),
        "weights": weights, "steps": steps, "rate": rate, "seed": seed, "density": {str(n): d for n, d in targets.items()},
        **({} if mix == WHOLE_BITS else {"bits": mix}), **({} if limits is None else {"engine": limits.told()}),
    }  # fmt: skip
    mixes = table.mixes if table.stored else (mix,)
    store = partial(named_front, mixes=mixes) if table.stored else partial(stored_front, mix=mix)
    checkpoint = Checkpoint(parts_dir, name_of_bits(name, mixes), course)
    if saved := processes.from_first(checkpoint.load):
        arrays, told = saved
        mixtures.restore(arrays, told["mixtures"])
        for generator, state in zip(generators, told["generators"], strict=True):
            generator.bit_generator.state = state
        history = told["history"]
    with compiled_layers(model, (steps - len(history)) * batch_tokens(model)):
        for step in range(len(history), steps):
            if progress:
                progress(step, steps)
            left = max(0.0, 1 - step / max(1.0, SHRINKING * steps))
            chances = mixtures.chances(mixtures.limit + left * np.maximum(FIRST_DENSITY - mixtures.limit, 0))
            found = sampler(batches.draw(), chances)
            mixtures.step(chances, found.slope)
            history.append(found.divergence)
            arrays, numbers = mixtures.state()
            state = {"mixtures": numbers, "generators": [rng.bit_generator.state for rng in generators], "history": history}
            checkpoint.save(arrays, state, last=step + 1 == steps)
    if progress:
        progress(steps, steps)
    last = history[-max(1, steps // 10) :]
    divergence = {task: float(np.mean([told[task] for told in last])) for task in batches.tasks}
    logger.info("learned in %d steps: %s nats under plans drawn in the last ones", steps, divergence)
    how = {"steps": steps, "rate": rate, "shrinking": SHRINKING, "weights": weights, "lesson_lengths": batches.lengths}
    goals = default_goals(table)
    points = []
    for share in (0.0, *FLOOR_SHARES):
        least = share * min(targets.values())
        told = {**how, "drawn_divergence": divergence, "least": least}
        learned = point(
            table, mixtures.choice(max_rules_per_layer, least), name=name if not least else f"{name}-{least:.3g}",
            origin="learned", lengths=targets, goals=goals, search=told,
        )  # fmt: skip
        points.append(spent_point(table, learned, targets, goals))
    settings = {**how, "solver": "learn", "seed": seed, "density": {str(n): d for n, d in targets.items()}}
    if limits is None:
        return store(Front(tuple(distinct(points)), objectives, settings, table.provenance))
    held = tuple(one for one in distinct(points) if meets(one.plan, limits, targets))
    return told_front(store(Front(held, objectives, settings, table.provenance)), limits)
