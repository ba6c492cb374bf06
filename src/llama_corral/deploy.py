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
from typing import Any

import anyio
import anyio.abc
import trio
from pydantic import SecretStr
from workflows import Workflow

from . import __version__
from .abc import Coordinator, MessageQueue, Store
from .aio import caller_library, open_asyncio_loop
from .control_plane import ControlPlane, ControlPlaneConfig
from .exceptions import SetupError
from .http_link import HttpLink
from .protocol.sealing import Sealer
from .queues import MemoryMessageQueue, open_queue
from .queues.urls import without_credentials
from .runtime import StepFlavour, check_served
from .services import CheckpointPolicy, OnChange, WorkflowService, WorkflowServiceConfig
from .services.http_coordinator import HttpCoordinator
from .settings import QueueSettings, ServerSettings, StateSettings, StoreSettings
from .starting import add_credentials, enter_patiently, open_workers_queue, try_patiently
from .stores import open_store
from .stores.secret_file import SecretFile, read_secret_file
from .supervision import StopEvent

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

    `store_url`, `queue_url`: with credentials or without. What they leave out, `store_password` and `queue_credentials` add;
    these come from the environment if not given (`CORRAL_STORE_PASSWORD`, `CORRAL_QUEUE_USER`, `CORRAL_QUEUE_PASSWORD`). A
    queue in memory is enough for one control plane and its workers.
    `state_secret`: the first one seals stored state, all of them verify. Without any (`CORRAL_STATE_SECRET` is not set
    either), a store in a file has one of its own, kept beside it; what a database keeps is not sealed then.
    """

    store_url: str = field(default="sqlite:///corral.db", repr=False)
    queue_url: str = field(default="memory://", repr=False)
    store_password: SecretStr | None = field(default_factory=lambda: StoreSettings().store_password)
    queue_credentials: QueueSettings = field(default_factory=QueueSettings)
    settings: ServerSettings = field(default_factory=ServerSettings)
    control_plane: ControlPlaneConfig = field(default_factory=ControlPlaneConfig)
    state_secret: tuple[SecretStr, ...] = field(default_factory=lambda: StateSettings().state_secret)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions(ServiceOptions):
    """Of services whose control plane is another process: `corral core` or `corral serve`.

    `control_plane_url`: one URL, or several with commas in between.
    `queue_url`: of the message queue; if not given, the control plane is asked. What it leaves out of user and password,
    `queue_credentials` add, which come from the environment if not given (`CORRAL_QUEUE_USER`, `CORRAL_QUEUE_PASSWORD`).
    """

    control_plane_url: str = "http://127.0.0.1:8000"
    token: SecretStr | None = None
    queue_url: str | None = field(default=None, repr=False)
    queue_credentials: QueueSettings = field(default_factory=QueueSettings)


@asynccontextmanager
async def open_core(options: DeployOptions) -> AsyncIterator[Core]:
    """Store, queue and control plane without an HTTP server, on either backend; services attach to it with
    `deploy_workflow`.

    Raises:
        StoreUnavailable, QueueUnavailable: the database or the broker is away.
        StoreError, SetupError: a URL or a secret that cannot be used.
    """
    async with AsyncExitStack() as stack:
        store_url = add_credentials(options.store_url, None, options.store_password)
        store = await stack.enter_async_context(_open_sealed_store(options, store_url))
        queue = await stack.enter_async_context(
            open_queue(
                add_credentials(
                    options.queue_url,
                    options.queue_credentials.queue_user,
                    options.queue_credentials.queue_password,
                ),
                token=options.settings.token,
                namespace=options.control_plane.topic_namespace,
            )
        )
        logger.info("store: %s; queue: %s", without_credentials(store_url), without_credentials(options.queue_url))
        if isinstance(queue, MemoryMessageQueue) and not store.exclusive:
            logger.info(
                "the queue is in this process: no other control plane may use the store (--queue names a broker)"
            )
        # A store of one process is locked by it: whatever lived in an earlier one is dead.
        plane = await stack.enter_async_context(
            ControlPlane(store, queue, config=options.control_plane, alone=store.exclusive)
        )
        yield Core((), plane, queue, store)


@asynccontextmanager
async def _open_sealed_store(options: DeployOptions, url: str) -> AsyncIterator[Store]:
    secrets = options.state_secret
    own: SecretFile | None = None
    if not secrets:
        own = await anyio.to_thread.run_sync(read_secret_file, url)
        secrets = () if own is None else (own.secret,)
    sealer = Sealer([secret.get_secret_value() for secret in secrets]) if secrets else None
    async with open_store(url, sealer=sealer) as store:
        if own is not None:
            await anyio.to_thread.run_sync(own.keep)
        if sealer is None and not store.exclusive:
            logger.warning(
                "stored state is not sealed: whoever writes to the database can change it unseen; "
                "give all control planes the same CORRAL_STATE_SECRET"
            )
        yield store


async def deploy_core(
    options: DeployOptions | None = None,
    *,
    stop: trio.Event | None = None,
    task_status: anyio.abc.TaskStatus[Core] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """A core with its HTTP server, until `stop` is set or the call is cancelled. Started with the `Core` when it listens;
    until the database and the broker are there, it tries again. If `stop` is set before that, it returns without having
    started.

    Raises:
        AddressError, StoreError, SetupError: something must be changed before it can run.
    """
    options = options or DeployOptions()
    stop = trio.Event() if stop is None else stop
    async with AsyncExitStack() as stack:
        bare = await enter_patiently(stack, partial(open_core, options), "the database and the broker", stop)
        if bare is not None:
            nursery = await stack.enter_async_context(trio.open_nursery())
            task_status.started(await _start_http(nursery, bare, options, stop))


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
    working runs get `options.drain_timeout` seconds, what is left is handed back to the store, and the server closes. As
    `deploy_core` it waits for the database and the broker.

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
        bare = await enter_patiently(stack, partial(open_core, options), "the database and the broker", stop)
        if bare is None:
            return
        close_http = trio.Event()
        http = await stack.enter_async_context(trio.open_nursery())
        core = await _start_http(http, bare, options, close_http)
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

    Started with the `Worker` when every service takes tasks; until the control plane and the broker answer, it tries again.
    If `stop` is set before that, it returns without having started. After `stop` it takes nothing more, working runs get
    `options.drain_timeout` seconds, and what is left is handed back.

    Raises:
        Unauthorized: the token is wrong.
        SetupError: the broker refuses it, or needs a package that is not installed.
        Incompatible: the control plane is of a release with which this one cannot work.
        UsageError: what else must be changed before it can run.
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
        queue = await open_workers_queue(stack, link, options, stop)
        if queue is None:
            return
        async with anyio.create_task_group() as tasks:
            services: dict[str, WorkflowService] = {}
            for name, workflow in workflows.items():
                service = _make_service(workflow, _config_of(name, workflow, options), queue, coordinator, options)
                start = partial(_start_service, tasks, service, link)
                if await try_patiently(start, "the control plane or its queue", stop) is None:
                    break
                services[name] = service
            else:
                task_status.started(Worker(link.url, services))
                await stop.wait()
            logger.info("stopping: nothing new is taken; services that drain: %d", len(services))
            for service in services.values():
                service.stop()


async def _start_service(tasks: anyio.abc.TaskGroup, service: WorkflowService, link: HttpLink) -> bool:
    await link.ask("GET", "/ready", bytes)
    await tasks.start(service.processing_loop)
    return True


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


async def _start_http(nursery: trio.Nursery, core: Core, options: DeployOptions, stop: trio.Event) -> Core:
    # Only who serves HTTP pays for the web stack.
    from .control_plane.http import mount
    from .web import WebApp, serve

    app = WebApp(options.settings, title="llama-corral", version=__version__)
    mount(app, core.plane, queue_url=options.queue_url, store_url=options.store_url)
    urls: list[str] = await nursery.start(partial(serve, app, options.settings, stop=stop))
    return Core(tuple(urls), core.plane, core.queue, core.store)
