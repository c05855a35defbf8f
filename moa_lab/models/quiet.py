"""Loading without progress bars."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide what is written to standard error: the bars of transformers' readers cannot be switched off."""
    # tqdm looks up sys.stderr when a bar is made. Warnings still come through: logging handlers keep the stream they were made with.
    with contextlib.redirect_stderr(io.StringIO()):
        yield
