"""What a service's runs rely on until the last of them has ended: reports, wake-ups, heartbeats."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, TypeVar

import anyio
import anyio.abc

from ..abc import Coordinator, LocalService, MessageQueue
from ..exceptions import CorralError, Unavailable
from ..protocol import topics
from ..protocol.records import HeldTask, ServiceInfo
from ..supervision import Backoff
from .execution import TaskExecution
from .intake import keep_consuming
from .reporter import Reporter

logger = logging.getLogger(__name__)

T = TypeVar("T")

EARLY_WAKEUPS = 1_000
"""Wake-ups remembered about tasks that are not in hand: their claim's answer may be on its way."""


class SupportHost(LocalService, Protocol):
    """What the support needs of its service."""

    instance_id: str

    @property
    def service_name(self) -> str: ...

    @property
    def topic_namespace(self) -> str: ...

    @property
    def coordinator(self) -> Coordinator: ...

    @property
    def message_queue(self) -> MessageQueue: ...

    @property
    def executions(self) -> Mapping[str, TaskExecution]:
        """The tasks in hand, by id."""

    def info(self) -> ServiceInfo: ...


class Support:
    """The helpers of one service. Each `..._forever` is a support task."""

    def __init__(self, host: SupportHost) -> None:
        self._host = host
        self._backoff = Backoff()
        self._dirty: list[Reporter] = []
        self._wake = anyio.Event()
        self._early: OrderedDict[str, None] = OrderedDict()

    async def ask(self, question: Callable[[], Awaitable[T]], what: str) -> T:
        """Ask the coordinator, again and again while it is away: the task stays ours until its lease ends."""
        failures = 0
        while True:
            try:
                return await question()
            except Unavailable as exc:
                failures += 1
                logger.log(
                    logging.WARNING if failures == 1 else logging.DEBUG, "cannot %s, trying again: %s", what, exc
                )
                await anyio.sleep(self._backoff.delay(failures))

    # Reports

    def needs_flush(self, reporter: Reporter) -> None:
        self._dirty.append(reporter)
        self._wake.set()

    async def publish_forever(self) -> None:
        """Report what runs have published: one report of each in flight, all of them side by side."""
        async with anyio.create_task_group() as reports:
            while True:
                await self._wake.wait()
                self._wake = anyio.Event()
                dirty, self._dirty = self._dirty, []
                for reporter in dirty:
                    reports.start_soon(reporter.flush)

    # Wake-ups

    async def listen_forever(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Hear that something changed about a task in hand."""
        await keep_consuming(f"wake-ups of {self._host.service_name}", self._listen, task_status=task_status)

    async def _listen(self, on_open: Callable[[], None]) -> None:
        host = self._host
        async with host.message_queue.subscribe(topics.instance(host.topic_namespace, host.instance_id)) as wakeups:
            on_open()
            for execution in list(host.executions.values()):  # what was said while nobody listened
                execution.wake()
            while True:
                task_id = str((await wakeups.receive()).data.get("task_id"))
                execution_or_none = host.executions.get(task_id)
                if execution_or_none is not None:
                    execution_or_none.wake()
                else:
                    self._early[task_id] = None
                    if len(self._early) > EARLY_WAKEUPS:
                        self._early.popitem(last=False)

    def was_woken(self, task_id: str) -> bool:
        """Whether a wake-up came before the task was in hand."""
        return self._early.pop(task_id, self) is None

    # Heartbeats

    async def beat_forever(self, interval: float) -> None:
        """One heartbeat for the instance, with what it holds; the answer may say that something is not ours any more."""
        capacity = self._host.info().capacity
        failed = False
        while True:
            await anyio.sleep(interval)
            info = self._host.info()
            try:
                if await self._beat() or info.capacity != capacity:
                    await self._host.coordinator.register(info, local=self._host)
                    capacity = info.capacity
            except CorralError as exc:  # also where the control plane refuses us: whoever runs both may change that
                level = logging.DEBUG if failed else logging.WARNING
                logger.log(level, "heartbeat of %s failed, trying again: %s", self._host.service_name, exc)
                failed = True
            else:
                if failed:
                    logger.info("heartbeat of %s is heard again", self._host.service_name)
                failed = False

    async def _beat(self) -> bool:
        """Whether the instance has to register again."""
        asked = dict(self._host.executions)
        held = [HeldTask(task_id, each.claim.epoch, each.inbox_read) for task_id, each in asked.items()]
        answer = await self._host.coordinator.heartbeat(self._host.instance_id, held)
        # The answer is about those that were asked for: meanwhile we may hold a newer epoch of the same task.
        for task_id in answer.fenced:
            if not asked[task_id].finished.is_set():
                asked[task_id].lose()
        for task_id in answer.news:
            asked[task_id].wake()
        return not answer.known
