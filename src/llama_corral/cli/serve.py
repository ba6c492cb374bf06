"""`corral serve`: everything in one process."""

from __future__ import annotations

import gc
import logging
import sys
from typing import Annotated, Any

import typer
from pydantic import SecretStr, ValidationError

from ..exceptions import SetupError
from ._program import STUCK_AFTER, run_program


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("serve")(serve)


def serve(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="TARGET...", help="[name=]module:attribute or [name=]file.py:attribute of a workflow."),
    ],
    host: Annotated[str, typer.Option(help="Address to bind; 0.0.0.0 means everybody.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to bind; 0 chooses a free one.", min=0, max=65535)] = 8000,
    store: Annotated[str, typer.Option(help="SQLAlchemy URL of the store.")] = "sqlite:///corral.db",
    max_concurrent_tasks: Annotated[int, typer.Option(help="Runs of each service that work at a time.", min=1)] = 8,
    step_flavour: Annotated[
        str, typer.Option(help="What async steps speak: asyncio (any library) or anyio (AnyIO, Trio, httpx; faster).")
    ] = "asyncio",
    token: Annotated[
        str | None, typer.Option(help="Bearer token that clients must send.", envvar="CORRAL_TOKEN")
    ] = None,
    drain_timeout: Annotated[float, typer.Option(help="Seconds that working runs get after a stop.", min=0)] = 10.0,
    stuck_after: Annotated[
        float, typer.Option(help="Seconds after that until a program that does not end is ended.", min=0, hidden=True)
    ] = STUCK_AFTER,
    log_format: Annotated[str, typer.Option(help="text or json")] = "text",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error")] = "info",
    access_log: Annotated[bool, typer.Option("--access-log", help="Log one line a request.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Keep tracebacks in the records of failed tasks.")] = False,
) -> None:
    """Serve workflows: control plane, queue, services and store in one process.

    Prints `corral ready at URL` when it accepts. Ctrl-C or SIGTERM drains; a second one ends at once.
    """
    for value, known, option in (
        (step_flavour, ("asyncio", "anyio"), "--step-flavour"),
        (log_format, ("text", "json"), "--log-format"),
        (log_level, ("debug", "info", "warning", "error"), "--log-level"),
    ):
        if value not in known:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}", param_hint=option)
    given: dict[str, Any] = {
        "host": host,
        "port": port,
        "token": SecretStr(token) if token is not None else None,
        "log_format": log_format,
        "access_log": access_log,
        "debug": debug,
    }

    def prepare() -> Any:
        from ..deploy import DeployOptions
        from ..settings import ServerSettings
        from ..web import configure_logging
        from .targets import load_targets

        try:
            settings = ServerSettings(**given)
        except ValidationError as exc:
            raise SetupError(f"the settings are wrong: {exc.errors(include_input=False)[0]['msg']}") from exc
        configure_logging(given["log_format"], level=getattr(logging, log_level.upper()))
        options = DeployOptions(
            store_url=store,
            max_concurrent_tasks=max_concurrent_tasks,
            step_flavour=step_flavour,  # type: ignore[arg-type]
            drain_timeout=drain_timeout,
            settings=settings,
        )
        return load_targets(targets), options

    sys.exit(run_program(prepare, _serve, drain_timeout=drain_timeout, stuck_after=stuck_after))


async def _serve(prepared: Any, stop: Any) -> int:
    import trio

    from ..deploy import Deployment, deploy_all

    workflows, options = prepared
    async with trio.open_nursery() as nursery:

        async def deploy(*, task_status: Any) -> None:
            await deploy_all(workflows, options, stop=stop, task_status=task_status)

        deployment: Deployment = await nursery.start(deploy)
        # What is loaded by now stays for as long as the process: the collector need not walk it again and again. That is
        # a sixth of a small task's CPU, and the longest pauses. The program decides this, never the library.
        gc.collect()
        gc.freeze()
        print(f"corral ready at {deployment.url}", flush=True)
    return 0
