"""`paving serve`: a run's controller behind vLLM's OpenAI-compatible server."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from paving.terminal import one_line_errors, say


@one_line_errors
def serve(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="Run folder, controller folder or Hugging Face repository of a controller.")],
    model: Annotated[
        str | None, typer.Option(help="Folder of the base. Default: what the controller was trained on.")
    ] = None,
    host: Annotated[str, typer.Option(help="Loopback unless you say otherwise.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    allow_oracle: Annotated[
        bool, typer.Option("--allow-oracle", help="For measuring: requests may ask for the oracle and open gates.")
    ] = False,
) -> None:
    """Serve with vLLM; options behind `--` are vLLM's own, as --api-key or --max-model-len.

    A request chooses its gate: {"vllm_xargs": {"paving_policy": "closed"}}; default, soft, hard, thresholded,
    conformal:0.05, closed.
    """
    from paving.controller.paved_model import controller_folder, trained_on
    from paving.serving.command import server_command

    command, environment = server_command(
        run, model=model, host=host, port=port, extra=context.args, allow_oracle=allow_oracle
    )
    if system := (trained_on(controller_folder(run)) or {}).get("system"):
        say(f"fitted behind a system prompt; begin every conversation with it: {system}")
    # Not the whole command: an API key may be in it.
    say(f"serving {command[4]} with {environment['PAVING_CONTROLLER']} on http://{host}:{port}")
    os.execvpe(command[0], command, environment)
