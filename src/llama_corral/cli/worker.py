"""`corral worker`: services in a process of their own."""

from __future__ import annotations

import sys
from typing import Any

import typer
from pydantic import SecretStr

from . import options as opt
from ._program import STUCK_AFTER, Announcement, run_program
from ._settings import read_queue_credentials, set_up_logging


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("worker")(worker)


def worker(
    targets: opt.Targets,
    control_plane: opt.ControlPlane = opt.DEFAULT_URL,
    queue: opt.WorkersQueueUrl = None,
    max_concurrent_tasks: opt.MaxConcurrentTasks = 8,
    step_flavour: opt.StepFlavour = "asyncio",
    checkpoints: opt.Checkpoints = "auto",
    idle_timeout: opt.IdleTimeout = 60.0,
    on_change: opt.OnChange = "resume",
    token: opt.Token = None,
    drain_timeout: opt.DrainTimeout = 10.0,
    stuck_after: opt.StuckAfter = STUCK_AFTER,
    log_format: opt.LogFormat = "text",
    log_level: opt.LogLevel = "info",
    debug: opt.Debug = False,
) -> None:
    """Run workflows for a control plane in another process. Any number of workers may serve the same ones.

    Prints `corral worker ready: NAMES at URL` when it takes tasks; until the control plane and its queue answer, it tries
    again. Ctrl-C or SIGTERM drains; a second one ends at once.
    """

    def prepare() -> Any:
        from ..deploy import WorkerOptions
        from .targets import load_targets

        set_up_logging(log_format, log_level)
        chosen = WorkerOptions(
            control_plane_url=control_plane,
            token=SecretStr(token) if token is not None else None,
            queue_url=queue,
            queue_credentials=read_queue_credentials(),
            max_concurrent_tasks=max_concurrent_tasks,
            step_flavour=step_flavour,
            checkpoints=checkpoints,
            idle_timeout=idle_timeout or None,
            on_change=on_change,
            drain_timeout=drain_timeout,
            debug=debug,
        )
        return load_targets(targets), chosen

    sys.exit(run_program(prepare, _work, drain_timeout=drain_timeout, stuck_after=stuck_after))


async def _work(prepared: Any, stop: Any) -> int:
    from ..deploy import deploy_worker

    workflows, chosen = prepared
    ready = Announcement(lambda running: f"corral worker ready: {', '.join(running.services)} at {running.url}")
    await deploy_worker(workflows, chosen, stop=stop, task_status=ready)
    return 0
