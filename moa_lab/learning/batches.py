"""Random batches of samples for the steps of learning."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedModel

from moa_lab.calibration.samples import Sample, SampleSet, group_by_shape
from moa_lab.search.goals import QUESTIONS

BATCH_TOKENS = {"cpu": 1024, "cuda": 32_768}
QUESTIONS_SHARE = 0.5
"""Share of questions in a step, where there are other tasks: a question has few answer tokens."""


def batch_tokens(model: PreTrainedModel) -> int:
    """Tokens of a step on the model's device."""
    return BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"])


class Batches:
    """Batches of one length and all tasks, as many samples as `tokens` hold and at least one of each; drawn at random.

    A length is drawn in proportion to its tokens, as the cost of a span grows with them: a short length, where many spans see everything,
    would favour spans that are too short at the others. rng: what the next batches depend on. Raises ValueError for a task that lacks a
    length.
    """

    def __init__(self, samples: SampleSet, tokens: int, seed: int) -> None:
        self._groups, self._tokens = group_by_shape(samples), tokens
        self.rng = np.random.default_rng(seed)
        self.tasks = sorted({task for task, _ in self._groups})
        self.lengths = sorted({length for _, length in self._groups})
        for task in self.tasks:
            for length in self.lengths:
                if (task, length) not in self._groups:
                    raise ValueError(f"there are no samples of {task} at {length} tokens, where other tasks have some")

    def draw(self) -> list[Sample]:
        """The next batch."""
        length = int(self.rng.choice(self.lengths, p=np.array(self.lengths) / sum(self.lengths)))
        batch: list[Sample] = []
        for task in self.tasks:
            group = self._groups[task, length]
            count = max(1, int(self._share(task) * (self._tokens // length)))
            batch += [group[int(index)] for index in self.rng.permutation(len(group))[:count]]
        return batch

    def _share(self, task: str) -> float:
        if QUESTIONS not in self.tasks or len(self.tasks) == 1:
            return 1 / len(self.tasks)
        return QUESTIONS_SHARE if task == QUESTIONS else (1 - QUESTIONS_SHARE) / (len(self.tasks) - 1)
