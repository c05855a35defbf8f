"""Documents of three domains that have little in common: speeches, source code, and arithmetic word problems."""

from __future__ import annotations

import ast
import sysconfig
import tokenize
from collections.abc import Sequence
from pathlib import Path

from moa_lab.calibration.arithmetic import arithmetic_documents
from moa_lab.calibration.documents import SPLITS, Document, embedded_documents

DOMAINS = ("addresses", "code", "arithmetic")

MIN_MODULES = 12
MODULE_BYTES = (8_000, 64_000)
MIN_DOCSTRING = 200
LEAST = 6


def domain_documents(name: str) -> tuple[Document, ...]:
    """Documents of a domain, no text twice, in a fixed order; `split_documents` splits them.

    addresses: the embedded speeches of all splits. code: modules of Python's standard library (which depend on its version) without
    their docstrings, which serve as human summaries. arithmetic: generated word problems with worked solutions.
    Raises ValueError for another name, and where the standard library has too few sources.
    """
    if name == "addresses":
        return tuple(document for split in SPLITS for document in embedded_documents(split))
    if name == "code":
        return code_documents(Path(sysconfig.get_paths()["stdlib"]))
    if name == "arithmetic":
        return arithmetic_documents()
    raise ValueError(f"domain must be one of {', '.join(DOMAINS)}, got {name!r}")


def code_documents(folder: Path) -> tuple[Document, ...]:
    """A Document for every module directly in `folder` of 8 to 64 kB whose docstring has at least 200 characters, ordered by name.

    Raises ValueError when there are fewer than 12.
    """
    found: dict[str, Document] = {}
    for path in sorted(folder.glob("*.py")):
        document = _module(path) if MODULE_BYTES[0] <= path.stat().st_size <= MODULE_BYTES[1] else None
        if document is not None:
            found.setdefault(document.text, document)
    if len(found) < MIN_MODULES:
        raise ValueError(
            f"{folder} holds {len(found)} modules with a docstring to learn from, at least {MIN_MODULES} are needed; "
            "use a Python that has its standard library as source files"
        )
    return tuple(found.values())


def enough_documents(documents: Sequence[Document], characters: int) -> tuple[Document, ...]:
    """The first documents that together hold `characters` characters, but at least six if there are six.

    A TextStream tokenizes all its documents: a few short samples do not need a whole domain.
    """
    chosen: list[Document] = []
    held = 0
    for document in documents:
        if held >= characters and len(chosen) >= LEAST:
            break
        chosen.append(document)
        held += len(document.text)
    return tuple(chosen)


def _module(path: Path) -> Document | None:
    """The module without its docstring; None where it has none of that length, or cannot be read as Python."""
    try:
        # tokenize.open uses the encoding that the file declares.
        with tokenize.open(path) as stream:
            source = stream.read()
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return None
    docstring = ast.get_docstring(tree)
    if docstring is None or len(docstring) < MIN_DOCSTRING:
        return None
    first, last = tree.body[0].lineno, tree.body[0].end_lineno or tree.body[0].lineno
    lines = source.splitlines(keepends=True)
    text = "".join([*lines[: first - 1], *lines[last:]]).strip()
    return Document(path.stem, text, summary=docstring) if text else None
