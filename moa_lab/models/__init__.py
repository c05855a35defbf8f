"""Models by name: found, loaded (GGUF files unpacked and kept), checked, and named in records by fingerprints."""

from moa_lab.geometry.of_model import geometry_of
from moa_lab.models.chat import chat_ids, opened, opening_ids, prompt_ids
from moa_lab.models.embedded import EMBEDDED, EmbeddedModel, cache_folder, embedded_file, is_cached
from moa_lab.models.fingerprints import model_name, tokenizer_fingerprint, weights_fingerprint
from moa_lab.models.folders import model_folder
from moa_lab.models.kept import clear_kept, kept_models, unpacked_folder
from moa_lab.models.loading import load_model
from moa_lab.models.names import is_gguf
from moa_lab.models.places import DTYPES, device_of, dtype_of
from moa_lab.models.size import weight_count

__all__ = [
    "DTYPES",
    "EMBEDDED",
    "EmbeddedModel",
    "cache_folder",
    "chat_ids",
    "clear_kept",
    "device_of",
    "dtype_of",
    "embedded_file",
    "geometry_of",
    "is_cached",
    "is_gguf",
    "kept_models",
    "load_model",
    "model_folder",
    "model_name",
    "opened",
    "opening_ids",
    "prompt_ids",
    "tokenizer_fingerprint",
    "unpacked_folder",
    "weight_count",
    "weights_fingerprint",
]
