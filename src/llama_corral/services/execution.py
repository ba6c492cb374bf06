"""One claimed task in hand: its run, what goes in and out of it, and its one ending.

    the service's runs ⊃ execution ⊃ { run, forwarder }

The run's scope holds the run and the forwarder of outside events: when the run ends the forwarder is cancelled, when the
scope is cancelled both are. The execution itself is a helper of the service: shielded, and ended a few seconds after the
service's body has left. So whatever happens to the run, its ending is stored, or the task is handed back; also where a
step does not end though it was cancelled: then a second task of the service does it, and the step goes on for nobody.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, Literal, Protocol, TypeGuard

import anyio
import anyio.abc
from workflows import Context, Workflow
from workflows.events import Event, StartEvent, WorkflowFailedEvent

from ..exceptions import (
    BadInput,
    MailboxFull,
    NotFound,
    RunClosed,
    StateRefused,
    TooLarge,
    UsageError,
    WorkflowChanged,
)
from ..log_ids import log_task
from ..protocol.records import Checkpoint, Claim, InboxEvent, ReportAnswer
from ..runtime import Run, RunHooks, RunOptions, Slot, make_run
from .checkpoints import Checkpointer, CheckpointPolicy
from .outcome import Judge, Outcome
from .reporter import Reporter, ReporterHost
from .resuming import Beginner, OnChange, marker_of
from .sweeper import IdleSweeper

logger = logging.getLogger(__name__)

Ending = Literal["cancel", "release", "leave", "lost"]

UNWINDING_TIME: Final = 2.0
"""Seconds that steps get to end once they are cancelled, before their task ends or is handed back without them."""


class ExecutionHost(ReporterHost, Protocol):
    """What an execution needs of its service."""

    workflow: Workflow
    run_options: RunOptions
    fingerprint: str
    debug: bool
    checkpoints: CheckpointPolicy
    on_change: OnChange

    @property
    def sweeper(self) -> IdleSweeper | None:
        """Where idle runs are told to leave memory; None where they stay."""

    def start_run(self, fn: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Start a task among the service's runs."""

    def forget(self, execution: TaskExecution) -> None:
        """The execution's task is not in hand any more."""


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
        self.inbox_read = 0
        self.error: BaseException | None = None
        self.finished = anyio.Event()
        """The task is not in hand any more. A step that does not end may still hold the slot."""
        self.reporter = Reporter(host, claim, self.lose)
        self._host = host
        self._judge = Judge(claim, host.codec, host.fingerprint, host.debug)
        self._checkpointer = Checkpointer(host.checkpoints, host.codec, host.fingerprint, claim.task_id)
        self._run: Run | None = None
        self._scope = anyio.CancelScope()
        self._tasks: anyio.abc.TaskGroup | None = None
        self._ending: Ending | None = None
        self._checkpoint: Checkpoint | None = None
        self._wake_at: float | None = None
        self._release_when_idle = False
        self._failed_step: str | None = None
        self._unwound = anyio.Event()
        self._settled: anyio.Event | None = None
        # The forwarder: whether it runs, has to look once more, and waits for the run to take some events first.
        self._pulling = False
        self._pull_again = False
        self._mailbox_full = False

    # What the run asks and says (RunHooks)

    async def before_step(self, step: str) -> None:
        await self.reporter.wait_room()
        if self._checkpointer.each_step:
            await self.reporter.wait_checkpoint()
        if not self.slot.held:
            await self.slot.ensure()
        if self.idle:
            self._end_idleness()
        if self._mailbox_full:  # a step starts because its event was taken
            self.wake()

    def _end_idleness(self) -> None:
        self.idle = False
        self._checkpointer.forget()
        if self._host.sweeper is not None:
            self._host.sweeper.discard(self)
        self.reporter.set_waiting(False)

    def on_event(self, event: Event) -> None:
        if isinstance(event, WorkflowFailedEvent):
            self._failed_step = event.step_name
        self.reporter.add(event)

    def on_step_done(self) -> None:
        if self._run is None or self._ending is not None:
            return
        checkpoint = self._checkpointer.after_step(self._run, self.inbox_read)
        if checkpoint is not None:
            self.reporter.add_checkpoint(checkpoint)

    def on_idle(self) -> None:
        self.slot.release()
        self.idle = True
        if self._release_when_idle:
            self.release()
            return
        if self._run is not None and self._ending is None:
            checkpoint = self._checkpointer.on_wait(self._run, self.inbox_read)
            if checkpoint is not None:
                self.reporter.add_checkpoint(checkpoint)
        self.reporter.set_waiting(True)
        if self._host.sweeper is not None:
            self._host.sweeper.add(self)

    def on_unwinding(self) -> None:
        self._host.start_run(self._settle_without_steps)

    # What the service asks. Native callers only.

    def wake(self) -> None:
        """Something changed about the task: pull its inbox and its cancel flag."""
        self._pull_again = True
        if self._tasks is not None and not self._pulling:
            self._pulling = True
            self._tasks.start_soon(self._forward_inbox, name=f"forwarder of task {self.claim.task_id}")

    def send(self, event: Event) -> None:
        """Hand an outside event to the run directly. Raises NotFound where there is no run to take it."""
        if self._run is None or self._tasks is None or self._ending is not None:
            raise NotFound(f"task {self.claim.task_id} takes no events now", task_id=self.claim.task_id)
        self._run.send_event(event)

    def cancel(self) -> None:
        """Cancel the run; its record will say cancelled, unless it ended before."""
        if self._ending is None:
            self._ending = "cancel"
            if self._run is not None and self._tasks is not None:
                self._run.cancel()
            else:
                self._scope.cancel()

    def release(self) -> None:
        """Hand the task back with what it has reached."""
        if self._ending is None:
            self._ending = "release"
            # Now, and not when the run has unwound: what its steps do about their cancellation is no part of it.
            if self._is_driven(self._run):
                self._checkpoint = self._checkpointer.on_leave(self._run, self.inbox_read)
            self.reporter.cut()
            self._scope.cancel()

    def release_when_idle(self) -> None:
        """Hand the task back now if it waits, or when it next does."""
        self._release_when_idle = True
        if self.idle:
            self.release()

    def leave(self) -> bool:
        """Leave memory: the task stays waiting, and comes back with its next event, for its next timer, or to be cancelled.
        False where that is not possible now."""
        run, sweeper = self._run, self._host.sweeper
        if sweeper is None or self._ending is not None or not self.idle or not self._is_driven(run):
            return False
        if not run.is_at_rest or self._pulling or self._mailbox_full:
            return False
        timer = run.next_timer
        if timer is not None and timer - self._host.now() <= sweeper.timeout:  # it would be back at once
            return False
        checkpoint = self._checkpointer.on_leave(run, self.inbox_read, idle=True)
        if checkpoint is None:
            return False
        self._ending, self._checkpoint, self._wake_at = "leave", checkpoint, timer
        self.reporter.cut()
        self._scope.cancel()
        return True

    def _is_driven(self, run: Run | None) -> TypeGuard[Run]:
        return run is not None and not run.is_done and self._tasks is not None

    def lose(self) -> None:
        """Another owner has the task, or it is gone: stop, report nothing."""
        self._ending = "lost"
        self.reporter.settled = True
        self._scope.cancel()

    # The work

    async def execute(self) -> None:
        """Run the task to its ending and store it, or hand it back. What the task raised is in `error` then."""
        try:
            with log_task(self.claim.task_id):
                outcome = await self._run_to_end()
                self._unwound.set()
                await self._settle(outcome)
        finally:
            self.slot.release()
            self._unwound.set()
            self._let_go()

    async def _run_to_end(self) -> Outcome | None:
        """The outcome of a task that ends before its run begins; None where the run says it."""
        if self.claim.cancel_requested:
            return self._judge.cancelled()
        try:
            run, events = self._begin()
        except (WorkflowChanged, StateRefused) as exc:
            return self._judge.refused(exc)
        except Exception as exc:  # refused input, an agent in the wrong flavour: the task's own failure
            return self._judge.failed(exc)
        if self.claim.deadline is not None:
            self._scope.deadline = anyio.current_time() + self.claim.deadline - self._host.now()
        with self._scope:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                try:
                    self._feed(events)
                    if self._pull_again:  # a wake-up that was faster than the claim's answer
                        self.wake()
                    await run.drive()
                finally:
                    self._tasks = None  # from here on the group may be closed at any moment
                    tasks.cancel_scope.cancel()
        return None

    def _begin(self) -> tuple[Run, tuple[InboxEvent, ...]]:
        """The run, and the outside events that it gets first."""
        claim, codec, host = self.claim, self._host.codec, self._host
        arguments = json.loads(claim.input)
        if not isinstance(arguments, dict):
            raise BadInput("the start arguments are not a JSON object")
        make = partial(self._make_run, codec.start_event(arguments))
        beginning = Beginner(codec, host.fingerprint, host.on_change, make, host.now()).begin(claim)
        marker = marker_of(claim, beginning)
        if marker is not None:
            self.reporter.begin(marker)
        self._run = beginning.run
        self.inbox_read = beginning.inbox_read
        if beginning.from_start:  # the claim has only what came after its checkpoint
            self._pull_again = True
            return beginning.run, ()
        self._pull_again = self._pull_again or bool(claim.inbox)  # there may be more of them
        return beginning.run, claim.inbox

    def _make_run(self, start_event: StartEvent, context: Context[Any] | None) -> Run:
        return make_run(
            self._host.workflow,
            start_event=start_event,
            context=context,
            run_id=self.claim.task_id,
            hooks=self,
            options=self._host.run_options,
        )

    # Its end

    async def _settle_without_steps(self) -> None:
        """End the task, or hand it back, where its steps do not end in time. They go on, and nobody hears of it."""
        with anyio.move_on_after(UNWINDING_TIME):
            await self._unwound.wait()
        if self._unwound.is_set() or self._run is None:
            return
        with log_task(self.claim.task_id):
            logger.warning(
                "task %s goes its way without its steps: they were cancelled and do not end", self.claim.task_id
            )
            await self._settle(None)

    async def _settle(self, outcome: Outcome | None) -> None:
        """Store the ending, or hand the task back. Once: the second caller waits for the first."""
        if self._settled is not None:
            await self._settled.wait()
            return
        self._settled = anyio.Event()
        try:
            outcome = outcome or self._outcome()
            if self._ending == "lost":
                return
            if outcome is None:
                await self._hand_back()
            else:
                await self.reporter.flush(outcome.terminal, outcome.context)
                if self.reporter.retry_at is None:
                    self.error = outcome.error
                else:
                    logger.info("task %s is tried again", self.claim.task_id)
        finally:
            self.reporter.settled = True
            self._settled.set()
            self._let_go()

    def _outcome(self) -> Outcome | None:
        """The outcome of the run; None where the task is to be handed back."""
        run = self._run
        assert run is not None
        if self._ending in ("release", "leave") and self._failed_step is None and _was_closed(run):
            return None
        overdue = self._scope.cancel_called and self._ending is None
        return self._judge.ended_run(run, failed_step=self._failed_step, timed_out=overdue)

    def _let_go(self) -> None:
        if self._host.sweeper is not None:
            self._host.sweeper.discard(self)
        self._host.forget(self)
        self.finished.set()

    # Outside events

    def _feed(self, events: tuple[InboxEvent, ...]) -> None:
        """Hand events to the run, in order, up to the first one for which it has no room."""
        assert self._run is not None
        if self._ending is not None:  # it is not in the checkpoint
            return
        self._mailbox_full = False
        for event in events:
            if event.seq <= self.inbox_read:
                continue
            before, self.inbox_read = self.inbox_read, event.seq  # a snapshot that is made meanwhile has the event
            try:
                self._run.send_event(self._host.codec.decode_event(event.payload))
            except MailboxFull:
                self._mailbox_full = True  # before_step asks again: by then the run has taken some
                self.inbox_read = before
                return
            except BadInput as exc:
                logger.warning("task %s: an outside event is skipped: %s", self.claim.task_id, exc)
            except RunClosed:
                self.inbox_read = before
                return

    async def _forward_inbox(self) -> None:
        try:
            while self._pull_again:
                self._pull_again = False
                task_id, epoch = self.claim.task_id, self.claim.epoch
                pull = partial(self._host.coordinator.pull, task_id, epoch, self.inbox_read)
                try:
                    page = await self._host.ask(pull, f"pull the events of task {task_id}")
                except UsageError as exc:  # it will be refused every time; a wake-up asks once more
                    logger.error("the events of task %s cannot be pulled: %s", task_id, exc)
                    return
                if page.status != "ok":
                    self.lose()
                    return
                if page.cancel_requested:
                    self.cancel()
                self._feed(page.events)
                # What came after the page was read, or did not fit into it. A full mailbox waits for a step.
                if page.events and self.inbox_read < page.head and not self._mailbox_full:
                    self._pull_again = True
        finally:
            self._pulling = False

    # Handing back

    async def _hand_back(self) -> None:
        await self.reporter.flush()
        if self.reporter.settled:
            return
        self.reporter.drop_rest()
        try:
            try:
                answer = await self._release(self._checkpoint)
            except TooLarge as exc:
                logger.warning("task %s is handed back without its checkpoint: %s", self.claim.task_id, exc)
                answer = await self._release(None)
        except UsageError as exc:  # it will be refused every time
            logger.error("task %s cannot be handed back: %s", self.claim.task_id, exc)
            return
        self._host.tickets_due(answer.tickets)

    async def _release(self, checkpoint: Checkpoint | None) -> ReportAnswer:
        release = partial(self._host.coordinator.release, self.claim.task_id, self.claim.epoch, checkpoint)
        if self._ending == "leave":
            release = partial(release, idle=True, wake_at=self._wake_at)
        return await self._host.ask(release, f"hand back task {self.claim.task_id}")


def _was_closed(run: Run) -> bool:
    """Whether the run was closed before it ended by itself."""
    try:
        return run.stop_event is None
    except RunClosed:
        return True
    except Exception:
        return False
