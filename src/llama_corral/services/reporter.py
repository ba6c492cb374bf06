"""What a run publishes, on its way to the coordinator: collected in sync code, reported in batches and in order.

One report of a task is in flight at a time, and it is repeated unchanged until it is answered: under its sequence number
it is stored once, however often it is sent.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol, TypeVar

import anyio
from workflows.events import Event, StopEvent

from ..abc import Coordinator
from ..exceptions import TooLarge
from ..protocol.records import Claim, ContextUpdate, EventRecord, Report, Terminal, Ticket
from .codec import WorkflowCodec

logger = logging.getLogger(__name__)

T = TypeVar("T")

BEHIND = 1_000
"""Events not yet stored beyond which no further step of the run starts."""
OVERFLOW = 100_000
"""Events not yet stored beyond which the step that publishes fails."""


class ReporterHost(Protocol):
    """What a reporter needs of its service."""

    codec: WorkflowCodec

    @property
    def coordinator(self) -> Coordinator: ...

    def now(self) -> float: ...

    def needs_flush(self, reporter: Reporter) -> None:
        """The reporter has something to report. Callable from any library."""

    def tickets_due(self, tickets: tuple[Ticket, ...]) -> None:
        """Tasks became ready that a coordinator without a queue of its own leaves to the service."""

    async def ask(self, question: Callable[[], Awaitable[T]], what: str) -> T:
        """Ask the coordinator again and again while it is away."""


class Reporter:
    """Reports one claimed task.

    Args:
        on_lost: Called when the coordinator says that the task is not ours any more.
    """

    def __init__(self, host: ReporterHost, claim: Claim, on_lost: Callable[[], None]) -> None:
        self.settled = False
        """Nothing more is to be reported: the ending is stored, or the task is not ours."""
        self.waiting = False
        """Whether the run waits; told with the next report."""
        self._waiting_told = False
        self._host = host
        self._claim = claim
        self._on_lost = on_lost
        self._events: list[EventRecord] = []
        self._sequence = 0
        self._unanswered: Report | None = None
        self._wanted = False
        self._sending = anyio.Lock()
        self._flushed = anyio.Event()

    @property
    def _not_stored(self) -> int:
        return len(self._events) + (len(self._unanswered.events) if self._unanswered is not None else 0)

    def add(self, event: Event) -> None:
        """A published event. Callable from any library; raises TooLarge in the step that publishes too fast."""
        if self._not_stored >= OVERFLOW:
            raise TooLarge(
                f"task {self._claim.task_id} published {OVERFLOW} events faster than they can be stored",
                hint="publish fewer events, or await something between them",
            )
        self._events.append(self._host.codec.encode_event(event))
        if not isinstance(event, StopEvent):  # the ending goes with it in one report
            self.want_flush()

    def set_waiting(self, waiting: bool) -> None:
        self.waiting = waiting
        if waiting is not self._waiting_told:
            self.want_flush()

    def want_flush(self) -> None:
        if not self._wanted:
            self._wanted = True
            self._host.needs_flush(self)

    async def wait_room(self) -> None:
        """Return when no more than `BEHIND` events wait to be stored."""
        while self._not_stored > BEHIND:
            self.want_flush()
            await self._flushed.wait()

    async def flush(self, terminal: Terminal | None = None, context: ContextUpdate | None = None) -> None:
        """Report what has gathered, with the ending if it is given. Waits for the report in flight before it; what a
        cancelled call leaves unanswered is sent first by the next one."""
        async with self._sending:
            self._wanted = False
            await self._send_unanswered()
            self._unanswered = self._next_report(terminal, context)
            await self._send_unanswered()

    def _next_report(self, terminal: Terminal | None, context: ContextUpdate | None) -> Report | None:
        if self.settled:
            return None
        waiting = self.waiting if self.waiting is not self._waiting_told and terminal is None else None
        if not self._events and waiting is None and terminal is None:
            return None
        events, self._events = tuple(self._events), []
        self._sequence += 1
        return Report(
            task_id=self._claim.task_id,
            epoch=self._claim.epoch,
            seq=self._sequence,
            now=self._host.now(),
            events=events,
            waiting=waiting,
            terminal=terminal,
            context=context,
        )

    async def _send_unanswered(self) -> None:
        report = self._unanswered
        if report is None or self.settled:
            return
        answer = await self._host.ask(
            partial(self._host.coordinator.report, report), f"report on task {report.task_id}"
        )
        self._unanswered = None
        if report.waiting is not None:
            self._waiting_told = report.waiting
        self._flushed.set()
        self._flushed = anyio.Event()
        if answer.status != "ok":
            logger.info("task %s is %s: this instance stops working on it", report.task_id, answer.status)
            self._on_lost()
            return
        if report.terminal is not None:
            self.settled = True
        self._host.tickets_due(answer.tickets)
