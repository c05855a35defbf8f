"""What passes of a server launch that its warm-up did not: prints how many kernels were compiled then, and a line for each new one.

python launched_passes.py CHIP HEAD_DIM BITS    BITS as JSON: of K and V of every KV head

A process of its own: where Triton's interpreter is on, nothing is specialised.
"""

from __future__ import annotations

import json
import sys
from collections import Counter

import compile_everywhere
import numpy as np
import torch
from compile_everywhere import CHIPS, compiled, launched

from moa_lab.cache import LayerLayout
from moa_lab.plan import Bits
from moa_lab.serving import RequestPages, paged_kernels
from moa_lab.serving.page_layout import layout_of
from moa_lab.serving.page_pool import shape_of
from moa_lab.serving.paged import LayerHeads, layer_attention
from moa_lab.serving.step import Scoring, Step
from moa_lab.serving.warm_up import warm_up

GROUP, PAGE_TOKENS, LONGEST, DTYPE, CPU = 3, 64, 5000, torch.float16, torch.device("cpu")


def passes(kinds: list[LayerHeads], page_bytes: int, kv_heads: int, head_dim: int, buckets: int, scoring: Scoring) -> None:
    """Prompts, whole and in chunks of any size, and single tokens of any number of requests, in block tables of any width."""
    random = np.random.default_rng(0)
    raw = torch.zeros(2, page_bytes, dtype=torch.int8)
    for rows in (1, 2, 3, 7, 16, 33, 110):
        for longest in (1, 2, 16, 700):
            new = random.integers(1, longest + 1, size=rows)
            if rows == 1:
                new[:] = longest
            past = np.where(random.random(rows) < 0.5, 0, random.integers(1, LONGEST - 1000, size=rows))
            lengths, firsts = torch.from_numpy(past + new), torch.from_numpy(np.concatenate([[0], np.cumsum(new)]))
            made = torch.zeros(int(new.sum()), (GROUP + 2) * kv_heads, head_dim, dtype=DTYPE)
            table = torch.ones(rows, 1 + max(alike.columns for alike in kinds) + rows, dtype=torch.int32)[:, 1:]
            step = Step(table, torch.from_numpy(random.integers(buckets, size=rows)), lengths, firsts)
            layer_attention(kinds, raw, *made.split([GROUP * kv_heads, kv_heads, kv_heads], dim=1), step, scoring)


def main(chip: str, head_dim: int, bits: list[Bits]) -> None:
    """Print what was found."""
    kv_heads = len(bits)
    shape = shape_of(Counter(bits), PAGE_TOKENS, head_dim, DTYPE)
    layouts = [LayerLayout(4, (60, 300, 5000, 1000)[:kv_heads], None, capacity) for capacity in (1000, LONGEST)]
    pages = RequestPages((1000, LONGEST), tuple(layout_of((layout,), (bits,), shape.tokens) for layout in layouts))
    kinds = [LayerHeads(alike, CPU) for alike in pages.of_layer(0)]
    heads = (GROUP * kv_heads, kv_heads)
    scoring = Scoring(0.1, sink_logits=torch.zeros(GROUP * kv_heads, 1, 1, dtype=DTYPE))
    # What a long row holds is read of one head after another, of a shorter row of all heads together.
    paged_kernels.MOST_READ = 2 * LONGEST * head_dim * DTYPE.itemsize
    compile_everywhere.cases = lambda: {
        "warm-up": lambda: warm_up(kinds, shape.nbytes, heads, head_dim, DTYPE, scoring, CPU),
        "passes": lambda: passes(kinds, shape.nbytes, kv_heads, head_dim, len(layouts), scoring),
    }
    found: dict[str, set[str]] = {"warm-up": set(), "passes": set()}
    for case, kernel, arguments, settings in launched(CHIPS[chip], ()):
        found[case].add(compiled(kernel, arguments, settings, CHIPS[chip])[0])
    print(len(found["warm-up"]))
    print("\n".join(sorted(found["passes"] - found["warm-up"])))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [tuple(each) for each in json.loads(sys.argv[3])])
