"""One run of a workflow, as its owner sees it. What drives it is in `driver.py`, what it decides in `core.py`."""

from __future__ import annotations

import weakref
from typing import Any

import anyio.lowlevel

from .driver import RunDriver
from .faces import OutsideFace
from .mailbox import FromOutside
from .options import RunStatistics
from .serializer import as_context_serializer
from .stream import EventReader
from .upstream import (
    Context,
    Event,
    StepId,
    StopEvent,
    TickAddEvent,
    TickCancelRun,
    context_with_face,
    validate_step_message,
    workflow_serializer,
)


class Run(RunDriver):
    """A run of a workflow. Made by `open_run`; `drive` must be running for anything to happen."""

    _given_context: weakref.ref[Context[Any]] | None = None

    # Looking at it

    @property
    def is_done(self) -> bool:
        """True from the ending on, whether with a result or not. Steps that were still working may be unwinding."""
        return self._outcome is not None

    @property
    def stop_event(self) -> StopEvent | None:
        """The event that ended the run, None while it runs. Raises what the workflow raised."""
        if self._outcome is None or isinstance(self._outcome, StopEvent):
            return self._outcome
        # Every raise would otherwise add the caller's frames to the one exception that all callers share.
        raise self._outcome.with_traceback(self._traceback)

    @property
    def context(self) -> Context[Any]:
        """Upstream's Context of the run, seen from outside: `store`, `to_dict()`, `send_event`, and reuse in a next run."""
        given = self._given_context() if self._given_context is not None else None
        return given if given is not None else context_with_face(self.outside_face())

    def adopt_context(self, context: Context[Any]) -> None:
        """Let the Context that the run was started with show this run from now on."""
        self._given_context = weakref.ref(context)  # it holds the run

    def outside_face(self) -> OutsideFace:
        """A face for a Context that is to show this run from outside."""
        serializer = as_context_serializer(self._serializer or workflow_serializer(self.workflow))
        return OutsideFace(self.workflow, self.adapter, serializer)

    def running_steps(self) -> list[str]:
        """Names of the steps that are working or wait for a slot."""
        return [str(step) for step, worker in self.broker_state.workers.items() if worker.in_progress]

    def held_events(self) -> list[Event]:
        """Outside events that nothing has taken yet, in the order in which they came. What a run that was closed before
        it ended leaves here was never seen by the workflow."""
        coming = [item.tick.event for item in self._buffer if isinstance(item, FromOutside)]
        return [*self._held.events(), *coming]

    def statistics(self) -> RunStatistics:
        """Numbers of this moment."""
        return RunStatistics(
            run_id=self.run_id,
            is_done=self.is_done,
            is_idle=self.is_idle,
            working_steps=self._working,
            ticks=self._ticks,
            published_events=self._stream.published,
            buffered_events=len(self._stream),
            lost_events=self._stream.first,
            held_events=len(self._held),
            timers=len(self._timers),
        )

    # Talking to it

    def send_event(self, event: Event, step: str | None = None) -> None:
        """Send an event into the run from outside. It is held until something can take it.

        Raises:
            MailboxFull: too many events are held; send again when the run has taken some.
            RunClosed: the run has ended.
            WorkflowRuntimeError: there is no step of that name, or it does not accept the event.
        """
        if step is not None:
            validate_step_message(self.workflow, step, event)
        self.post_from_outside(TickAddEvent(event=event, step_id=StepId.root(step) if step is not None else None))

    def cancel(self) -> None:
        """End the run with WorkflowCancelledByUser. Returns at once; nothing happens if it has ended."""
        if self._outcome is None:
            self._post(TickCancelRun())

    async def wait_stop_event(self) -> StopEvent:
        """The event that ended the run, once all its steps have unwound. Raises what the workflow raised."""
        if self._closed:
            await anyio.lowlevel.checkpoint()
        else:
            await self.wait_as_parent(self._is_open, self.wait_closed)
        stop = self.stop_event
        assert stop is not None
        return stop

    async def wait_closed(self) -> None:
        """Return when all steps of the run have unwound, however it ended."""
        while not self._closed:
            await self._on_closed.wait()

    async def result(self) -> Any:
        """What `await workflow.run()` returns: the stop event's result, or the stop event if it is of an own class.

        Raises:
            WorkflowTimeoutError, WorkflowCancelledByUser, RunClosed, and what a step raised.
        """
        stop = await self.wait_stop_event()
        return stop.result if type(stop) is StopEvent else stop

    def events(self) -> EventReader:
        """Published events from the first one in the ring on, until the run has ended. Any number of readers."""
        return EventReader(self._stream, self)
