"""Composing the parts: a core, services, or all of it in one process. Nothing else is in here.

    store ⊃ queue ⊃ control plane ⊃ { services, HTTP server }

Nesting is the closing order. A stop refuses new tasks first, lets the services drain while their clients still listen, and
closes the HTTP server after that. Each function is started with `task_group.start`: it reports when it really works, raises
what goes wrong, and ends everything it started when it is cancelled.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import anyio
import anyio.abc
import trio
from workflows import Workflow

from . import __version__
from .abc import MessageQueue, Store
from .aio import open_asyncio_loop
from .control_plane import ControlPlane, ControlPlaneConfig
from .exceptions import SetupError
from .queues import open_queue
from .runtime import StepFlavour, check_served
from .services import WorkflowService, WorkflowServiceConfig
from .settings import ServerSettings
from .stores import open_store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Core:
    """A running core: what services of the same process attach to, and where clients reach it."""

    urls: tuple[str, ...]
    plane: ControlPlane
    queue: MessageQueue
    store: Store

    @property
    def url(self) -> str:
        """The first URL; empty without an HTTP server."""
        return self.urls[0] if self.urls else ""


@dataclass(frozen=True, slots=True)
class Deployment:
    """Everything in one process: the core and its services by name."""

    core: Core
    services: Mapping[str, WorkflowService]

    @property
    def url(self) -> str:
        """Where clients reach it."""
        return self.core.url


@dataclass(frozen=True, slots=True)
class DeployOptions:
    """What all services of a deployment share.

    `max_concurrent_tasks`: the cap of each service. `drain_timeout`: seconds that working runs get after a stop.
    """

    store_url: str = "sqlite:///corral.db"
    queue_url: str = "memory://"
    max_concurrent_tasks: int = 8
    step_flavour: StepFlavour = "asyncio"
    drain_timeout: float = 10.0
    settings: ServerSettings = field(default_factory=ServerSettings)
    control_plane: ControlPlaneConfig = field(default_factory=ControlPlaneConfig)


@asynccontextmanager
async def open_core(options: DeployOptions) -> AsyncIterator[Core]:
    """Store, queue and control plane without an HTTP server, on either backend; services attach to it with
    `deploy_workflow`.

    Raises:
        StoreError, SetupError: a URL that cannot be used.
    """
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_store(options.store_url))
        queue = await stack.enter_async_context(open_queue(options.queue_url))
        # SQLite is locked by one process: whatever instance is stored from before is dead.
        plane = await stack.enter_async_context(ControlPlane(store, queue, config=options.control_plane, alone=True))
        yield Core((), plane, queue, store)


async def deploy_core(
    options: DeployOptions | None = None,
    *,
    stop: trio.Event | None = None,
    task_status: anyio.abc.TaskStatus[Core] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """A core with its HTTP server, until `stop` is set or the call is cancelled. Started with the `Core` when it listens.

    Raises:
        AddressError, StoreError, SetupError: something must be changed before it can run.
    """
    options = options or DeployOptions()
    stop = trio.Event() if stop is None else stop
    async with open_core(options) as bare, trio.open_nursery() as nursery:
        core = await _start_http(nursery, bare, options.settings, stop)
        task_status.started(core)


async def deploy_workflow(
    workflow: Workflow,
    config: WorkflowServiceConfig,
    core: Core,
    *,
    step_flavour: StepFlavour = "asyncio",
    drain_timeout: float = 10.0,
    debug: bool = False,
    task_status: anyio.abc.TaskStatus[WorkflowService] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Serve a workflow on a core of this process until the service is stopped. Started with the service when it takes
    tasks.

    On Trio with the "asyncio" flavour, open one `llama_corral.aio.open_asyncio_loop` around all of them, or each service
    opens its own.
    """
    service = WorkflowService(
        workflow,
        core.queue,
        config,
        coordinator=core.plane,
        step_flavour=step_flavour,
        drain_timeout=drain_timeout,
        debug=debug,
    )
    async with anyio.create_task_group() as tasks:
        await tasks.start(service.processing_loop)
        task_status.started(service)


async def deploy_all(
    workflows: Mapping[str, Workflow],
    options: DeployOptions | None = None,
    *,
    stop: trio.Event | None = None,
    task_status: anyio.abc.TaskStatus[Deployment] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """A core and a service for each workflow, by name, in this process, until `stop` is set or the call is cancelled.

    Started with the `Deployment` when it listens and every service takes tasks. After `stop` nothing new is accepted,
    working runs get `options.drain_timeout` seconds, what is left is handed back to the store, and the server closes.

    Raises:
        AddressError, StoreError, SetupError: something must be changed before it can run.
        WorkflowValidationError: a workflow that upstream would refuse to run.
        FlavourError: an agent that cannot work in the step flavour.
    """
    options = options or DeployOptions()
    stop = trio.Event() if stop is None else stop
    if not workflows:
        raise SetupError("there is no workflow to serve", hint="name at least one")
    for workflow in workflows.values():
        workflow.validate()
        check_served(workflow, options.step_flavour, "trio")
    async with AsyncExitStack() as stack:
        if options.step_flavour == "asyncio":
            await stack.enter_async_context(open_asyncio_loop())
        bare = await stack.enter_async_context(open_core(options))
        close_http = trio.Event()
        http = await stack.enter_async_context(trio.open_nursery())
        core = await _start_http(http, bare, options.settings, close_http)
        try:
            async with trio.open_nursery() as nursery:
                services = {
                    name: await nursery.start(partial(_deploy_one, workflow, name, core, options))
                    for name, workflow in workflows.items()
                }
                task_status.started(Deployment(core, services))
                await stop.wait()
                logger.info("stopping: no new tasks; %d services drain", len(services))
                core.plane.refuse_new()
                for service in services.values():
                    service.stop()
        finally:
            close_http.set()


async def _deploy_one(
    workflow: Workflow,
    name: str,
    core: Core,
    options: DeployOptions,
    *,
    task_status: anyio.abc.TaskStatus[WorkflowService],
) -> None:
    host, _, port = core.url.rpartition("/")[2].rpartition(":")
    config = WorkflowServiceConfig(
        service_name=name,
        description=(workflow.__doc__ or f"The workflow {name}.").strip().partition("\n")[0],
        host=host,
        port=int(port),
        max_concurrent_tasks=options.max_concurrent_tasks,
    )
    await deploy_workflow(
        workflow,
        config,
        core,
        step_flavour=options.step_flavour,
        drain_timeout=options.drain_timeout,
        debug=options.settings.debug,
        task_status=task_status,
    )


async def _start_http(nursery: trio.Nursery, core: Core, settings: ServerSettings, stop: trio.Event) -> Core:
    # Only who serves HTTP pays for the web stack.
    from .control_plane.http import mount
    from .web import WebApp, serve

    app = WebApp(settings, title="llama-corral", version=__version__)
    mount(app, core.plane)
    urls: list[str] = await nursery.start(partial(serve, app, settings, stop=stop))
    return Core(tuple(urls), core.plane, core.queue, core.store)
