"""vLLM in this process, under a plan: for comparing and timing it where no server is wanted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moa_lab.serving.settings import PLAN_VARIABLE, served_plan


def prepare(plan: str | Path | None) -> None:
    """Let what vLLM starts here from now on run under the config card `plan` (None: as vLLM is), in this process.

    The plugin is called, so that moa_lab need not be installed as a package. Raises ValueError for what cannot be served.
    """
    os.environ.pop(PLAN_VARIABLE, None)
    # A process of its own would know nothing of a plugin that is not installed, and serve without the plan.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if plan is not None:
        os.environ[PLAN_VARIABLE] = str(Path(plan).absolute())
        from moa_lab.serving.vllm.plugin import register

        register()


def start(model: str, plan: str | Path | None, **settings: Any) -> Any:
    """vLLM's `LLM` of a folder or hub id, under `plan`; see `prepare`. settings: vLLM's."""
    prepare(plan)
    from vllm import LLM

    return LLM(model, **{"skip_tokenizer_init": True, "enable_prefix_caching": False, **settings})


class InProcess:
    """`moa_lab.serving.Answers` by vLLM in this process."""

    def __init__(self, model: str, plan: str | Path, **settings: Any) -> None:
        self._llm = start(model, plan, **settings)
        config, served = self._llm.llm_engine.vllm_config, served_plan()
        assert served is not None
        self.max_tokens = int(config.model_config.max_model_len)
        self.lengths = served.lengths(self.max_tokens, config.cache_config.block_size)

    def tokens(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """As `Answers.tokens`."""
        from vllm import SamplingParams

        asked = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], asked, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]
