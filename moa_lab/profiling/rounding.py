"""What it costs to store K and V in fewer bits, to first order: the gradient of the loss times the change by rounding.

Errors of single numbers are as good as independent, so a head's numbers add up as their squares do: the root of sum (g d)^2 is the size
of the loss change to expect, in nats. It ranks mixes of bits better than the signed sum does (`moa-lab study weights`).
"""

from __future__ import annotations

import torch

from moa_lab.cache.storage import as_stored
from moa_lab.records import ROUNDED_BITS


def rounding_losses(values: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Expected size of the loss change when K or V is stored in each of `ROUNDED_BITS`: float64 (batch, kv_heads, widths).

    values: (batch, kv_heads, tokens, head_dim), in the dtype that is stored; gradient: of the loss in them.
    """
    values, found = values.detach(), []
    exact = values.to(gradient.dtype)
    for bits in ROUNDED_BITS:
        change = as_stored(values, bits).to(gradient.dtype) - exact
        # float64: sums of millions of numbers.
        found.append((change * gradient).square().sum(dim=(-2, -1), dtype=torch.float64).sqrt())
    return torch.stack(found, dim=-1)
