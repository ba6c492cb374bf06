"""The outside events of one claimed task, from its inbox at the coordinator into its run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import anyio.abc

from ..exceptions import BadInput, MailboxFull, RunClosed, UsageError
from ..protocol.records import Claim, InboxEvent
from ..runtime import Run
from .reporter import ReporterHost

logger = logging.getLogger(__name__)


class InboxOwner(Protocol):
    """Whose inbox it is."""

    def lose(self, *, deleted: bool = False) -> None:
        """The task is not ours any more, or nobody's."""

    def cancel(self) -> None:
        """Somebody wants the task cancelled."""


class Inbox:
    """Pulls what has come for a task and hands it to the run, in order.

    `read` is the highest seq that the run has: taken by a step, or held by the run until one takes it.
    """

    def __init__(self, host: ReporterHost, claim: Claim, owner: InboxOwner) -> None:
        self.read = 0
        self._host = host
        self._claim = claim
        self._owner = owner
        self._run: Run | None = None
        self._tasks: anyio.abc.TaskGroup | None = None
        # Whether the forwarder runs, has to look once more, and waits for the run to take some events first.
        self._pulling = False
        self._pull_again = False
        self._mailbox_full = False

    @property
    def is_busy(self) -> bool:
        """Whether something is on its way to the run."""
        return self._pulling or self._mailbox_full

    def open(self, run: Run, tasks: anyio.abc.TaskGroup, events: Sequence[InboxEvent] | None) -> None:
        """The run takes events from now on, as long as the task group is open.

        Args:
            events: What came with the claim: the first ones, of which there may be more. None where those are missing.
        """
        self._run, self._tasks = run, tasks
        self._feed(events or ())
        if self._pull_again or events is None or events:  # a wake-up may have been faster than the claim's answer
            self.wake()

    def close(self) -> None:
        """The run takes nothing more: what comes now is for whoever goes on with it."""
        self._run = self._tasks = None

    def wake(self) -> None:
        """Something changed about the task: pull its inbox and its cancel flag."""
        self._pull_again = True
        if self._tasks is not None and not self._pulling:
            self._pulling = True
            self._tasks.start_soon(self._forward, name=f"forwarder of task {self._claim.task_id}")

    def step_starts(self) -> None:
        """The run has taken an event: there may be room for another one."""
        if self._mailbox_full:
            self.wake()

    def _feed(self, events: Sequence[InboxEvent]) -> None:
        """Hand events to the run, up to the first one for which it has no room."""
        self._mailbox_full = False
        for event in events:
            run = self._run
            if run is None or event.seq <= self.read:
                continue
            before, self.read = self.read, event.seq  # a snapshot that is made meanwhile has the event
            try:
                run.send_event(self._host.codec.decode_event(event.payload))
            except (MailboxFull, RunClosed) as exc:
                self.read = before
                self._mailbox_full = isinstance(exc, MailboxFull)
                return
            except BadInput as exc:
                logger.warning("task %s: an outside event is skipped: %s", self._claim.task_id, exc)

    async def _forward(self) -> None:
        task_id = self._claim.task_id
        try:
            while self._pull_again:
                self._pull_again = False
                pull = partial(self._host.coordinator.pull, task_id, self._claim.epoch, self.read)
                try:
                    page = await self._host.ask(pull, f"pull the events of task {task_id}")
                except UsageError as exc:  # it will be refused every time; a wake-up asks once more
                    logger.error("the events of task %s cannot be pulled: %s", task_id, exc)
                    return
                if page.status != "ok":
                    self._owner.lose(deleted=page.status == "deleted")
                    return
                if page.cancel_requested:
                    self._owner.cancel()
                before = self.read
                self._feed(page.events)
                # What came after the page was read, or did not fit into it. A full mailbox waits for a step, and a run
                # that is over takes nothing.
                if before < self.read < page.head and not self._mailbox_full and self._run is not None:
                    self._pull_again = True
        finally:
            self._pulling = False
