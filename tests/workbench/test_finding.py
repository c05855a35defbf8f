from __future__ import annotations

import pytest

from moa_lab.workbench.finding import find_head


@pytest.mark.parametrize("text", ["L12 H3", "l12h3", " 12 3 ", "12.3", "12,3", "layer 12, KV head 3", "Layer 12 head 3"])
def test_a_head_is_found_by_what_people_call_it(text: str) -> None:
    assert find_head(text, 13, 4) == (12, 3)


@pytest.mark.parametrize("text", ["", "12", "123", "head 3", "L1 H2 H3", "-1 2", "L1.5 H2"])
def test_what_names_no_head_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="L12 H3"):
        find_head(text, 200, 200)


@pytest.mark.parametrize("text", ["L13 H0", "L0 H4"])
def test_a_head_beyond_the_model_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(ValueError, match="layers are 0 to 12, heads 0 to 3"):
        find_head(text, 13, 4)
