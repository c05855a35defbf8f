"""The measured shapes of attention, with windows as unequal as those of a real plan."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from moa_lab.masks import causal_work
from moa_lab.plan import WHOLE_BITS, Bits, Plan, told_bits
from moa_lab.plan.bits import vector_bytes
from moa_lab.shipped import data_folder

RUNS = data_folder("runs")
DEFAULT_PLANS = ("standard-50", "standard-25")


@dataclass(frozen=True)
class Shape:
    """Attention of one layer: `batch` rows of `n_tokens` tokens under the plan of that name.

    flex: FlexAttention is measured too, which compiles for many seconds per shape. bits: of K and V, stored.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    batch: int
    n_tokens: int
    plan: str = "standard-50"
    flex: bool = False
    bits: Bits = WHOLE_BITS

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.query_heads // self.kv_heads

    @property
    def scale(self) -> float:
        """Factor of the attention scores."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True)
class Spans:
    """Tokens that the KV heads of one layer keep of `n_tokens`, sink and window: at most all of them."""

    n_tokens: int
    sink_tokens: int
    tokens: tuple[int, ...]

    @property
    def windows(self) -> tuple[int, ...]:
        """Window tokens per KV head."""
        return tuple(span - self.sink_tokens for span in self.tokens)

    @property
    def density(self) -> float:
        """Kept tokens over all tokens."""
        return sum(self.tokens) / (len(self.tokens) * self.n_tokens)

    @property
    def skew(self) -> float:
        """Longest over mean span."""
        return max(self.tokens) * len(self.tokens) / sum(self.tokens)

    @property
    def mean(self) -> int:
        """Mean span, rounded to a token."""
        return round(sum(self.tokens) / len(self.tokens))

    def uniform(self) -> Spans:
        """The same total of tokens, shared equally."""
        least, more = divmod(sum(self.tokens), len(self.tokens))
        return replace(self, tokens=tuple(least + (head < more) for head in range(len(self.tokens))))


def stretched_spans(plan: Plan, kv_heads: int, n_tokens: int) -> Spans:
    """Spans of a layer of `kv_heads` heads at `n_tokens` with the density of `plan`, and heads as unequal as its heads.

    All heads of the plan, at the longest length that its card reports, are sorted by the fraction they keep and cut into `kv_heads`
    equal parts; a head keeps its part's mean, which preserves the density for any number of heads. The order is shuffled, as in a
    real model. Below that length the sink shrinks in proportion.
    """
    parts, sink = stretched(plan, kv_heads, n_tokens)
    tokens = np.clip(np.rint(parts * n_tokens), sink + 1, n_tokens).astype(int)
    order = np.random.default_rng(0).permutation(kv_heads)
    return Spans(n_tokens, sink, tuple(tokens[order].tolist()))


def stretched(plan: Plan, heads: int, n_tokens: int) -> tuple[np.ndarray, int]:
    """The fractions that `heads` heads keep, ascending, and the sink at `n_tokens`: see `stretched_spans`."""
    home = plan.longest
    fractions = (plan.spans(home).ravel() / home)[by_fraction(plan)]
    # Every head repeated `heads` times, so that the parts have equal size.
    parts = np.repeat(fractions, heads).reshape(heads, -1).mean(axis=1)
    return parts, min(plan.sink_tokens, plan.sink_tokens * n_tokens // home)


def by_fraction(plan: Plan) -> np.ndarray:
    """The plan's heads, flattened, by the fraction that they keep at the longest length of its card, ascending."""
    return np.argsort(plan.spans(plan.longest).ravel(), kind="stable")


def described(shape: Shape, spans: Spans) -> dict[str, Any]:
    """The shape as JSON data, with its density (of tokens) and skew; bits only where they are fewer than the dtype's."""
    fields = {name: value for name, value in asdict(shape).items() if name not in ("flex", "bits")}
    if shape.bits != WHOLE_BITS:
        fields["bits"] = told_bits(shape.bits)
    return {**fields, "sink_tokens": spans.sink_tokens, "density": round(spans.density, 4), "skew": round(spans.skew, 2)}


def kv_bytes(shape: Shape, slots: int, itemsize: int) -> int:
    """Bytes of K and V in `slots` slots a row (all KV heads together), all rows: what a decode step must read, grids included."""
    return slots * sum(vector_bytes(shape.head_dim, width, itemsize) for width in shape.bits) * shape.batch


def prefill_flops(shape: Shape, spans: Spans) -> int:
    """FLOPs of the visible pairs, in all query heads and rows: two products of 2 * head_dim each."""
    pairs = sum(causal_work(shape.n_tokens, spans.sink_tokens, window) for window in spans.windows)
    return 4 * shape.head_dim * pairs * shape.group * shape.batch


def dense_flops(shape: Shape) -> int:
    """FLOPs of all causal pairs."""
    return 4 * shape.head_dim * (shape.n_tokens * (shape.n_tokens + 1) // 2) * shape.query_heads * shape.batch


def default_plans() -> dict[str, Plan]:
    """The recorded plans by name. Raises ValueError where there is no checkout to read them from."""
    paths = {name: RUNS / name / "plan.json" for name in DEFAULT_PLANS}
    if not all(path.is_file() for path in paths.values()):
        raise ValueError(f"the recorded plans are not in {RUNS}; pass plan=, a config card of `moa-lab validate`")
    return {name: Plan.load(path) for name, path in paths.items()}


# D1: at least 256 MB of kept K and V, far beyond every cache.
DECODE = (
    Shape(32, 32, 128, 16, 4096, flex=True),
    Shape(32, 32, 128, 4, 16384),
    Shape(32, 32, 64, 16, 8192),
    Shape(32, 8, 128, 64, 4096),
    Shape(32, 8, 128, 16, 16384, flex=True),
    Shape(32, 8, 128, 4, 65536),
    Shape(32, 8, 64, 64, 8192),
    Shape(32, 32, 128, 64, 4096, "standard-25"),
    Shape(32, 8, 128, 32, 16384, "standard-25"),
    Shape(32, 32, 128, 1, 65536, "standard-25"),
)
# B1 to B3: at least 128 MB in 8 bits, and so 256 MB in bfloat16.
STORED = tuple(replace(DECODE[index], flex=False) for index in (0, 2, 4, 6))
HETEROGENEOUS = tuple(DECODE[index] for index in (0, 1, 4, 7, 8))
SINGLE = (
    *(Shape(32, kv_heads, 128, 1, length) for kv_heads in (32, 8) for length in (16384, 32768, 65536)),
    # Of seven query heads a KV head, and 7 MB.
    Shape(28, 4, 128, 9, 12288, "standard-25"),
    Shape(32, 8, 128, 1, 7168, "standard-25"),
)
PREFILL = (
    Shape(32, 32, 128, 1, 4096),
    Shape(32, 32, 128, 1, 8192, flex=True),
    Shape(32, 32, 128, 1, 16384),
    Shape(32, 32, 128, 1, 32768),
    Shape(32, 8, 128, 1, 4096),
    Shape(32, 8, 128, 1, 8192),
    Shape(32, 8, 128, 1, 16384, flex=True),
    Shape(32, 8, 128, 1, 32768),
)
# D4: as many requests as fit in an H200 beside the weights of 7 billion parameters, and few.
PAGED = (
    Shape(32, 32, 128, 110, 4096),
    Shape(32, 32, 128, 215, 4096, "standard-25"),
    Shape(32, 8, 128, 64, 16384),
    Shape(32, 32, 128, 8, 4096),
)
# B4: the same in 8 bits, and in the bits of a quarter of the bytes.
PAGED_STORED = (
    Shape(32, 32, 128, 215, 4096, bits=(8, 8)),
    Shape(32, 8, 128, 64, 16384, bits=(8, 8)),
    Shape(32, 32, 128, 32, 4096, bits=(8, 4)),
)
# P3: other head_dims, of models of half a billion to 27 billion weights.
OTHER_DIMS = (
    Shape(32, 32, 64, 1, 8192),
    Shape(32, 8, 64, 1, 16384),
    Shape(14, 2, 64, 4, 8192),
    Shape(16, 8, 256, 1, 8192),
    Shape(32, 16, 256, 1, 16384),
)
# P4
CHUNKED = (Shape(32, 32, 128, 1, 8192), Shape(32, 8, 128, 1, 16384), Shape(32, 8, 64, 4, 8192))
WALL_CLOCK_LENGTHS = (16384, 32768)
MEMORY = (Shape(32, 8, 128, 4, 16384), Shape(32, 32, 128, 1, 16384, "standard-25"))
MEMORY_LAYERS = 32

SHAPES: dict[str, tuple[Shape, ...]] = {
    "D1": DECODE,
    "D2": HETEROGENEOUS,
    "D3": SINGLE,
    "D4": PAGED,
    "P1": PREFILL,
    "P2": tuple(shape for shape in PREFILL if shape.n_tokens in WALL_CLOCK_LENGTHS),
    "P3": OTHER_DIMS,
    "P4": CHUNKED,
    "M1": MEMORY,
    "B1": STORED,
    "B2": STORED,
    "B3": STORED,
    "B4": PAGED_STORED,
}

_TINY = Shape(4, 2, 32, 1, 256)
QUICK_SHAPES: dict[str, tuple[Shape, ...]] = {
    "D1": (replace(_TINY, kv_heads=4), replace(_TINY, batch=2, plan="standard-25")),
    "D2": (_TINY,),
    "D3": (_TINY,),
    "D4": (replace(_TINY, batch=2),),
    "P1": (_TINY,),
    "P2": (_TINY,),
    "P3": (_TINY,),
    "P4": (_TINY,),
    "M1": (_TINY,),
    "B1": (_TINY,),
    "B2": (_TINY,),
    "B3": (_TINY,),
    "B4": (replace(_TINY, batch=2, bits=(8, 8)),),
}


def shapes_of(row: str, quick: bool, plans: Collection[str]) -> tuple[Shape, ...]:
    """Shapes of a row, under the user's one plan where `plans` are not the recorded ones."""
    found = (QUICK_SHAPES if quick else SHAPES)[row]
    if set(DEFAULT_PLANS) <= set(plans):
        return found
    (name,) = plans
    return tuple(replace(shape, plan=name) for shape in found)
