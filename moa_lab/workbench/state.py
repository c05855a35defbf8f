"""The state that all panels share; a change of several fields calls every watcher once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan
from moa_lab.records import Front, InfluenceProfile, LossTable, Measurements

Watcher = Callable[[], None]


@dataclass
class State:
    """Records, and what is selected: a plan, another to compare it with, a KV head, a task, lengths in tokens.

    n_tokens: the length that spans and bytes are shown at; length: a profiled one. measurements: the run's and those made here; a row's
    `detail["plan"]` is the plan's identity. plan: what the budget or the front chose last. plans: others, of the run or loaded.
    hovered: the (layer, KV head) that the pointer is over in some figure. weights_bytes: of the model in 16 bits, 0 before it is known.
    gpu, sequence_tokens: the GPU that capacities are told for, by its key, and the tokens of a sequence there; "" and 0 before one is
    chosen. own_gpu: GB and GB/s of one that no list has.
    dark, width: the colours of figures, and the workbench's pixels on its page, 0 before they are known. validation: what the plans of the
    front were chosen by; worse: sentences on where the run's plan is worse than a simple one. tab: the selected panel, "" for all.
    """

    profile: InfluenceProfile | None = None
    table: LossTable | None = None
    front: Front | None = None
    measurements: Measurements | None = None
    validation: Measurements | None = None
    plan: Plan | None = None
    other: Plan | None = None
    plans: tuple[Plan, ...] = ()
    worse: tuple[str, ...] = ()
    layer: int = 0
    kv_head: int = 0
    hovered: tuple[int, int] | None = None
    task: str = ""
    length: int = 0
    n_tokens: int = 0
    weights_bytes: int = 0
    gpu: str = ""
    sequence_tokens: int = 0
    own_gpu: tuple[float, float] = (0.0, 0.0)
    dark: bool = False
    width: int = 0
    tab: str = ""
    _watchers: list[tuple[frozenset[str], Watcher]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        keys = self.profile.keys if self.profile else ()
        if keys:
            self.task = self.task or keys[0][0]
            self.length = self.length or max(length for task, length in keys if task == self.task)
        points = self.front.points if self.front else ()
        lengths = self.table.lengths if self.table else [int(n) for point in points for n in point.density]
        self.n_tokens = self.n_tokens or self.length or max(lengths, default=0)

    def set(self, **changes: Any) -> None:
        """Change fields together; watchers of any that changed are called once, in the order in which they were added.

        Raises ValueError for an unknown field, and for a head that the model does not have.
        """
        known = {each.name for each in fields(self) if not each.name.startswith("_")}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ValueError(f"there is no {unknown[0]!r} to set; there are {', '.join(sorted(known))}")
        self._check_head(changes)
        changed = {name for name, value in changes.items() if getattr(self, name) is not value and getattr(self, name) != value}
        for name in changed:
            setattr(self, name, changes[name])
        for names, watcher in list(self._watchers):
            if names & changed:
                watcher()

    def copy(self) -> State:
        """The same records and selections, which nobody watches and no panel changes."""
        return replace(self, _watchers=[])

    def step(self, layers: int, kv_heads: int) -> None:
        """Choose the head so many layers and KV heads on, or the last one on the way; without a record of the model nothing happens."""
        geometry = self._geometry()
        if geometry is not None:
            layer, kv_head = self.layer + layers, self.kv_head + kv_heads
            self.set(layer=min(max(layer, 0), geometry.layers - 1), kv_head=min(max(kv_head, 0), geometry.kv_heads - 1))

    def hover(self, place: Sequence[int] | None) -> None:
        """The pointer is over a KV head of a map that has its heads by number: place is (KV head, layer); None: over none."""
        self.set(hovered=None if place is None else (int(place[1]), int(place[0])))

    def watch(self, names: Iterable[str], watcher: Watcher) -> Callable[[], None]:
        """Call `watcher` whenever one of `names` changes; returns a function that ends that."""
        entry = (frozenset(names), watcher)
        self._watchers.append(entry)
        return lambda: self._watchers.remove(entry)

    def watch_in(self, tab: str, names: Iterable[str], watcher: Watcher) -> Watcher:
        """As `watch`, for a panel: changes while another panel is selected call `watcher` once, when this one is selected again.

        Returns a function that acts as if one of `names` had changed.
        """
        missed: list[bool] = []

        def changed() -> None:
            if self.tab in ("", tab):
                watcher()
            else:
                missed[:] = [True]

        def turned() -> None:
            if self.tab in ("", tab) and missed:
                missed.clear()
                watcher()

        self.watch(names, changed)
        self.watch(["tab"], turned)
        return changed

    def _geometry(self) -> ModelGeometry | None:
        return next((record.geometry for record in (self.profile, self.table, self.plan) if record is not None), None)

    def _check_head(self, changes: dict[str, Any]) -> None:
        geometry = self._geometry()
        if geometry is None:
            return
        for name, count in (("layer", geometry.layers), ("kv_head", geometry.kv_heads)):
            if name in changes and not 0 <= changes[name] < count:
                raise ValueError(f"{name} must lie in 0..{count - 1}, got {changes[name]}")
