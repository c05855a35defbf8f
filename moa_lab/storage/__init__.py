"""Records as files: JSON and safetensors, written so that a kill loses nothing, refused by name when they are not what they should be."""

from moa_lab.storage.reading import (
    HAND_CURE,
    STAGE_CURE,
    TENSORS_SUFFIX,
    RecordError,
    check_schema,
    is_intact,
    parse,
    read_description,
    read_json,
    read_plain,
    read_tensors,
    schema_of,
)
from moa_lab.storage.writing import atomic_path, end_to_json, to_json, umask, write_json, write_tensors, write_text

__all__ = [
    "HAND_CURE",
    "STAGE_CURE",
    "TENSORS_SUFFIX",
    "RecordError",
    "atomic_path",
    "check_schema",
    "end_to_json",
    "is_intact",
    "parse",
    "read_description",
    "read_json",
    "read_plain",
    "read_tensors",
    "schema_of",
    "to_json",
    "umask",
    "write_json",
    "write_tensors",
    "write_text",
]
