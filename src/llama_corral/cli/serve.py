"""`corral serve`: everything in one process."""

from __future__ import annotations

import sys
from typing import Any

import typer

from . import options as opt
from ._program import STUCK_AFTER, Announcement, run_program
from ._settings import (
    make_control_plane_config,
    make_server_settings,
    read_queue_credentials,
    read_state_secret,
    read_store_password,
    set_up_logging,
)


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("serve")(serve)


def serve(
    targets: opt.Targets,
    host: opt.Host = "127.0.0.1",
    port: opt.Port = 8000,
    store: opt.StoreUrl = "sqlite:///corral.db",
    queue: opt.QueueUrl = "memory://",
    max_concurrent_tasks: opt.MaxConcurrentTasks = 8,
    step_flavour: opt.StepFlavour = "asyncio",
    checkpoints: opt.Checkpoints = "auto",
    idle_timeout: opt.IdleTimeout = 60.0,
    on_change: opt.OnChange = "resume",
    retention: opt.Retention = None,
    max_queued_tasks: opt.MaxQueuedTasks = None,
    token: opt.OwnToken = None,
    drain_timeout: opt.DrainTimeout = 10.0,
    stuck_after: opt.StuckAfter = STUCK_AFTER,
    heartbeat: opt.Heartbeat = None,
    lease: opt.Lease = None,
    log_format: opt.LogFormat = "text",
    log_level: opt.LogLevel = "info",
    access_log: opt.AccessLog = False,
    debug: opt.Debug = False,
) -> None:
    """Serve workflows: control plane, queue, services and store in one process. Workers may join it.

    Prints `corral ready at URL` when it accepts; until database and broker are there, it tries again. Ctrl-C or SIGTERM
    drains; a second one ends at once.
    """

    def prepare() -> Any:
        from ..deploy import DeployOptions
        from .targets import load_targets

        settings = make_server_settings(
            host=host,
            port=port,
            token=token,
            log_format=log_format,
            access_log=access_log,
            debug=debug,
            graceful_timeout=max(drain_timeout, 1.0),  # also after no drain at all, answers are written to their end
        )
        config = make_control_plane_config(
            retention=retention, max_queued_tasks=max_queued_tasks, heartbeat=heartbeat, lease=lease
        )
        set_up_logging(log_format, log_level)
        chosen = DeployOptions(
            store_url=store,
            queue_url=queue,
            store_password=read_store_password(),
            queue_credentials=read_queue_credentials(),
            settings=settings,
            control_plane=config,
            state_secret=read_state_secret(),
            max_concurrent_tasks=max_concurrent_tasks,
            step_flavour=step_flavour,
            checkpoints=checkpoints,
            idle_timeout=idle_timeout or None,
            on_change=on_change,
            drain_timeout=drain_timeout,
        )
        return load_targets(targets), chosen

    sys.exit(run_program(prepare, _serve, drain_timeout=drain_timeout, stuck_after=stuck_after))


async def _serve(prepared: Any, stop: Any) -> int:
    from ..deploy import deploy_all

    workflows, chosen = prepared
    ready = Announcement(lambda deployment: f"corral ready at {deployment.url}")
    await deploy_all(workflows, chosen, stop=stop, task_status=ready)
    return 0
