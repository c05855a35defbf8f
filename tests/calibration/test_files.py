"""Files as people have them: packed, with other suffixes, in folders, with marks and broken characters."""

import bz2
import csv
import gzip
import json
import logging
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from texts import small_documents, tokenizer_of
from tiny import tiny_model

from moa_lab.calibration import calibrate, requests
from moa_lab.calibration.documents import Document
from moa_lab.calibration.sources import ColumnMap, load_documents
from moa_lab.pipeline import Run
from moa_lab.presets import RunSettings

ROWS = [{"document": f"Text {number}, \u00e4 \u4f60.", "summary": f"Sum {number}."} for number in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
EXPECTED = [(row["document"], row["summary"]) for row in ROWS]


def found(path: Path) -> list[tuple[str, str | None]]:
    return [(one.text, one.summary) for one in load_documents(path)]


def table(path: Path, delimiter: str) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.NDJSON", "a.JSONL", "a.json", "my.data.v2.jsonl"])
@pytest.mark.parametrize(
    ("packing", "pack"), [("", bytes), (".gz", gzip.compress), (".GZ", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_json_lines_are_read_under_every_name_and_packing(tmp_path: Path, name: str, packing: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"{name}{packing}"
    path.write_bytes(pack(LINES.encode()))
    assert found(path) == EXPECTED
    assert load_documents(path)[0].name == f"{name.rpartition('.')[0]}-0"


def test_tables_with_tabs_or_commas_are_read_packed_or_not(tmp_path: Path) -> None:
    for path in (table(tmp_path / "a.tsv", "\t"), table(tmp_path / "a.csv", ",")):
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        assert found(path) == found(packed) == EXPECTED


def test_a_text_file_is_one_document_and_form_feeds_part_it(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("One.\n\nStill one.\n", encoding="utf-8")
    assert load_documents(path) == (Document("book-0", "One.\n\nStill one."),)
    path.write_text("One.\n\f\nTwo.\f \f", encoding="utf-8")
    assert [one.text for one in load_documents(path)] == ["One.", "Two."]
    with pytest.raises(ValueError, match="is plain text and has no columns to map; leave the option out"):
        load_documents(path, columns=ColumnMap.parse("text=text"))


def test_a_folder_is_read_file_after_file_and_holds_one_format(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"Text {name}.", encoding="utf-8")
    (tmp_path / "notes.md").write_text("x", encoding="utf-8")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD.txt").write_text("x", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert [(one.name, one.text) for one in load_documents(tmp_path)] == [(f"{n}-0", f"Text {n}.") for n in "abc"]
    assert "left out 1 files that are no .txt" in caplog.text
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    with pytest.raises(ValueError, match=r"several formats \(.jsonl, .txt\); give one file, or a folder of one format"):
        load_documents(tmp_path)


def test_a_fault_in_a_folder_names_the_file_and_the_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"document": "x", "summary": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"b.jsonl: row 1: column 'summary' holds int, expected text"):
        load_documents(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"b.jsonl: no column 'document' for text"):
        load_documents(tmp_path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".txt"])
def test_a_byte_order_mark_and_utf_16_are_read(tmp_path: Path, suffix: str) -> None:
    contents = {".csv": "document,summary\nText,Sum\n", ".tsv": "document\tsummary\nText\tSum\n", ".txt": "Text"}
    content = contents.get(suffix, '{"document": "Text", "summary": "Sum"}\n')
    for encoding in ("utf-8-sig", "utf-16"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(content.encode(encoding))
        assert [one.text for one in load_documents(path)] == ["Text"]


def test_joined_files_with_marks_in_the_middle_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(json.dumps(row).encode("utf-8-sig") + b"\n" for row in ROWS))
    assert found(path) == EXPECTED


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".txt", ".jsonl.gz"])
def test_a_byte_that_is_no_utf_8_names_its_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    content = b"\xef\xbb\xbf" + LINES.encode().replace(b"Text 2", b"Text \xff")
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    with pytest.raises(ValueError, match=rf"a{suffix}: line 3 is not UTF-8 \(byte 0xff\); write the file as UTF-8"):
        load_documents(path)


@pytest.mark.parametrize("column", ["document", "summary"])
@pytest.mark.parametrize(("broken", "fault"), [("\\ud83d", r"a lone surrogate \(\\ud83d\)"), ("\\u0000", "a NUL character")])
def test_half_a_character_names_file_row_and_column(tmp_path: Path, column: str, broken: str, fault: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(LINES + "\n" + json.dumps({**ROWS[0], column: "X"}).replace('"X"', f'"bad {broken} one"'), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"a.jsonl: row 4: column '{column}' holds {fault}; write the row again without it"):
        load_documents(path)
    with pytest.raises(ValueError, match=rf"document 'x' holds {fault}"):
        Document("x", "text", summary=json.loads(f'"{broken}"'))


def test_a_nul_in_a_table_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("document,summary\nText,Sum\nTe\0xt,Sum\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.csv: line 3 holds a NUL character"):
        load_documents(path)


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.95])
@pytest.mark.parametrize(("packing", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_a_damaged_packed_file_is_refused_by_name(tmp_path: Path, packing: str, pack: Callable[[bytes], bytes], keep: float) -> None:
    path = tmp_path / f"a.jsonl{packing}"
    content = pack(LINES.encode() * 50)
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=rf"a.jsonl{packing}: truncated or not JSONL \(.*fetch or write it again") as caught:
        load_documents(path)
    assert "\n" not in str(caught.value)


def test_other_packings_and_deep_nesting_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"unpack it first, or pack it as .gz, .bz2, .xz"):
        load_documents(tmp_path / "a.jsonl.zst")
    (tmp_path / "deep.jsonl").write_text('{"document": ' + "[" * 100_000, encoding="utf-8")
    with pytest.raises(ValueError, match=r"deep.jsonl: truncated or not JSONL \(RecursionError"):
        load_documents(tmp_path / "deep.jsonl")
    for name in ("gone.ndjson", "gone.txt", "gone.jsonl.gz"):
        with pytest.raises(ValueError, match="no such file"):
            load_documents(tmp_path / name)


def test_repeated_rows_are_read_once_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(LINES + LINES, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert found(path) == EXPECTED
    assert "left out 3 documents that repeat another" in caplog.text
    # The same text with another summary is another document.
    path.write_text(LINES + json.dumps({**ROWS[0], "summary": "Another."}), encoding="utf-8")
    assert len(found(path)) == 4


def test_rows_without_the_column_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(LINES + '{"summary": "no text"}\n', encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert found(path) == EXPECTED
    assert "left out 1 rows whose column 'document' is blank" in caplog.text


def test_a_set_without_summaries_needs_no_word_about_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": one.text}) + "\n" for one in small_documents(sentences=200)), encoding="utf-8")
    documents = load_documents(path, columns=ColumnMap.parse("text=text"))
    assert {one.summary for one in documents} == {None}
    assert documents == load_documents(path, columns=ColumnMap.parse("text=text,summary=none"))
    model, tokenizer = tiny_model("llama", max_length=1024), tokenizer_of("chat")
    made = calibrate(model, tokenizer, [700], wanted=requests("model", questions=1, others=1, answer_tokens=4), documents=documents)
    assert len(made) == 2
    with pytest.raises(ValueError, match="supervision 'human' needs documents with a summary or an answer"):
        calibrate(model, tokenizer, [700], wanted=requests("human", others=1), documents=documents)
    # Refused before the model, which does not exist, is looked for.
    settings = RunSettings(model="/no/such/model", source=str(path), columns="text=text", supervision="human")
    with pytest.raises(ValueError, match="supervision 'human' needs documents"):
        Run(tmp_path / "run", settings).begin()


def test_a_column_that_stands_twice_or_is_mapped_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.csv"
    path.write_text("text,text\na,b\n")
    with pytest.raises(ValueError, match=r"twice\.csv: line 1: column 'text' stands twice"):
        load_documents(path, columns=ColumnMap(text="text"))
    with pytest.raises(ValueError, match="text is mapped twice, to body and title"):
        ColumnMap.parse("text=body,text=title")
