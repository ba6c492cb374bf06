"""A llama-index workflow as a service.

    support (publisher, wake-ups, heartbeat)
      ⊃ runs (one execution for each claimed task)
          ⊃ intake (takes tickets while a slot is free)

Nesting is the closing order: a stop ends the intake at once, gives the runs a grace period, and ends the support last.
"""

from __future__ import annotations

import contextvars
import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.abc
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from pydantic import SecretStr
from workflows import Context, Workflow

from ..abc import Consumer, Coordinator, Delivery, MessageQueue, Reservation, Subscription
from ..aio import open_asyncio_loop
from ..exceptions import BadInput, CorralError, NotFound, QueueUnavailable, Unavailable
from ..protocol import topics
from ..protocol.messages import ActionTypes, QueueMessage, ServiceDefinition, new_id
from ..protocol.records import Claim, ContextUpdate, HeldTask, Report, ReportAnswer, ServiceInfo, Ticket
from ..queues.consumers import BaseMessageQueueConsumer, CallableMessageConsumer, RemoteMessageConsumer
from ..runtime import RunOptions, Slot, StepFlavour, workflow_fingerprint
from ..supervision import Backoff, open_support_group
from .base import BaseService
from .codec import WorkflowCodec
from .config import WorkflowServiceConfig
from .execution import TaskExecution
from .queue_coordinator import PublishCallback, QueueCoordinator, read_definition

logger = logging.getLogger(__name__)

READY_LIMIT = 10_000
"""Tickets that wait inside the service (bare queue, POST /process_message); beyond it whoever brings one waits."""
TAKE_AT_ONCE = 64
"""Tickets taken from the queue in one call."""
DEREGISTER_GRACE = 5.0


@dataclass(frozen=True, slots=True)
class ServiceStatistics:
    """A look at a service. `working`: runs that hold a slot. `waiting`: runs in memory that hold none."""

    service_name: str
    running: bool
    capacity: float
    working: int
    waiting: int
    ready: int


class WorkflowService(BaseService):
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
        debug: bool = False,
        control_plane_url: str | None = None,
        token: SecretStr | None = None,
    ) -> None:
        super().__init__(config.service_name, control_plane_url, token)
        self.workflow = workflow
        self.config = config
        self.codec = WorkflowCodec(workflow, types)
        self.fingerprint = workflow_fingerprint(workflow)
        self.run_options = RunOptions(flavour=step_flavour, event_buffer=0)
        self.debug = debug
        self.drain_timeout = drain_timeout
        self.instance_id = new_id()
        self._message_queue = message_queue
        self._publisher_id = f"{type(self).__qualname__}-{self.instance_id}"
        self._publish_callback = publish_callback
        self._bare: QueueCoordinator | None = None
        if coordinator is None:
            coordinator = self._bare = QueueCoordinator(
                message_queue, publisher_id=self._publisher_id, publish_callback=publish_callback
            )
        self._coordinator = coordinator
        self._backoff = Backoff()
        self._port: int | None = None

        self._limiter: anyio.CapacityLimiter | None = None
        self._capacity: float = config.max_concurrent_tasks
        self._executions: dict[str, TaskExecution] = {}
        self._runs: anyio.abc.TaskGroup | None = None
        self._vars: contextvars.Context | None = None
        self._stop: anyio.Event | None = None
        self._stopping = False
        self._running = False
        self._parked = False
        self._dirty: list[TaskExecution] = []
        self._publish_wake: anyio.Event | None = None
        self._ready_in: MemoryObjectSendStream[Ticket] | None = None
        self._ready_out: MemoryObjectReceiveStream[Ticket] | None = None

    # What it is

    @property
    def service_definition(self) -> ServiceDefinition:
        return ServiceDefinition(
            service_name=self.config.service_name,
            description=self.config.description,
            host=self.config.host,
            port=self._port if self._port is not None else self.config.port,
        )

    @property
    def message_queue(self) -> MessageQueue:
        return self._message_queue

    @property
    def coordinator(self) -> Coordinator:
        """Who decides for this service."""
        return self._coordinator

    @property
    def publisher_id(self) -> str:
        return self._publisher_id

    @property
    def publish_callback(self) -> PublishCallback | None:
        return self._publish_callback

    @property
    def capacity(self) -> float:
        """Runs that may work at a time. Settable while the service runs: after lowering it nothing starts until fewer
        work than it says; what works goes on."""
        return self._capacity

    @capacity.setter
    def capacity(self, total: float) -> None:
        self._capacity = total
        if self._limiter is not None:
            self._limiter.total_tokens = total

    def statistics(self) -> ServiceStatistics:
        """Numbers of this moment."""
        working = self._limiter.borrowed_tokens if self._limiter is not None else 0
        waiting = sum(1 for execution in self._executions.values() if not execution.slot.held)
        ready = self._ready_out.statistics().current_buffer_used if self._ready_out is not None else 0
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

    def as_consumer(self, remote: bool = False) -> BaseMessageQueueConsumer:
        if remote:
            return RemoteMessageConsumer(
                id_=self.publisher_id, url=f"{self._own_url()}/process_message", message_type=self.service_name
            )
        return CallableMessageConsumer(
            id_=self.publisher_id, message_type=self.service_name, handler=self.process_message
        )

    def _own_url(self) -> str:
        port = self._port if self._port is not None else self.config.port
        return f"{'https' if self.config.use_tls else 'http'}://{self.config.host}:{port}"

    # What a decider in this process may ask (LocalService)

    def check_start(self, arguments: Mapping[str, Any]) -> None:
        """Raise BadInput where the workflow would refuse these start arguments."""
        self.codec.start_event(arguments)

    def check_event(self, payload: str) -> str:
        """The canonical JSON of an outside event. Raises BadInput."""
        return self.codec.canonical_event(payload)

    def reserve(self) -> Reservation | None:
        """A free slot for a task about to be accepted, if nobody waits for one before it."""
        if self._stopping or self._limiter is None or not self._parked or self._runs is None:
            return None
        slot = Slot(self._limiter)
        return _Reservation(self, slot) if slot.take_nowait() else None

    # Running

    async def launch_local(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        logger.info("launching %s in this process", self.service_name)
        await self.processing_loop(task_status=task_status)

    async def launch_server(self, *, task_status: anyio.abc.TaskStatus[str] = anyio.TASK_STATUS_IGNORED) -> None:
        from .app import serve_service  # HTTP needs Trio and a web stack: only who serves pays for them

        await serve_service(self, task_status=task_status)

    def bound_to(self, port: int) -> None:
        """Note the port that the service's own server really listens on."""
        self._port = port

    def stop(self) -> None:
        """Take nothing more, drain, and let `processing_loop` return. Returns at once; repeating it is harmless."""
        self._stopping = True
        if self._stop is not None:
            self._stop.set()

    async def processing_loop_then(
        self, done: Any, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """`processing_loop`, and set `done` when it has returned."""
        try:
            await self.processing_loop(task_status=task_status)
        finally:
            done.set()

    async def processing_loop(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Take tasks and run them until `stop`, then drain. Started when the first can be taken.

        Cancelling it cancels all runs; their tasks are handed back.

        Raises:
            Unavailable: the coordinator cannot be reached at the start.
            What a task raised, in an exception group, with `config.raise_exceptions`.
        """
        async with AsyncExitStack() as stack:
            if self.run_options.flavour == "asyncio":
                await stack.enter_async_context(open_asyncio_loop())
            self._open()
            try:
                await self._run_inside(task_status)
            finally:
                self._running = False
                self._runs = self._limiter = None
                with anyio.move_on_after(DEREGISTER_GRACE, shield=True):
                    await self._deregister()

    def _open(self) -> None:
        self._limiter = anyio.CapacityLimiter(self._capacity)
        self._stop = anyio.Event()
        self._publish_wake = anyio.Event()
        self._ready_in, self._ready_out = anyio.create_memory_object_stream[Ticket](READY_LIMIT)
        if self._stopping:
            self._stop.set()

    async def _run_inside(self, task_status: anyio.abc.TaskStatus[None]) -> None:
        assert self._stop is not None
        assert self._ready_in is not None
        assert self._ready_out is not None
        async with AsyncExitStack() as stack:
            stack.enter_context(self._ready_in)
            stack.enter_context(self._ready_out)
            registration = await self._coordinator.register(self._info(), local=self)
            self._topic_namespace = registration.topic_namespace
            own_topic = topics.instance(self._topic_namespace, self.instance_id)
            wakeups = await stack.enter_async_context(self._message_queue.subscribe(own_topic))
            consumer = await stack.enter_async_context(self._message_queue.consumer(self.get_topic(self.service_name)))
            support = await stack.enter_async_context(open_support_group())
            name = self.service_name
            support.start_soon(self._publish, name=f"publisher of {name}")
            support.start_soon(self._listen, wakeups, name=f"wake-ups of {name}")
            if registration.heartbeat_interval > 0:
                support.start_soon(self._beat, registration.heartbeat_interval, name=f"heartbeat of {name}")
            async with anyio.create_task_group() as self._runs:
                self._vars = contextvars.copy_context()
                async with anyio.create_task_group() as intake:
                    take = self._take_messages if self._bare is not None else self._take_tickets
                    intake.start_soon(take, consumer, name=f"intake of {name}")
                    intake.start_soon(self.manage_tasks, name=f"tasks of {name}")
                    self._running = True
                    task_status.started()
                    await self._stop.wait()
                    intake.cancel_scope.cancel()
                self._running = False
                await self._drain()

    def _info(self) -> ServiceInfo:
        return ServiceInfo(
            definition=self.service_definition.model_dump_json(),
            service_name=self.service_name,
            instance_id=self.instance_id,
            capacity=int(self._capacity),
            events=self.codec.event_types(),
            start_schema=self.codec.start_schema(),
        )

    async def _deregister(self) -> None:
        try:
            await self._coordinator.deregister(self.instance_id)
        except CorralError as exc:
            logger.warning("%s could not be deregistered: %s", self.service_name, exc)

    async def _drain(self) -> None:
        """Hand back what waits, let work finish within the grace period, hand back the rest."""
        for execution in list(self._executions.values()):
            execution.release_when_idle()
        if self._executions:
            logger.info("%s drains: %d tasks are working", self.service_name, len(self._executions))
        with anyio.move_on_after(self.drain_timeout):
            for execution in list(self._executions.values()):
                await execution.finished.wait()
        for execution in list(self._executions.values()):
            execution.release()

    # Intake

    async def _take_tickets(self, consumer: Consumer) -> None:
        """Take a ticket when a slot is free, without holding the slot while waiting for one."""
        assert self._limiter is not None
        while True:
            await self._wait_slot_free()
            free = min(self._limiter.available_tokens, TAKE_AT_ONCE)
            self._parked = True
            try:
                deliveries = await consumer.receive(max(1, int(free)))
            finally:
                self._parked = False
            given_back: list[Delivery] = []
            for delivery in deliveries:
                slot = Slot(self._limiter)
                if slot.take_nowait():
                    self._start(self._take, delivery, slot)
                else:
                    given_back.append(delivery)
            for delivery in reversed(given_back):  # each goes back to the front
                await delivery.nack()

    async def _wait_slot_free(self) -> None:
        """Return when a slot is free, in turn with runs that wait to go on, and leave it free."""
        assert self._limiter is not None
        turn = Slot(self._limiter)
        await turn.ensure()
        turn.release()

    async def _take(self, delivery: Delivery, slot: Slot) -> None:
        """Claim the task of a ticket, acknowledge it, and work on the task."""
        try:
            ticket = self._ticket(delivery.message)
            if ticket is None:
                await self._bury(delivery)
                return
            claim = await self._claim(ticket)
            await delivery.ack()
            if claim is not None:
                await self._execute(claim, slot)
        except Unavailable as exc:
            logger.warning("a ticket of %s goes back to the queue: %s", self.service_name, exc)
            await delivery.nack()
        finally:
            slot.release()

    async def _claim(self, ticket: Ticket) -> Claim | None:
        """Ask until the coordinator answers: with the same nonce, so that a lost answer is given again."""
        nonce = new_id()
        failures = 0
        while True:
            try:
                return await self._coordinator.claim(ticket, self.instance_id, nonce)
            except Unavailable as exc:
                failures += 1
                if failures >= 5:
                    raise
                logger.warning("cannot claim task %s, trying again: %s", ticket.task_id, exc)
                await anyio.sleep(self._backoff.delay(failures))

    def _ticket(self, message: QueueMessage) -> Ticket | None:
        task_id = message.data.get("task_id")
        if message.action is not ActionTypes.NEW_TASK or not isinstance(task_id, str):
            return None
        return Ticket(task_id, self.service_name)

    async def _bury(self, delivery: Delivery) -> None:
        logger.error("message %s on the topic of %s is no ticket", delivery.message.id_, self.service_name)
        await self._message_queue.publish(delivery.message, topics.dead_letter(self._topic_namespace))
        await delivery.ack()

    async def _take_messages(self, consumer: Consumer) -> None:
        """The original's intake: every message is taken as it comes; tasks wait inside until a slot is free."""
        while True:
            for delivery in await consumer.receive(TAKE_AT_ONCE):
                try:
                    await self.process_message(delivery.message)
                except BadInput as exc:
                    logger.error("%s", exc)
                    await self._bury(delivery)
                except CorralError as exc:  # an event for a task that is not there: nothing is kept
                    logger.warning("%s", exc)
                    await delivery.ack()
                else:
                    await delivery.ack()

    async def process_message(self, message: QueueMessage) -> None:
        """Take a NEW_TASK or a SEND_EVENT, wherever it comes from. Waits while too many tasks wait inside the service.

        Raises:
            BadInput: another action, or no task definition in it.
            NotFound: an event for a task that is not known here or has ended.
            Unavailable: the service is not running.
        """
        definition = read_definition(message)
        if message.action is ActionTypes.NEW_TASK:
            ticket: Ticket | None = Ticket(definition.task_id, self.service_name)
            if self._bare is not None:
                ticket = self._bare.admit(definition, self.now())
            if ticket is not None:
                await self._make_ready(ticket)
        elif message.action is ActionTypes.SEND_EVENT:
            execution = self._executions.get(definition.task_id)
            if self._bare is not None:
                self._bare.add_event(definition.task_id, self.codec.canonical_event(definition.input))
                if execution is not None:
                    execution.wake()
            elif execution is not None:
                execution.send(self.codec.decode_event(definition.input))
            else:
                raise NotFound(f"task {definition.task_id} is not worked on here", task_id=definition.task_id)
        else:
            raise BadInput(f"a workflow service takes new_task and send_event, not {message.action!r}")

    async def _make_ready(self, ticket: Ticket) -> None:
        if self._ready_in is None:
            raise Unavailable(f"{self.service_name} is not running", hint="start its processing_loop")
        await self._ready_in.send(ticket)

    def tickets_due(self, tickets: tuple[Ticket, ...]) -> None:
        """Tickets that freed sessions give. A coordinator with a queue has published them itself."""
        if self._bare is None or self._runs is None:
            return
        for ticket in tickets:
            self._start(self._make_ready, ticket)

    async def manage_tasks(self) -> None:
        """Start the tasks that wait inside the service, one whenever a slot is free."""
        assert self._limiter is not None
        assert self._ready_out is not None
        while True:
            ticket = await self._ready_out.receive()
            slot = Slot(self._limiter)
            try:
                await slot.ensure()
                self._start(self._claim_and_execute, ticket, slot)
            except BaseException:
                slot.release()
                raise

    async def _claim_and_execute(self, ticket: Ticket, slot: Slot) -> None:
        try:
            claim = await self._claim(ticket)
            if claim is not None:
                await self._execute(claim, slot)
        except Unavailable as exc:
            logger.error("task %s could not be claimed: %s", ticket.task_id, exc)
        finally:
            slot.release()

    # Executions

    def _start(self, fn: Any, *args: Any) -> None:
        """Start a task of the runs group with the group's context variables: a request that brings a task must not leave
        its own ones in the run."""
        assert self._runs is not None
        assert self._vars is not None
        self._vars.run(self._runs.start_soon, fn, *args)

    def start_claimed(self, claim: Claim, slot: Slot) -> None:
        """Work on a task that was claimed under a reserved slot. Returns at once."""
        self._start(self._execute, claim, slot)

    async def process_call(self, claim: Claim) -> None:
        """Work on a claimed task to its ending, under a slot of the service."""
        assert self._limiter is not None
        slot = Slot(self._limiter)
        await slot.ensure()
        await self._execute(claim, slot)

    async def _execute(self, claim: Claim, slot: Slot) -> None:
        execution = TaskExecution(self, claim, slot)
        known = self._executions.get(claim.task_id)
        if known is not None:
            known.lose()  # an older epoch of the same task
        self._executions[claim.task_id] = execution
        if self._stopping and not self._running:
            execution.release_when_idle()
        try:
            await execution.execute()
        finally:
            if self._executions.get(claim.task_id) is execution:
                del self._executions[claim.task_id]
            execution.finished.set()
        if self.config.raise_exceptions and isinstance(execution.error, Exception):
            raise execution.error

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    # Support

    def needs_flush(self, execution: TaskExecution) -> None:
        """The execution has something to report. Callable from any library."""
        self._dirty.append(execution)
        if self._publish_wake is not None:
            self._publish_wake.set()

    async def _publish(self) -> None:
        """Report what executions have gathered: one report of each in flight, all of them side by side."""
        async with anyio.create_task_group() as reports:
            while True:
                assert self._publish_wake is not None
                await self._publish_wake.wait()
                self._publish_wake = anyio.Event()
                dirty, self._dirty = self._dirty, []
                for execution in dirty:
                    reports.start_soon(execution.flush)

    async def send_report(self, report: Report) -> ReportAnswer:
        """`coordinator.report`, repeated while the coordinator is away: the task stays ours until its lease ends."""
        failures = 0
        while True:
            try:
                return await self._coordinator.report(report)
            except Unavailable as exc:
                failures += 1
                logger.warning("cannot report on task %s, trying again: %s", report.task_id, exc)
                await anyio.sleep(self._backoff.delay(failures))

    async def _listen(self, wakeups: Subscription) -> None:
        while True:
            try:
                message = await wakeups.receive()
            except QueueUnavailable:
                return  # the queue is closing: so are we
            execution = self._executions.get(str(message.data.get("task_id")))
            if execution is not None:
                execution.wake()

    async def _beat(self, interval: float) -> None:
        """One heartbeat for the instance, with what it holds; the answer may say that something is not ours any more."""
        while True:
            await anyio.sleep(interval)
            held = [
                HeldTask(execution.claim.task_id, execution.claim.epoch, execution.inbox_read)
                for execution in self._executions.values()
            ]
            try:
                answer = await self._coordinator.heartbeat(self.instance_id, held)
                if not answer.known:
                    await self._coordinator.register(self._info(), local=self)
            except Unavailable as exc:
                logger.warning("heartbeat of %s failed: %s", self.service_name, exc)
                continue
            for task_id in answer.fenced:
                if (execution := self._executions.get(task_id)) is not None:
                    execution.lose()
            for task_id in answer.news:
                if (execution := self._executions.get(task_id)) is not None:
                    execution.wake()

    # The original's names for a session's context

    async def get_workflow_state(self, claim: Claim) -> Context[Any] | None:
        """The context that the session of a claimed task left for this service, None if there is none."""
        return None if claim.context is None else self.codec.decode_context(claim.context.payload)

    async def set_workflow_state(self, ctx: Context[Any], claim: Claim) -> ContextUpdate:
        """The context as it is stored with the task's ending, based on the version that the claim came with."""
        based_on = claim.context.version if claim.context is not None else 0
        return ContextUpdate(based_on, self.codec.encode_context(ctx), self.fingerprint)


class _Reservation:
    def __init__(self, service: WorkflowService, slot: Slot) -> None:
        self.instance_id = service.instance_id
        self._service = service
        self._slot = slot

    def start(self, claim: Claim) -> None:
        self._service.start_claimed(claim, self._slot)

    def cancel(self) -> None:
        self._slot.release()
