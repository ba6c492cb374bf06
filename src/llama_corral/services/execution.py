"""One claimed task in hand: its run, what goes in and out of it, and its one ending.

    the service's runs ⊃ execution ⊃ { run, forwarder }

The run's scope holds the run and the forwarder of outside events: when the run ends the forwarder is cancelled, when the
scope is cancelled both are. The execution itself is a helper of the service: shielded, and ended a few seconds after the
service's body has left. So whatever happens to the run, its ending is stored, or the task is handed back.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import Literal, Protocol

import anyio
import anyio.abc
from workflows import Workflow
from workflows.events import Event, WorkflowFailedEvent

from ..exceptions import BadInput, MailboxFull, NotFound, RunClosed
from ..log_ids import log_task
from ..protocol.records import Checkpoint, Claim, InboxEvent
from ..runtime import Run, RunHooks, RunOptions, Slot, make_run
from .outcome import Judge, Outcome
from .reporter import Reporter, ReporterHost

logger = logging.getLogger(__name__)

Ending = Literal["cancel", "release", "lost"]


class ExecutionHost(ReporterHost, Protocol):
    """What an execution needs of its service."""

    workflow: Workflow
    run_options: RunOptions
    fingerprint: str
    debug: bool


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
        self.reporter = Reporter(host, claim, self.lose)
        self._host = host
        self._run: Run | None = None
        self._scope = anyio.CancelScope()
        self._tasks: anyio.abc.TaskGroup | None = None
        self._ending: Ending | None = None
        self._checkpoint: Checkpoint | None = None
        self._release_when_idle = False
        self._failed_step: str | None = None
        # The forwarder: whether it runs, has to look once more, and waits for the run to take some events first.
        self._pulling = False
        self._pull_again = False
        self._mailbox_full = False

    # What the run asks and says (RunHooks)

    async def before_step(self, step: str) -> None:
        await self.reporter.wait_room()
        if not self.slot.held:
            await self.slot.ensure()
        if self.idle:
            self.idle = False
            self.reporter.set_waiting(False)
        if self._mailbox_full:  # a step starts because its event was taken
            self.wake()

    def on_event(self, event: Event) -> None:
        if isinstance(event, WorkflowFailedEvent):
            self._failed_step = event.step_name
        self.reporter.add(event)

    def on_idle(self) -> None:
        self.slot.release()
        self.idle = True
        if self._release_when_idle:
            self.release()
        else:
            self.reporter.set_waiting(True)

    # What the service asks. Native callers only.

    def wake(self) -> None:
        """Something changed about the task: pull its inbox and its cancel flag."""
        self._pull_again = True
        if self._tasks is not None and not self._pulling:
            self._pulling = True
            self._tasks.start_soon(self._forward_inbox, name=f"forwarder of task {self.claim.task_id}")

    def send(self, event: Event) -> None:
        """Hand an outside event to the run directly. Raises NotFound where there is no run to take it."""
        if self._run is None or self._tasks is None:
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
            self._checkpoint = self._snapshot()
            self._scope.cancel()

    def release_when_idle(self) -> None:
        """Hand the task back now if it waits, or when it next does."""
        self._release_when_idle = True
        if self.idle:
            self.release()

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
                await self._execute()
        finally:
            self.slot.release()
            self.finished.set()

    async def _execute(self) -> None:
        outcome = await self._run_to_end()
        if self._ending == "lost":
            return
        if outcome is None:
            await self._hand_back()
        else:
            self.error = outcome.error
            await self.reporter.flush(outcome.terminal, outcome.context)

    async def _run_to_end(self) -> Outcome | None:
        """The outcome; None where the task is to be handed back."""
        judge = Judge(self.claim, self._host.codec, self._host.fingerprint, self._host.debug)
        if self.claim.cancel_requested:
            return judge.cancelled()
        try:
            run = self._run = self._prepare()
        except Exception as exc:  # refused input, a context that does not fit: the task's own failure
            return judge.failed(exc)
        if self.claim.deadline is not None:
            self._scope.deadline = anyio.current_time() + self.claim.deadline - self._host.now()
        with self._scope:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                try:
                    self._feed(self.claim.inbox)
                    if self._pull_again:  # a wake-up that was faster than the claim's answer
                        self.wake()
                    await run.drive()
                finally:
                    self._tasks = None  # from here on the group may be closed at any moment
                    tasks.cancel_scope.cancel()
        overdue = self._scope.cancelled_caught and self._ending is None
        if self._ending == "release" and self._failed_step is None and _was_closed(run):
            return None
        return judge.ended_run(run, failed_step=self._failed_step, timed_out=overdue)

    def _prepare(self) -> Run:
        claim, codec = self.claim, self._host.codec
        arguments = json.loads(claim.input)
        if not isinstance(arguments, dict):
            raise BadInput("the start arguments are not a JSON object")
        context = None
        held: list[str] = []
        if claim.checkpoint is not None:
            snapshot = json.loads(claim.checkpoint.snapshot)
            context = codec.decode_context(json.dumps(snapshot["context"]))
            held = snapshot["held"]
        elif claim.context is not None:
            context = codec.decode_context(claim.context.payload)
        run = make_run(
            self._host.workflow,
            start_event=codec.start_event(arguments),
            context=context,
            run_id=claim.task_id,
            hooks=self,
            options=self._host.run_options,
        )
        for payload in held:
            run.send_event(codec.decode_event(payload))
        return run

    # Outside events

    def _feed(self, events: tuple[InboxEvent, ...]) -> None:
        """Hand events to the run, in order, up to the first one for which it has no room."""
        assert self._run is not None
        self._mailbox_full = False
        for event in events:
            if event.seq <= self.inbox_read:
                continue
            try:
                self._run.send_event(self._host.codec.decode_event(event.payload))
            except MailboxFull:
                self._mailbox_full = True  # before_step asks again: by then the run has taken some
                return
            except BadInput as exc:
                logger.warning("task %s: an outside event is skipped: %s", self.claim.task_id, exc)
            except RunClosed:
                return
            self.inbox_read = event.seq

    async def _forward_inbox(self) -> None:
        try:
            while self._pull_again:
                self._pull_again = False
                task_id, epoch = self.claim.task_id, self.claim.epoch
                page = await self._host.ask(
                    partial(self._host.coordinator.pull, task_id, epoch, self.inbox_read),
                    f"pull the events of task {task_id}",
                )
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

    def _snapshot(self) -> Checkpoint | None:
        """The run as it is, to go on from elsewhere; None where it cannot be encoded: it then starts again."""
        if self._run is None or self._run.is_done or self._tasks is None:
            return None
        codec = self._host.codec
        try:
            held = [codec.serializer.serialize(event) for event in self._run.held_events()]
            context = json.loads(codec.encode_context(self._run.context))
        except Exception as exc:  # state that is not JSON
            logger.warning("task %s cannot be snapshotted and will start again: %s", self.claim.task_id, exc)
            return None
        return Checkpoint(json.dumps({"context": context, "held": held}), self.inbox_read, self._host.fingerprint)

    async def _hand_back(self) -> None:
        await self.reporter.flush()
        if self.reporter.settled:
            return
        answer = await self._host.ask(
            partial(self._host.coordinator.release, self.claim.task_id, self.claim.epoch, self._checkpoint),
            f"hand back task {self.claim.task_id}",
        )
        self.reporter.settled = True
        self._host.tickets_due(answer.tickets)


def _was_closed(run: Run) -> bool:
    """Whether the run was closed before it ended by itself."""
    try:
        run.stop_event  # noqa: B018 - it raises what ended the run
    except RunClosed:
        return True
    except Exception:
        return False
    return False
