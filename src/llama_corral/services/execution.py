"""One claimed task in hand: its run, what goes in and out of it, and its one ending.

    support ⊃ execution ⊃ { run, forwarder }

The run's scope holds the run and the forwarder of outside events: when the run ends the forwarder is cancelled, when the
scope is cancelled both are. What the run publishes is collected in sync code and reported in batches, one report in
flight; the ending goes with the last batch in one transaction, from a shielded and bounded scope.
"""

from __future__ import annotations

import json
import logging
import traceback
from dataclasses import dataclass
from typing import Literal, Protocol

import anyio
import anyio.abc
from workflows import Workflow
from workflows.errors import WorkflowCancelledByUser, WorkflowTimeoutError
from workflows.events import Event, StopEvent, WorkflowFailedEvent

from ..abc import Coordinator
from ..exceptions import BadInput, MailboxFull, NotFound, RunClosed, TooLarge
from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import ErrorRecord
from ..protocol.records import (
    Checkpoint,
    Claim,
    ContextUpdate,
    EventRecord,
    InboxEvent,
    Report,
    ReportAnswer,
    Terminal,
    Ticket,
)
from ..runtime import Run, RunHooks, RunOptions, Slot, make_run
from .codec import WorkflowCodec

logger = logging.getLogger(__name__)

BEHIND = 1_000
"""Events not yet stored beyond which no further step of the run starts."""
OVERFLOW = 100_000
"""Events not yet stored beyond which the step that publishes fails."""
REPORT_GRACE = 30.0
"""Seconds that the ending of a task may take to be stored once its run is over."""
RELEASE_GRACE = 5.0
"""Seconds that handing a task back may take while its service is cancelled."""

Ending = Literal["cancel", "timeout", "release", "lost"]


class ExecutionHost(Protocol):
    """What an execution needs of its service."""

    workflow: Workflow
    codec: WorkflowCodec
    run_options: RunOptions
    fingerprint: str
    debug: bool

    @property
    def coordinator(self) -> Coordinator: ...

    def now(self) -> float: ...

    def needs_flush(self, execution: TaskExecution) -> None:
        """The execution has something to report. Callable from any library."""

    def tickets_due(self, tickets: tuple[Ticket, ...]) -> None:
        """Tasks became ready that a coordinator without a queue of its own leaves to the service."""

    async def send_report(self, report: Report) -> ReportAnswer:
        """`coordinator.report`, repeated while the coordinator is away."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended, and what it raised if it did."""

    terminal: Terminal
    context: ContextUpdate | None = None
    error: BaseException | None = None


class TaskExecution(RunHooks):
    """Works on one claim under one slot. `execute` does everything; the other methods may be called while it runs.

    Args:
        host: The service.
        claim: The task.
        slot: Its place under the cap, taken or not; the execution gives it back.
    """

    def __init__(self, host: ExecutionHost, claim: Claim, slot: Slot) -> None:
        self.claim = claim
        self.slot = slot
        self.idle = False
        self.inbox_read = claim.checkpoint.inbox_applied if claim.checkpoint is not None else 0
        self.error: BaseException | None = None
        self.finished = anyio.Event()
        self._host = host
        self._run: Run | None = None
        self._scope = anyio.CancelScope()
        self._tasks: anyio.abc.TaskGroup | None = None
        self._ending: Ending | None = None
        self._checkpoint: Checkpoint | None = None
        self._settled = False
        self._pulling = False
        self._pull_again = False
        self._release_when_idle = False
        self._failed_step: str | None = None

        self._events: list[EventRecord] = []
        self._sequence = 0
        self._reporting = anyio.Lock()
        self._flushed = anyio.Event()
        self._waiting_reported = False
        self.flush_wanted = False

    # What the run asks and says (RunHooks)

    async def before_step(self, step: str) -> None:
        while len(self._events) > BEHIND:
            self._want_flush()
            await self._flushed.wait()
        if not self.slot.held:
            await self.slot.ensure()
        if self.idle:
            self.idle = False
            if self._waiting_reported:
                self._want_flush()
        if self._pull_again:
            self.wake()

    def on_event(self, event: Event) -> None:
        if isinstance(event, WorkflowFailedEvent):
            self._failed_step = event.step_name
        if len(self._events) >= OVERFLOW:
            raise TooLarge(
                f"task {self.claim.task_id} published {OVERFLOW} events faster than they can be stored",
                hint="publish fewer events, or await something between them",
            )
        self._events.append(self._host.codec.encode_event(event))
        if not isinstance(event, StopEvent):  # the ending goes with it in one report
            self._want_flush()

    def on_idle(self) -> None:
        self.slot.release()
        self.idle = True
        if self._release_when_idle:
            self.release()
        else:
            self._want_flush()

    # What the service asks

    def wake(self) -> None:
        """Something changed about the task: pull its inbox and its cancel flag. Native callers only."""
        if self._tasks is None:
            return
        if self._pulling:
            self._pull_again = True
            return
        self._pulling = True
        self._tasks.start_soon(self._pull_inbox, name=f"forwarder of task {self.claim.task_id}")

    def send(self, event: Event) -> None:
        """Hand an outside event to the run directly. Raises NotFound where there is no run to take it."""
        if self._run is None or self._tasks is None:
            raise NotFound(f"task {self.claim.task_id} takes no events now", task_id=self.claim.task_id)
        self._run.send_event(event)

    def cancel(self) -> None:
        """Cancel the run; its record will say cancelled."""
        if self._ending is None:
            self._ending = "cancel"
        if self._run is not None and self._tasks is not None:
            self._run.cancel()
        else:
            self._scope.cancel()

    def release(self) -> None:
        """Hand the task back with what it has reached."""
        if self._ending is None and not self._settled:
            self._ending = "release"
            self._checkpoint = self._snapshot()
            self._scope.cancel()

    def release_when_idle(self) -> None:
        """Hand the task back now if it waits, or when it next does."""
        self._release_when_idle = True
        if self.idle:
            self.release()

    def lose(self) -> None:
        """Another owner has the task, or it is gone: stop, report nothing."""
        if self._ending is None:
            self._ending = "lost"
        self._settled = True
        self._scope.cancel()

    # The work

    async def execute(self) -> None:
        """Run the task to its ending and store it. Raises only if the service is to be told (see `error`)."""
        try:
            outcome = await self._run_to_end()
            if self._settled:
                return
            if outcome is None:
                await self._hand_back(REPORT_GRACE)
                return
            self.error = outcome.error
            with anyio.move_on_after(REPORT_GRACE, shield=True):
                await self.flush(outcome.terminal, outcome.context)
            if not self._settled:
                logger.error("the ending of task %s could not be stored in time", self.claim.task_id)
        finally:
            if not self._settled:
                await self._hand_back(RELEASE_GRACE)  # noqa: ASYNC102 - shielded and bounded inside
            self.slot.release()

    async def _run_to_end(self) -> Outcome | None:
        """The outcome; None where the task is to be handed back."""
        if self.claim.cancel_requested:
            return self._cancelled()
        try:
            run = self._run = self._prepare()
        except Exception as exc:  # refused input, a context that does not fit: the task's own failure
            return self._failed(exc)
        timed_out = False
        if self.claim.deadline is not None:
            self._scope.deadline = anyio.current_time() + self.claim.deadline - self._host.now()
        with self._scope:
            async with anyio.create_task_group() as self._tasks:
                self._feed(self.claim.inbox)
                await run.drive()
                self._tasks.cancel_scope.cancel()
        self._tasks = None
        timed_out = self._scope.cancelled_caught and self._ending is None
        return self._judge(run, timed_out)

    def _prepare(self) -> Run:
        claim, host = self.claim, self._host
        arguments = json.loads(claim.input)
        if not isinstance(arguments, dict):
            raise BadInput("the start arguments are not a JSON object")
        context = None
        held: list[str] = []
        if claim.checkpoint is not None:
            snapshot = json.loads(claim.checkpoint.snapshot)
            context = host.codec.decode_context(json.dumps(snapshot["context"]))
            held = snapshot["held"]
        elif claim.context is not None:
            context = host.codec.decode_context(claim.context.payload)
        start = host.codec.start_event(arguments)
        run = make_run(
            host.workflow,
            start_event=start,
            context=context,
            run_id=claim.task_id,
            hooks=self,
            options=host.run_options,
        )
        for payload in held:
            run.send_event(host.codec.decode_event(payload))
        return run

    def _judge(self, run: Run, timed_out: bool) -> Outcome | None:
        """What the run's ending means for the task."""
        try:
            stop = run.stop_event
        except WorkflowCancelledByUser:
            return self._cancelled()
        except WorkflowTimeoutError as exc:
            return self._ended(TaskStatus.TIMED_OUT, exc)
        except RunClosed:
            if self._ending == "release":
                return None
            if timed_out:
                error = TimeoutError(f"task {self.claim.task_id} did not end before its deadline")
                return self._ended(TaskStatus.TIMED_OUT, error)
            return self._cancelled()
        except Exception as exc:  # whatever a step raised is the task's failure
            return self._failed(exc)
        assert stop is not None
        return self._completed(run, stop)

    def _completed(self, run: Run, stop: StopEvent) -> Outcome:
        codec, claim = self._host.codec, self.claim
        try:
            result, text = codec.encode_result(stop)
        except Exception as exc:  # a result whose own serializer fails
            return self._failed(exc)
        context, context_error = None, None
        if not claim.implicit_session:
            try:
                based_on = claim.context.version if claim.context is not None else 0
                context = ContextUpdate(based_on, codec.encode_context(run.context), self._host.fingerprint)
            except Exception as exc:  # state that is not JSON never refuses the ending (P4)
                context_error = f"{type(exc).__name__}: {exc}"
                logger.warning("the context of task %s cannot be stored: %s", claim.task_id, context_error)
        return Outcome(Terminal(TaskStatus.COMPLETED, result, text, context_error=context_error), context)

    def _failed(self, exc: BaseException) -> Outcome:
        logger.error("task %s failed: %s: %s", self.claim.task_id, type(exc).__name__, exc)
        return self._ended(TaskStatus.FAILED, exc)

    def _cancelled(self) -> Outcome:
        return self._ended(TaskStatus.CANCELLED, None)

    def _ended(self, status: TaskStatus, exc: BaseException | None) -> Outcome:
        if exc is None:
            record = ErrorRecord(type="TaskCancelled", message="the task was cancelled")
        else:
            shown = "".join(traceback.format_exception(exc)) if self._host.debug else None
            record = ErrorRecord(type=type(exc).__name__, message=str(exc), step=self._failed_step, traceback=shown)
        return Outcome(Terminal(status, error=record, result_text=record.message), error=exc)

    # Outside events

    def _feed(self, events: tuple[InboxEvent, ...]) -> None:
        """Hand events to the run, in order, up to the first one for which it has no room."""
        assert self._run is not None
        for event in events:
            if event.seq <= self.inbox_read:
                continue
            try:
                self._run.send_event(self._host.codec.decode_event(event.payload))
            except MailboxFull:
                self._pull_again = True  # before_step asks again: by then the run has taken some
                return
            except BadInput as exc:
                logger.warning("task %s: an outside event is skipped: %s", self.claim.task_id, exc)
            except RunClosed:
                return
            self.inbox_read = event.seq

    async def _pull_inbox(self) -> None:
        try:
            while True:
                self._pull_again = False
                page = await self._host.coordinator.pull(self.claim.task_id, self.claim.epoch, self.inbox_read)
                if page.status != "ok":
                    self.lose()
                    return
                if page.cancel_requested:
                    self.cancel()
                before = self.inbox_read
                self._feed(page.events)
                if self.inbox_read == before and not self._wake_again():
                    return
        finally:
            self._pulling = False

    def _wake_again(self) -> bool:
        """Whether a wake-up came while pulling. A full mailbox is no reason to pull at once."""
        return self._pull_again and self._run is not None and not self._run.held_events()

    # Reporting

    def _want_flush(self) -> None:
        if not self.flush_wanted:
            self.flush_wanted = True
            self._host.needs_flush(self)

    async def flush(self, terminal: Terminal | None = None, context: ContextUpdate | None = None) -> None:
        """Report what has gathered, with the ending if it is given. Waits for the report in flight before it."""
        async with self._reporting:
            self.flush_wanted = False
            if self._settled:
                return
            events, self._events = tuple(self._events), []
            waiting = self.idle if self.idle != self._waiting_reported and terminal is None else None
            if not events and waiting is None and terminal is None:
                return
            self._sequence += 1
            report = Report(
                task_id=self.claim.task_id,
                epoch=self.claim.epoch,
                seq=self._sequence,
                now=self._host.now(),
                events=events,
                waiting=waiting,
                terminal=terminal,
                context=context,
            )
            answer = await self._host.send_report(report)
            if waiting is not None:
                self._waiting_reported = waiting
            self._flushed.set()
            self._flushed = anyio.Event()
            if answer.status != "ok":
                logger.info("task %s is %s: this instance stops working on it", self.claim.task_id, answer.status)
                self.lose()
                return
            self._host.tickets_due(answer.tickets)
            if terminal is not None:
                self._settled = True

    # Handing back

    def _snapshot(self) -> Checkpoint | None:
        """The run as it is, to go on from elsewhere; None where it cannot be encoded: it then starts again."""
        if self._run is None or self._run.is_done:
            return None
        try:
            held = [self._host.codec.serializer.serialize(event) for event in self._run.held_events()]
            context = json.loads(self._host.codec.encode_context(self._run.context))
        except Exception as exc:  # state that is not JSON
            logger.warning("task %s cannot be snapshotted and will start again: %s", self.claim.task_id, exc)
            return None
        return Checkpoint(json.dumps({"context": context, "held": held}), self.inbox_read, self._host.fingerprint)

    async def _hand_back(self, grace: float) -> None:
        with anyio.move_on_after(grace, shield=True):
            await self.flush()
            if self._settled:
                return
            answer = await self._host.coordinator.release(self.claim.task_id, self.claim.epoch, self._checkpoint)
            self._settled = True
            self._host.tickets_due(answer.tickets)
        if not self._settled:
            logger.error("task %s could not be handed back in time", self.claim.task_id)
