"""Paths of a run's records: one folder per value of the settings that a record depends on, and copies of the last run's at the top.

runs/demo/samples.safetensors, profile.safetensors   one of each: the settings they depend on are fixed per folder
runs/demo/density-0.5/plan.json, ...                 of one density
runs/demo/plan.json, ...                             copies of the last run's, for people and the workbench
"""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_lab.plan import MIN_SPAN, read_mixes, told_bits
from moa_lab.presets import DEFAULT_PREFERENCE, PRESETS, SETTINGS_SCHEMA, RunSettings
from moa_lab.storage import atomic_path, parse, read_json, to_json, write_json

FIXED = ("model", "lengths", "preset", "seed", "supervision", "source", "columns", "plain_prompts", "sink_tokens")
"""Settings that the samples or the profile, and so everything else, depend on: another value needs another folder."""

_SEARCHING = ("density", "bits", "min_span", "max_rules_per_layer", "use_lengths", "short_lengths", "engine")
_CHOOSING = (*_SEARCHING, "prefer")
_CHOSEN = (*_CHOOSING, "test_lengths")
_TESTED = (*_CHOSEN, "test_seed")

DEPENDS: Mapping[str, tuple[str, ...]] = {
    "samples.safetensors": (),
    "profile.safetensors": (),
    "lessons.safetensors": ("short_lengths",),
    "table.safetensors": ("floor", "use_lengths"),
    "baseline-ranked.json": ("density", "min_span", "use_lengths"),
    "baseline-paper.json": ("density", "min_span", "use_lengths"),
    "front-search.json": _SEARCHING,
    "front-learned.json": _SEARCHING,
    "front-learned-words.json": _SEARCHING,
    "draft.json": _CHOOSING,
    "front.json": _CHOOSING,
    "plan.json": _CHOSEN,
    "validation.json": _CHOSEN,
    "measurements.json": _TESTED,
    "summary.json": _TESTED,
    "report.html": _TESTED,
}
"""By record: the settings, beyond `FIXED`, that it depends on. Beside fields of `RunSettings` these are short_lengths, the tested lengths
below the longest profiled one (spans are learned for them as well), and floor: min_span, in the folder's name even if it is the default.
use_lengths are all beyond the profiled ones where the plan will be used, the tested ones among them."""

ON_TOP = ("table.safetensors", "front.json", "plan.json", "validation.json", "measurements.json", "summary.json", "report.html")
"""Records that have a copy at the top of the folder."""


@dataclass
class RunFolder:
    """The folder of a run with `settings`. Raises ValueError where it holds a run whose `FIXED` settings are others."""

    path: Path
    settings: RunSettings
    is_current: bool = False

    def __post_init__(self) -> None:
        before = self._before() or self.settings
        for name in FIXED:
            old, new = getattr(before, name), getattr(self.settings, name)
            if old != new:
                raise ValueError(
                    f"{self.path} holds a run with another {name} ({old}, now {new}): its samples.safetensors and profile.safetensors "
                    "are made with that; choose another folder, or delete this one"
                )

    def place(self, name: str) -> Path:
        """Where the record `name` lies."""
        return _place(self.path, name, self.settings)

    def begin(self) -> None:
        """Write the settings: the top of the folder now belongs to this run. Records of the last run there move to their own folders."""
        before = self._before() or self.settings
        for name in DEPENDS:
            top, own = self.path / name, _place(self.path, name, before)
            if top.exists() and top != own:
                if not own.exists():
                    _copy(top, own)
                if own != self.place(name):
                    top.unlink()
        write_json(self.path / "settings.json", {"schema": SETTINGS_SCHEMA, **to_json(self.settings)})
        self.is_current = True
        for name in ON_TOP:
            self.publish(name)

    def publish(self, name: str) -> None:
        """Copy a record to the top, if it exists and this run has begun."""
        top, own = self.path / name, self.place(name)
        if self.is_current and name in ON_TOP and own.exists() and not (top.exists() and filecmp.cmp(top, own, shallow=False)):
            _copy(own, top)

    def _before(self) -> RunSettings | None:
        path = self.path / "settings.json"
        if not path.exists():
            return None
        # The usual advice to delete it would be wrong: the records beside it were made with these settings.
        read = read_json(path, SETTINGS_SCHEMA, "choose another folder, or restore this file")
        stored = {name: value for name, value in read.items() if name != "schema"}
        return parse(RunSettings, stored, path)


def short_lengths(settings: RunSettings) -> tuple[int, ...]:
    """Tested lengths below the longest profiled one, as the user or the preset names them."""
    preset = PRESETS[settings.preset]
    longest = max(settings.lengths or preset.lengths)
    return tuple(sorted({n for n in settings.test_lengths or settings.lengths or preset.test_lengths if n < longest}))


def long_lengths(settings: RunSettings) -> tuple[int, ...]:
    """Lengths beyond the longest profiled one where the plan will be used, as the user or the preset names them."""
    preset = PRESETS[settings.preset]
    longest = max(settings.lengths or preset.lengths)
    tested = settings.test_lengths or settings.lengths or preset.test_lengths
    return tuple(sorted({n for n in (*tested, *(settings.use_lengths or (2 * longest,))) if n > longest}))


def _place(folder: Path, name: str, settings: RunSettings) -> Path:
    words = [word for key in DEPENDS[name] if (word := _word(key, settings))]
    return folder / "-".join(words) / name if words else folder / name


def _word(key: str, settings: RunSettings) -> str:
    """A setting as part of a folder's name; empty for the default."""
    value, usual = _values(settings)[key]
    if value == usual:
        return ""
    if isinstance(value, tuple):
        told = "+".join(map(str, value)) or "none"
    elif isinstance(value, str):
        # Letters, digits and a few signs alone: it becomes part of a path.
        told = "".join(letter if letter.isalnum() or letter in "=+.-" else "+" for letter in value)
    else:
        # As many digits as it takes to tell two densities apart.
        told = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return f"{key.replace('_', '-').removesuffix('-per-layer')}-{told}"


def _values(settings: RunSettings) -> dict[str, tuple[Any, Any]]:
    """By key of `DEPENDS`: the value, and the default, which no folder is named after."""
    usual = RunSettings(lengths=settings.lengths, preset=settings.preset)
    return {
        "density": (settings.density, None),
        # A plus sign joins the two of one mix.
        "bits": ("-".join(map(told_bits, read_mixes(settings.bits))), "16"),
        "floor": (settings.min_span, None),
        "min_span": (settings.min_span, MIN_SPAN),
        "max_rules_per_layer": (settings.max_rules_per_layer, None),
        "engine": (settings.engine, None),
        "test_lengths": (settings.test_lengths, None),
        "prefer": (settings.prefer, DEFAULT_PREFERENCE),
        "use_lengths": (long_lengths(settings), long_lengths(usual)),
        "short_lengths": (short_lengths(settings), short_lengths(usual)),
        "test_seed": (settings.test_seed, 0),
    }


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as copy:
        shutil.copyfile(source, copy)
