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
from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal, Protocol, TypeGuard

import anyio
import anyio.abc
from workflows import Context, Workflow
from workflows.events import Event, StartEvent, WorkflowFailedEvent

from ..exceptions import BadInput, NotFound, RunClosed, StateRefused, TooLarge, UsageError, WorkflowChanged
from ..log_ids import log_task
from ..protocol.records import Checkpoint, Claim, InboxEvent, ReportAnswer
from ..runtime import Run, RunHooks, RunOptions, Slot, make_run
from .checkpoints import Checkpointer, CheckpointPolicy
from .inbox import Inbox
from .outcome import Judge, Outcome
from .reporter import Reporter, ReporterHost
from .resuming import Beginner, OnChange, marker_of
from .sweeper import IdleSweeper

logger = logging.getLogger(__name__)

Ending = Literal["cancel", "release", "leave", "lost"]

UNWINDING_TIME: Final = 10.0
"""Seconds that steps get to end once they are cancelled, before their task ends without them."""
HAND_BACK_TIME: Final = 2.0
"""The same where the task is handed back or the service is over: what waits then is a stop."""


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
        self.identity = claim.task_id
        self.idle = False
        self.error: BaseException | None = None
        self.finished = anyio.Event()
        """The task is not in hand any more. A step that does not end may still hold the slot."""
        self.reporter = Reporter(host, claim, self.lose)
        self._host = host
        self._inbox = Inbox(host, claim, self)
        self._judge = Judge(claim, host.codec, host.fingerprint, host.debug)
        self._checkpointer = Checkpointer(host.checkpoints, host.codec, host.fingerprint, claim.task_id)
        self._run: Run | None = None
        self._scope = anyio.CancelScope()
        self._tasks: anyio.abc.TaskGroup | None = None
        self._ending: Ending | None = None
        self._checkpoint: Checkpoint | None = None
        self._wake_at: float | None = None
        self._release_when_idle = False
        self._is_deleted = False
        self._failed_step: str | None = None
        self._raised_late = False
        self._unwound = anyio.Event()
        self._patience: anyio.CancelScope | None = None
        self._is_hurried = False
        self._settled: anyio.Event | None = None

    @property
    def inbox_read(self) -> int:
        """The highest seq of an outside event that the run has."""
        return self._inbox.read

    # What the run asks and says (RunHooks)

    async def before_step(self, step: str) -> None:
        await self.reporter.wait_room()
        if self._checkpointer.each_step:
            await self.reporter.wait_checkpoint()
        if not self.slot.held:
            await self.slot.ensure()
        if self.idle:
            self._end_idleness()
        self._inbox.step_starts()

    def _end_idleness(self) -> None:
        self.idle = False
        self._checkpointer.forget()
        if self._host.sweeper is not None:
            self._host.sweeper.discard(self)
        self.reporter.set_waiting(False)

    def on_event(self, event: Event) -> None:
        if isinstance(event, WorkflowFailedEvent):
            if self._scope.cancel_called:  # its own clean-up failed, and it is being done with
                self._raised_late = True
            else:
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

    def is_handed_on(self) -> bool:
        return self._ending in ("release", "leave", "lost") and not self._is_deleted

    def on_unwinding(self) -> None:
        self._host.start_run(self._settle_without_steps)

    # What the service asks. Native callers only.

    def wake(self) -> None:
        """Something changed about the task: pull its inbox and its cancel flag."""
        self._inbox.wake()

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
        """Hand the task back with what it has reached. One that is ending gets little time for it from now on."""
        self._hurry()
        if self._ending is None:
            self._ending = "release"
            # Now, and not when the run has unwound: what its steps do about their cancellation is no part of it.
            if self._is_driven(self._run):
                self._checkpoint = self._checkpointer.on_leave(self._run, self.inbox_read)
            self._close_up()

    def _close_up(self) -> None:
        """What the run does and gets from now on is no part of what is handed back."""
        self._inbox.close()
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
        if not run.is_at_rest or self._inbox.is_busy:
            return False
        # Where the coordinator does not take its checkpoint, it would do again what it did, and ask again what it asked.
        if self.reporter.has_checkpoint or self.reporter.refused_checkpoint:
            return False
        timer = run.next_timer
        if timer is not None and timer - self._host.now() <= sweeper.timeout:  # it would be back at once
            return False
        checkpoint = self._checkpointer.on_leave(run, self.inbox_read, idle=True)
        if checkpoint is None:
            return False
        self._ending, self._checkpoint, self._wake_at = "leave", checkpoint, timer
        self._close_up()
        return True

    def _hurry(self) -> None:
        if not self._is_hurried:
            self._is_hurried = True
            if self._patience is not None:
                self._patience.deadline = min(self._patience.deadline, anyio.current_time() + HAND_BACK_TIME)

    def _is_driven(self, run: Run | None) -> TypeGuard[Run]:
        return run is not None and not run.is_done and self._tasks is not None

    def lose(self, *, deleted: bool = False) -> None:
        """Another owner has the task, or it is gone: stop, report nothing."""
        self._ending = "lost"
        self._is_deleted = deleted
        self._hurry()
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
                    if self._ending is None:
                        self._inbox.open(run, tasks, events)
                    await run.drive()
                finally:
                    self._inbox.close()
                    self._tasks = None  # from here on the group may be closed at any moment
                    tasks.cancel_scope.cancel()
        return None

    def _begin(self) -> tuple[Run, tuple[InboxEvent, ...] | None]:
        """The run, and the outside events that it gets first; None where they have to be pulled."""
        claim, codec, host = self.claim, self._host.codec, self._host
        arguments = json.loads(claim.input)
        if not isinstance(arguments, dict):
            raise BadInput("the start arguments are not a JSON object")
        start = partial(codec.start_event, arguments)
        beginning = Beginner(codec, host.fingerprint, host.on_change, start, self._make_run, host.now()).begin(claim)
        marker = marker_of(claim, beginning)
        if marker is not None:
            self.reporter.begin(marker)
        self._run = beginning.run
        self._checkpointer.based_on = beginning.based_on
        self._judge = replace(self._judge, based_on=beginning.based_on)
        self._inbox.read = beginning.inbox_read
        # Where its checkpoint is not used, the claim lacks what came before it.
        return beginning.run, None if beginning.from_start else claim.inbox

    def _make_run(self, start_event: StartEvent | None, context: Context[Any] | None) -> Run:
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
        with anyio.move_on_after(HAND_BACK_TIME if self._is_hurried else UNWINDING_TIME) as self._patience:
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
                    if outcome.retryable:
                        logger.error("task %s failed: it is not tried again", self.claim.task_id)
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
        handed_back = self._ending in ("release", "leave") and self._failed_step is None
        if handed_back and (self._raised_late or _was_closed(run)):
            return None
        overdue = self._scope.cancel_called and self._ending is None
        if self._raised_late:
            return self._judge.timed_out() if overdue else self._judge.cancelled()
        return self._judge.ended_run(run, failed_step=self._failed_step, timed_out=overdue)

    def _let_go(self) -> None:
        if self._host.sweeper is not None:
            self._host.sweeper.discard(self)
        self._host.forget(self)
        self.finished.set()

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
