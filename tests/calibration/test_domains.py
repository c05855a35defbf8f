from __future__ import annotations

import ast
import re
import sysconfig
from pathlib import Path
from random import Random

import pytest
from tiny import tiny_tokenizer

from moa_lab.calibration.arithmetic import GOODS, KINDS, NAMES, Step, arithmetic_documents
from moa_lab.calibration.documents import Document, TextStream, split_documents
from moa_lab.calibration.domains import DOMAINS, code_documents, domain_documents, enough_documents
from moa_lab.calibration.wordings import WORDINGS

LINE = re.compile(r"^.+: (\d+) ([-+*/]) (\d+) = (\d+)\.$")
ANSWER = re.compile(r"^The answer is (\d+) \D+\.$")


@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_is_always_the_same_without_any_text_twice_and_can_be_split(name: str) -> None:
    documents = domain_documents(name)
    assert documents == domain_documents(name)
    assert len({document.text for document in documents}) == len(documents) >= 12
    assert min(len(document.text) for document in documents) > 1000
    split = split_documents(documents, seed=0)
    assert {len(part) > 2 for part in split.values()} == {True}


def test_code_is_the_source_without_the_docstring_that_is_its_summary() -> None:
    folder = Path(sysconfig.get_paths()["stdlib"])
    for document in domain_documents("code"):
        assert document.summary is not None
        assert len(document.summary) >= 200
        tree = ast.parse(document.text)
        original = ast.parse((folder / f"{document.name}.py").read_text(encoding="utf-8"))
        assert document.summary == ast.get_docstring(original)
        assert document.summary not in document.text
        # Nothing but the docstring is gone.
        assert [ast.dump(node) for node in tree.body] == [ast.dump(node) for node in original.body[1:]]


def test_modules_without_a_long_docstring_or_of_another_size_are_left_out(tmp_path: Path) -> None:
    body = "x = 1\n" * 2000
    for index in range(12):
        (tmp_path / f"good{index:02}.py").write_text(f'#!/bin/python\n"""{"Words about it. " * 20}"""\n{body}y = {index}\n')
    (tmp_path / "same.py").write_text((tmp_path / "good00.py").read_text())
    (tmp_path / "short.py").write_text(f'"""Few words."""\n{body}')
    (tmp_path / "none.py").write_text(body)
    (tmp_path / "small.py").write_text(f'"""{"Words about it. " * 20}"""\nx = 1\n')
    (tmp_path / "large.py").write_text(f'"""{"Words about it. " * 20}"""\n{body * 20}')
    (tmp_path / "broken.py").write_text(f'"""{"Words about it. " * 20}"""\n{body}def (')
    found = code_documents(tmp_path)
    assert [document.name for document in found] == [f"good{index:02}" for index in range(12)]
    assert found[0].text.startswith("#!/bin/python\nx = 1\n")
    (tmp_path / "good05.py").unlink()
    (tmp_path / "same.py").unlink()
    with pytest.raises(ValueError, match="holds 11 modules"):
        code_documents(tmp_path)


def test_every_line_of_every_solution_is_right_and_uses_what_the_story_or_a_line_before_gives() -> None:
    checked = 0
    for document in arithmetic_documents(count=6, characters=20_000, seed=3):
        for problem in document.text.split("\n\n"):
            story, *lines, answer = problem.split("\n")
            # Known: the numbers that were said; a fence has two sides and three days are named.
            known = {*map(int, re.findall(r"\d+", story.partition(". ")[2])), 2, 3}
            for line in lines:
                match = LINE.match(line)
                assert match, line
                left, right, result = int(match[1]), int(match[3]), int(match[4])
                assert {left, right} <= known, problem
                assert {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[match[2]] == result > 0, problem
                known.add(result)
                checked += 1
            final = ANSWER.match(answer)
            assert final, answer
            assert int(final[1]) == result
    assert checked > 500


def test_no_problem_comes_twice_and_every_kind_comes() -> None:
    documents = arithmetic_documents()
    problems = [part.partition(". ")[2] for document in documents for part in document.text.split("\n\n")]
    assert len(set(problems)) == len(problems) > 2000
    assert len(documents) == 24
    assert all(30_000 <= len(document.text) < 31_500 for document in documents)
    last_words = {problem.split("\n")[-2].partition(":")[0] for problem in problems}
    assert {str(kind(Random(0))).split("\n")[-2].partition(":")[0] for kind in KINDS} == last_words
    assert len(last_words) == len(KINDS)
    assert arithmetic_documents(2, 5000, seed=1) != arithmetic_documents(2, 5000, seed=2)


def test_a_division_with_a_remainder_is_refused() -> None:
    assert Step("Each", 12, "/", 4).result == 3
    with pytest.raises(ValueError, match="remainder"):
        Step("Each", 13, "/", 4)


def test_problems_name_nobody_that_a_planted_fact_is_about() -> None:
    keys = {word for wordings in WORDINGS.values() for wording in wordings for words in wording.keys for word in words}
    assert not keys & {*NAMES, *GOODS}


def test_an_unknown_domain_is_refused() -> None:
    with pytest.raises(ValueError, match="addresses, code, arithmetic"):
        domain_documents("poems")


def test_every_domain_streams_excerpts_that_begin_where_something_begins() -> None:
    for name in DOMAINS:
        stream = TextStream(domain_documents(name)[:4], tiny_tokenizer(), seed=0)
        assert len(stream.take(1024)) == 1024
        assert [len(part) for part in stream.take_documents(999, 3)] == [333, 333, 333]


def test_enough_documents_hold_what_is_asked_for_and_are_never_very_few() -> None:
    documents = [Document(str(index), "x" * 100) for index in range(20)]
    assert enough_documents(documents, 1) == tuple(documents[:6])
    assert enough_documents(documents, 1000) == tuple(documents[:10])
    assert enough_documents(documents, 1001) == tuple(documents[:11])
    assert enough_documents(documents, 10**6) == tuple(documents)
    assert enough_documents(documents[:2], 1) == tuple(documents[:2])
