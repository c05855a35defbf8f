"""What notebook 09 says of how far the density can go, held against the records that it shows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from moa_lab.calibration.documents import embedded_documents
from moa_lab.evaluate.compare import difference, excess_over_dense, ratio, row_of
from moa_lab.plan import Plan
from moa_lab.studies import StudyRecord
from moa_lab.studies.densities.costs import EFFECTIVE, PUBLISHED_REACH, effective_context
from moa_lab.studies.densities.speed import speedup
from moa_lab.studies.gains import gain

DATA = Path(__file__).resolve().parents[2] / "data"
retrieval, quality, speed = (StudyRecord.load(f"{DATA}/studies/{name}.json") for name in ("retrieval", "quality", "speed"))
percents = [f"{100 * density:g}" for density in retrieval.settings["densities"]]
lengths = retrieval.settings["test_lengths"]
rates = {(row.plan, row.task): row for row in speed.select(metric="tokens_per_s")}
over_dense = [
    {plan: speedup(rates[plan, task], rates["dense", task]) for plan in dict.fromkeys(plan for plan, _ in rates)}
    for task in ("decode", "decode one", "prefill")
]
"""By plan: how many times faster than dense all rows decode, one row decodes, prompts are read."""
ours = [f"moa-{p}" for p in ("50", "25", "15")]


def test_plans_were_chosen_as_said_and_find_more_needles_than_uniform_spans_of_their_bytes() -> None:
    assert {(one.provenance.device, one.settings["run"]["test_seed"]) for one in (retrieval, quality, speed)} == {("NVIDIA H200", 1)}
    texts = [len(document.text) for document in embedded_documents("test")]
    assert (len(texts), sum(texts) < 512 * 2048) == (20, True)
    descents = {p: Plan.load(f"{DATA}/studies/plans/moa-{p}.json").search for p in percents}
    assert all(record.settings["chosen"][f"moa-{p}"] == descents[p]["candidate"] for record in (retrieval, quality) for p in percents)
    assert [descents[p]["origin"] for p in percents] == ["budget"] + ["learned"] * 6
    assert {p for p in percents if descents[p]["candidate"] == "learned-words"} == {"50"}
    assert (descents["25"]["weights"], descents["50"]["weights"]) == ({"questions": 3}, {"summaries": 2, "text": 3})
    assert all(descents[p]["lesson_lengths"] == [1024, 2048, 4096] for p in percents[1:])
    for p in percents:
        for n in lengths:
            kept = [row_of(retrieval.rows, f"{kind}-{p}", "needles", n) for kind in ("moa", "uniform")]
            assert abs(kept[0].density - kept[1].density) < 0.001
            assert difference(*kept).low > 0


def test_every_length_has_512_needles_each_in_a_text_of_its_own() -> None:
    assert {(row.n, row.detail["contexts"]) for row in retrieval.select(task="needles")} == {(512, 512)}


def test_chosen_spans_and_eviction_are_better_and_worse_where_it_is_said_and_keep_what_is_said() -> None:
    grid = [[gain(retrieval.rows, f"moa-{p}", f"snapkv-{p}", "needles", [n]) for n in lengths[1:]] for p in percents]
    columns = [{p: one.verdict for p, one in zip(percents, column, strict=True)} for column in zip(*grid, strict=True)]
    better = [percents[:6], *[["15", "20", "25", "35", "75"]] * 2]
    assert [[p for p in percents if verdicts[p] == "better"] for verdicts in columns] == better
    assert [[p for p in percents if verdicts[p] == "worse"] for verdicts in columns] == [[], ["12.5"], ["12.5", "50"]]
    at = {row.plan: [row_of(retrieval.rows, row.plan, "needles", n) for n in lengths] for row in retrieval.select(task="needles")}
    for p in percents:
        moa, snapkv, h2o, uniform = (at[f"{kind}-{p}"] for kind in ("moa", "snapkv", "h2o", "uniform"))
        apart = [more.density - less.density for less, more in zip(moa[1:], snapkv[1:], strict=True)]
        assert min(apart) >= 0
        assert (max(apart) < 0.01) == (p != "75")
        assert max(row.density for row in moa[1:]) < float(p) / 100 + 0.0005
        assert (moa[0].density > float(p) / 100 + 0.05) == (float(p) < 50)
        assert all(a.value < b.value for a, b in zip(h2o, uniform, strict=True))
    assert [f"{at[plan][0].density:.0%}" for plan in ("moa-25", "snapkv-25")] == ["32%", "26%"]
    assert [f"{at[plan][3].density:.0%}" for plan in ("moa-75", "snapkv-75")] == ["73%", "75%"]


def test_losses_of_needles_against_the_dense_model_are_decided_where_it_is_said() -> None:
    against = {p: [gain(retrieval.rows, f"moa-{p}", "dense", "needles", [n]).found for n in lengths] for p in percents}
    together = {p: gain(retrieval.rows, f"moa-{p}", "dense", "needles", lengths[1:]).found for p in percents}
    lost = {p: [n for n, one in zip(lengths, against[p], strict=True) if one.high < 0] for p in percents}
    assert lost == {"12.5": lengths, "15": lengths, "20": lengths[1:], "25": [], "35": [], "50": [8192], "75": []}
    assert [p for p in percents if together[p].high < 0] == ["12.5", "15", "20", "50"]
    assert [p for p in percents if together[p].low > 0] == ["75"]
    assert [f"{together[p].value:.2f}" for p in ("20", "25", "50", "75")] == ["-0.04", "-0.01", "-0.02", "0.02"]
    assert gain(retrieval.rows, "moa-50", "moa-25", "needles", lengths[1:]).verdict == "not decided"
    assert sum(len(found) for found in against.values()) == 28


def test_a_quarter_and_a_half_find_the_shares_of_needles_that_are_told() -> None:
    grid = [[gain(retrieval.rows, f"moa-{p}", f"snapkv-{p}", "needles", [n]) for n in lengths[1:]] for p in percents]
    at = {row.plan: [row_of(retrieval.rows, row.plan, "needles", n) for n in lengths] for row in retrieval.select(task="needles")}
    against = {p: [gain(retrieval.rows, f"moa-{p}", "dense", "needles", [n]).found for n in lengths] for p in percents}
    together = {p: gain(retrieval.rows, f"moa-{p}", "dense", "needles", lengths[1:]).found for p in percents}
    quarter, half = (at[f"moa-{p}"] for p in ("25", "50"))
    apart = [difference(*pair) for pair in zip(quarter, half, strict=True)]
    assert [one.low < 0 < one.high for one in apart] == [True, True, True, False]
    assert [f"{one.value:.2f}" for one in (apart[3], grid[5][2].found)] == ["0.03", "-0.03"]
    assert max(apart[3].low, -grid[5][2].found.high) < 0.003
    assert f"[{-together['25'].high:.3f}, {-together['25'].low:.3f}]" == "[-0.004, 0.025]"
    assert min(one.low for one in against["25"]) > -0.04
    assert [f"{one.value:.2f}" for one in (against["50"][3], *against["20"][1:])] == ["-0.04", "-0.04", "-0.05", "-0.04"]
    assert [f"{one.value:.2f}" for one in against["75"][2:] if one.low > 0] == ["0.02", "0.02"]
    assert [f"{at[f'moa-{p}'][2].value:.2f}" for p in ("20", "15", "12.5")] == ["0.81", "0.72", "0.36"]
    found = {plan: [f"{row.value:.2f}" for row in at[plan][1:]] for plan in ("moa-25", "dense", "uniform-25")}
    assert found == {"moa-25": ["0.97", "0.86", "0.58"], "dense": ["0.98", "0.87", "0.59"], "uniform-25": ["0.21", "0.22", "0.22"]}
    lines = [(row.n, f"{row.value:.0%}") for row in retrieval.select(plan="dense", task="lines")]
    assert lines == [(64, "9%"), (64, "5%"), (64, "0%"), (64, "0%")]


def test_the_effective_context_is_as_many_times_the_mean_span_as_is_told() -> None:
    at = {row.plan: [row_of(retrieval.rows, row.plan, "needles", n) for n in lengths] for row in retrieval.select(task="needles")}
    plans = ["dense", *(f"{kind}-{p}" for kind in ("moa", "snapkv", "uniform") for p in percents)]
    reached = pd.DataFrame(
        [(plan, *effective_context(plan, retrieval.rows)) for plan in plans if effective_context(plan, retrieval.rows)[0]],
        columns=["plan", "effective context", "over mean span"],
    )
    far = reached[reached.plan.str.startswith("moa") & (reached["over mean span"] > PUBLISHED_REACH)].set_index("plan")
    assert far["over mean span"].idxmax() == "moa-20"
    told = {plan: row_of(retrieval.rows, plan, "needles", int(n)) for plan, n in far["effective context"].items()}
    sure = {plan: (row.length, f"{1 / row.density:.1f}") for plan, row in told.items() if row.low > EFFECTIVE}
    assert sure == {"moa-15": (1024, "4.5"), "moa-20": (2048, "5.0"), "moa-25": (2048, "4.0")}
    assert set(far.index) == set(sure)
    assert effective_context("dense", retrieval.rows)[0] == 2048
    assert reached["effective context"].max() == 2048
    assert [plan for plan in at if at[plan][2].high >= EFFECTIVE] == ["moa-75"]
    assert [f"{at[plan][2].value:.0%}" for plan in ("dense", "moa-75")] == ["87%", "89%"]
    assert not reached.plan.str.startswith("uniform").any()


def test_text_costs_what_is_told_and_most_at_twice_the_longest_lesson() -> None:
    descents = {p: Plan.load(f"{DATA}/studies/plans/moa-{p}.json").search for p in percents}
    losses = [row for row in quality.rows if row.metric == "cross_entropy"]
    saved = {
        f"{task}, {p}%": gain(losses, f"moa-{p}", f"uniform-{p}", task, lengths).found
        for task in ("documents", "summaries")
        for p in percents
    }
    documents, summaries = ([one for name, one in saved.items() if name.startswith(task)] for task in ("documents", "summaries"))
    assert all(one.high < 0 for one in documents)
    assert all(one.low > 0 for one in summaries)
    alone = {n: [gain(losses, f"moa-{p}", f"uniform-{p}", "summaries", [n]).verdict for p in percents] for n in lengths}
    assert alone[8192] == ["worse"] * 4 + ["not decided"] * 3
    assert [alone[n][percents.index("50")] for n in lengths] == ["better"] * 3 + ["not decided"]
    assert set(alone[1024] + alone[2048][:6]) == {"better"}
    costs = {p: [excess_over_dense(losses, f"moa-{p}", "documents", n) for n in lengths] for p in percents}
    assert [f"{costs[p][3].value:.1%}" for p in percents[:4]] == ["6.0%", "25.1%", "13.1%", "7.3%"]
    assert [f"{max(one.value for one in costs[p][:3]):.1%}" for p in percents[:4]] == ["12.9%", "12.6%", "8.6%", "6.7%"]
    assert [p for p in percents if costs[p][3].low > max(one.high for one in costs[p][:3])] == ["15", "20"]
    assert [p for p in percents if costs[p][3].value == max(one.value for one in costs[p])] == ["15", "20", "25"]
    assert {gain(losses, "moa-12.5", f"moa-{p}", "documents", [8192]).verdict for p in percents[1:4]} == {"better"}
    assert f"{max(excess_over_dense(losses, f'uniform-{p}', 'documents', 8192).value for p in percents):.1%}" == "2.7%"
    assert max(lengths) == 2 * max(*descents["25"]["lesson_lengths"], *retrieval.settings["profiled_lengths"])


def test_perplexities_above_dense_are_those_that_are_told() -> None:
    losses = [row for row in quality.rows if row.metric == "cross_entropy"]
    above = {}
    for task in ("documents", "summaries"):
        for kind in ("moa", "uniform"):
            for p in ("25", "50"):
                above[task, kind, p] = [excess_over_dense(losses, f"{kind}-{p}", task, n) for n in lengths]
    ends = {name: (f"{min(one.value for one in found):.1%}", f"{max(one.value for one in found):.1%}") for name, found in above.items()}
    assert [ends["documents", kind, "50"] for kind in ("moa", "uniform")] == [("0.7%", "1.4%"), ("0.2%", "1.2%")]
    assert [ends["documents", kind, "25"][1] for kind in ("moa", "uniform")] == ["7.3%", "3.5%"]
    assert [ends["summaries", kind, p][1] for p in ("50", "25") for kind in ("moa", "uniform")] == ["1.8%", "41.9%", "12.5%", "57.9%"]
    at_half = [gain(losses, "moa-50", "uniform-50", "documents", [n]) for n in lengths]
    assert [one.verdict for one in at_half] == ["not decided"] * 2 + ["worse"] * 2
    assert [f"{one.found.value:.3f}" for one in at_half[2:]] == ["-0.003", "-0.005"]


def test_chosen_spans_stay_closer_to_the_dense_model_up_to_4096_tokens_and_uniform_ones_at_8192() -> None:
    closer = {}
    for p in percents:
        for metric, sign in (("kl", -1), ("token_match", 1)):
            rows = {n: [row_of(quality.rows, f"{kind}-{p}", "summaries", n, metric) for kind in ("moa", "uniform")] for n in lengths}
            found = {n: difference(*pair) for n, pair in rows.items()}
            for name, side in (("chosen", sign), ("uniform", -sign)):
                # Decided: the end of the interval that is nearer to 0 is on the side of this one.
                decided = [n for n, one in found.items() if min(side * one.low, side * one.high) > 0]
                closer.setdefault(f"{p}%", {})[f"{metric}: {name}"] = ", ".join(f"{n:,}" for n in decided) or "-"
    closer = pd.DataFrame(closer).T
    assert not closer.filter(like="chosen").map(lambda told: "8,192" in told).any(axis=None)
    assert closer.filter(like="uniform").isin(["-", "8,192"]).all(axis=None)
    assert list(closer.index[closer["kl: uniform"] == "8,192"]) == [f"{p}%" for p in percents if p != "50"]
    assert list(closer.index[closer["token_match: uniform"] == "8,192"]) == ["12.5%", "15%", "20%", "25%", "35%"]


def test_one_row_and_prefill_gain_what_is_told() -> None:
    _, one_row, prefill = over_dense
    assert [f"{one_row[plan].value:.2f}" for plan in ours] == ["1.00", "1.01", "1.00"]
    told = [f"{prefill[plan].value:.2f}" for plan in (*ours, *(f"uniform-{p}" for p in ("50", "25", "15")), "transformers dense")]
    assert told == ["1.07", "1.07", "0.93", "0.85", "0.95", "0.91", "1.12"]
    assert [[rate[plan].low < 1 < rate[plan].high for plan in ours] for rate in (one_row, prefill)] == [[True] * 3, [False, True, True]]
    against = speedup(rates["moa-50", "decode"], rates["transformers dense", "decode"])
    assert f"{against.value:.1f} [{against.low:.1f}, {against.high:.1f}]" == "12.6 [10.5, 15.1]"


def test_all_rows_decode_as_many_times_faster_as_is_told_and_keep_these_needles() -> None:
    gains, _, _ = over_dense
    times = [f"{gains[plan].value:.2f} [{gains[plan].low:.2f}, {gains[plan].high:.2f}]" for plan in ours]
    assert times == ["1.85 [1.85, 1.86]", "3.18 [3.18, 3.19]", "4.39 [4.38, 4.40]"]
    assert all(1 < gains[plan].value / gains[plan.replace("moa", "uniform")].value < 1.003 for plan in ours)
    assert not [plan for plan in gains if rates[plan, "decode"].detail.get("captured") is False]
    assert [plan for plan in ours if rates[plan, "decode"].detail["batch"] == speed.settings["most_rows"]] == ["moa-25", "moa-15"]
    slowest, _, fastest = sorted(rates["transformers dense", "decode one"].detail["repeats"])
    assert 5 < fastest / slowest < 6
    needles = {row.plan: row for row in speed.select(task="needles")}
    found = {plan: ratio(row, needles["dense"]) for plan, row in needles.items()}
    assert [f"{found[plan].value:.0%}" for plan in ours] == ["98%", "99%", "83%"]
    assert [f"{found[plan.replace('moa', 'uniform')].value:.0%}" for plan in ours] == ["53%", "26%", "14%"]
    assert [f"[{found[plan].low:.0%}, {found[plan].high:.0%}]" for plan in ours[:2]] == ["[96%, 101%]", "[96%, 103%]"]


def test_all_goals_are_met_and_three_of_them_decided() -> None:
    at = {row.plan: [row_of(retrieval.rows, row.plan, "needles", n) for n in lengths] for row in retrieval.select(task="needles")}
    goals = pd.DataFrame(
        [
            {
                "goal": g.name,
                "value": round(g.value, 3),
                "95%": f"{g.low:.3f} to {g.high:.3f}" if g.low is not None else "-",
                "aimed at": f"{'at most' if g.at_most else 'at least'} {g.goal}",
                "meets": g.meets,
                "decided": g.decided,
            }
            for g in (*retrieval.goals, *quality.goals)
        ]
    )
    assert all(goals.meets)
    assert list(goals.decided) == [True, True, True, False]
    needed, farthest, _, answers = (*retrieval.goals, *quality.goals)
    assert [f"{end:.2f}" for g in (needed, farthest) for end in (g.value, g.low, g.high)] == ["0.98", "0.96", "1.01", *["5.00"] * 3]
    times = {p: [a.value / b.value for a, b in zip(at[f"moa-{p}"], at[f"uniform-{p}"], strict=True)] for p in ("25", "50")}
    assert {p: (f"{min(one):.1f}", f"{max(one):.1f}") for p, one in times.items()} == {"25": ("2.6", "4.5"), "50": ("1.5", "2.3")}
    assert f"{answers.value:.1%} [{answers.low:.1%}, {answers.high:.1%}]" == "1.8% [1.4%, 2.3%]"
