"""What notebook 11 says of lower densities and fewer bits, held against the records that it shows."""

from __future__ import annotations

from pathlib import Path

from moa_lab import Plan
from moa_lab.evaluate.compare import answers_way, ratio, row_of
from moa_lab.records import Measurement, Measurements
from moa_lab.studies import StudyRecord
from moa_lab.studies.densities.low_density import variant_text
from moa_lab.studies.gains import gain, gains_by_density

DATA = Path(__file__).resolve().parents[2] / "data"
refine, low, weights = (StudyRecord.load(f"{DATA}/studies/{name}.json") for name in ("refine", "low_density", "weights"))
standard = Measurements.load(f"{DATA}/runs/standard-25/measurements.json")


def gained_over_ranked() -> dict[str, dict[str, Measurement]]:
    """By task and by what it is compared with, what whole heads over a floor gain."""
    gained = {"needles": {}, "documents": {}, "summaries": {}}
    for row in (*low.select(metric="needles_gained"), *low.select(metric="nats_saved")):
        if row.plan.startswith("ranked"):
            gained[row.task][variant_text(row)] = row
    return gained


def test_records_are_of_the_devices_and_samples_that_are_named() -> None:
    assert [record.provenance.device for record in (refine, low, weights, standard)] == [*3 * ["NVIDIA H200"], "NVIDIA H100 80GB HBM3"]
    assert [record.settings["run"].get("test_seed", 0) for record in (refine, low, weights, standard)] == [1, 1, 1, 0]


def test_stages_were_chosen_as_said_and_keep_what_is_told() -> None:
    assert [refine.settings[of] for of in ("learning_steps", "refine_heads", "profiled_lengths")] == [640, 32, [2048, 4096]]
    sizes = {(row.task, row.n) for record in (refine, low, weights) for row in record.rows if row.plan == "dense"}
    assert sizes == {("needles", 512), ("documents", 32), ("summaries", 64)}
    stages = ("ranked", "search", "learned")
    densities = (15, 20, 25, 50)
    told = [Plan.load(f"{DATA}/studies/plans/moa-{p}.json").search for p in densities]
    assert [one["candidate"] for one in told] == [refine.settings["chosen"][f"learned-{p}"] for p in densities]
    descents = [*3 * [(640, {"questions": 3})], (320, {"summaries": 2, "text": 3})]
    assert [(one["steps"], one["weights"]) for one in told] == descents
    kept = {(a, n): [row_of(refine.rows, f"{a}-{p}", "needles", n).density for p in densities] for a in stages for n in (1024, 2048, 4096)}
    assert all(share < p / 100 - 0.02 for share, p in zip(kept["ranked", 4096], densities, strict=True))
    assert all(abs(a - b) < 0.005 for n in (2048, 4096) for a, b in zip(kept["learned", n], kept["search", n], strict=True))
    assert all(a > b + 0.01 for a, b in zip(kept["learned", 1024], kept["search", 1024], strict=True))


def test_learning_finds_more_needles_than_the_search_as_told() -> None:
    densities = (15, 20, 25, 50)
    single = ((1024,), (2048,), (4096,))
    learned = gains_by_density(refine.rows, "learned", "search", "needles", single, densities)
    to_ranked = gains_by_density(refine.rows, "learned", "ranked", "needles", single, densities)
    better = "better"
    open_ = "not decided"
    same = "no difference"
    assert [one.verdict for one in learned.values()] == [*9 * [better], same, open_, better]
    longest = [learned[f"{p}%, 4,096 tokens"].found.value for p in densities]
    assert [f"{value:.3f}" for value in (min(longest[:3]), max(longest[:3]), longest[3])] == ["0.107", "0.203", "0.025"]
    assert all(to_ranked[f"{p}%, 4,096 tokens"].verdict == better for p in densities)


def test_learning_and_moves_gain_and_cost_what_is_told() -> None:
    densities = (15, 20, 25, 50)
    better = "better"
    worse = "worse"
    open_ = "not decided"
    same = "no difference"
    both = (2048, 4096)
    tasks = ("needles", "summaries", "documents")
    stage_pairs = (("learned", "search"), ("learned", "ranked"), ("refined", "learned"))
    table = {(a, b, task): gains_by_density(refine.rows, a, b, task, [both], densities) for a, b in stage_pairs for task in tasks}
    verdicts = {pair: [one.verdict for one in row.values()] for pair, row in table.items()}
    assert [verdicts["learned", "search", t] for t in tasks] == [4 * [better], [worse, open_, open_, better], 4 * [worse]]
    paid = [[round(-one.found.value, 3) for one in table["learned", "search", task].values()] for task in tasks]
    assert paid == [[-0.103, -0.221, -0.156, -0.016], [0.042, -0.006, -0.021, -0.007], [0.042, 0.024, 0.017, 0.002]]
    assert [verdicts["learned", "ranked", t] for t in tasks] == [4 * [better], 4 * [better], [worse, better, better, better]]
    assert [one.verdict for one in gains_by_density(refine.rows, "learned", "search", "summaries", [(1024,)], densities).values()] == [
        open_,
        better,
        better,
        better,
    ]
    assert [verdicts["refined", "learned", t] for t in tasks] == [[same, same, of, same] for of in (open_, better, better)]
    assert [round(table["refined", "learned", t]["25%"].found.value, 3) for t in tasks[1:]] == [0.009, 0.005]
    moved = [gain(refine.rows, "refined-25", "learned-25", "needles", (n,)) for n in (2048, 4096)]
    assert [(one.verdict, f"{one.found.value:.3f}") for one in moved] == [(open_, "-0.008"), (better, "0.025")]


def test_goals_are_met_or_missed_as_told() -> None:
    better = "better"
    worse = "worse"
    open_ = "not decided"
    both = (2048, 4096)
    assert [(goal.meets, goal.decided) for goal in refine.goals] == [
        (True, True),
        (False, True),
        (True, False),
        (True, False),
        (False, True),
    ]
    found = [ratio(*(row_of(refine.rows, plan, "needles", n) for plan in ("refined-20", "dense"))) for n in both]
    assert [(f"{one.value:.2f}", f"{one.low:.2f}") for one in found] == [("0.96", "0.94"), ("0.94", "0.90")]
    to_dense = {a: [gain(refine.rows, a, "dense", "needles", (n,)) for n in (1024, 2048, 4096)] for a in ("learned-25", "refined-25")}
    assert [(one.verdict, f"{-one.found.low:.2f}") for one in to_dense["learned-25"]] == [(open_, "0.00"), (open_, "0.03"), (open_, "0.04")]
    assert [one.verdict for one in to_dense["refined-25"]] == ["no difference", worse, open_]
    lost = [gain(refine.rows, f"refined-{p}", "dense", "needles", (n,)) for p in (20, 15) for n in both]
    told = [(f"{-one.found.value:.2f}", one.verdict) for one in (*lost, to_dense["refined-25"][1])]
    assert told == [(share, worse) for share in ("0.04", "0.05", "0.21", "0.15", "0.02")]
    halved = [gain(refine.rows, "refined-50", other, "needles", (n,)) for other in ("dense", "refined-25") for n in (2048, 4096)]
    assert [(one.verdict, f"{one.found.low:.2f}") for one in halved[:2]] == [(open_, "-0.01"), (open_, "-0.04")]
    assert [one.verdict for one in halved[2:]] == [better, worse]
    assert [f"{n:.2f}" for n in (refine.goals[2].value, refine.goals[2].high, 100 * refine.goals[-1].value)] == ["0.38", "0.65", "1.37"]


def test_the_searched_quarter_is_not_told_from_the_learned_one_in_needles() -> None:
    LONG = "moved, 48 questions"
    ours = ("learned-25", "refined-25")
    runs = {"dense, same run": (standard, "dense"), LONG: (standard, "moa"), **{plan: (refine, plan) for plan in ("dense", *ours)}}
    shares = {f"{n:,}": {name: row_of(of.rows, plan, "needles", n) for name, (of, plan) in runs.items()} for n in (2048, 4096)}
    assert all(max(r.low for r in of.values()) < min(r.high for r in of.values()) for of in shares.values())
    assert [row.n for row in shares["4,096"].values()] == [128, 128, 512, 512, 512]


def test_other_wordings_find_what_is_told() -> None:
    validated = Measurements.load(f"{DATA}/runs/standard-25/validation.json")
    asked = [row for row in validated.rows if row.metric == "retrieval" and row.length == 4096]
    told = {plan: row_of(asked, plan, "needles", 4096) for plan in ("dense", validated.settings["chosen"])}
    assert [f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in told.values()] == ["0.84 [0.74, 0.91]", "0.69 [0.57, 0.79]"]
    assert {row.n for row in told.values()} == {64}


def test_the_searched_quarter_pays_in_words() -> None:
    tasks = ("needles", "summaries", "documents")
    LONG = "moved, 48 questions"
    ours = ("learned-25", "refined-25")
    runs = {LONG: (standard.rows, "moa", "uniform"), **{plan: (refine.rows, plan, "uniform-25") for plan in ours}}
    way = {name: [answers_way(*run, n) for n in (2048, 4096)] for name, run in runs.items()}
    assert way[LONG][1].value > 0.5 > max(way[plan][i].value for plan in ours for i in (0, 1))
    assert all(way[LONG][i].value > way[plan][i].value > way[LONG][i].low for plan in ours for i in (0, 1))
    lost = {(t, n): [gain(rows, p, "dense", t, (n,)) for rows, p, _ in runs.values()] for t in tasks[1:] for n in (2048, 4096)}
    apart = [key for key, (many, *rest) in lost.items() if all(many.found.high < one.found.low for one in rest)]
    assert apart == [("documents", 4096)]
    assert all(many.found.high > one.found.low for key, (many, *rest) in lost.items() if key not in apart for one in rest)


def test_needles_fall_off_below_sixteen_whole_heads() -> None:
    better = "better"
    worse = "worse"
    open_ = "not decided"
    pairs = ((16, 12), (24, 16), (32, 16), (32, "dense"))
    plans = {0: "whole-0-floor-128", "dense": "dense", **{count: f"whole-{count}-floor-128" for count in (12, 16, 24, 32)}}
    steps = {n: {f"{a} less {b}": gain(low.rows, plans[a], plans[b], "needles", (n,)) for a, b in pairs} for n in (2048, 4096)}
    assert [one.verdict for one in steps[4096].values()] == [better, worse, open_, worse]
    assert [f"{abs(one.found.value):.2f}" for one in steps[4096].values()] == ["0.35", "0.05", "0.00", "0.14"]
    assert [steps[2048][f"32 less {b}"].verdict for b in (16, "dense")] == [better, worse]
    assert [f"{abs(steps[2048][f'32 less {b}'].found.value):.2f}" for b in (16, "dense")] == ["0.11", "0.04"]
    assert row_of(low.rows, plans[0], "needles", 4096).value < 0.01
    assert [(cliff["enough"], cliff["short"], cliff["decided"]) for cliff in low.settings["cliffs"]] == 2 * [(None, 32, True)]


def test_needles_break_from_the_beginning_of_the_text_on() -> None:
    counts = (4, 8, 12, 16, 32)
    names = [f"whole-{count}-floor-128" for count in counts] + ["dense"]
    depths = {name: row_of(low.rows, name, "needles", 4096).detail["by_depth"] for name in names}
    columns = sorted(depths["dense"], key=float)
    cells = [[depths[name][depth]["value"] for depth in columns] for name in names]
    far = {name: sum(row[:5]) / 5 for name, row in zip(names, cells, strict=True)}
    near = {name: sum(row[5:]) / 5 for name, row in zip(names, cells, strict=True)}
    assert far["whole-12-floor-128"] < 0.1
    assert [f"{of:.2f}" for of in (near["whole-12-floor-128"], far["whole-16-floor-128"])] == ["0.66", "0.61"]


def test_floors_and_sinks_move_losses_between_needles_and_text() -> None:
    gained = gained_over_ranked()
    text = {name: (row, gained["summaries"][name]) for name, row in gained["documents"].items()}
    assert all(row.high < 0 for name, pair in text.items() if "floor 96" in name for row in pair)
    assert {round(row.value, 1) for name, (row, _) in text.items() if "floor 96" in name} == {-0.1}
    assert all(row.low > 0 for name, pair in text.items() if "floor 96" not in name for row in pair)
    assert {f"{row.value:.2f}" for name, (row, _) in text.items() if "sink" in name} == {"0.04"}
    lose = [name for name, row in gained["needles"].items() if row.high < 0]
    found = [name for name, row in gained["needles"].items() if row.low > 0]
    assert sorted(lose + found) == sorted(gained["needles"])
    assert found[::2] == [f"{percent}%: floor 96" for percent in ("8", "10", "12.5")]
    both_gained = ["8%: floor 192, 4,096 tokens only", "10%: floor 256, 4,096 tokens only"]
    assert found[1::2] == both_gained == [name for name in found if gained["documents"][name].low > 0]
    assert max(row_of(low.rows, f"ranked-{name}-sink-64", "needles", 4096).value for name in ("8-floor-192", "10-floor-256")) < 0.2
    assert [f"{gained['needles'][f'15%: sink {sink}'].value:.2f}" for sink in (4, 16)] == ["-0.02", "-0.04"]


def test_one_head_makes_half_of_what_cutting_costs_and_learned_spans_help() -> None:
    better = "better"
    both = (2048, 4096)
    gained = gained_over_ranked()
    ranks = {tuple(head): place for place, head in enumerate(low.settings["ranking"], start=1)}
    cuts = sorted(low.select(metric="loss_change", plan="ranked-15"), key=lambda row: -row.value)
    named = {f"{row.task}, rank {ranks[row.detail['layer'], row.detail['kv_head']]}": row for row in cuts}
    share = cuts[0].value / sum(max(row.value, 0) for row in cuts)
    assert (next(iter(named)), next(reversed(named))) == ("layer 18 head 2, rank 1", "layer 17 head 0, rank 6")
    assert 0.45 < share < 0.55
    assert all(row.low > 0 for row in cuts[:-1])
    assert cuts[-1].high < 0 < cuts[-1].high + 0.001
    compared = ("learned-15", "ranked-15-floor-128-sink-64")
    helped = {(task, n): gain(low.rows, *compared, task, n) for task in gained for n in ((2048,), (4096,), both)}
    assert {one.verdict for one in helped.values()} == {better}
    assert [f"{helped['needles', n].found.value:.2f}" for n in ((2048,), (4096,))] == ["0.09", "0.36"]
    assert all(abs(one.density - one.against_density) < 0.001 for (_, lengths), one in helped.items() if len(lengths) == 2)


def test_retrieval_at_8192_tokens_falls_as_the_papers_does() -> None:
    better = "better"
    worse = "worse"
    open_ = "not decided"
    retrieval = StudyRecord.load(f"{DATA}/studies/retrieval.json")
    assert retrieval.provenance.device == "NVIDIA H200"
    kinds = {"ours": "moa", "ours, uniform spans": "uniform"}
    found = {name: [row_of(retrieval.rows, f"{kind}-{p}", "needles", 8192) for p in ("12.5", 25, 50)] for name, kind in kinds.items()}
    assert all(row.low > other.high for row, other in zip(*found.values(), strict=True))
    downward = [gain(retrieval.rows, f"moa-{a}", f"moa-{b}", "needles", (8192,)).verdict for a, b in ((25, 50), ("12.5", 25))]
    assert downward == [better, worse]
    dense = row_of(retrieval.rows, "dense", "needles", 8192).value
    assert [f"{share:.2f}" for share in (dense, found["ours"][1].value - found["ours"][2].value)] == ["0.59", "0.03"]
    assert [gain(retrieval.rows, f"moa-{p}", "dense", "needles", (8192,)).verdict for p in (25, 50)] == [open_, worse]
    assert 0.45 < found["ours"][0].value / found["ours"][1].value < 0.55
    assert [retrieval.settings["chosen"][f"moa-{p}"] for p in ("12.5", 25, 50)] == ["budget-1", "learned", "learned-words"]


def test_mixed_bits_are_better_on_needles_but_for_one() -> None:
    mixed = {row.plan: row for row in weights.select(metric="retrieval_difference") if " uniform " in row.detail["against"]}
    assert [name for name, row in mixed.items() if row.low <= 0] == ["weights mixed 4 bits, first order"]
    assert mixed["weights mixed 4 bits, first order"].high < 0


def test_mixed_bits_save_text_where_it_is_said() -> None:
    mixed = {row.plan: row for row in weights.select(metric="retrieval_difference") if " uniform " in row.detail["against"]}
    change = {(row.plan, row.task): row for row in weights.select(metric="cross_entropy_difference") if row.plan in mixed}
    verdicts = {key: "better" if row.high < 0 else "worse" if row.low > 0 else "open" for key, row in change.items()}
    one_a_head = [name for name in mixed if name.startswith("kv") and "apart" not in name]
    assert [name for name in mixed if verdicts[name, "documents"] == "worse"] == one_a_head
    assert [key for key, verdict in verdicts.items() if verdict == "open"] == [("weights mixed 3 bits, first order", "documents")]
    assert {verdicts[name, "summaries"] for name in mixed} == {"better"}


def test_the_root_of_squares_ranks_best_and_intervals_overlap() -> None:
    both = (2048, 4096)
    three = [f"weights {how} 3 bits" for how in ("uniform", "mixed")]
    assert weights.settings["predictors"] == {"kv": "root of squares", "weights": "root of squares"}
    rank = {(row.task, row.plan): row for row in weights.select(metric="rank_correlation")}
    assert all(
        row.low < rank[task, "root of squares"].high and row.high > rank[task, "root of squares"].low for (task, _), row in rank.items()
    )
    assert all(row.value <= rank[task, "root of squares"].value for (task, _), row in rank.items())
    beyond = {how: [row_of(weights.rows, how, "documents", n).value for n in both] for how in ("dense", *three)}
    ends = [f"{end:.1f}" for of in (beyond["dense"], beyond[three[0]] + beyond[three[1]]) for end in (min(of), max(of))]
    assert ends == ["3.2", "3.3", "5.0", "5.3"]


def test_the_root_of_squares_chooses_better_bits_as_told() -> None:
    better = "better"
    worse = "worse"
    open_ = "not decided"
    both = (2048, 4096)
    gained = gained_over_ranked()
    squares = {
        (f"{kind} {bits} bits", task): gain(weights.rows, f"{kind} mixed {bits} bits", f"{kind} mixed {bits} bits, first order", task, both)
        for kind in ("kv", "weights")
        for bits in (4, 3)
        for task in gained
    }
    unlike = [key for key, one in squares.items() if key[1] != "needles" and one.verdict != better]
    assert unlike == [("kv 3 bits", "documents"), ("kv 3 bits", "summaries")]
    assert {squares[key].verdict for key in unlike} == {open_}
    assert [one.verdict for (_, task), one in squares.items() if task == "needles"] == [open_, worse, better, worse]


def test_the_dense_model_differs_between_the_two_codes_by_so_many_needles() -> None:
    both = (2048, 4096)
    found = [[row_of(record.rows, "dense", "needles", n) for n in both] for record in (weights, refine)]
    assert [round(one.n * (one.value - other.value)) for one, other in zip(*found, strict=True)] == [1, -2]


def test_half_the_spans_in_fewer_bits_save_text_at_a_quarter_of_the_bytes() -> None:
    worse = "worse"
    open_ = "not decided"
    both = (2048, 4096)
    gained = gained_over_ranked()
    QUARTER = "25% spans in 16 bits"
    together = [QUARTER, "50% spans in 8 bits", "50% spans in mixed bits", "kv uniform 4 bits", "100% spans in mixed bits"]
    rows = [row for row in weights.rows if row.detail.get("against") == QUARTER]
    apart = [gain(weights.rows, "kv mixed 4 bits, K and V apart", QUARTER, task, both) for task in gained]
    assert [one.verdict for one in apart] == [worse, worse, open_]
    assert [f"{-one.found.value:.2f}" for one in apart[:2]] == ["0.05", "0.01"]
    halves, whole = ([row for row in rows if row.plan.startswith(starts)] for starts in ("50%", ("100%", "kv uniform")))
    assert len(halves) == len(whole) == 6
    assert all(row.low < 0 < row.high if row.task == "needles" else row.high < 0 for row in halves)
    assert f"{max(-row.low for row in halves if row.task == 'needles'):.3f}" == "0.014"
    assert all(row.high < 0 if row.task == "needles" else row.low > 0 for row in whole)
    kept = {plan: row_of(weights.rows, plan, "needles", 4096).density for plan in together}
    assert kept["50% spans in mixed bits"] <= kept[QUARTER] < kept["50% spans in 8 bits"] < 0.27


def test_eight_bits_cost_next_to_nothing_and_hold_against_every_stage() -> None:
    stages = ("ranked", "search", "learned")
    better = "better"
    open_ = "not decided"
    both = (2048, 4096)
    tasks = ("needles", "summaries", "documents")
    gained = gained_over_ranked()
    QUARTER = "25% spans in 16 bits"
    EIGHT = "50% spans in 8 bits"
    rows = [*weights.rows, *(row for row in refine.rows if row.plan != "dense")]
    assert not any(gain(rows, EIGHT, "learned-50", task, (n,)).decided for task in gained for n in both)
    samples = [[row_of(rows, plan, task, n).detail["per_sample"] for task in gained for n in both] for plan in (QUARTER, "learned-25")]
    assert samples[0] == samples[1]
    table = {plan: [gain(rows, EIGHT, plan, task, both) for task in gained] for plan in [f"{stage}-25" for stage in (*stages, "refined")]}
    decided = [[one.verdict for one in found] for found in table.values()]
    assert decided == [[of, better, better] for of in (better, better, open_, open_)]
    assert decided == [[gain(rows, "50% spans in mixed bits", plan, task, both).verdict for task in gained] for plan in table]
    eights, longs = ([row_of(found, plan, "needles", n) for n in both] for found, plan in ((rows, EIGHT), (standard, "moa")))
    assert all(eight.low < long.value < eight.high for eight, long in zip(eights, longs, strict=True))
    runs = ((rows, EIGHT), (standard.rows, "moa"))
    lost = [[f"{-gain(found, plan, 'dense', task, both).found.value:.3f}" for found, plan in runs] for task in tasks[1:]]
    assert lost == [["0.004", "0.113"], ["0.008", "0.065"]]
