"""Documents from elsewhere: the embedded texts, a local file, or a dataset on the Hugging Face hub."""

from __future__ import annotations

import importlib
import logging
import random
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from moa_lab.calibration.documents import JOINT, SPLITS, Document, Split, embedded_documents
from moa_lab.calibration.files import FORMATS, TEXT, Row, Table, first_line, is_file_name, read_tables
from moa_lab.text import unreadable

logger = logging.getLogger(__name__)

EMBEDDED = "embedded:"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
PARQUET_REVISION = "refs/convert/parquet"


@dataclass(frozen=True)
class ColumnMap:
    """Which column of a dataset holds which field of a Document; None where there is no such column.

    A summary column that was not asked for may be missing: the documents then have none.
    `question` and `answer` may hold one string each or two equally long lists (several questions about one text: one Document each).
    `separator` is what stands between the sources of one text; it is replaced by a blank line.
    """

    text: str = "document"
    summary: str | None = "summary"
    question: str | None = None
    answer: str | None = None
    separator: str | None = None
    optional: tuple[str, ...] = field(default=("summary",), compare=False, repr=False)

    @classmethod
    def parse(cls, option: str) -> ColumnMap:
        """Read "text=article,summary=none,question=query": fields left out keep their default, `none` means no such column.

        Raises ValueError naming the part that is not `field=column`, or the field that is mapped twice.
        """
        known = [one.name for one in fields(cls) if one.name != "optional"]
        chosen: dict[str, Any] = {}
        for part in option.split(","):
            name, equals, column = (piece.strip() for piece in part.partition("="))
            if name not in known or not equals or not column or (name == "text" and column.lower() == "none"):
                raise ValueError(f"columns: {part.strip()!r} is not field=column, with field one of {', '.join(known)}")
            if name in chosen:
                raise ValueError(f"columns: {name} is mapped twice, to {chosen[name]} and {column}; map it once")
            chosen[name] = None if column.lower() == "none" else column
        return cls(**chosen, optional=() if "summary" in chosen else ("summary",))


# The columns of nics-efc/MoA_Long_HumanQA are those that the authors' code writes and reads (thu-nics/MoA, MoA/dataset/convert.py:
# dataset, questions, answers, evidences, context, summary); they were read from that code, not from the set itself.
PRESETS: dict[str, ColumnMap] = {
    "alexfabbri/multi_news": ColumnMap(separator="|||||"),
    "nics-efc/MoA_Long_HumanQA": ColumnMap(text="context", summary="summary", question="questions", answer="answers", separator="|||||"),
}


def named_documents(source: str | None, columns: str | None = None, seed: int = 0) -> tuple[Document, ...] | None:
    """The documents that `--source` and `--columns` name; None without a source. Raises ValueError as `load_documents`, and for columns
    of no source."""
    if source is None:
        if columns:
            raise ValueError("--columns maps the columns of --source: name that as well")
        return None
    return load_documents(source, columns=ColumnMap.parse(columns) if columns else None, seed=seed)


def load_documents(
    source: str | Path,
    *,
    columns: ColumnMap | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
) -> tuple[Document, ...]:
    """Load documents from `source`.

    `source` is "embedded:calibration" (or validation, test), a local file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt; also
    packed as .gz, .bz2 or .xz), a folder of files of one of these formats, or the id of a dataset on the hub, "owner/name" or
    "owner/name:configuration" (through `datasets.load_dataset`; `split` applies to these only). A .txt file is one document, or
    several with form feeds between them. `columns` is by default the preset of a known hub id, else ColumnMap(). `limit` draws that
    many documents (fewer, if there are fewer) in an order that `seed` decides; without it all come in the order of the source. Rows
    with a blank text and documents that repeat another are left out, and their number is logged.

    Raises ValueError, in one line with the cure: an unknown source, a missing column (with those that exist), an empty or truncated
    file, a text that is no Unicode (with file and row), a hub that cannot be reached.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    name, path = str(source), Path(source)
    if name.startswith(EMBEDDED):
        return _embedded(name, columns, limit, seed)
    if name and (path.is_dir() or is_file_name(name)):
        tables = read_tables(path)
    elif path.exists() or not HUB_ID.fullmatch(name):
        raise ValueError(
            f"source {name!r} is neither a {FORMATS} file, nor a folder of them, nor a dataset id (owner/name), nor one of "
            + ", ".join(EMBEDDED + known for known in SPLITS)
        )
    else:
        tables = [Table(name, name.rpartition("/")[2].replace(":", "-"), _hub_rows(name, split))]
        columns = columns or PRESETS.get(name.partition(":")[0])
    if not any(len(table.rows) for table in tables):
        raise ValueError(f"{name}: the dataset is empty; give one with at least one row")
    if columns is not None and not tables[0].columns:
        raise ValueError(f"columns: {name} is plain text and has no columns to map; leave the option out")
    return _documents(name, tables, columns or ColumnMap(text=TEXT), limit, seed)


def _embedded(source: str, columns: ColumnMap | None, limit: int | None, seed: int) -> tuple[Document, ...]:
    if columns is not None:
        raise ValueError(f"columns: {source} has no columns to map; leave the option out")
    # cast: embedded_documents refuses what is not a split.
    documents = embedded_documents(cast(Split, source.removeprefix(EMBEDDED)))
    return documents if limit is None else tuple(random.Random(seed).sample(documents, min(limit, len(documents))))


def _documents(source: str, tables: Sequence[Table], columns: ColumnMap, limit: int | None, seed: int) -> tuple[Document, ...]:
    for table in tables:
        if len(table.rows):
            _check_columns(table, columns)
    places = [(table, index) for table in tables for index in range(len(table.rows))]
    if limit is not None:
        places = random.Random(seed).sample(places, len(places))
    documents: dict[tuple[Any, ...], Document] = {}
    blank = repeated = 0
    for table, index in places:
        found = _row_documents(f"{table.source}: row {index + 1}", f"{table.stem}-{index}", table.rows[index], columns)
        blank += not found
        for document in found:
            content = astuple(document)[1:]
            repeated += content in documents
            documents.setdefault(content, document)
        if limit is not None and len(documents) >= limit:
            break
    if not documents:
        raise ValueError(f"{source}: column {columns.text!r} is blank in all {blank} rows; map text to the column that holds the documents")
    if blank:
        logger.warning("%s: left out %d rows whose column %r is blank", source, blank, columns.text)
    if repeated:
        logger.warning("%s: left out %d documents that repeat another", source, repeated)
    return tuple(documents.values())[:limit]


def _check_columns(table: Table, columns: ColumnMap) -> None:
    existing = getattr(table.rows, "column_names", None) or list(dict.fromkeys(key for row in table.rows for key in row))
    for name in ("text", "summary", "question", "answer"):
        column = getattr(columns, name)
        if column is not None and column not in existing and name not in columns.optional:
            raise ValueError(
                f"{table.source}: no column {column!r} for {name}; map {name} to one of its columns: {', '.join(map(str, existing))}"
                + ("" if name == "text" else ", or to none")
            )


def _row_documents(where: str, name: str, row: Row, columns: ColumnMap) -> list[Document]:
    """The documents of one row: one for each question about its text, one without a question, or none if the text is blank."""
    text = _string(where, columns.text, row.get(columns.text))
    if text is None:
        return []
    if columns.separator is not None:
        text = JOINT.join(part.strip() for part in text.split(columns.separator) if part.strip())
        if not text:
            return []
    # MultiNews begins its summaries with a dash.
    summary = _string(where, "summary", row.get(columns.summary)) if columns.summary else None
    summary = summary.lstrip("\u2013 ") if summary else None
    questions = _strings(where, columns.question, row)
    answers = _strings(where, columns.answer, row)
    if columns.question and columns.answer and len(questions) != len(answers):
        raise ValueError(f"{where} has {len(questions)} questions and {len(answers)} answers; give as many of the one as of the other")
    count = max(len(questions), len(answers))
    questions, answers = questions or [None] * count, answers or [None] * count
    # In the authors' set a blank question (MultiNews) asks for the summary: its answer is the summary.
    pairs = [pair for pair in zip(questions, answers, strict=True) if pair[0]]
    if not pairs:
        return [Document(name, text, summary or next(filter(None, answers), None))]
    if len(pairs) == 1:
        return [Document(name, text, summary, *pairs[0])]
    return [Document(f"{name}-q{number}", text, summary, *pair) for number, pair in enumerate(pairs)]


def _string(where: str, column: str, value: Any) -> str | None:
    """The stripped string, None if it is missing or blank."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {column!r} holds {type(value).__name__}, expected text; map another column")
    fault = unreadable(value)
    if fault:
        raise ValueError(f"{where}: column {column!r} holds {fault}; write the row again without it")
    return value.strip() or None


def _strings(where: str, column: str | None, row: Row) -> list[str | None]:
    value = row.get(column) if column else None
    if value is None:
        return []
    return [_string(where, str(column), item) for item in (value if isinstance(value, list | tuple) else [value])]


def _hub_rows(source: str, split: str) -> Sequence[Row]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(f"{source}: datasets of the hub need the package datasets; pip install datasets, or give a local file") from error
    path, _, configuration = source.partition(":")
    arguments = (path, configuration) if configuration else (path,)
    try:
        try:
            rows = datasets.load_dataset(*arguments, split=split)
        except RuntimeError as error:
            # Old sets (MultiNews) consist of a loading script, which datasets 4 and later refuse; the hub keeps a Parquet copy.
            if "scripts are no longer supported" not in str(error):
                raise
            rows = datasets.load_dataset(*arguments, split=split, revision=PARQUET_REVISION)
    except Exception as error:
        raise ValueError(
            f"{source}: split {split!r} could not be loaded from the hub ({first_line(error)}); check the id, the split and the network, "
            f"or download it and give a local file: {FORMATS}"
        ) from error
    return cast(Sequence[Row], rows)
