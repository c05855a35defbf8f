"""A GPU of choice: what it holds under a plan and how fast it decodes, beside the dense cache; and what the weights take there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as w

from moa_lab.bench.here import HERE, gpu_named, is_here
from moa_lab.capacity import GPUS, Gpu, capacity, estimated_weights_bytes, gpu_like
from moa_lab.plan import Plan, dense_plan
from moa_lab.workbench.measuring import Plans
from moa_lab.workbench.state import State
from moa_lab.workbench.widgets import choice, number, row

ANOTHER = "another"
"""The choice of a GPU by its memory and by how fast it reads."""
READ, ESTIMATED, GIVEN = "of this model, in 16 bits", "estimated from its heads until the model is loaded", "as you wrote"


class OnGpu:
    """Boxes for a GPU, the weights and the tokens of a sequence. changed: called when one of them changes.

    Weights are those of the state's model: read from it, or estimated from its geometry, until a number is written.
    """

    def __init__(self, state: State, name: str, changed: Callable[[], object]) -> None:
        self.state, self._changed = state, changed
        self._setting = self._is_written = self._follows = False
        geometry = Plans(state).geometry
        self._estimated = estimated_weights_bytes(geometry) if geometry is not None else 10**9
        own = [("this machine's", HERE)] if is_here() else []
        listed = ((gpu.name, key) for key, gpu in GPUS.items())
        self.gpu = choice("on", [*own, *listed, ("another one", ANOTHER)], f"{name}-gpu", "200px")
        self.memory = number("memory (GB)", state.own_gpu[0], 0.0, 100_000.0, 1.0, f"{name}-memory", "160px")
        self.reads = number("reads (GB/s)", state.own_gpu[1], 0.0, 1e6, 10.0, f"{name}-reads", "160px")
        # Measured when it is asked for, not before the first paint.
        self.gpu.value = state.gpu or next(iter(GPUS))
        self.weights = number("weights (GB)", 0.01, 0.0, 10_000.0, 0.1, f"{name}-weights", "170px")
        self.tokens = number(
            "tokens a sequence", max(state.sequence_tokens or state.n_tokens, 1), 1, 10_000_000, 1024, f"{name}-tokens", "210px"
        )
        self.note = w.HTML()
        self.box = row(self.gpu, self.memory, self.reads, self.tokens, self.weights, self.note)
        self._show()
        self._read()
        self.weights.observe(lambda _: self._written(), "value")
        self.gpu.observe(lambda change: self._named(change["old"], change["new"]), "value")
        for box in (self.memory, self.reads):
            box.observe(lambda _: self._chose(own_gpu=(self.memory.value, self.reads.value)), "value")
        self.tokens.observe(lambda change: self._chose(sequence_tokens=int(change["new"])), "value")
        state.watch(["weights_bytes"], self._read)
        # One GPU and one length in all panels.
        state.watch(["gpu", "own_gpu", "sequence_tokens"], self._follow)

    @property
    def device(self) -> Gpu:
        """The chosen GPU; this machine's is measured when it is asked for first, some seconds. Raises ValueError for one without memory."""
        return gpu_like(self.memory.value, self.reads.value) if self.gpu.value == ANOTHER else gpu_named(self.gpu.value)

    @property
    def weights_bytes(self) -> int:
        """What the weights take, at least a byte."""
        return max(1, round(self.weights.value * 1e9))

    @property
    def n_tokens(self) -> int:
        """Prompt and answer of a sequence."""
        return int(self.tokens.value)

    def told(self, plan: Plan, kv_bytes: int | None = None) -> list[tuple[str, str]]:
        """What the GPU holds under `plan`, and how fast it decodes. kv_bytes: of a sequence, where they are known already."""
        n, gpu = self.n_tokens, self.device
        held = plan.kv_bytes(n) if kv_bytes is None else kv_bytes
        ours, dense = (capacity(gpu, self.weights_bytes, size) for size in (held, dense_plan(plan.geometry).kv_bytes(n)))
        if not ours.batch:
            return [(f"on {gpu.name}", f"not one sequence of {n:,} tokens fits beside the weights")]
        times = f", {ours.tokens_s / dense.tokens_s:.1f} times dense" if dense.batch else ", where dense does not fit"
        beyond = self.beyond(plan)
        return [
            (f"sequences on {gpu.name}", f"{ours.batch:,} of {n:,} tokens (dense {dense.batch:,})"),
            ("tokens/s, foretold", f"{ours.tokens_s:,.0f}{times}"),
            *([("note", beyond)] if beyond else []),
        ]

    def brief(self, plan: Plan) -> str:
        """What the GPU holds under `plan`, and how fast it decodes, in few words."""
        found = capacity(self.device, self.weights_bytes, plan.kv_bytes(self.n_tokens))
        return f"{found.batch:,} sequences, {found.tokens_s:,.0f} tokens/s" if found.batch else "not one sequence fits"

    def beyond(self, plan: Plan) -> str:
        """What is wrong with a sequence that is longer than the model takes; "" where it is not."""
        longest = plan.geometry.max_length
        return f"the model takes {longest:,} tokens at most" if self.n_tokens > longest else ""

    def _named(self, before: str, now: str) -> None:
        if now == ANOTHER and not all(self.state.own_gpu):
            # Written over what is known of the last one.
            known = gpu_named(before)
            self.state.set(own_gpu=(round(known.memory_bytes / 1e9, 1), round(known.read_bytes_s / 1e9)))
        self._show()
        self._chose(gpu=now)

    def _show(self) -> None:
        for box in (self.memory, self.reads):
            box.layout.display = None if self.gpu.value == ANOTHER else "none"

    def _chose(self, **chosen: Any) -> None:
        if self._follows:
            return
        self.state.set(**chosen)
        self._changed()

    def _follow(self) -> None:
        """All boxes at once: half of another GPU is none."""
        boxes = self.gpu, self.tokens, self.memory, self.reads
        state, here = self.state, tuple(box.value for box in boxes)
        own = state.own_gpu if all(state.own_gpu) else here[2:]
        wanted = state.gpu or here[0], state.sequence_tokens or here[1], *own
        if wanted == here:
            return
        self._follows = True
        try:
            for box, value in zip(boxes, wanted, strict=True):
                box.value = value
        finally:
            self._follows = False
        self._changed()

    def _read(self) -> None:
        if self._is_written:
            return
        self._setting = True
        try:
            self.weights.value = round((self.state.weights_bytes or self._estimated) / 1e9, 3)
        finally:
            self._setting = False
        self.note.value = READ if self.state.weights_bytes else ESTIMATED
        self._changed()

    def _written(self) -> None:
        if not self._setting:
            self._is_written, self.note.value = True, GIVEN
            self._changed()
