"""A run as upstream's `WorkflowHandler` shows it, for steps of either library.

Upstream's handler is made of an asyncio task that waits for the result. This one is made of nothing: who awaits it waits.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio

from ..exceptions import RunClosed
from .upstream import Context, Event, InternalDispatchEvent, StopEvent, WorkflowCancelledByUser, WorkflowHandler

if TYPE_CHECKING:
    from .run import Run


class RunHandler(WorkflowHandler):
    """The handler of a run inside of the run of a step.

        handler = workflow.run(topic="llamas")
        async for event in handler.stream_events(): ...
        result = await handler

    Cancelling `await handler` cancels the run and waits until it has unwound. As a block, `async with handler:`, it does so
    whenever the block is left before the run has ended. The run ends with that of the step at the latest.
    """

    def __init__(self, run: Run) -> None:
        # Not upstream's: that would start an asyncio task.
        self._run = run
        self._workflow = run.workflow
        self.run_id = run.run_id

    def __str__(self) -> str:
        return f"{type(self).__name__}(workflow={self._workflow.workflow_name}, run_id={self.run_id})"

    @property
    def ctx(self) -> Context[Any]:
        """The run's Context from outside."""
        return self._run.context

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()  # noqa: ASYNC102 -- shielded inside

    async def stop_event_result(self) -> StopEvent:
        """The event that ended the run. Raises what the workflow raised."""
        try:
            return await self._run.wait_stop_event()
        except anyio.get_cancelled_exc_class():
            await self._end()  # noqa: ASYNC102 -- shielded inside
            raise

    async def _end(self) -> None:
        self._run.cancel()
        with anyio.CancelScope(shield=True):  # as long as the run's own clean-up takes
            await self._run.wait_closed()

    def is_done(self) -> bool:
        return self._run.is_done

    def get_stop_event(self) -> StopEvent | None:
        """The event that ended the run; None while it runs, and where it raised."""
        return None if self._error() is not None else self._run.stop_event

    def stream_events(self, expose_internal: bool = False) -> AsyncIterator[Event]:  # type: ignore[override]
        """The run's events, from the first one that is left in its buffer on. Nothing has to be closed, so it is no
        generator: Trio does not like those that are dropped."""
        return _Shown(self._run.events(), internal=expose_internal)

    async def cancel_run(self, *, timeout: float = 5.0) -> None:  # noqa: ASYNC109 -- upstream's
        """Cancel the run and wait until it has unwound, not longer than `timeout` seconds."""
        self._run.cancel()
        with anyio.move_on_after(timeout):
            await self._run.wait_closed()

    # What upstream has given up, and code that is older uses

    def done(self) -> bool:
        return self.is_done()

    def cancel(self) -> None:
        self._run.cancel()

    def cancelled(self) -> bool:
        return isinstance(self._error(), (WorkflowCancelledByUser, RunClosed))

    def exception(self) -> BaseException | None:
        return self._error()

    def _error(self) -> BaseException | None:
        try:
            self._run.stop_event  # noqa: B018 -- raises what the workflow raised
        except Exception as exc:
            return exc
        return None


class _Shown(AsyncIterator[Event]):
    """Events of a run without upstream's internal ones, unless they are wanted."""

    def __init__(self, events: AsyncIterator[Event], *, internal: bool) -> None:
        self._events = events
        self._internal = internal

    async def __anext__(self) -> Event:
        while True:
            event = await anext(self._events)
            if self._internal or not isinstance(event, InternalDispatchEvent):
                return event
