"""Compile all kernels, as they are dispatched, for chips that are not there, and tell what each takes, a JSON line a kernel.

python compile_everywhere.py CHIP [CASE ...]    one of CHIPS, all cases unless some are named
python compile_everywhere.py --list    what would be compiled, for all chips
python compile_everywhere.py --record FILE LINES ...    what was printed for chips, kept as one record

A process of its own: where Triton's interpreter is on, nothing compiles.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from pages_oracle import Pages, by_pages
from ring_attends import by_triton
from ring_oracle import Sequences
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime import jit

from moa_lab.bench.compiled import COMPILED_SCHEMA
from moa_lab.cache import LayerLayout
from moa_lab.kernels import decode, devices, drawn, influence, prefill
from moa_lab.kernels.devices import SPARE
from moa_lab.provenance import provenance
from moa_lab.serving import paged
from moa_lab.serving.page_layout import PAGE_TOKENS
from moa_lab.storage import write_json

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Chip:
    """target: what Triton compiles for. shared: bytes of shared memory a program may have, as the chip's driver tells. registers: of a
    thread, at most."""

    target: GPUTarget
    shared: int
    registers: int

    @property
    def capability(self) -> tuple[int, int] | None:
        """As `nvidia_capability`."""
        return divmod(self.target.arch, 10) if self.target.backend == "cuda" else None


CHIPS = {
    **{
        f"sm_{arch}": Chip(GPUTarget("cuda", arch, 32), shared, 255)
        for arch, shared in ((80, 166912), (86, 101376), (89, 101376), (90, 232448), (100, 232448))
    },
    **{
        name: Chip(GPUTarget("hip", name, wave), 65536, registers)
        for name, wave, registers in (("gfx90a", 64, 512), ("gfx942", 64, 512), ("gfx1100", 32, 256))
    },
}
HALF, WHOLE = torch.bfloat16, torch.float32
CHOSEN = ("BLOCK_M", "BLOCK_N", "ONE_LOOP", "TILE", "PARTS", "BLOCK", "num_warps", "num_stages")
"""Settings that follow from what a device says of itself."""
describes = prefill._describes


def cases() -> dict[str, Callable[[], object]]:
    """By name, calls that launch kernels."""
    rings, reach = LayerLayout(64, (960, 200), None, 2048), LayerLayout(64, (960, 200), 512, 2048)
    found: dict[str, Callable[[], object]] = {}
    for dtype, head_dim in ((HALF, 64), (HALF, 80), (HALF, 128), (HALF, 256), (WHOLE, 128)):
        name = f"{dtype}, {head_dim}".removeprefix("torch.")
        found[f"prefill {name}"] = partial(_prefill, dtype, head_dim)
        found[f"ring {name}"] = partial(_turns, rings, dtype=dtype, head_dim=head_dim)
    for head_dim in (64, 128, 256):
        found[f"drawn {head_dim}"] = partial(_drawn, HALF, head_dim)
        found[f"pages {head_dim}"] = partial(_pages, head_dim)
        found[f"influence {head_dim}"] = partial(_influence, HALF, head_dim)
    for bits, head_dim in (([(8, 8), (8, 8)], 128), ([(8, 4), (8, 4)], 64), ([(4, 4), (16, 8)], 80), ([(8, 8), (8, 8)], 256)):
        found[f"ring {head_dim}, bits {bits}"] = partial(_turns, rings, dtype=HALF, head_dim=head_dim, bits=bits)
    for bits, head_dim in (((8, 8), 128), ((8, 4), 64), ((4, 4), 256), ((16, 8), 128)):
        found[f"pages {head_dim}, bits {bits}"] = partial(_pages, head_dim, [bits, bits])
    found["ring 128, many new tokens"] = partial(_turns, rings, dtype=HALF, head_dim=128, turns=([40, 3], [300, 300]))
    found["ring with all there is"] = partial(_turns, reach, dtype=HALF, head_dim=128, group=8, softcap=30.0, sinks=True)
    return found


def _turns(layout: LayerLayout, turns: tuple[list[int], ...] = ([40, 3], [1, 1]), **settings: Any) -> None:
    rows = Sequences(layout, 2, **settings)
    for counts in turns:
        by_triton(rows, rows.chunk(counts), tile=decode.tile_slots(rows.ring))


def _prefill(dtype: torch.dtype, head_dim: int) -> None:
    query, key, value = (torch.zeros(2, heads, 300, head_dim, dtype=dtype) for heads in (4, 2, 2))
    prefill.prefill_attention(query, key, value, [50, 300], 64, 0.1)


def _drawn(dtype: torch.dtype, head_dim: int) -> None:
    query, key, value = (torch.zeros(1, heads, 300, head_dim, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    shift = torch.zeros(1, 2, 5, requires_grad=True)
    if drawn.holds_tiles(query):
        drawn.drawn_windows(query, key, value, shift, torch.ones(1, 2, dtype=torch.int32), 64, 0.1).sum().backward()


def _influence(dtype: torch.dtype, head_dim: int) -> None:
    query, key, value, slope = (torch.zeros(1, heads, 300, head_dim, dtype=dtype) for heads in (4, 2, 2, 4))
    if influence.holds_blocks(query):
        influence.backward_with_influence(query, key, value, slope, 64, 0.1)


def _pages(head_dim: int, bits: list[tuple[int, int]] | None = None) -> None:
    rows = Sequences(LayerLayout(4, (60, 300), None, 1000), 2, dtype=HALF, head_dim=head_dim, bits=bits)
    pages = Pages(rows.layout, PAGE_TOKENS, 2, sample=rows.ring.sample, bits=bits)
    # The second chunk reads what is held.
    for counts in ([1, 1], [40, 1], [40, 1]):
        by_pages(rows, pages, rows.chunk(counts))


def launched(chip: Chip, wanted: tuple[str, ...]) -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """What the cases launch on a chip: case, kernel, arguments and settings."""
    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        seen.append((kernel, arguments, settings))

    jit.JITFunction.run = record
    for module in (prefill, decode, devices, drawn):
        module.nvidia_capability = lambda _: chip.capability
    for module in (prefill, decode, drawn):
        module.wave_lanes = lambda _: chip.target.warp_size if chip.target.backend == "hip" else None
        module.room_for_tiles = lambda _: chip.shared - SPARE
    # A tensor on a CPU may be described wherever the interpreter runs.
    prefill._describes = lambda tensor: chip.capability is not None and chip.capability >= prefill.HOPPER and describes(tensor)
    paged.kernel_applies = lambda *_: True
    for name, call in cases().items():
        if not wanted or name in wanted:
            call()
        while seen:
            yield (name, *seen.pop(0))


def compiled(kernel: Any, arguments: tuple[Any, ...], settings: dict[str, Any], chip: Chip) -> tuple[str, Callable[[], Any]]:
    """What tells one compilation from another, and what compiles."""
    backend = make_backend(chip.target)
    settings = {**settings, "debug": False}
    bound, specialised, options = jit.create_function_from_signature(kernel.signature, kernel.params, backend)(*arguments, **settings)
    options, signature, constants, attributes = kernel._pack_args(backend, settings, bound, specialised, options)
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
    key = f"{kernel.__name__} {signature} {constants} {attributes} {options.num_warps} {options.num_stages}"
    return key, lambda: triton.compile(source, target=chip.target, options=options.__dict__)


def taken(binary: Any, chip: Chip) -> dict[str, int]:
    """Shared memory in bytes, registers of a thread, and bytes of these that were spilled."""
    if chip.target.backend == "hip":
        told = {key: int(number) for key, number in re.findall(r"\.(\w+_count):\s+(\d+)", binary.asm["amdgcn"])}
        return {"shared": binary.metadata.shared, "registers": told["vgpr_count"], "spilled": 4 * told["vgpr_spill_count"]}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", usage.stdout + usage.stderr)}
    return {"shared": binary.metadata.shared, "registers": found["REG"], "spilled": found["LOCAL"] + found["STACK"]}


def configurations(name: str, *wanted: str) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """Every kernel of every case, or of those of these names, as it is dispatched, once; and what compiles it."""
    chip = CHIPS[name]
    done: set[str] = set()
    for case, kernel, arguments, settings in launched(chip, wanted):
        key, make = compiled(kernel, arguments, settings, chip)
        if key not in done:
            done.add(key)
            chosen = {setting: settings[setting] for setting in CHOSEN if setting in settings}
            yield {"chip": name, "case": case, "kernel": kernel.__name__, **chosen}, make


def main(name: str, *wanted: str) -> None:
    """Print a line for every kernel of every case, or of those of these names."""
    for told, make in configurations(name, *wanted):
        began = time.perf_counter()
        found = taken(make(), CHIPS[name])
        print(json.dumps({**told, **found, "seconds": round(time.perf_counter() - began, 1)}), flush=True)


def keep(out: str, *printed: str) -> None:
    """Write the lines of the files `printed` as one record."""
    rows = [json.loads(line) for path in printed for line in Path(path).read_text().splitlines()]
    told = {
        "schema": COMPILED_SCHEMA,
        "triton": triton.__version__,
        "chips": {name: {"shared": chip.shared, "registers": chip.registers} for name, chip in CHIPS.items()},
        "rows": [{name: value for name, value in row.items() if name != "seconds"} for row in rows],
        "provenance": vars(provenance(device="compiled on a CPU")),
    }
    write_json(out, told)


if __name__ == "__main__":
    if sys.argv[1] == "--record":
        keep(*sys.argv[2:])
    elif sys.argv[1] == "--list":
        for chip in CHIPS:
            for told, _ in configurations(chip):
                print(json.dumps(told))
    else:
        main(*sys.argv[1:])
