import plotly.graph_objects as go
import pytest
from figure_records import LOST, make_measurements, make_validation

from moa_lab.figures import measured_front
from moa_lab.figures.plan_kinds import kind_styles
from moa_lab.records.candidates import KINDS, SEARCHED

KIND_NAMES = {*KINDS.values(), SEARCHED}


def named(fig: go.Figure) -> dict[str, go.Scatter]:
    return {trace.name: trace for trace in fig.data if trace.name}


def test_every_candidate_is_a_marker_of_its_kind_at_what_it_loses() -> None:
    traces = named(measured_front(make_validation()))
    groups = {name: trace for name, trace in traces.items() if name in KIND_NAMES}
    assert set(groups) == KIND_NAMES
    seen = {name: (x, y) for trace in groups.values() for name, x, y in zip(trace.customdata, trace.x, trace.y, strict=True)}
    assert seen == {name: (words, facts) for name, (_, _, words, facts) in LOST.items()}
    assert (traces["dense"].x[0], traces["dense"].y[0]) == (0, 0)
    assert "60.0% of facts, +2.000 nats" in groups["uniform spans"].text[0]


def test_kinds_look_different_without_their_colour_and_the_same_whichever_were_measured() -> None:
    styles = kind_styles()
    assert set(styles) == KIND_NAMES
    assert len({style.symbol for style in styles.values()}) == len(KIND_NAMES)
    few = named(measured_front(make_validation({name: LOST[name] for name in ("far-5", "refined-1")})))
    assert all(few[kind].marker.symbol == styles[kind].symbol for kind in few if kind in KIND_NAMES)


def test_the_line_joins_only_candidates_that_none_beats_in_both() -> None:
    line = measured_front(make_validation()).data[0]
    assert list(zip(line.x, line.y, strict=True)) == [(0.034, 0.125), (0.057, 0.01)]


def test_the_chosen_candidate_is_ringed_and_labelled() -> None:
    ring = named(measured_front(make_validation(chosen="layers")))["chosen in validation"]
    assert (ring.x[0], ring.y[0], ring.texttemplate) == (0.07, 0.5, "layers")
    assert not [name for name in named(measured_front(make_validation(chosen="gone"))) if name.startswith("chosen")]


def test_where_no_fact_is_lost_needles_are_told_apart_by_nats() -> None:
    fig = measured_front(make_validation({name: (*lost[:3], 0.0) for name, lost in LOST.items()}))
    assert named(fig)["uniform spans"].y[0] == 2.0
    assert "nats per token" in fig.layout.yaxis.title.text
    assert "% of facts" in measured_front(make_validation()).layout.yaxis.title.text


def test_a_record_without_candidates_is_refused() -> None:
    with pytest.raises(ValueError, match="no candidates"):
        measured_front(make_measurements())
