"""What a run publishes, on its way to the coordinator: collected in sync code, reported in batches and in order.

One report of a task is in flight at a time, and it is repeated unchanged until it is answered: under its sequence number
it is stored once, however often it is sent. A checkpoint goes with exactly the events before it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

import anyio
from workflows.events import Event, StopEvent

from ..abc import Coordinator
from ..exceptions import TooLarge, UsageError
from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import ErrorRecord
from ..protocol.records import Checkpoint, Claim, ContextUpdate, EventRecord, Report, Terminal, Ticket
from .codec import WorkflowCodec
from .sizes import REPORT_LIMIT, size_of

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
        self.retry_at: float | None = None
        """The ending was a failure after which the task is tried again, from that time on."""
        self.refused_checkpoint = False
        """The latest checkpoint was too large for the coordinator."""
        self.waiting = False
        """Whether the run waits; told with the next report."""
        self._waiting_told = False
        self._host = host
        self._claim = claim
        self._on_lost = on_lost
        self._events: list[EventRecord] = []
        self._terminal: Terminal | None = None
        self._context: ContextUpdate | None = None
        # How many of the events belong before the checkpoint, or before the moment from which another run goes on.
        self._mark: int | None = None
        self._checkpoint: Checkpoint | None = None
        self._is_cut = False
        self._sequence = 0
        self._unanswered: Report | None = None
        self._limit = REPORT_LIMIT
        self._apart = False
        self._wanted = False
        self._sending = anyio.Lock()
        self._flushed = anyio.Event()

    @property
    def _not_stored(self) -> int:
        return len(self._events) + (len(self._unanswered.events) if self._unanswered is not None else 0)

    @property
    def has_checkpoint(self) -> bool:
        """Whether a checkpoint waits to be stored."""
        return self._checkpoint is not None or (
            self._unanswered is not None and self._unanswered.checkpoint is not None
        )

    def begin(self, marker: EventRecord) -> None:
        """Start the first report with an event of ours."""
        self._events.insert(0, marker)
        self.want_flush()

    def add(self, event: Event) -> None:
        """A published event. Callable from any library; raises TooLarge in the step that publishes too fast."""
        if self.settled:  # by a step that goes on although its task is over
            return
        if self._not_stored >= OVERFLOW:
            raise TooLarge(
                f"task {self._claim.task_id} published {OVERFLOW} events faster than they can be stored",
                hint="publish fewer events, or await something between them",
            )
        self._events.append(self._host.codec.encode_event(event))
        if not isinstance(event, StopEvent):  # the ending goes with it in one report
            self.want_flush()

    def add_checkpoint(self, checkpoint: Checkpoint) -> None:
        """A checkpoint of the run as it is now. It replaces one that was not reported yet. Callable from any library."""
        if not self._is_cut:
            self._checkpoint = checkpoint
            self._mark = len(self._events)
            self.want_flush()

    def cut(self) -> None:
        """What is published from now on comes from steps that another run will do again; `drop_rest` forgets it. Should the
        run end all the same, its ending brings it along."""
        self._is_cut = True
        self._checkpoint = None
        self._mark = len(self._events)

    def drop_rest(self) -> None:
        """Forget what was published since `cut`."""
        del self._events[self._mark :]

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

    async def wait_checkpoint(self) -> None:
        """Return when no checkpoint waits to be stored."""
        while self.has_checkpoint:
            self.want_flush()
            await self._flushed.wait()

    async def flush(self, terminal: Terminal | None = None, context: ContextUpdate | None = None) -> None:
        """Report what has gathered, with the ending if it is given. Waits for the report in flight before it; what a
        cancelled call leaves unanswered is sent first by the next one."""
        async with self._sending:
            self._wanted = False
            await self._send_unanswered()
            if terminal is not None:
                self._take_ending(terminal, context)
            while (report := self._next_report()) is not None:
                self._unanswered = report
                await self._send_unanswered()

    def _take_ending(self, terminal: Terminal, context: ContextUpdate | None) -> None:
        self._terminal, self._context = terminal, context
        may_go_on = terminal.error is not None and terminal.error.retryable
        if self._is_cut or not may_go_on:  # the ending makes the checkpoint useless
            self._checkpoint = self._mark = None
            self._is_cut = False

    def _next_report(self) -> Report | None:
        if self.settled:
            return None
        end = len(self._events) if self._mark is None else self._mark
        count = self._count_that_fit(end)
        is_whole = count == end
        checkpoint = self._checkpoint if is_whole else None
        is_last = is_whole and count == len(self._events)
        terminal = self._terminal if is_last and checkpoint is None and not (self._apart and count) else None
        waiting = None
        if is_last and self._terminal is None and self.waiting is not self._waiting_told:
            waiting = self.waiting
        if not count and checkpoint is None and waiting is None and terminal is None:
            return None
        events = tuple(self._events[:count])
        del self._events[:count]
        if self._mark is not None:
            self._mark -= count
        if checkpoint is not None:
            self._checkpoint = self._mark = None
        self._sequence += 1
        return Report(
            task_id=self._claim.task_id,
            epoch=self._claim.epoch,
            seq=self._sequence,
            now=self._host.now(),
            events=events,
            waiting=waiting,
            checkpoint=checkpoint,
            terminal=terminal,
            context=self._context if terminal is not None else None,
        )

    def _count_that_fit(self, end: int) -> int:
        """How many of the first events one report takes: at least one, if there is one."""
        room = self._limit
        for count in range(end):
            room -= size_of(self._events[count].payload)
            if room < 0:
                return max(1, count)
        return end

    async def _send_unanswered(self) -> None:
        report = self._unanswered
        if report is None or self.settled:
            return
        try:
            answer = await self._host.ask(
                partial(self._host.coordinator.report, report), f"report on task {report.task_id}"
            )
        except UsageError as exc:  # it will be refused every time
            self._unanswered = None
            if not isinstance(exc, TooLarge) or not self._make_smaller(report):
                logger.error("the reports on task %s are refused and it is given up: %s", report.task_id, exc)
                self._on_lost()
            self._tell_flushed()
            return
        self._unanswered = None
        if report.checkpoint is not None:
            self.refused_checkpoint = False
        if report.waiting is not None:
            self._waiting_told = report.waiting
        self._tell_flushed()
        if answer.status != "ok":
            logger.info("task %s is %s: this instance stops working on it", report.task_id, answer.status)
            self._on_lost()
            return
        if report.terminal is not None:
            self.settled = True
            self.retry_at = answer.retry_at
        self._host.tickets_due(answer.tickets)

    def _tell_flushed(self) -> None:
        self._flushed.set()
        self._flushed = anyio.Event()

    def _make_smaller(self, report: Report) -> bool:
        """Take back a report that is too large for the coordinator, to report the same in less. False where nothing can be
        left out."""
        self._sequence -= 1
        events, terminal = list(report.events), report.terminal
        if report.checkpoint is not None:
            self.refused_checkpoint = True
            logger.warning("a checkpoint of task %s is too large for the coordinator", report.task_id)
        elif terminal is not None and events:
            self._apart = True
        elif len(events) > 1:
            self._limit = max(1, sum(size_of(event.payload) for event in events) // 2)
        elif events:
            problem = f"the event takes {size_of(events[0].payload)} bytes, which is too much for the coordinator"
            smaller = EventRecord(events[0].type, json.dumps({"error": problem}))
            if smaller == events[0]:
                return False
            events = [smaller]
        elif terminal is not None and report.context is not None:
            self._terminal = replace(terminal, context_error="the context is too large for the coordinator")
            self._context = None
        elif terminal is not None and terminal.status is TaskStatus.COMPLETED:
            error = ErrorRecord(type=TooLarge.code, message="the result is too large for the coordinator")
            self._terminal = Terminal(TaskStatus.FAILED, error=error, result_text=error.message)
        else:
            return False
        self._events[:0] = events
        if self._mark is not None:
            self._mark += len(events)
        return True
