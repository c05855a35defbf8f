"""What runs an exported plan: the files that every engine reads, how it is started, and what it does not take."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moa_lab.plan import Plan

MODEL = "smollm2"
"""For a plan that names no model."""


@dataclass(frozen=True)
class Launcher:
    """needs: formats of `moa_lab.workbench.exporting.FORMATS`. note: what to know, in a sentence. launch: from the plan and the config
    card's path to a shell command. check: raises ValueError for a plan that the engine does not take.
    """

    needs: tuple[str, ...]
    note: str
    launch: Callable[[Plan, Path], str]
    check: Callable[[Plan], object] = lambda plan: None


def _python(plan: Plan, card: Path) -> str:
    return f"cd {shlex.quote(str(card.parent))} && python {shlex.quote(card.with_suffix('.py').name)}"


def _served(plan: Plan, card: Path) -> str:
    return f"moa-lab serve --model {shlex.quote(plan.provenance.model or MODEL)} --plan {shlex.quote(str(card))}"


def _published(plan: Plan, card: Path) -> str:
    return f"moa-lab show {shlex.quote(str(card.with_suffix('.published.json')))}"


LAUNCHERS = {
    "transformers": Launcher(
        ("config card", "Python snippet"), "The snippet loads the model and generates over the ring cache.", _python,
    ),
    "vLLM": Launcher(
        ("config card",), 'An OpenAI-compatible server, in an environment with pip install "moa-lab[serve]"; on a CPU or an NVIDIA GPU.',
        _served,
    ),
    "the authors' code": Launcher(
        ("published {alphas, betas}",), "Their format holds a rule per query head; the command says what is in the file.", _published,
        lambda plan: plan.to_published(),
    ),
}  # fmt: skip
"""By the name that the export panel shows."""


def launch(engine: str, plan: Plan, card: str | Path) -> str:
    """The shell command that runs the plan whose config card is, or would be, at `card`.

    Raises ValueError for an unknown engine, and for a plan that it does not take.
    """
    if engine not in LAUNCHERS:
        raise ValueError(f"engine must be one of {', '.join(LAUNCHERS)}, got {engine!r}")
    LAUNCHERS[engine].check(plan)
    return LAUNCHERS[engine].launch(plan, Path(card))
