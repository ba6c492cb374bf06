"""Services on a real store, queue and control plane, or on a bare queue; and what tests need to steer their steps."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import anyio
import anyio.abc
from workflows import Workflow
from workflows.context import JsonSerializer
from workflows.events import HumanResponseEvent

from llama_corral.abc import Coordinator, MessageQueue, Store
from llama_corral.control_plane import ControlPlane, ControlPlaneConfig
from llama_corral.protocol import topics
from llama_corral.protocol.messages import ActionTypes, QueueMessage, TaskDefinition
from llama_corral.protocol.records import Checkpoint, Claim, Report, ReportAnswer, StoredEvent, TaskRecord
from llama_corral.queues.memory import MemoryMessageQueue
from llama_corral.services import WorkflowService, WorkflowServiceConfig
from llama_corral.stores import SqlStore

from ..moments import living_tasks as living_tasks

PATIENCE = 8.0
"""Seconds after which a test that waits for something gives up."""


async def until(condition: Callable[[], Any]) -> None:
    """For conditions whose change nobody announces: look whenever nothing else can run, and every now and then where on
    a slow machine something always can."""
    with anyio.fail_after(PATIENCE):
        while True:
            found = condition()
            if await found if inspect.isawaitable(found) else found:
                return
            with anyio.move_on_after(0.1):
                await anyio.wait_all_tasks_blocked()


class Gate:
    """Waits of steps in either flavour and of the test: each waiter brings an event of its own library."""

    def __init__(self) -> None:
        self._waiting: list[anyio.Event] = []

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when the condition holds; it is looked at whenever somebody calls `changed`."""
        while not condition():
            event = anyio.Event()
            self._waiting.append(event)
            await event.wait()

    def changed(self) -> None:
        waiting, self._waiting = self._waiting, []
        for event in waiting:
            event.set()


class Probe:
    """What the steps of a workflow do and are told to do."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.working = 0
        self.peak = 0
        self.entered: list[Any] = []
        self.cleaned: list[Any] = []
        self.opened: set[Any] = set()

    @contextmanager
    def inside(self, name: Any) -> Iterator[None]:
        """A step works on `name`."""
        self.working += 1
        self.peak = max(self.peak, self.working)
        self.entered.append(name)
        self.gate.changed()
        try:
            yield
        finally:
            self.working -= 1
            self.cleaned.append(name)
            self.gate.changed()

    def open(self, *names: Any) -> None:
        self.opened.update(names)
        self.gate.changed()

    async def wait_open(self, name: Any) -> None:
        await self.gate.until(lambda: name in self.opened or "all" in self.opened)

    async def wait_entered(self, count: int) -> None:
        with anyio.fail_after(PATIENCE):
            await self.gate.until(lambda: len(self.entered) >= count)

    async def wait_working(self, count: int) -> None:
        with anyio.fail_after(PATIENCE):
            await self.gate.until(lambda: self.working == count)


class Rig:
    """A control plane with services."""

    def __init__(
        self, store: Store, queue: MemoryMessageQueue, plane: ControlPlane, tasks: anyio.abc.TaskGroup, flavour: Any
    ) -> None:
        self.store = store
        self.queue = queue
        self.plane = plane
        self.tasks = tasks
        self.flavour = flavour
        self.ended: dict[str, anyio.Event] = {}
        self.crashes: list[Exception] = []
        """What came out of processing loops; a test that expects something takes it out."""

    async def serve(
        self,
        workflow: Workflow,
        name: str = "svc",
        *,
        cap: int = 8,
        coordinator: Coordinator | None = None,
        queue: MessageQueue | None = None,
        tasks: anyio.abc.TaskGroup | None = None,
        **options: Any,
    ) -> WorkflowService:
        """Start a service. Tests that cancel it give a task group of their own: a fixture's group hosts the test."""
        config = WorkflowServiceConfig(
            service_name=name, max_concurrent_tasks=cap, raise_exceptions=options.pop("raise_exceptions", False)
        )
        options = {"step_flavour": self.flavour, **options}
        service = WorkflowService(
            workflow, queue or self.queue, config, coordinator=coordinator or self.plane, **options
        )
        await (tasks or self.tasks).start(self._run, service)
        return service

    async def _run(self, service: WorkflowService, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        ended = self.ended[service.instance_id] = anyio.Event()
        try:
            await service.processing_loop(task_status=task_status)
        except Exception as exc:
            self.crashes.append(exc)
        finally:
            ended.set()

    async def wait_ended(self, service: WorkflowService) -> None:
        with anyio.fail_after(PATIENCE):
            await self.ended[service.instance_id].wait()

    async def stop(self, service: WorkflowService) -> None:
        service.stop()
        await self.wait_ended(service)

    async def submit(self, service: str = "svc", /, *, session: str | None = None, **arguments: Any) -> str:
        return (await self.plane.submit(service, arguments, session_id=session)).task_id

    async def result(self, task_id: str) -> TaskRecord:
        """The terminal record."""
        record = await self.plane.wait_result(task_id, PATIENCE)
        assert record is not None, f"{await self.plane.get_task(task_id)}"
        return record

    async def run(self, service: str = "svc", /, **arguments: Any) -> TaskRecord:
        return await self.result(await self.submit(service, **arguments))

    async def events(self, task_id: str) -> list[StoredEvent]:
        """The whole log of an ended task."""
        found: list[StoredEvent] = []
        with anyio.fail_after(PATIENCE), self.plane.open_log(task_id) as log:
            async for page in log:
                found.extend(page.events)
        return found

    async def wait_status(self, task_id: str, *statuses: str) -> TaskRecord:
        """Until the task has one of these statuses."""
        record = await self.plane.get_task(task_id)

        async def has_come() -> bool:
            nonlocal record
            record = await self.plane.get_task(task_id)
            return record.status in statuses

        await until(has_come)
        return record

    async def answer(self, task_id: str, text: str = "yes") -> None:
        # As upstream's clients write it: a control plane that has no service of the task here knows events by this form.
        await self.plane.send_event(task_id, JsonSerializer().serialize(HumanResponseEvent(response=text)))


class Recorder:
    """The way to the coordinator, on which a test reads what was said and answered."""

    def __init__(self, plane: Any) -> None:
        self.plane = plane
        self.reports: list[Report] = []
        self.releases: list[tuple[Checkpoint | None, dict[str, Any]]] = []
        self.claims: list[Claim] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plane, name)

    async def claim(self, *args: Any) -> Claim | None:
        claim: Claim | None = await self.plane.claim(*args)
        if claim is not None:
            self.claims.append(claim)
        return claim

    async def report(self, report: Report) -> ReportAnswer:
        answer: ReportAnswer = await self.plane.report(report)
        self.reports.append(report)
        return answer

    async def release(self, task_id: str, epoch: int, checkpoint: Checkpoint | None, **how: Any) -> ReportAnswer:
        answer: ReportAnswer = await self.plane.release(task_id, epoch, checkpoint, **how)
        self.releases.append((checkpoint, how))
        return answer

    @property
    def checkpoints(self) -> list[Checkpoint]:
        return [report.checkpoint for report in self.reports if report.checkpoint is not None]


async def take_away(rig: Rig, service: WorkflowService) -> None:
    """What the reaper does with a service's tasks when its process is dead; here it is there to take them again."""
    rig.plane._effects.lost(await rig.store.reap([service.instance_id], time.time()))


def response(text: str = "yes", **fields: Any) -> str:
    return json.dumps({"type": "HumanResponseEvent", "value": {"response": text, **fields}})


@asynccontextmanager
async def open_rig(flavour: Any, url: str = "sqlite://", **settings: Any) -> AsyncIterator[Rig]:
    config = ControlPlaneConfig(**{"topic_namespace": "test", **settings})
    async with SqlStore(url) as store, MemoryMessageQueue() as queue:
        async with ControlPlane(store, queue, config=config, alone=True) as plane:
            async with anyio.create_task_group() as tasks:
                rig = Rig(store, queue, plane, tasks, flavour)
                await anyio.wait_all_tasks_blocked()  # what the control plane starts by itself has started
                yield rig
                tasks.cancel_scope.cancel()
    for crash in rig.crashes:
        raise crash


class Bare:
    """A service on a queue and nothing else."""

    def __init__(self, queue: MessageQueue, service: WorkflowService, out: Any, *, namespace: str) -> None:
        self.queue = queue
        self.service = service
        self.messages: list[QueueMessage] = []
        self.ended = anyio.Event()
        self._out = out
        self._namespace = namespace

    async def send(self, action: ActionTypes | None, data: dict[str, Any]) -> None:
        name = self.service.service_name
        message = QueueMessage(action=action, data=data, type=name)
        await self.queue.publish(message, topics.topic(self._namespace, name))

    async def new_task(self, task_id: str, *, session: str | None = None, **arguments: Any) -> None:
        definition = TaskDefinition(input=json.dumps(arguments), task_id=task_id, session_id=session)
        await self.send(ActionTypes.NEW_TASK, definition.model_dump())

    async def send_event(self, task_id: str, payload: str) -> None:
        definition = TaskDefinition(input=payload, task_id=task_id)
        await self.send(ActionTypes.SEND_EVENT, definition.model_dump())

    async def receive(self) -> QueueMessage:
        """The next message to the control plane."""
        with anyio.fail_after(PATIENCE):
            (delivery,) = await self._out.receive()
        await delivery.ack()
        self.messages.append(delivery.message)
        return delivery.message

    async def result(self, task_id: str) -> dict[str, Any]:
        """The task's COMPLETED_TASK, wherever it stands among what has come."""
        while True:
            found = [each.data for each in self.messages if _is_result(each) and each.data["task_id"] == task_id]
            if found:
                return found[0]
            await self.receive()

    def results(self) -> list[str]:
        return [each.data["task_id"] for each in self.messages if _is_result(each)]

    def streamed(self, task_id: str) -> list[dict[str, Any]]:
        return [
            each.data
            for each in self.messages
            if each.action is ActionTypes.TASK_STREAM and each.data["task_id"] == task_id
        ]


def _is_result(message: QueueMessage) -> bool:
    return message.action is ActionTypes.COMPLETED_TASK


@asynccontextmanager
async def open_bare(
    workflow: Workflow,
    flavour: Any,
    *,
    cap: int = 8,
    queue: MessageQueue | None = None,
    namespace: str = topics.DEFAULT_NAMESPACE,
    **options: Any,
) -> AsyncIterator[Bare]:
    config = WorkflowServiceConfig(service_name="svc", max_concurrent_tasks=cap)
    async with queue or MemoryMessageQueue() as queue, anyio.create_task_group() as tasks:
        service = WorkflowService(workflow, queue, config, step_flavour=flavour, **options)
        async with queue.consumer(topics.topic(namespace, topics.CONTROL_PLANE_NAME)) as out:
            bare = Bare(queue, service, out, namespace=namespace)
            await tasks.start(partial(_run_bare, bare))
            yield bare
            tasks.cancel_scope.cancel()


async def _run_bare(bare: Bare, *, task_status: anyio.abc.TaskStatus[None]) -> None:
    try:
        await bare.service.processing_loop(task_status=task_status)
    finally:
        bare.ended.set()
