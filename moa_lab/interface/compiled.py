"""A model's layers, compiled by `torch.compile` where so much runs on a GPU that the seconds of compiling come back."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from moa_lab.geometry.wrappers import is_split, plain_model
from moa_lab.interface.sites import attention_sites

HOT_TOKENS = 4_000_000
"""Tokens of a model's forward passes from which on its layers are compiled: some ten seconds are saved on each so many."""
GRAPHS = 64
"""Graphs that one layer's code may have: with and without gradients, under a plan or not, for every kind of layer."""

_seen: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def compiled_layers(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """Passes over `tokens` tokens, without a cache of K and V: by compiled layers on a GPU, once many have been run there.

    Norms, rotations and activations are fused, attention is what it was; results differ by rounding. Layers that are compiled already
    stay so, and what cannot be compiled, or lies on several devices, runs as it is written.
    """
    model = plain_model(model)
    _seen[model] = _seen.get(model, 0) + tokens
    if model.device.type != "cuda" or is_split(model) or _seen[model] < HOT_TOKENS:
        yield
        return
    with compiling(model):
        yield


@contextlib.contextmanager
def compiling(model: PreTrainedModel, backend: str = "inductor") -> Iterator[None]:
    """The layers of `model` compiled by one of torch's backends, also on a CPU; as they were on exit. What was compiled is kept."""
    config: Any = torch._dynamo.config
    mine = [layer for layer in _layers(model) if getattr(layer, "_compiled_call_impl", None) is None]
    with config.patch(suppress_errors=True, recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS * len(mine) + GRAPHS):
        for layer in mine:
            layer.compile(dynamic=True, backend=backend)
        try:
            yield
        finally:
            for layer in mine:
                layer._compiled_call_impl = None


def _layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers that attend, one site each; none for a model that is not a stack of them."""
    sites = {site.module for site in attention_sites(model)}
    for stack in model.modules():
        layers = list(stack.children()) if isinstance(stack, torch.nn.ModuleList) else []
        if len(layers) == len(sites) and all(len(sites.intersection(layer.modules())) == 1 for layer in layers):
            return layers
    return []
