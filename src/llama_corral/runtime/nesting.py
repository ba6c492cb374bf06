"""Runs inside of runs: what a step that waits for a run of its own means to the run that the step belongs to.

A parent whose step does nothing but wait for an idle child is idle itself: its step is *parked*, and the parent's slot goes
back to the limiter. Before the child starts a step, or the parent's step goes on, the slot is taken again.

Where the child runs in another process it is the step itself that knows (`StepActivity.wait_elsewhere`). A step counts as
waiting for a run of its own where its own task awaits the child (in `run.result()`, in its events, in `run_workflow`, or in
upstream's handler) and no other child of it works. A step that awaits children in a task group, or a handler whose run has
been idle before, keeps its slot: a slot is held a little too long there. What else a step does, in tasks beside the one
that awaits an idle child, is not seen.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from ..aio import current_task_identity, in_foreign_library, is_blocked_on

if TYPE_CHECKING:
    from .core import RunCore
    from .run import Run

T = TypeVar("T")

_current: ContextVar[StepActivity | None] = ContextVar("llama_corral_step", default=None)


@dataclass(eq=False, slots=True)
class _Wait:
    child: Run
    is_blocked: Callable[[], bool]
    task: Any


class StepActivity:
    """One call of a step, as the runs that it starts see it.

    Args:
        run: The run that the step belongs to.
        step: The step's name.
        call: Which call of the step it is: the same for the same call in a run that goes on from a snapshot.
        threaded: The step is a sync one: whatever it waits for, it does nothing else meanwhile.
    """

    __slots__ = (
        "_away",
        "_call",
        "_children",
        "_made",
        "_parked",
        "_run",
        "_slot_given",
        "_task",
        "_threaded",
        "_waits",
        "step",
    )

    def __init__(self, run: Run, step: str, call: str, *, threaded: bool) -> None:
        self.step = step
        self._run: Run | None = run
        self._call = call
        self._made = 0
        self._away = 0
        self._threaded = threaded
        self._task: Any = None
        self._waits: list[_Wait] = []
        self._children: set[RunCore] = set()
        self._parked = False
        self._slot_given = False  # since the step was last known to have its slot

    @property
    def run(self) -> Run | None:
        """The run, None once the call has ended: copies of its context variables may live longer."""
        return self._run

    def enter(self) -> None:
        """Note that the caller's task is the step's own."""
        self._task = current_task_identity()

    def close(self) -> None:
        """The call has ended."""
        self._run = None
        self._task = None

    def add_child(self, child: RunCore) -> str | None:
        """A run was made by the step. Its identity, where the step's run has one: made of the call and of how many runs
        the call has made before."""
        self._children.add(child)
        self._made += 1
        if self._run is None or self._run.identity is None:
            return None
        return f"{self._run.identity}/{self.step}/{self._call}/{self._made}"

    def remove_child(self, child: RunCore) -> None:
        """A run of the step was closed."""
        self._children.discard(child)
        self.look()

    def look(self) -> None:
        """Park the step or let it go on, as its children now are."""
        parked = (
            self._run is not None
            and (self._away > 0 or any(self._only_waits(wait) for wait in self._waits))
            and all(child.is_idle for child in self._children)
        )
        if parked != self._parked and self._run is not None:
            self._parked = parked
            if parked:
                self._slot_given = True
                self._run.step_parked()
            else:
                self._run.step_resumed()

    def _only_waits(self, wait: _Wait) -> bool:
        own = self._threaded or wait.task is self._task or is_blocked_on(self._task, wait.task)
        return own and wait.child.is_idle and wait.is_blocked()

    async def wait_for(self, child: Run, is_blocked: Callable[[], bool], wait: Callable[[], Awaitable[T]]) -> T:
        """Await `wait()`, a wait for the child. Where the step's own task does, directly or through an asyncio task that it
        awaits, the step has its slot again when this returns or raises."""
        entry = _Wait(child, is_blocked, current_task_identity())
        self._waits.append(entry)
        self.look()
        try:
            return await wait()
        finally:
            self._waits.remove(entry)
            self.look()
            if self._slot_given and self._run is not None:
                await self._regain(self._run)  # noqa: ASYNC102 -- shielded where that means something

    async def wait_elsewhere(self, wait: Callable[[], Awaitable[T]]) -> T:
        """Await `wait()`, in which the step does nothing but wait for something far away that does nothing itself. The step
        has its slot again when this returns or raises."""
        self._away += 1
        self.look()
        try:
            return await wait()
        finally:
            self._away -= 1
            self.look()
            if self._slot_given and self._run is not None:
                await self._regain(self._run)  # noqa: ASYNC102 -- shielded where that means something

    async def _regain(self, run: Run) -> None:
        # Where a timeout of the step's own ended its wait, it goes on with a slot or not at all: what ends this wait is the
        # end of the run. In the other library that comes as asyncio's own cancellation, which no scope shields from.
        with anyio.CancelScope(shield=True) as scope:
            with nullcontext() if in_foreign_library(run.home.backend) else run.until_end(scope):
                await run.wait_slot(self.step)
        self._slot_given = False


def current_activity() -> StepActivity | None:
    """The call of a step that the caller is part of, None outside of steps."""
    activity = _current.get()
    run = activity.run if activity is not None else None
    # A sync step may run an event loop of its own in its thread: runs in there belong to nobody here.
    return activity if run is not None and run.home.thread == threading.get_ident() else None


def set_activity(activity: StepActivity) -> None:
    """Tell the caller's task, and what it starts, which call of a step it is."""
    _current.set(activity)
