"""Plans as folders: what is written is read again, people's text stays, and the hub's cache serves a repository without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan, uniform_plan
from moa_lab.records import Measurements
from moa_lab.storage import RecordError

RUN = Path(__file__).parents[1] / "data/runs/standard-25"
PLAN = Plan.load(RUN / "plan.json")


def test_a_folder_gives_the_plan_back_and_its_card_is_one_that_the_hub_reads(tmp_path: Path) -> None:
    folder = PLAN.save_pretrained(tmp_path / "mine", base_model="HuggingFaceTB/SmolLM2-135M-Instruct", license="apache-2.0")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "plan.json"]
    assert Plan.from_pretrained(folder) == PLAN
    assert Plan.from_pretrained(str(folder), geometry=PLAN.geometry) == PLAN
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (card.data.library_name, card.data.license) == ("moa-lab", "apache-2.0")


def test_the_model_card_tells_densities_scores_with_intervals_and_how_to_serve(tmp_path: Path) -> None:
    measured = Measurements.load(RUN / "measurements.json")
    text = (PLAN.save_pretrained(tmp_path, base_model="some/model", scores=measured) / "README.md").read_text()
    for n in PLAN.lengths:
        assert f"| {n:,} | {PLAN.density(n):.1%} | {PLAN.kv_bytes(n) / 2**20:,.1f} MiB |" in text
    cells = {}
    for name in (PLAN.name, "dense", "uniform"):
        (row,) = measured.select(plan=name, task="needles", length=2048, metric="retrieval")
        cells[name] = f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}] (n = {row.n})"
    assert f"| needles, 2,048 tokens: answers found | {' | '.join(cells.values())} |" in text
    score = PLAN.scores["validation needles@2048 retrieval"]
    assert f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}] (n = {score['n']})" in text
    assert "moa-lab serve --model some/model --plan plan.json" in text
    assert PLAN.identity() in text


def test_a_card_without_lengths_or_scores_is_described_all_the_same(tmp_path: Path) -> None:
    plan = uniform_plan(ModelGeometry(2, 4, 2, 16, 4096), 0.5).with_bits(8)
    text = (plan.save_pretrained(tmp_path) / "README.md").read_text()
    assert f"| 4,096 | {plan.density(4096):.1%} |" in text
    assert "8,192" not in text
    assert "What was measured" not in text
    assert "4 heads store K in 8 bits, V in 8" in text
    assert Plan.from_pretrained(tmp_path) == plan


def test_a_readme_that_is_there_keeps_its_text_and_has_one_section(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("---\nlicense: mit\n---\n\n# My model\n\nMine.\n")
    PLAN.save_pretrained(tmp_path)
    once = readme.read_text()
    assert once.startswith("---\nlicense: mit\n---\n\n# My model\n\nMine.\n\n")
    readme.write_text(once + "\nAfterwards.\n")
    PLAN.renamed("other").save_pretrained(tmp_path)
    again = readme.read_text()
    assert again.startswith("---\nlicense: mit\n---\n\n# My model\n\nMine.\n\n")
    assert again.endswith("\nAfterwards.\n")
    assert "# other: a span" in again
    assert f"# {PLAN.name}: a span" not in again


def in_cache(cache: Path, repository: str, plan: Plan, commit: str = "0123456789abcdef0123456789abcdef01234567") -> None:
    """The repository as a download leaves it in the hub's cache."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    plan.save_pretrained(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(commit)


def test_a_repository_is_read_through_the_hub_and_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    in_cache(tmp_path, "somebody/plan", PLAN)
    assert Plan.from_pretrained("somebody/plan") == PLAN
    with pytest.raises(ValueError, match=r"plan 'somebody/other': neither the hub nor its cache gives plan\.json of somebody/other"):
        Plan.from_pretrained("somebody/other")


def test_what_is_no_plan_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no plan\.json"):
        Plan.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        Plan.from_pretrained("plan")
    with pytest.raises(ValueError, match=r"a config card is read by Plan\.load"):
        Plan.from_pretrained(RUN / "plan.json")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        PLAN.save_pretrained(RUN / "plan.json")
    folder = PLAN.save_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match="another geometry"):
        Plan.from_pretrained(folder, geometry=ModelGeometry(2, 4, 2, 16, 4096))
    (folder / "plan.json").write_text("{")
    with pytest.raises(RecordError):
        Plan.from_pretrained(folder)
