from __future__ import annotations

import csv
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moa_lab.calibration.documents import Document, embedded_documents
from moa_lab.calibration.sources import PRESETS, ColumnMap, load_documents, named_documents

NEWS = [
    {"document": "First report. \n More.|||||Second report.|||||", "summary": "\u2013 Two reports."},
    {"document": "Third report.", "summary": "\u2013 One report."},
    {"document": "Fourth report.", "summary": "\u2013 One more."},
]
HUMAN_QA = [
    {"dataset": "qasper", "context": "A paper.", "summary": "Its abstract.", "questions": ["Who?", "When?"], "answers": ["They", "Then"],
     "evidences": ["", ""], "total_length_level": 2},
    {"dataset": "multi_news", "context": "News.|||||Other news.", "summary": "All news.", "questions": [""], "answers": ["All news."],
     "evidences": [""], "total_length_level": 4},
    {"dataset": "lcc", "context": "", "summary": "", "questions": ["x ="], "answers": ["1"], "evidences": [""], "total_length_level": 2},
]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


class Hub:
    """Stands for the package `datasets`: records the calls and answers with rows, or raises."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[tuple[str, ...], dict[str, Any]]] = []

    def load_dataset(self, *arguments: str, **options: Any) -> Any:
        self.calls.append((arguments, options))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def install(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> Hub:
    hub = Hub(*answers)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=hub.load_dataset))  # type: ignore[arg-type]
    return hub


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_of_the_multinews_schema_gives_documents_and_human_summaries(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"news{suffix}", NEWS)
    documents = load_documents(path, columns=PRESETS["alexfabbri/multi_news"])
    assert documents[0] == Document("news-0", "First report. \n More.\n\nSecond report.", "Two reports.")
    assert [document.summary for document in documents] == ["Two reports.", "One report.", "One more."]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_of_the_authors_schema_gives_one_document_a_question(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / f"qa{suffix}", HUMAN_QA)
    with caplog.at_level(logging.WARNING):
        documents = load_documents(str(path), columns=PRESETS["nics-efc/MoA_Long_HumanQA"])
    assert documents == (
        Document("qa-0-q0", "A paper.", "Its abstract.", "Who?", "They"),
        Document("qa-0-q1", "A paper.", "Its abstract.", "When?", "Then"),
        Document("qa-1", "News.\n\nOther news.", "All news."),
    )
    assert "left out 1 rows whose column 'context' is blank" in caplog.text


def test_json_lines_in_a_file_named_json_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "news.jsonl", NEWS).rename(tmp_path / "news.json")
    assert len(load_documents(path)) == 3


def test_a_csv_document_longer_than_the_default_field_limit_is_read_whole(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = write(tmp_path / "long.csv", [{"document": 'A "quoted", long\ntext. ' * 10_000, "summary": "s"}])
    assert len(load_documents(path)[0].text) > before
    assert csv.field_size_limit() == before


def test_limit_draws_by_seed_and_without_it_the_order_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "many.jsonl", [{"document": f"text {number}", "summary": ""} for number in range(30)])
    every = load_documents(path)
    assert [document.text for document in every] == [f"text {number}" for number in range(30)]
    some = load_documents(path, limit=5, seed=1)
    assert len(set(some)) == 5
    assert set(some) <= set(every)
    assert some == load_documents(path, limit=5, seed=1)
    assert some != load_documents(path, limit=5, seed=2)
    assert set(load_documents(path, limit=99)) == set(every)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        load_documents(path, limit=0)


def test_limit_counts_documents_not_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "qa.jsonl", HUMAN_QA[:1])
    assert len(load_documents(path, columns=PRESETS["nics-efc/MoA_Long_HumanQA"], limit=1)) == 1


def test_embedded_sources_are_the_embedded_splits() -> None:
    assert load_documents("embedded:validation") == embedded_documents("validation")
    assert set(load_documents("embedded:validation", limit=3)) < set(embedded_documents("validation"))
    with pytest.raises(ValueError, match="must be one of calibration, validation, test, got 'train'"):
        load_documents("embedded:train")
    with pytest.raises(ValueError, match="columns: embedded:test has no columns"):
        load_documents("embedded:test", columns=ColumnMap())


def test_a_hub_id_goes_through_load_dataset_with_its_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = install(monkeypatch, NEWS, HUMAN_QA)
    assert load_documents("alexfabbri/multi_news", split="validation")[0].text == "First report. \n More.\n\nSecond report."
    assert load_documents("nics-efc/MoA_Long_HumanQA")[1].question == "When?"
    assert hub.calls == [
        (("alexfabbri/multi_news",), {"split": "validation"}),
        (("nics-efc/MoA_Long_HumanQA",), {"split": "train"}),
    ]


def test_a_configuration_and_columns_of_the_users_own_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = install(monkeypatch, [{"article": "Text.", "highlights": "Short."}])
    documents = load_documents("owner/daily:3.0.0", columns=ColumnMap(text="article", summary="highlights"), split="test")
    assert documents == (Document("daily-3.0.0-0", "Text.", "Short."),)
    assert hub.calls == [(("owner/daily", "3.0.0"), {"split": "test"})]


def test_a_real_dataset_object_is_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(HUMAN_QA))
    assert [d.answer for d in load_documents("nics-efc/MoA_Long_HumanQA")] == ["They", "Then", None]
    with pytest.raises(ValueError, match=r"no column 'body' for text; .*: dataset, context, summary"):
        load_documents("nics-efc/MoA_Long_HumanQA", columns=ColumnMap(text="body"))


def test_a_dataset_that_is_a_loading_script_is_read_from_its_parquet_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = install(monkeypatch, RuntimeError("Dataset scripts are no longer supported, but found multi_news.py"), NEWS)
    assert len(load_documents("alexfabbri/multi_news")) == 3
    assert hub.calls[1] == (("alexfabbri/multi_news",), {"split": "train", "revision": "refs/convert/parquet"})


@pytest.mark.parametrize("failure", [ConnectionError("Couldn't reach the Hub\nlong trace"), FileNotFoundError("gone"), RuntimeError()])
def test_a_hub_that_cannot_be_reached_is_one_line_with_the_cure(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    install(monkeypatch, failure)
    with pytest.raises(ValueError, match="check the id, the split and the network, or download it and give a local file") as caught:
        load_documents("owner/name")
    assert "\n" not in str(caught.value)
    assert type(failure).__name__ in str(caught.value)


def test_without_the_package_datasets_the_cure_is_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pip install datasets"):
        load_documents("owner/name")


def test_a_missing_column_lists_those_that_exist(tmp_path: Path) -> None:
    path = write(tmp_path / "other.jsonl", [{"article": "Text.", "abstract": "Short."}])
    with pytest.raises(ValueError, match=r"no column 'document' for text; map text to one of its columns: article, abstract$"):
        load_documents(path)
    with pytest.raises(ValueError, match=r"no column 'summary' for summary; .*: article, abstract, or to none"):
        load_documents(path, columns=ColumnMap.parse("text=article,summary=summary"))
    assert load_documents(path, columns=ColumnMap.parse("text=article, summary=none")) == (Document("other-0", "Text."),)


@pytest.mark.parametrize(("suffix", "keep"), [(".jsonl", 0.8), (".json", 0.8), (".csv", 0.8), (".parquet", 0.5), (".parquet", 0.9)])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, suffix: str, keep: float) -> None:
    path = write(tmp_path / f"news{suffix}", NEWS)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=rf"news{suffix}: truncated or not {suffix[1:].upper()} \(.*fetch or write it again") as caught:
        load_documents(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_an_empty_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"empty{suffix}"
    path.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="the dataset is empty"):
        load_documents(path)


def test_rows_without_any_text_and_rows_of_another_type_are_refused(tmp_path: Path) -> None:
    blank = write(tmp_path / "blank.jsonl", [{"document": " ", "summary": ""}, {"document": None, "summary": ""}])
    with pytest.raises(ValueError, match="column 'document' is blank in all 2 rows"):
        load_documents(blank)
    number = write(tmp_path / "number.jsonl", [{"document": "Text.", "summary": None}, {"document": 3, "summary": ""}])
    with pytest.raises(ValueError, match="row 2: column 'document' holds int, expected text"):
        load_documents(number)
    foreign = tmp_path / "foreign.json"
    foreign.write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(ValueError, match="row 1 is int, expected an object"):
        load_documents(foreign)
    uneven = write(tmp_path / "uneven.jsonl", [{"document": "Text.", "q": ["a?", "b?"], "a": ["x"]}])
    with pytest.raises(ValueError, match="row 1 has 2 questions and 1 answers"):
        load_documents(uneven, columns=ColumnMap(summary=None, question="q", answer="a"))


def test_a_source_that_is_nothing_known_lists_what_is(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x", encoding="utf-8")
    for source in (tmp_path / "notes.md", "a b", ""):
        with pytest.raises(ValueError, match=r"neither a \.jsonl, .*embedded:calibration"):
            load_documents(source)
    with pytest.raises(ValueError, match="no such file"):
        load_documents(tmp_path / "gone.jsonl")
    (tmp_path / "folder.json").mkdir()
    for folder in (tmp_path, tmp_path / "folder.json"):
        with pytest.raises(ValueError, match=r"the folder holds no .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet file"):
            load_documents(folder)


@pytest.mark.parametrize("option", ["", "article", "text=", "body=article", "text=none"])
def test_a_column_option_that_cannot_be_read_names_the_fields(option: str) -> None:
    with pytest.raises(ValueError, match="is not field=column, with field one of text, summary, question, answer, separator"):
        ColumnMap.parse(option)


def test_columns_without_a_source_are_refused_and_not_passed_over() -> None:
    assert named_documents(None) is None
    with pytest.raises(ValueError, match="--columns maps the columns of --source: name that as well"):
        named_documents(None, "text=article")
