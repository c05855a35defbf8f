"""A plan that is worse than a simple one on test samples is said to be so first."""

from __future__ import annotations

from dataclasses import replace

from moa_lab.evaluate.summary import summarise, table
from moa_lab.evaluate.worse import chosen_text, worse_than_simple
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan, SpanRule, dense_plan, uniform_plan
from moa_lab.records import Measurement, Measurements

GEOMETRY = ModelGeometry(2, 2, 2, 16, 4096, ())
DENSE, UNIFORM = dense_plan(GEOMETRY, (2048,)), uniform_plan(GEOMETRY, 0.5, (2048,))
MOA = Plan(geometry=GEOMETRY, rules=((SpanRule(0, 1), SpanRule(128, 0)),) * 2, name="moa", lengths=(2048,), search={"origin": "default"})


def row(plan: str, metric: str, task: str, values: list[float]) -> Measurement:
    value = sum(values) / len(values)
    return Measurement(plan, metric, task, 2048, value, len(values), value - 1, value + 1, 0.5, {"per_sample": values, "samples": "s"})


def test_what_is_decidedly_lost_against_a_simple_plan_is_named_with_both_numbers_and_a_cure() -> None:
    rows = [row("moa", "retrieval", "needles", [0, 0, 0, 1] * 8), row("uniform", "retrieval", "needles", [1, 1, 0, 1] * 8)]
    (told,) = worse_than_simple(MOA, [DENSE, UNIFORM], rows)
    assert told == (
        "moa is worse than uniform here: needles at 2,048 tokens 0.250 against 0.750. "
        "Try --prefer needles, a higher --density, or a preset with more samples."
    )


def test_a_difference_that_is_not_decided_a_better_score_and_an_equal_plan_are_not_named() -> None:
    close = [row("moa", "cross_entropy", "documents", [3.0, 3.3]), row("uniform", "cross_entropy", "documents", [3.1, 3.1])]
    better = [row("moa", "cross_entropy", "summaries", [0.5, 0.6, 0.5]), row("uniform", "cross_entropy", "summaries", [0.9, 1.0, 0.9])]
    assert worse_than_simple(MOA, [UNIFORM], [*close, *better]) == []
    lost = [row("moa", "cross_entropy", "summaries", [0.9, 1.0, 0.9]), row("uniform", "cross_entropy", "summaries", [0.5, 0.6, 0.5])]
    assert "own answers at 2,048 tokens 0.933 against 0.533 nats" in worse_than_simple(MOA, [UNIFORM], lost)[0]
    assert worse_than_simple(replace(UNIFORM, name="moa"), [UNIFORM], lost) == []
    # Other bits make another plan.
    (told,) = worse_than_simple(replace(UNIFORM, name="moa").with_bits(4), [UNIFORM], lost)
    assert told.startswith("moa is worse than uniform here")
    # The dense model keeps more: to lose against it is no warning.
    assert worse_than_simple(MOA, [DENSE], [replace(one, plan=one.plan.replace("uniform", "dense")) for one in lost]) == []


def test_the_table_says_so_in_its_first_line_and_which_candidate_won_in_its_last() -> None:
    chosen = {
        "candidate": "learned", "origin": "learned", "prefer": "both", "score": 0.25,
        "best_simple": {"candidate": "ranked-128", "origin": "ranked", "losses": {}, "score": 0.5},
    }  # fmt: skip
    moa = replace(MOA, search=chosen)
    rows = [row("moa", "retrieval", "needles", [0, 0, 0, 1] * 8), row("uniform", "retrieval", "needles", [1, 1, 0, 1] * 8)]
    rows += [row("dense", "retrieval", "needles", [1.0] * 32)]
    lines = table(summarise([DENSE, UNIFORM, moa], Measurements(tuple(rows)), 2048)).splitlines()
    assert lines[0].startswith("moa is worse than uniform here: needles")
    assert lines[-1] == (
        "moa is learned (learned spans), chosen by needles and words: in validation it loses 0.250 of what uniform spans lose, "
        "the best simple plan, ranked-128 (whole heads over a floor), 0.500."
    )
    simple = replace(moa, search={**chosen, "candidate": "ranked-128", "origin": "ranked"})
    assert chosen_text(simple).endswith("a simple plan lost least in validation.")
    assert chosen_text(UNIFORM) == ""
