"""Composing the parts: a core, services, or all of it in one process. Nothing else is in here.

    store ⊃ queue ⊃ control plane ⊃ { services, HTTP server }      `deploy_core`, `deploy_workflow`, `deploy_all`
    connections ⊃ services                                         `deploy_worker`, for a core in another process

Nesting is the closing order. A stop refuses new tasks first, lets the services drain while their clients still listen, and
closes the HTTP server after that. Each function is started with `task_group.start`: it reports when it really works, raises
what goes wrong, and ends everything it started when it is cancelled.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import anyio
import anyio.abc
import trio
from pydantic import SecretStr
from workflows import Workflow

from . import __version__
from .abc import Coordinator, MessageQueue, Store
from .aio import caller_library, open_asyncio_loop
from .control_plane import ControlPlane, ControlPlaneConfig
from .exceptions import SetupError, Unavailable
from .http_link import HttpLink
from .protocol.sealing import Sealer
from .queues import open_queue
from .queues.http import HttpMessageQueue
from .runtime import StepFlavour, check_served
from .services import CheckpointPolicy, OnChange, WorkflowService, WorkflowServiceConfig
from .services.http_coordinator import HttpCoordinator
from .settings import ServerSettings, StateSettings
from .stores import open_store
from .stores.secret_file import SecretFile, read_secret_file
from .supervision import Backoff, StopEvent

logger = logging.getLogger(__name__)

MAX_RETRY_DELAY: Final = 5.0
"""Seconds that a worker waits at most before it looks again whether its control plane is up."""


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
class Worker:
    """Services that work for a control plane in another process, by name."""

    url: str
    services: Mapping[str, WorkflowService]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """What all services of a process share.

    `max_concurrent_tasks`: the cap of each service. `drain_timeout`: seconds that working runs get after a stop.
    `checkpoints`, `idle_timeout`, `on_change`: as in `WorkflowService`. `debug`: keep tracebacks in the records of failed
    tasks.
    """

    max_concurrent_tasks: int = 8
    step_flavour: StepFlavour = "asyncio"
    drain_timeout: float = 10.0
    checkpoints: CheckpointPolicy = "auto"
    idle_timeout: float | None = 60.0
    on_change: OnChange = "resume"
    debug: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployOptions(ServiceOptions):
    """Of a core, and of services in its process.

    `state_secret`: the first one seals stored state, all of them verify. Without any (`CORRAL_STATE_SECRET` is not set
    either), a store in a file has one of its own, kept beside it.
    """

    store_url: str = "sqlite:///corral.db"
    queue_url: str = "memory://"
    settings: ServerSettings = field(default_factory=ServerSettings)
    control_plane: ControlPlaneConfig = field(default_factory=ControlPlaneConfig)
    state_secret: tuple[SecretStr, ...] = field(default_factory=lambda: StateSettings().state_secret)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions(ServiceOptions):
    """Of services whose control plane is another process: `corral core` or `corral serve`."""

    control_plane_url: str = "http://127.0.0.1:8000"
    token: SecretStr | None = None


@asynccontextmanager
async def open_core(options: DeployOptions) -> AsyncIterator[Core]:
    """Store, queue and control plane without an HTTP server, on either backend; services attach to it with
    `deploy_workflow`.

    Raises:
        StoreError, SetupError: a URL or a secret that cannot be used.
    """
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(_open_sealed_store(options))
        queue = await stack.enter_async_context(open_queue(options.queue_url))
        # A store of one process is locked by it: whatever lived in an earlier one is dead.
        plane = await stack.enter_async_context(
            ControlPlane(store, queue, config=options.control_plane, alone=store.exclusive)
        )
        yield Core((), plane, queue, store)


@asynccontextmanager
async def _open_sealed_store(options: DeployOptions) -> AsyncIterator[Store]:
    secrets = options.state_secret
    own: SecretFile | None = None
    if not secrets:
        own = await anyio.to_thread.run_sync(read_secret_file, options.store_url)
        secrets = () if own is None else (own.secret,)
    sealer = Sealer([secret.get_secret_value() for secret in secrets]) if secrets else None
    async with open_store(options.store_url, sealer=sealer) as store:
        if own is not None:
            await anyio.to_thread.run_sync(own.keep)
        yield store


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
    options: ServiceOptions | None = None,
    *,
    task_status: anyio.abc.TaskStatus[WorkflowService] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Serve a workflow on a core of this process until the service is stopped. Started with the service when it takes
    tasks. The cap is that of `config`.

    On Trio with the "asyncio" flavour, open one `llama_corral.aio.open_asyncio_loop` around all of them, or each service
    opens its own.
    """
    service = _make_service(workflow, config, core.queue, core.plane, options or ServiceOptions())
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
    Workers in other processes may join it.

    Started with the `Deployment` when it listens and every service takes tasks. After `stop` nothing new is accepted,
    working runs get `options.drain_timeout` seconds, what is left is handed back to the store, and the server closes.

    Raises:
        AddressError, StoreError, SetupError: something must be changed before it can run.
        WorkflowValidationError: a workflow that upstream would refuse to run.
        FlavourError: an agent that cannot work in the step flavour.
    """
    options = options or DeployOptions()
    options = replace(options, debug=options.debug or options.settings.debug)
    stop = trio.Event() if stop is None else stop
    _check_workflows(workflows, options)
    async with AsyncExitStack() as stack:
        if options.step_flavour == "asyncio":
            await stack.enter_async_context(open_asyncio_loop())
        bare = await stack.enter_async_context(open_core(options))
        close_http = trio.Event()
        http = await stack.enter_async_context(trio.open_nursery())
        core = await _start_http(http, bare, options.settings, close_http)
        host, _, port = core.url.rpartition("/")[2].rpartition(":")
        try:
            async with trio.open_nursery() as nursery:
                services: dict[str, WorkflowService] = {}
                for name, workflow in workflows.items():
                    config = _config_of(name, workflow, options, host=host, port=int(port))
                    services[name] = _make_service(workflow, config, core.queue, core.plane, options)
                    await nursery.start(services[name].processing_loop)
                task_status.started(Deployment(core, services))
                await stop.wait()
                logger.info("stopping: no new tasks; services that drain: %d", len(services))
                core.plane.refuse_new()
                for service in services.values():
                    service.stop()
        finally:
            close_http.set()


async def deploy_worker(
    workflows: Mapping[str, Workflow],
    options: WorkerOptions | None = None,
    *,
    stop: StopEvent | None = None,
    task_status: anyio.abc.TaskStatus[Worker] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """A service for each workflow, by name, that works for a control plane in another process, on either backend, until
    `stop` is set or the call is cancelled.

    Started with the `Worker` when every service takes tasks; until the control plane answers, it tries again. If `stop` is
    set before that, it returns without having started. After `stop` it takes nothing more, working runs get
    `options.drain_timeout` seconds, and what is left is handed back.

    Raises:
        Unauthorized: the token is wrong.
        Incompatible: the control plane is of a release with which this one cannot work.
        UsageError, SetupError: what else must be changed before it can run.
        WorkflowValidationError, FlavourError: as in `deploy_all`.
    """
    options = options or WorkerOptions()
    stop = anyio.Event() if stop is None else stop
    _check_workflows(workflows, options)
    async with AsyncExitStack() as stack:
        if options.step_flavour == "asyncio":
            await stack.enter_async_context(open_asyncio_loop())
        link = await stack.enter_async_context(HttpLink(options.control_plane_url, options.token))
        coordinator = await stack.enter_async_context(HttpCoordinator(link.url, link=link))
        queue = await stack.enter_async_context(HttpMessageQueue(link.url, link=link))
        async with anyio.create_task_group() as tasks:
            services: dict[str, WorkflowService] = {}
            for name, workflow in workflows.items():
                service = _make_service(workflow, _config_of(name, workflow, options), queue, coordinator, options)
                if not await _start_patiently(tasks, service, link, stop):
                    break
                services[name] = service
            else:
                task_status.started(Worker(link.url, services))
                await stop.wait()
            logger.info("stopping: nothing new is taken; services that drain: %d", len(services))
            for service in services.values():
                service.stop()


async def _start_patiently(
    tasks: anyio.abc.TaskGroup, service: WorkflowService, link: HttpLink, stop: StopEvent
) -> bool:
    """Start a service, again and again while its control plane is away. False: `stop` came first."""
    backoff = Backoff(maximum=MAX_RETRY_DELAY)
    failures = 0
    while not stop.is_set():
        try:
            await link.ask("GET", "/ready", bytes)
            await tasks.start(service.processing_loop)
        except Unavailable as error:
            failures += 1
            if failures == 1:
                logger.warning("waiting for the control plane, trying again and again: %s", error)
            with anyio.move_on_after(backoff.delay(failures)):
                await stop.wait()
        else:
            return True
    return False


def _check_workflows(workflows: Mapping[str, Workflow], options: ServiceOptions) -> None:
    if not workflows:
        raise SetupError("there is no workflow to serve", hint="name at least one")
    for workflow in workflows.values():
        workflow.validate()
        check_served(workflow, options.step_flavour, caller_library())


def _config_of(name: str, workflow: Workflow, options: ServiceOptions, **address: Any) -> WorkflowServiceConfig:
    return WorkflowServiceConfig(
        service_name=name,
        description=(workflow.__doc__ or f"The workflow {name}.").strip().partition("\n")[0],
        max_concurrent_tasks=options.max_concurrent_tasks,
        **address,
    )


def _make_service(
    workflow: Workflow,
    config: WorkflowServiceConfig,
    queue: MessageQueue,
    coordinator: Coordinator,
    options: ServiceOptions,
) -> WorkflowService:
    return WorkflowService(
        workflow,
        queue,
        config,
        coordinator=coordinator,
        step_flavour=options.step_flavour,
        drain_timeout=options.drain_timeout,
        checkpoints=options.checkpoints,
        idle_timeout=options.idle_timeout,
        on_change=options.on_change,
        debug=options.debug,
    )


async def _start_http(nursery: trio.Nursery, core: Core, settings: ServerSettings, stop: trio.Event) -> Core:
    # Only who serves HTTP pays for the web stack.
    from .control_plane.http import mount
    from .web import WebApp, serve

    app = WebApp(settings, title="llama-corral", version=__version__)
    mount(app, core.plane)
    urls: list[str] = await nursery.start(partial(serve, app, settings, stop=stop))
    return Core(tuple(urls), core.plane, core.queue, core.store)
