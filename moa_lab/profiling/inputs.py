"""Check that samples and loss table belong to the model that a search runs."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.calibration.origin import check_origin, check_vocabulary
from moa_lab.calibration.samples import SampleSet
from moa_lab.models import geometry_of
from moa_lab.records import LossTable


def check_inputs(
    model: PreTrainedModel, samples: SampleSet, table: LossTable, tokenizer: PreTrainedTokenizerBase | None = None, *,
    any_model: bool = False,
) -> None:  # fmt: skip
    """Refuse samples and a table of another model. Raises ValueError that names both.

    any_model: accept other weights and another tokenizer, but never another geometry or token ids beyond the vocabulary.
    """
    geometry = geometry_of(model)
    if not table.geometry.fits(geometry):
        raise ValueError(f"the loss table is of another geometry: it has {table.geometry}; the model has {geometry}")
    if not any_model:
        check_origin(samples.provenance, model, "samples", tokenizer)
        check_origin(table.provenance, model, "loss table (profile)", tokenizer)
    check_vocabulary(samples, model)
