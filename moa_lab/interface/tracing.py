"""What `torch.compile` may see of us: a call that it steps around, or, where one graph is asked for, an operator it does not look into."""

from __future__ import annotations

from typing import Any

import torch

WORDS = (
    "moa_lab chooses attention and caches outside the compiled graph: compile without fullgraph=True, "
    "or use moa_lab.generate(compiled=True), which compiles the decode step whole"
)


def is_traced() -> bool:
    """True in code that `torch.compile` is reading rather than running."""
    return torch.compiler.is_dynamo_compiling()


@torch.compiler.assume_constant_result
def traces_whole() -> bool:
    """Asked while traced: whether the graph may not be broken (fullgraph=True)."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    # Not public. Where it is missing, or a broken graph asks at run time, the answer is no: a break is right, or refused in `WORDS`.
    try:
        reader = InstructionTranslator.current_tx()
        return bool(reader.one_graph or reader.error_on_graph_break)
    except AttributeError:
        return False


class _Handed:
    """What a cache hands to the attention that comes next, within one graph; nothing outside it."""

    cache: Any = None
    layer: int = 0


handed = _Handed()
