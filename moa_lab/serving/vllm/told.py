"""What the processes of an engine are told through vLLM's config, which travels to all of them."""

from __future__ import annotations

from typing import Any


def tell(config: Any, name: str, what: Any) -> None:
    """Let every process of the engine know of `what`, as JSON data. config: vLLM's VllmConfig, of an engine under a plan."""
    config.additional_config = {**config.additional_config, name: what}


def told(config: Any, name: str) -> Any:
    """What was told under `name`; None where nothing was."""
    # Without a plan it may be an object of the user's.
    return config.additional_config.get(name) if isinstance(config.additional_config, dict) else None
