"""Plans as folders or hub repositories, beside a model's weights or alone: a config card, and a model card that people read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moa_lab.plan.model_card import Score, Shown, as_section, model_card, section_in
from moa_lab.storage import write_text
from moa_lab.storage.hub import hub_file

CARD_FILE, README_FILE = "plan.json", "README.md"


def save_folder(plan: Shown, folder: str | Path, base_model: str | None, scores: Iterable[Score], license: str | None) -> Path:
    """`Plan.save_pretrained`."""
    place = Path(folder)
    if place.is_file():
        raise ValueError(f"{place} is a file; name a folder")
    section = as_section(plan, scores, base_model)
    readme = place / README_FILE
    text = section_in(readme.read_text("utf-8"), section) if readme.exists() else model_card(section, base_model, license)
    plan.save(place / CARD_FILE)
    write_text(readme, text)
    return place


def card_file(name: str | Path, revision: str | None = None) -> Path:
    """The config card in a folder, or in the hub repository of that id. Raises ValueError as `Plan.from_pretrained`."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / CARD_FILE).is_file():
            raise ValueError(f"{folder} holds no {CARD_FILE}: plan.save_pretrained(folder) writes one")
        return folder / CARD_FILE
    if folder.exists() or str(name).count("/") != 1:
        raise ValueError(f"{name} is neither a folder nor a hub id, OWNER/NAME; a config card is read by Plan.load")
    return hub_file(f"plan {str(name)!r}", str(name), CARD_FILE, revision)
