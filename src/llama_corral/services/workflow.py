"""A llama-index workflow as a service.

    support (publisher, wake-ups, heartbeat)
      ⊃ runs (one execution for each claimed task)
          ⊃ intake (takes tickets while a slot is free)

Nesting is the closing order: a stop ends the intake at once, gives the runs a grace period, and ends the support last. A
cancellation reaches the intake only; the runs are then handed back and get a few seconds for it.
"""

from __future__ import annotations

import contextvars
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import anyio
import anyio.abc
from pydantic import SecretStr
from workflows import Context, Workflow

from ..abc import Coordinator, MessageQueue, Reservation
from ..aio import caller_library, open_asyncio_loop
from ..exceptions import BadInput, CorralError, NotFound, TooManyTasks, Unauthorized, Unavailable
from ..protocol.messages import ActionTypes, QueueMessage, TaskDefinition
from ..protocol.records import Claim, ContextUpdate, ServiceInfo, Ticket
from ..runtime import RunOptions, Slot, StepFlavour, check_served, workflow_fingerprint
from ..supervision import SupportGroup, open_support_group
from .checkpoints import CheckpointPolicy
from .codec import WorkflowCodec
from .config import WorkflowServiceConfig
from .configured import ConfiguredService, Latch
from .execution import TaskExecution
from .intake import Intake, keep_consuming
from .queue_coordinator import PublishCallback, QueueCoordinator, read_definition
from .reporter import Reporter
from .resuming import OnChange
from .support import Support
from .sweeper import IdleSweeper

logger = logging.getLogger(__name__)

T = TypeVar("T")

CLOSING_TIME = 5.0
"""Seconds that runs get to unwind and to be handed back once the service is over, and seconds to deregister it."""


@dataclass(frozen=True, slots=True)
class ServiceStatistics:
    """A look at a service. `working`: runs that hold a slot. `waiting`: runs in memory that hold none."""

    service_name: str
    running: bool
    capacity: float
    working: int
    waiting: int
    ready: int


class WorkflowService(ConfiguredService):
    """Runs a workflow for whoever sends it tasks.

    Without a coordinator it behaves on a bare message queue as the original did: NEW_TASK and SEND_EVENT messages in,
    TASK_STREAM and COMPLETED_TASK messages out. With one, messages are tickets, and the coordinator's store is the truth.

    Args:
        workflow: The workflow; any number of its runs may be in memory, `config.max_concurrent_tasks` of them working.
        message_queue: Where tickets come from. Whoever made it enters and closes it.
        config: Names, addresses and the cap.
        publish_callback: Called after each message that the service published on a bare queue.
        coordinator: Who decides; None for the original's protocol on the bare queue.
        step_flavour: What async step bodies speak on Trio. "asyncio" runs every existing workflow.
        types: Pydantic types beyond those of the workflow's signatures that may come from the wire.
        drain_timeout: Seconds that working runs get after a stop before they are handed back.
        checkpoints: When runs are stored, to go on from there if they are interrupted: see `CheckpointPolicy`.
        idle_timeout: Seconds after which a run that waits leaves memory, until its event or its timer comes; None: never.
        on_change: What becomes of stored runs and contexts that an earlier version of the workflow left: see `OnChange`.
        debug: Keep tracebacks in the records of failed tasks.
    """

    def __init__(
        self,
        workflow: Workflow,
        message_queue: MessageQueue,
        config: WorkflowServiceConfig,
        publish_callback: PublishCallback | None = None,
        *,
        coordinator: Coordinator | None = None,
        step_flavour: StepFlavour = "asyncio",
        types: Iterable[type[Any]] = (),
        drain_timeout: float = 10.0,
        checkpoints: CheckpointPolicy = "auto",
        idle_timeout: float | None = 60.0,
        on_change: OnChange = "resume",
        debug: bool = False,
        control_plane_url: str | None = None,
        token: SecretStr | None = None,
    ) -> None:
        super().__init__(message_queue, config, publish_callback, control_plane_url=control_plane_url, token=token)
        self.workflow = workflow
        self.codec = WorkflowCodec(workflow, types)
        self.fingerprint = workflow_fingerprint(workflow)
        self.run_options = RunOptions(flavour=step_flavour, event_buffer=0)
        self.debug = debug
        self.drain_timeout = drain_timeout
        self._bare: QueueCoordinator | None = None
        if coordinator is None:
            coordinator = self._bare = QueueCoordinator(
                message_queue, publisher_id=self._publisher_id, publish_callback=publish_callback
            )
            checkpoints, idle_timeout = "none", None  # nobody would keep them
        self._coordinator = coordinator
        self.checkpoints: CheckpointPolicy = checkpoints
        self.on_change: OnChange = on_change
        self.idle_timeout = idle_timeout
        self._capacity: float = config.max_concurrent_tasks
        self._executions: dict[str, TaskExecution] = {}
        self._stop = Latch()
        self._running = False
        self._draining = False
        self._over = False
        # Between the start of `processing_loop` and its end:
        self._limiter: anyio.CapacityLimiter | None = None
        self._intake: Intake | None = None
        self._support: Support | None = None
        self._sweeper: IdleSweeper | None = None
        self._runs: SupportGroup | None = None
        self._vars: contextvars.Context | None = None

    # What it is

    @property
    def coordinator(self) -> Coordinator:
        """Who decides for this service."""
        return self._coordinator

    @property
    def capacity(self) -> float:
        """Runs that may work at a time. Settable while the service runs: after lowering it nothing starts until fewer
        work than it says; what works goes on."""
        return self._capacity

    @capacity.setter
    def capacity(self, total: float) -> None:
        if total < 1 or not (isinstance(total, int) or math.isinf(total)):
            raise ValueError(f"a capacity is a whole number of at least 1, or infinity; not {total!r}")
        self._capacity = total
        if self._limiter is not None:
            self._limiter.total_tokens = total

    @property
    def executions(self) -> Mapping[str, TaskExecution]:
        """The tasks in hand, by id."""
        return self._executions

    def statistics(self) -> ServiceStatistics:
        """Numbers of this moment."""
        working = self._limiter.borrowed_tokens if self._limiter is not None else 0
        waiting = sum(1 for execution in self._executions.values() if not execution.slot.held)
        ready = self._intake.ready if self._intake is not None else 0
        return ServiceStatistics(self.service_name, self._running, self._capacity, working, waiting, ready)

    async def home(self) -> dict[str, str]:
        """The original's self-description: every value is a string."""
        return {
            "service_name": self.config.service_name,
            "description": self.config.description,
            "running": str(self._running),
            "step_interval": str(self.config.step_interval),
            "num_outstanding_calls": str(len(self._executions) + self.statistics().ready),
            "type": "workflow_service",
        }

    # What a decider in this process may ask (LocalService)

    def check_start(self, arguments: Mapping[str, Any]) -> None:
        """Raise BadInput where the workflow would refuse these start arguments."""
        self.codec.start_event(arguments)

    def check_event(self, payload: str) -> str:
        """The canonical JSON of an outside event. Raises BadInput."""
        return self.codec.canonical_event(payload)

    def reserve(self) -> Reservation | None:
        """A free slot for a task about to be accepted, if nobody waits for one before it."""
        if self._intake is None or not self._running or self._stop.is_set():
            return None
        return self._intake.reserve()

    # Running

    async def launch_server(self, *, task_status: anyio.abc.TaskStatus[str] = anyio.TASK_STATUS_IGNORED) -> None:
        from .app import serve_service  # HTTP needs Trio and a web stack: only who serves pays for them

        await serve_service(self, task_status=task_status)

    def stop(self) -> None:
        """Take nothing more, drain, and let `processing_loop` return. Returns at once; repeating it is harmless."""
        self._stop.set()

    async def processing_loop(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Take tasks and run them until `stop`, then drain. Started when the first can be taken.

        Cancelling it cancels all runs; their tasks are handed back.

        Raises:
            Unavailable: the coordinator or the queue cannot be reached at the start.
            FlavourError: the workflow is an agent that cannot work in the step flavour.
            What a task raised, in an exception group, with `config.raise_exceptions`.
        """
        if self._intake is not None:
            raise RuntimeError(f"{self.service_name} is running already")
        check_served(self.workflow, self.run_options.flavour, caller_library())
        async with AsyncExitStack() as stack:
            if self.run_options.flavour == "asyncio":
                await stack.enter_async_context(open_asyncio_loop())
            self._limiter = anyio.CapacityLimiter(self._capacity)
            self._intake = Intake(self, self._limiter)
            self._sweeper = None if self.idle_timeout is None else IdleSweeper(self.idle_timeout)
            self._draining = self._over = False
            try:
                await self._run_inside(self._intake, task_status)
            finally:
                with anyio.move_on_after(CLOSING_TIME, shield=True):
                    await self._leave(self._intake)
                self._limiter = self._intake = self._support = self._sweeper = self._runs = None

    async def _run_inside(self, intake: Intake, task_status: anyio.abc.TaskStatus[None]) -> None:
        name = self.service_name
        registration = await self._coordinator.register(self.info(), local=self)
        self._use_namespace(registration.topic_namespace)
        async with open_support_group() as support:
            helpers = self._support = Support(self)
            await support.start(helpers.listen_forever, name=f"wake-ups of {name}")
            support.start_soon(helpers.publish_forever, name=f"publisher of {name}")
            if registration.heartbeat_interval > 0:
                support.start_soon(helpers.beat_forever, registration.heartbeat_interval, name=f"heartbeat of {name}")
            if self._sweeper is not None:
                support.start_soon(self._sweeper.sweep_forever, name=f"idle runs of {name}")
            async with open_support_group() as self._runs:
                self._vars = contextvars.copy_context()
                try:
                    await self._take_until_stop(intake, task_status)
                    await self._drain(intake)
                finally:
                    self._running, self._draining, self._over = False, True, True
                    for execution in list(self._executions.values()):
                        execution.release()

    async def _take_until_stop(self, intake: Intake, task_status: anyio.abc.TaskStatus[None]) -> None:
        name = self.service_name
        async with anyio.create_task_group() as tasks:
            consume = partial(keep_consuming, f"intake of {name}", partial(self._consume, intake))
            await tasks.start(consume, name=f"intake of {name}")
            tasks.start_soon(intake.take_handed_in, name=f"tasks of {name}")
            self._running = True
            task_status.started()
            await self._stop.wait()
            tasks.cancel_scope.cancel()

    async def _consume(self, intake: Intake, on_open: Callable[[], None]) -> None:
        async with self._message_queue.consumer(self.get_topic(self.service_name)) as consumer:
            on_open()
            if self._bare is None:
                await intake.take_tickets(consumer)
            else:
                await intake.take_messages(partial(self._take_message, self._bare), consumer)

    async def manage_tasks(self) -> None:
        """The original's loop: start the tasks that wait inside the service, one whenever a slot is free. A part of
        `processing_loop`, which runs it by itself."""
        if self._intake is None:
            raise Unavailable(f"{self.service_name} is not running", hint="start its processing_loop")
        await self._intake.take_handed_in()

    def info(self) -> ServiceInfo:
        """What the service says of itself when it registers."""
        return ServiceInfo(
            definition=self.service_definition.model_dump_json(),
            service_name=self.service_name,
            instance_id=self.instance_id,
            capacity=int(min(self._capacity, 1_000_000)),
            events=self.codec.event_types(),
            start_schema=self.codec.start_schema(),
        )

    async def _drain(self, intake: Intake) -> None:
        """Hand back what waits, let work finish within the grace period. What is left is handed back after it."""
        self._running, self._draining = False, True
        for execution in list(self._executions.values()):
            execution.release_when_idle()
        if self._executions:
            logger.info("%s drains; tasks in hand: %d", self.service_name, len(self._executions))
        with anyio.move_on_after(self.drain_timeout):
            await intake.wait_none_reserved()
            while self._executions:
                await next(iter(self._executions.values())).finished.wait()

    async def _leave(self, intake: Intake) -> None:
        """Give back what never started, and tell the coordinator that we are gone."""
        try:
            await intake.close(publish=self._bare is None)
            if self._bare is not None:
                await self._bare.give_back()
            await self._coordinator.deregister(self.instance_id)
        except CorralError as exc:
            # Who was refused has heard of it when it registered, or from its heartbeats.
            level = logging.DEBUG if isinstance(exc, Unauthorized) else logging.WARNING
            logger.log(level, "%s left without saying so: %s", self.service_name, exc)

    # Messages

    async def process_message(self, message: QueueMessage) -> None:
        """Take a NEW_TASK or a SEND_EVENT, wherever it comes from. Waits while too many tasks wait inside the service.

        Raises:
            BadInput: another action, or no task definition in it.
            NotFound: an event for a task that is not known here or has ended.
            Unavailable: the service is not running, or has too many tasks.
        """
        if message.action not in (ActionTypes.NEW_TASK, ActionTypes.SEND_EVENT):
            raise BadInput(f"a workflow service takes new_task and send_event, not {message.action}")
        definition = read_definition(message)
        if message.action is ActionTypes.SEND_EVENT:
            self._take_event(definition)
            return
        intake = self._intake
        if intake is None or not self._running:
            raise Unavailable(f"{self.service_name} is not running", hint="start its processing_loop")
        if self._bare is None:
            await intake.hand_in(Ticket(definition.task_id, self.service_name))
        elif (ticket := self._bare.admit(definition, self.now())) is not None:
            intake.hand_in_nowait(ticket)

    async def _take_message(self, bare: QueueCoordinator, message: QueueMessage) -> None:
        try:
            await self.process_message(message)
        except TooManyTasks as exc:
            await bare.refuse(read_definition(message), exc)

    def _take_event(self, definition: TaskDefinition) -> None:
        execution = self._executions.get(definition.task_id)
        if self._bare is not None:
            self._bare.add_event(definition.task_id, self.codec.canonical_event(definition.input))
            if execution is not None:
                execution.wake()
        elif execution is not None:
            execution.send(self.codec.decode_event(definition.input))
        else:
            raise NotFound(f"task {definition.task_id} is not worked on here", task_id=definition.task_id)

    def tickets_due(self, tickets: tuple[Ticket, ...]) -> None:
        """Tickets that freed sessions give. A coordinator with a queue has published them itself."""
        if self._bare is not None and self._intake is not None and not self._draining:
            for ticket in tickets:
                self._intake.hand_in_nowait(ticket)

    # Executions

    def start_run(self, fn: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Start a task among the runs, with the group's context variables: a request that brings a task must not leave
        its own ones in the run."""
        assert self._runs is not None
        assert self._vars is not None
        self._vars.run(
            partial(self._runs.start_soon, fn, *args, name=f"task of {self.service_name}", grace=CLOSING_TIME)
        )

    async def process_call(self, claim: Claim) -> None:
        """Work on a claimed task to its ending, under a slot of the service. If the call is cancelled the task is handed
        back."""
        if self._limiter is None or self._runs is None:
            raise Unavailable(f"{self.service_name} is not running", hint="start its processing_loop")
        execution = TaskExecution(self, claim, Slot(self._limiter))
        self.start_run(self._work, execution)
        try:
            await execution.finished.wait()
        except anyio.get_cancelled_exc_class():
            execution.release()
            raise

    async def execute(self, claim: Claim, slot: Slot) -> None:
        """Work on a claimed task to its ending. Its slot is given back whenever it waits, and at the end."""
        await self._work(TaskExecution(self, claim, slot))

    async def _work(self, execution: TaskExecution) -> None:
        task_id = execution.claim.task_id
        known = self._executions.get(task_id)
        if known is not None:
            known.lose()  # an older epoch of the same task
        self._executions[task_id] = execution
        if self._support is not None and self._support.was_woken(task_id):
            execution.wake()
        if self._over:
            execution.release()
        elif self._draining:
            execution.release_when_idle()
        await execution.execute()
        if self.config.raise_exceptions and isinstance(execution.error, Exception):
            raise execution.error

    # What executions need

    @property
    def sweeper(self) -> IdleSweeper | None:
        """See `ExecutionHost`."""
        return self._sweeper

    def forget(self, execution: TaskExecution) -> None:
        """See `ExecutionHost`."""
        if self._executions.get(execution.claim.task_id) is execution:
            del self._executions[execution.claim.task_id]

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def needs_flush(self, reporter: Reporter) -> None:
        """See `ReporterHost`."""
        assert self._support is not None
        self._support.needs_flush(reporter)

    async def ask(self, question: Callable[[], Awaitable[T]], what: str) -> T:
        """See `ReporterHost`."""
        assert self._support is not None
        return await self._support.ask(question, what)

    # The control plane

    async def register_to_control_plane(self, control_plane_url: str) -> None:
        await super().register_to_control_plane(control_plane_url)
        self._use_namespace(self._topic_namespace)

    def _use_namespace(self, namespace: str) -> None:
        self._topic_namespace = namespace
        if self._bare is not None:
            self._bare.topic_namespace = namespace

    # The original's names for a session's context

    async def get_workflow_state(self, claim: Claim) -> Context[Any] | None:
        """The context that the session of a claimed task left for this service, None if there is none."""
        return None if claim.context is None else self.codec.decode_context(claim.context.payload)

    async def set_workflow_state(self, ctx: Context[Any], claim: Claim) -> ContextUpdate:
        """The context as it is stored with the task's ending, based on the version that the claim came with."""
        based_on = claim.context.version if claim.context is not None else 0
        return ContextUpdate(based_on, self.codec.encode_context(ctx), self.fingerprint)
