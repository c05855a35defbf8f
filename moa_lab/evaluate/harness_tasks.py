"""Tasks of the evaluation harness: found by name, loaded, and given the lengths asked for if they generate their texts."""

from __future__ import annotations

import contextlib
import inspect
import io
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from moa_lab.runtime.arguments import whole_number
from moa_lab.text import one_line

EXTRA = 'pip install "moa-lab[eval]"'
MISSING = f"the evaluation harness is not installed: {EXTRA}"
NAMES_SHOWN = 5
LENGTHS = "max_seq_lengths"
"""The name under which the harness's generators of texts are given lengths."""
SHORTEST_TOKENS = 1024
"""RULER's shortest prompts with their worked examples; for shorter ones its generators never finish."""
WORDS = "Below is a numbered list of words, some of which appear more often than others: memorise the ones that appear most often."
TOKENS_PER_WORD = 3.0
"""Limit for `WORDS`: the worked example of `ruler_vt` must fit 500 tokens, which a character-level tokenizer cannot do."""


def installed() -> tuple[Any, Any, Any]:
    """`simple_evaluate`, `TaskManager` and `HFLM`. Raises ValueError where the harness is missing."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"{MISSING} ({error})") from error
    return simple_evaluate, TaskManager, HFLM


class HarnessTasks:
    """The tasks that a user names, and what loads them.

    include_path: a folder with task files of the user's own. Raises ValueError for no task, an unknown one, or no folder.
    """

    def __init__(
        self, manager_type: Any, names: Sequence[str], include_path: str | Path | None, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"tasks must be a list of at least one name of a task, got {names!r}")
        if include_path is not None and not Path(include_path).is_dir():
            raise ValueError(f"include_path {include_path} is not a folder of task files (.yaml)")
        self.names, self._type, self._tokenizer = tuple(names), manager_type, tokenizer
        self._places, self._defaults = self._where(None if include_path is None else str(include_path))
        self._index = self._manager({}).task_index
        for name in self.names:
            if name not in self._index:
                close = [known for known in self._index if name.lower() in known.lower()][:NAMES_SHOWN]
                hint = f"; names like it: {', '.join(close)}" if close else ""
                raise ValueError(f"the harness knows no task {name!r}{hint}; a task of your own needs its folder as include_path")

    def _where(self, own: str | None) -> tuple[list[str] | None, bool]:
        """Folders of task files, and whether all tasks of the harness are read too, which takes seconds.

        They are, unless one folder has every name as a single task: a group may contain tasks of the harness.
        """
        import lm_eval.tasks

        ruler = str(Path(lm_eval.tasks.__file__).parent / "ruler")
        for folder in (own, ruler):
            if folder and set(self.names) <= set(self._type(include_path=folder, include_defaults=False).all_subtasks):
                return [folder], False
        return None if own is None else [own], True

    def _manager(self, metadata: dict[str, Any]) -> Any:
        return self._type(include_path=self._places, include_defaults=self._defaults, metadata=metadata)

    def makes_texts(self, name: str) -> bool:
        """Whether a task (or one in a group or tag of that name) generates texts of a given length in tokens, as RULER's do."""
        entry = self._index.get(name)
        settings = (entry.cfg if entry else None) or {}
        if "custom_dataset" in settings:
            return _asks_for_lengths(settings["custom_dataset"])
        members = settings["task"] if isinstance(settings.get("task"), list) else ()
        # A tag's entry lists the tasks that have it; that of a task lists its tags.
        tagged = entry.tags if entry and entry.kind.name == "TAG" else ()
        return any(self.makes_texts(one) for one in (*_names(members), *tagged) if one != name)

    def check_lengths(self, lengths: Sequence[int] | None, longest: int) -> None:
        """Raise ValueError for unusable lengths. longest: the model's maximum in tokens, less what a chat template adds."""
        sized = [name for name in self.names if self.makes_texts(name)]
        if not sized:
            if lengths:
                raise ValueError("lengths are for tasks that make their texts to a length (RULER); the texts of the tasks named are given")
            return
        if not lengths:
            raise ValueError(f"task {sized[0]!r} makes its texts to a length in tokens: say which (lengths, --lengths 4096,8192)")
        if not isinstance(lengths, Sequence) or isinstance(lengths, str | bytes):
            raise ValueError(f"lengths must be a list of whole numbers of tokens, such as [4096, 8192], got {lengths!r}")
        for length in lengths:
            if not SHORTEST_TOKENS <= whole_number("a length", length) <= longest:
                raise ValueError(f"length {length}: texts of task {sized[0]!r} have {SHORTEST_TOKENS} to {longest} tokens on this model")
        rate = len(self._tokenizer(WORDS).input_ids) / len(WORDS.split())
        if rate > TOKENS_PER_WORD:
            raise ValueError(
                f"this tokenizer takes {rate:.1f} tokens a word: the worked examples of task {sized[0]!r} need one that takes at most "
                f"{TOKENS_PER_WORD:g}"
            )

    @contextlib.contextmanager
    def loaded(self, name: str, length: int | None, seed: int) -> Iterator[tuple[Any, list[Any]]]:
        """The manager and what `simple_evaluate` takes as tasks for `name`, with texts of `length` tokens where it makes its own.

        Raises ValueError where it cannot be loaded: the message says what was missing.
        """
        with tempfile.TemporaryDirectory(prefix="moa_lab-") as folder:
            # RULER loads the tokenizer that counts its tokens by name or folder.
            metadata: dict[str, Any] = {}
            if length is not None:
                self._tokenizer.save_pretrained(folder)
                metadata = {"tokenizer": folder, LENGTHS: [length]}
            manager = self._manager(metadata)
            # Generators of texts use these global random states and never seed them.
            random.seed(seed)
            np.random.seed(seed)
            _forget_generators()
            try:
                # Generators print their attempts.
                with contextlib.redirect_stdout(io.StringIO()):
                    found = manager.load([name])
            except ImportError as error:
                raise ValueError(f"task {name!r} needs a package that is missing ({one_line(error)}): {EXTRA}") from error
            except Exception as error:  # data sets, the hub and generators have errors of their own
                raise ValueError(
                    f"the harness cannot load task {name!r} ({one_line(error)}); texts that are not made here come from the hub: "
                    "it needs a network, or a cache that holds them"
                ) from error
            yield manager, [found["groups"][name]] if name in found["groups"] else list(found["tasks"].values())


def _forget_generators() -> None:
    """Unload task modules that hold a `random.Random`: imported anew, they generate the same texts again."""
    for name, module in list(sys.modules.items()):
        if name.startswith("lm_eval.tasks.") and any(isinstance(value, random.Random) for value in vars(module).values()):
            del sys.modules[name]


def _names(members: Iterable[Any]) -> list[str]:
    """Names of a group's members, which are names or settings."""
    return [member if isinstance(member, str) else str(member.get("task", "")) for member in members]


def _asks_for_lengths(maker: Any) -> bool:
    """Whether a function that makes a task's texts reads the lengths that `HarnessTasks.loaded` passes; others make or fetch theirs.

    maker: FOLDER/MODULE.FUNCTION as the harness's index has it, or the function.
    """
    place = inspect.getsourcefile(maker) if callable(maker) else f"{str(maker).rpartition('.')[0]}.py"
    return LENGTHS in Path(place or "").read_text(encoding="utf-8")
