"""How many sequences a GPU holds under a plan, and how fast it decodes them: a roofline of bytes, held against recorded runs.

A decode step reads all weights and every sequence's keys and values once, and little else; so it takes as long as these bytes take at
the rate at which the GPU reads. The rows of `data/benchmarks/generate.json` lie within a tenth of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from moa_lab.plan import Plan

USABLE = 0.96
"""Share of a GPU's memory for weights, keys and values; the rest is activations, graphs and the driver's."""
READ_SHARE = 0.925
"""Of the rate of a pure read, what a whole compiled step reaches (seen on an H100: 0.905 to 0.947)."""
DATASHEET_SHARE = 0.91
"""Of a datasheet's bandwidth, what a pure read reaches (H100: 3.05 of 3.35 TB/s)."""


@dataclass(frozen=True)
class Gpu:
    """memory_bytes: all of it. read_bytes_s: of a pure read, bytes per second. measured: whether that was read off such a device."""

    name: str
    memory_bytes: int
    read_bytes_s: float
    measured: bool = False


def _listed(name: str, mebibytes: int, datasheet_gb_s: float) -> Gpu:
    return Gpu(name, mebibytes * 2**20, DATASHEET_SHARE * datasheet_gb_s * 1e9)


GPUS: dict[str, Gpu] = {
    "h100": Gpu("H100 80GB", 81_079 * 2**20, 3.05e12, measured=True),
    "h200": _listed("H200 141GB", 143_771, 4_800),
    "a100-80": _listed("A100 80GB", 81_079, 2_039),
    "a100-40": _listed("A100 40GB", 40_448, 1_555),
    "l40s": _listed("L40S 48GB", 46_068, 864),
    "a10": _listed("A10 24GB", 23_028, 600),
    "l4": _listed("L4 24GB", 23_034, 300),
    "rtx-4090": _listed("RTX 4090 24GB", 24_564, 1_008),
    "rtx-3090": _listed("RTX 3090 24GB", 24_576, 936),
}
"""GPUs by the name that a command takes. Bandwidths are of the vendor's datasheets but where they were measured."""


def gpu_of(name: str, memory_gb: float | None = None, read_gb_s: float | None = None) -> Gpu:
    """The GPU of that name in `GPUS`, or another one of so many GB that reads so many GB/s; what is not given is the named one's.

    Raises ValueError for another name.
    """
    if name not in GPUS:
        raise ValueError(f"--gpu must be one of {', '.join(GPUS)}, got {name!r}; or say --memory-gb and --read-gb-s of another")
    known = GPUS[name]
    if memory_gb is None and read_gb_s is None:
        return known
    memory = known.memory_bytes if memory_gb is None else int(memory_gb * 1e9)
    return Gpu("another GPU", memory, known.read_bytes_s if read_gb_s is None else read_gb_s * 1e9)


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


def capacity(gpu: Gpu, weights_bytes: int, kv_bytes: int, batch: int | None = None) -> Capacity:
    """Of sequences that take `kv_bytes` each, beside `weights_bytes`; as many as fit, at most `batch`.

    Raises ValueError for sizes below 1 byte or a batch below 1.
    """
    if min(weights_bytes, kv_bytes) < 1 or (batch is not None and batch < 1):
        raise ValueError(f"weights and KV take at least a byte and a batch has a sequence, got {weights_bytes}, {kv_bytes} and {batch}")
    fitting = max(0, int((USABLE * gpu.memory_bytes - weights_bytes) // kv_bytes))
    held = fitting if batch is None else min(batch, fitting)
    step = (weights_bytes + held * kv_bytes) / (READ_SHARE * gpu.read_bytes_s)
    return Capacity(held, kv_bytes, step, held / step)


def plan_capacity(plan: Plan, gpu: Gpu, weights_bytes: int, n_tokens: int, batch: int | None = None) -> Capacity:
    """`capacity` of sequences of `n_tokens` under `plan`, whose untouched keys and values take 16 bits a number."""
    return capacity(gpu, weights_bytes, plan.kv_bytes(n_tokens), batch)
