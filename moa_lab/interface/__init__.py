"""The one door to transformers: a registered attention function that hands every call to a handler of ours.

`route_attention(model, make_handler)` puts handlers in force for a thread; profiling and plans are two kinds of handler.
No model family is named anywhere: which modules attend is found by running the model on a few tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from transformers import PreTrainedModel

from moa_lab.geometry.wrappers import plain_model
from moa_lab.interface.calls import AttentionCall, AttentionSite, Handler
from moa_lab.interface.routes import ATTENTION_NAME, CacheMaker, Route, routed
from moa_lab.interface.sites import attention_sites

__all__ = ["ATTENTION_NAME", "AttentionCall", "AttentionSite", "Handler", "attention_sites", "route_attention"]


@contextlib.contextmanager
def route_attention(model: PreTrainedModel, make_handler: Callable[[int], Handler], caches: CacheMaker | None = None) -> Iterator[None]:
    """Send every attention call of layer `l` to `make_handler(l)`; the model is as before on exit, also after an exception.

    It holds for the thread or task that enters it, and for those begun in a copy of its context; each may enter its own. Where another
    calls the model without, RuntimeError is raised before any work is done. caches: makes the caches that transformers would make.
    Raises ValueError, naming what is missing, for a model whose attention cannot be routed.
    """
    model = plain_model(model)
    handlers = {site.module: make_handler(site.layer) for site in attention_sites(model)}
    with routed(Route(model, handlers, caches=caches)):
        yield
