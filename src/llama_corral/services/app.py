"""The HTTP server of one service: the original's two routes."""

from __future__ import annotations

from functools import partial

import anyio
import anyio.abc
import trio

from ..exceptions import SetupError
from ..protocol.messages import QueueMessage
from ..settings import ServerSettings
from ..web import Routes, WebApp, serve
from .workflow import WorkflowService


def service_routes(service: WorkflowService) -> Routes:
    """`GET /` and `POST /process_message`."""
    routes = Routes(tag="Workflow Service")

    @routes.get("/")
    async def home() -> dict[str, str]:
        """What the service is and how many calls it has in hand."""
        return await service.home()

    @routes.post("/process_message", errors=(404, 409, 429))
    async def process_message(body: QueueMessage) -> None:
        """Take a new task or an event for a running one."""
        await service.process_message(body)

    return routes


async def serve_service(
    service: WorkflowService, *, task_status: anyio.abc.TaskStatus[str] = anyio.TASK_STATUS_IGNORED
) -> None:
    """Run a service behind its own HTTP server until it is stopped. Started with its URL, when both take work."""
    if not trio.lowlevel.in_trio_task():
        raise SetupError("an HTTP server needs the Trio backend", hint="run it with anyio.run(main, backend='trio')")
    config = service.config
    settings = ServerSettings(
        host=config.internal_host or config.host,
        port=config.internal_port if config.internal_port is not None else config.port,
    )
    app = WebApp(settings, title=config.service_name, version="1", description=config.description)
    app.include(service_routes(service))
    app.add_component("service", lambda: service.statistics().running)
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        urls: list[str] = await nursery.start(partial(serve, app, settings, stop=stop))
        service.bound_to(int(urls[0].rpartition(":")[2]))
        await nursery.start(_serve_until_it_ends, service, stop)
        task_status.started(urls[0])


async def _serve_until_it_ends(
    service: WorkflowService, stop: trio.Event, *, task_status: trio.TaskStatus[None]
) -> None:
    """Keep the server as long as the service drains: its clients may still have events to send."""
    try:
        await service.processing_loop(task_status=task_status)
    finally:
        stop.set()
