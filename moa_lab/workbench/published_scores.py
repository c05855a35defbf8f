"""Scores of heads that other methods publish, read from their files: DuoAttention's gates and KVzip's head scores."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moa_lab.geometry import ModelGeometry
from moa_lab.text import given_path

DUO_FILE = "full_attention_heads.tsv"
"""As https://github.com/mit-han-lab/duo-attention publishes a model's gates, in a folder of its own."""


@dataclass(frozen=True)
class HeadScores:
    """values: float64 (layers, kv_heads), the larger the more of its past a head wants. method: whose they are."""

    name: str
    method: str
    values: np.ndarray


def read_head_scores(path: str | Path, geometry: ModelGeometry) -> HeadScores:
    """DuoAttention's `full_attention_heads.tsv`, or the folder that holds it: a layer a line, a KV head a column; or KVzip's
    `utils/head_score/NAME.pt` (`--save_head_score`): a tensor (layers, kv_heads).

    DuoAttention's gates are clipped to 0..1, as its own code does. A .pt file is read as tensors alone: nothing in it is run. Raises
    FileNotFoundError where there is no such file; ValueError for another kind of file, and for scores of another geometry.
    """
    given = given_path(path)
    file = given / DUO_FILE if given.is_dir() else given
    if not str(path).strip() or not file.is_file():
        raise FileNotFoundError(f"there are no head scores at {str(path)!r}: name a {DUO_FILE}, its folder, or a .pt of KVzip")
    if file.suffix == ".tsv":
        found, method = np.clip(_table(file), 0.0, 1.0), "DuoAttention"
    elif file.suffix == ".pt":
        found, method = _tensor(file), "KVzip"
    else:
        raise ValueError(f"{file}: head scores are a .tsv of DuoAttention or a .pt of KVzip")
    expected = (geometry.layers, geometry.kv_heads)
    # KVzip squeezes its tensor: of models with one KV head a layer, one axis is left.
    if found.ndim == 1 and geometry.kv_heads == 1:
        found = found[:, None]
    if found.shape != expected:
        raise ValueError(f"{file}: scores are of {' x '.join(map(str, found.shape))} heads, the model has {expected[0]} x {expected[1]}")
    if not np.isfinite(found).all():
        raise ValueError(f"{file}: scores must be finite numbers")
    return HeadScores(file.resolve().parent.name if file.name == DUO_FILE else file.stem, method, found)


def _table(file: Path) -> np.ndarray:
    try:
        return np.loadtxt(file, dtype=np.float64, delimiter="\t", ndmin=2)
    except ValueError as error:
        raise ValueError(f"{file}: no table of numbers: {error}") from error


def _tensor(file: Path) -> np.ndarray:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    # What torch raises for a file that is none of its own, or holds more than tensors.
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
        raise ValueError(f"{file}: no tensor that torch reads without running code") from error
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"{file}: holds no tensor of head scores but {type(found).__name__}")
    return found.to(torch.float64).numpy()
