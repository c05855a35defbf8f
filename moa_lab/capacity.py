"""How many sequences a GPU holds under a plan, and how fast it decodes them: a roofline of bytes and products, held against recorded runs.

A decode step reads all weights and every sequence's keys and values once, and multiplies every weight once for every sequence; it takes
as long as these bytes take at the rate at which the GPU reads, and these products beside. The compiled rows of
`data/benchmarks/generate.json` (H100) and `stored_bits_generate.json` (H200, up to 474 sequences) lie within a tenth of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan

USABLE, RESERVE_BYTES = 0.9835, 2 * 10**9
"""Of a GPU's memory, what weights, keys and values may take: this share, less activations, graphs and the driver's."""
STEP_SHARE = 0.98
"""Of both rates, what a whole compiled step reaches (seen: H100 .94 to .99; H200 1.01 to 1.05, over 8 bits .97 to .99)."""
READ_SHARE, MATMUL_SHARE = 0.91, 0.69
"""Of a datasheet's bandwidth, what a pure read reaches (H100: 3.05 of 3.35 TB/s); of its products in 16 bits (H200: 680 of 989)."""


@dataclass(frozen=True)
class Gpu:
    """memory_bytes: all of it. read_bytes_s: of a pure read, bytes per second. matmul_flops_s: of large products in 16 bits, operations per
    second. measured: whether the rates were read off such a device."""

    name: str
    memory_bytes: int
    read_bytes_s: float
    matmul_flops_s: float
    measured: bool = False


def _listed(name: str, mebibytes: int, datasheet_gb_s: float, datasheet_tflops: float) -> Gpu:
    return Gpu(name, mebibytes * 2**20, READ_SHARE * datasheet_gb_s * 1e9, MATMUL_SHARE * datasheet_tflops * 1e12)


GPUS: dict[str, Gpu] = {
    "h100": Gpu("H100 80GB", 81_079 * 2**20, 3.05e12, 717e12, measured=True),
    "h200": Gpu("H200 141GB", 143_771 * 2**20, 4.2e12, 680e12, measured=True),
    "a100-80": _listed("A100 80GB", 81_079, 2_039, 312),
    "a100-40": _listed("A100 40GB", 40_448, 1_555, 312),
    "l40s": _listed("L40S 48GB", 46_068, 864, 362),
    "a10": _listed("A10 24GB", 23_028, 600, 125),
    "l4": _listed("L4 24GB", 23_034, 300, 121),
    "rtx-4090": _listed("RTX 4090 24GB", 24_564, 1_008, 165),
    "rtx-3090": _listed("RTX 3090 24GB", 24_576, 936, 71),
}
"""GPUs by the name that a command takes. Rates are of the vendor's datasheets but where they were measured."""


def gpu_of(name: str, memory_gb: float | None = None, read_gb_s: float | None = None) -> Gpu:
    """The GPU of that name in `GPUS`, or another one of so many GB that reads so many GB/s; what is not given is the named one's.

    Raises ValueError for another name.
    """
    if name not in GPUS:
        raise ValueError(f"--gpu must be one of {', '.join(GPUS)}, got {name!r}; or say --memory-gb and --read-gb-s of another")
    return altered(GPUS[name], memory_gb, read_gb_s)


def altered(gpu: Gpu, memory_gb: float | None = None, read_gb_s: float | None = None) -> Gpu:
    """`gpu`, or another one of so many GB that reads so many GB/s where either is given."""
    if memory_gb is None and read_gb_s is None:
        return gpu
    memory = gpu.memory_bytes if memory_gb is None else int(memory_gb * 1e9)
    return Gpu("another GPU", memory, gpu.read_bytes_s if read_gb_s is None else read_gb_s * 1e9, gpu.matmul_flops_s)


def gpu_like(memory_gb: float, read_gb_s: float) -> Gpu:
    """A GPU of so many GB that reads so many GB/s, whose products take as long as on the one of `GPUS` that reads most like it.

    Raises ValueError for numbers that are not above 0.
    """
    if not (memory_gb > 0 and read_gb_s > 0):
        raise ValueError(f"a GPU has some GB and reads some GB/s, got {memory_gb} and {read_gb_s}")
    near = min(GPUS.values(), key=lambda gpu: abs(math.log(gpu.read_bytes_s / (read_gb_s * 1e9))))
    return altered(near, memory_gb, read_gb_s)


@dataclass(frozen=True)
class Capacity:
    """What a GPU does with as many sequences as it holds, or with `batch` of them.

    batch: sequences at once (0: not even the weights and one sequence fit). kv_bytes: of one of them. step_s: seconds of a decode step;
    tokens_s: tokens per second of all sequences together.
    """

    batch: int
    kv_bytes: int
    step_s: float
    tokens_s: float


WIDTHS_OF_MLP, VOCABULARY = 3.5, 128_000
"""Of a decoder that nothing but its heads is known of: the width of its MLP over that of its layers, and its tokens."""


def estimated_weights_bytes(geometry: ModelGeometry) -> int:
    """What the weights of a Llama-like decoder of these heads take in 16 bits: 0.66 (Qwen2.5-7B) to 1.31 times (Llama-2-7B) what they do.

    Attention and a gated MLP of `WIDTHS_OF_MLP`; embeddings of `VOCABULARY` tokens, twice from a width of 4,096 on.
    """
    width = geometry.query_heads * geometry.head_dim
    layer = 2 * width * (width + geometry.kv_heads * geometry.head_dim) + 3 * WIDTHS_OF_MLP * width**2
    return round(2 * (geometry.layers * layer + VOCABULARY * width * (2 if width >= 4096 else 1)))


def kv_room(gpu: Gpu, weights_bytes: int) -> float:
    """Bytes that are left for keys and values beside the weights; 0 where these do not fit."""
    return max(0.0, USABLE * gpu.memory_bytes - RESERVE_BYTES - weights_bytes)


def capacity(gpu: Gpu, weights_bytes: int, kv_bytes: int, batch: int | None = None) -> Capacity:
    """Of sequences that take `kv_bytes` each, beside `weights_bytes` in 16 bits, all of them used by every token; as many as fit, at most
    `batch`.

    Raises ValueError for sizes below 1 byte or a batch below 1.
    """
    if min(weights_bytes, kv_bytes) < 1 or (batch is not None and batch < 1):
        raise ValueError(f"weights and KV take at least a byte and a batch has a sequence, got {weights_bytes}, {kv_bytes} and {batch}")
    fitting = int(kv_room(gpu, weights_bytes) // kv_bytes)
    held = fitting if batch is None else min(batch, fitting)
    # A weight of two bytes is a product and a sum.
    step = ((weights_bytes + held * kv_bytes) / gpu.read_bytes_s + held * weights_bytes / gpu.matmul_flops_s) / STEP_SHARE
    return Capacity(held, kv_bytes, step, held / step)


def plan_capacity(plan: Plan, gpu: Gpu, weights_bytes: int, n_tokens: int, batch: int | None = None) -> Capacity:
    """`capacity` of sequences of `n_tokens` under `plan`, whose untouched keys and values take 16 bits a number."""
    return capacity(gpu, weights_bytes, plan.kv_bytes(n_tokens), batch)
