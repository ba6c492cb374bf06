"""A sync step in its worker thread. A thread cannot be stopped: on cancellation it is abandoned, and said so."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread

from .options import sync_step_limiter

logger = logging.getLogger(__name__)


class _ThreadCall:
    """What the waiting task and the thread know of each other.

    Each sets its own flag before it reads the other's, so that no thread works without one of them knowing.
    """

    __slots__ = ("_began", "_ended", "_function", "_name", "abandoned")

    def __init__(self, function: Callable[[], Any], step: str, run_id: str) -> None:
        self._function = function
        self._name = (step, run_id)
        self._began = False
        self._ended = False
        self.abandoned = False

    def work(self) -> Any:
        """In the thread."""
        self._began = True
        if self.abandoned:
            return None
        _here.call = self
        outcome = "returned"
        try:
            return self._function()
        except BaseException as exc:
            outcome = f"raised {type(exc).__name__}"
            raise
        finally:
            _here.call = None  # the thread goes on to other work
            self._ended = True
            self._note_end(outcome)

    def _note_end(self, outcome: str) -> None:
        if self.abandoned:
            logger.debug("the abandoned thread of step %r of run %s has %s", *self._name, outcome)

    def leave(self) -> None:
        """In the task, which has the result, or was cancelled and will not wait for it."""
        if self._ended:
            return
        self.abandoned = True
        if self._began:
            logger.warning(
                "step %r of run %s was cancelled in its thread, which cannot be stopped: it is abandoned, "
                "and what it still does is dropped",
                *self._name,
            )


class _Here(threading.local):
    call: _ThreadCall | None = None


_here = _Here()


async def call_in_thread(
    function: Callable[[], Any], *, step: str, run_id: str, limiter: anyio.CapacityLimiter | None
) -> Any:
    """Call a sync step in a thread of the limiter, by default of the loop's own for sync steps.

    Cancelled while it waits for a thread, the step never begins. Cancelled while it works, the thread goes on by itself;
    what it then sends, publishes, returns or raises is dropped. On Trio it keeps its place under the limiter until it
    ends; AnyIO's asyncio backend gives the place back at once.
    """
    call = _ThreadCall(function, step, run_id)
    try:
        return await anyio.to_thread.run_sync(
            call.work, abandon_on_cancel=True, limiter=limiter if limiter is not None else sync_step_limiter()
        )
    finally:
        call.leave()


def in_abandoned_thread() -> bool:
    """Whether the caller is a sync step that nobody waits for any more."""
    call = _here.call
    return call is not None and call.abandoned
