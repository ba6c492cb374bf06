"""`corral core`: the part that decides, for workers in other processes."""

from __future__ import annotations

import sys
from typing import Annotated, Any

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
    app.command("core")(core)


def core(
    host: opt.Host = "127.0.0.1",
    port: opt.Port = 8000,
    store: opt.StoreUrl = "sqlite:///corral.db",
    queue: opt.QueueUrl = "memory://",
    retention: opt.Retention = None,
    max_queued_tasks: opt.MaxQueuedTasks = None,
    token: opt.OwnToken = None,
    drain_timeout: Annotated[float, typer.Option(help="Seconds that requests get after a stop.", min=0)] = 10.0,
    stuck_after: opt.StuckAfter = STUCK_AFTER,
    heartbeat: opt.Heartbeat = None,
    lease: opt.Lease = None,
    log_format: opt.LogFormat = "text",
    log_level: opt.LogLevel = "info",
    access_log: opt.AccessLog = False,
) -> None:
    """Run the control plane, its store and the message queue; `corral worker` runs the workflows.

    With a database and a broker that others reach too (--store, --queue) any number of them may run side by side; they
    need the same CORRAL_STATE_SECRET. With a queue in memory there must be only one.

    Prints `corral ready at URL` when it accepts; until database and broker are there, it tries again. Ctrl-C or SIGTERM
    ends it: workers go on with what they have, and report to another one or when it is back.
    """

    def prepare() -> Any:
        from ..deploy import DeployOptions

        settings = make_server_settings(
            host=host,
            port=port,
            token=token,
            log_format=log_format,
            access_log=access_log,
            graceful_timeout=drain_timeout,
        )
        config = make_control_plane_config(
            retention=retention, max_queued_tasks=max_queued_tasks, heartbeat=heartbeat, lease=lease
        )
        set_up_logging(log_format, log_level)
        return DeployOptions(
            store_url=store,
            queue_url=queue,
            store_password=read_store_password(),
            queue_credentials=read_queue_credentials(),
            settings=settings,
            control_plane=config,
            state_secret=read_state_secret(),
        )

    sys.exit(run_program(prepare, _core, drain_timeout=drain_timeout, stuck_after=stuck_after))


async def _core(prepared: Any, stop: Any) -> int:
    from ..deploy import deploy_core

    ready = Announcement(lambda running: f"corral ready at {running.url}")
    await deploy_core(prepared, stop=stop, task_status=ready)
    return 0
