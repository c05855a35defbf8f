from __future__ import annotations

from pathlib import Path

import pytest
from command_line import exit_code
from texts import bpe_tokenizer
from tiny import tiny_model
from tiny_plans import small_plan

from moa_lab.models import model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    model = tiny_model("llama", max_length=512)
    model.save_pretrained(made)
    bpe_tokenizer().save_pretrained(made)
    small_plan(model).save(made / "plan.json")
    (made / "broken.json").write_text("{")
    small_plan(tiny_model("llama", layers=3)).save(made / "other.json")
    return made


@pytest.mark.parametrize(
    ("card", "options", "message"),
    [
        ("other.json", (), "another geometry: plan has 3 layers"),
        ("broken.json", (), "broken.json"),
        ("none.json", (), "none.json"),
        ("plan.json", ("--plan-length", "600"), "takes requests of at most 512 tokens"),
        ("plan.json", ("--plan-length", "300", "--max-model-len", "256"), "takes requests of at most 256 tokens"),
    ],
)
def test_what_cannot_be_served_is_one_line_before_vllm_is_started(
    folder: Path, card: str, options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(monkeypatch, "serve", "--model", folder, "--plan", folder / card, *options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_family_that_cannot_be_served_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert exit_code(monkeypatch, "serve", "--model", tmp_path, "--plan", folder / "plan.json") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "MambaConfig has no num_attention_heads" in line


def test_without_vllm_the_cure_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("moa_lab.commands.serve.find_spec", lambda name: None)
    assert exit_code(monkeypatch, "serve", "--model", folder, "--plan", folder / "plan.json") == 2
    assert 'pip install "moa-lab[serve]"' in capsys.readouterr().err


def test_a_folder_is_served_as_it_is(folder: Path) -> None:
    assert model_folder(str(folder)) == str(folder)
