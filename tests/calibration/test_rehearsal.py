"""What cannot be made is refused before the model answers anything."""

from __future__ import annotations

import pytest
from texts import bpe_tokenizer, small_documents

from moa_lab.calibration.rehearsal import rehearse
from moa_lab.calibration.tasks import Questions, Source
from moa_lab.calibration.wordings import LESSONS


def test_a_length_that_has_room_for_some_wordings_only_is_refused() -> None:
    documents, task = small_documents(16, sentences=300), Questions(2, wordings=LESSONS)
    source = Source(bpe_tokenizer(), documents, "calibration", seed=0)
    task.draft(source, 500)
    with pytest.raises(ValueError, match="length 500 is too short for a 'questions' sample"):
        rehearse(bpe_tokenizer(), documents, "calibration", [(task, 500)])
    rehearse(bpe_tokenizer(), documents, "calibration", [(task, 600)])
