"""A run among runs: those that its steps start, the run whose step started it, and the slot that they share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import Context as ContextVars
from contextvars import copy_context
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio

from ..aio import Bell, await_in, in_foreign_library, kept_tasks
from .core import RunCore
from .deadlines import Deadlines
from .home import Home
from .hooks import RunHooks
from .launch import Launch
from .live_state import LiveBrokerState
from .options import DEFAULT_EVENT_BUFFER, RunOptions
from .upstream import Workflow

if TYPE_CHECKING:
    from .run import Run


class RunFamily(RunCore):
    """What a run has to do with other runs. `RunDriver` drives it.

    A step starts a run in a task of its own (`open_run`, `run_workflow`), or asks for it with plain `workflow.run()`. Then
    it is *adopted*: driven inside of this run's task group, and it may outlive its step.
    """

    def __init__(
        self,
        workflow: Workflow,
        *,
        state: LiveBrokerState,
        run_id: str | None,
        hooks: RunHooks | None,
        options: RunOptions | None,
        home: Home | None,
        deadlines: Deadlines | None,
    ) -> None:
        super().__init__(
            workflow, state=state, run_id=run_id, hooks=hooks, options=options, home=home, deadlines=deadlines
        )
        self._wake: anyio.Event | None = None
        self._adopted_by: Run | None = None
        self._to_start: list[tuple[Run, ContextVars]] = []
        self._adopted: set[RunFamily] = set()
        self._until_end: set[anyio.CancelScope] = set()
        self._on_child_end = Bell()

    def _as_run(self) -> Run:
        return self  # type: ignore[return-value] # the only subclass

    @property
    def home(self) -> Home:
        """The event loop that drives the run."""
        return self._home

    @property
    def is_ending(self) -> bool:
        """Whether its steps are being cancelled: its task group takes nobody in any more, and what their clean-up starts is
        its own business."""
        return self._outcome is not None or self._is_leaving

    @property
    def is_at_rest(self) -> bool:
        """Whether the run is idle and a snapshot has all of it: it waits neither for its turn nor for a run of a step."""
        at_work = any(worker.in_progress for worker in self.broker_state.workers.values())
        return self.is_idle and self._begun and not at_work and not self._adopted and not self._to_start

    @property
    def is_child(self) -> bool:
        """Whether a step of another run started it."""
        return self._parent is not None

    def _drain_soon(self) -> None:
        """Reduce what is buffered: here, or in the driver where the caller speaks the other library."""
        if not in_foreign_library(self._home.backend):
            self._drain()
        elif self._wake is not None:
            self._wake.set()

    # As a parent

    def start_child(self, launch: Launch) -> Run | None:
        """Adopt a run that a step asks for, with the caller's context variables. None where this run is ending."""
        if self.is_ending:
            return None
        options = replace(self.options, event_buffer=DEFAULT_EVENT_BUFFER, internal_events=True)
        child = launch.make(type(self._as_run()), options, self._home)
        child._adopted_by = self._as_run()
        self._adopted.add(child)
        with kept_tasks():  # the child's asyncio tasks are no part of the step
            self._to_start.append((child, copy_context()))
        if not in_foreign_library(self._home.backend):
            self._start_adopted()
        elif self._wake is not None:
            self._wake.set()
        return child

    def _start_adopted(self) -> None:
        if self._to_start and self._tasks is not None and not self._is_leaving:
            adopted, self._to_start = self._to_start, []
            for child, variables in adopted:
                variables.run(self._tasks.start_soon, child.drive)

    def _dismiss(self) -> None:
        """This run is being left: no run of its steps goes on, whatever task it is in."""
        self._is_leaving = True
        for child, _ in self._to_start:
            child.close_undriven()
        for scope in tuple(self._until_end):
            scope.cancel()

    async def _wait_children(self) -> None:
        """Return when the runs have unwound that its steps started in tasks outside of its task group."""
        with anyio.CancelScope(shield=True):  # they have been cancelled
            while self._until_end:
                await self._on_child_end.wait()

    @contextmanager
    def until_end(self, scope: anyio.CancelScope) -> Iterator[None]:
        """Cancel the scope when the run ends, or at once if it has ended."""
        if self._is_leaving:
            scope.cancel()
        self._until_end.add(scope)
        try:
            yield
        finally:
            self._until_end.discard(scope)
            self._on_child_end.ring()

    def _is_at_work(self) -> bool:
        return super()._is_at_work() or any(child.is_left_at_work for child in self._adopted)

    def step_parked(self) -> None:
        """A step does nothing but wait for an idle run of its own."""
        self._parked += 1
        self._drain_soon()

    def step_resumed(self) -> None:
        """A parked step goes on, or a step of its own run does."""
        self._parked -= 1
        self._end_idleness()

    def adopted_changed(self, child: RunFamily) -> None:
        """An adopted run has become idle, or works again."""
        if child.is_left_at_work:
            self._end_idleness()
        else:
            self._drain_soon()

    def adopted_ended(self, child: RunFamily) -> None:
        """An adopted run was closed."""
        self._adopted.discard(child)
        self._drain_soon()

    # As a child

    @property
    def around(self) -> Run | None:
        """The run whose step started this one; None where no step did, or its run is over."""
        if self._adopted_by is not None:
            return self._adopted_by
        return self._parent.run if self._parent is not None else None

    @property
    def is_handed_on(self) -> bool:
        """Whether this run, or one around it, is being closed because somebody else goes on with it."""
        if self._hooks is not None and self._hooks.is_handed_on():
            return True
        around = self.around
        return around is not None and around.is_handed_on

    @property
    def is_left_at_work(self) -> bool:
        """Whether an adopted run works whose step has ended: its work is the run's around."""
        return self._parent is not None and self._parent.run is None and not self._idle

    def _tell_parent(self) -> None:
        if self._parent is not None:
            self._parent.look()
        if self._adopted_by is not None:
            self._adopted_by.adopted_changed(self)

    async def wait_as_parent(self, is_blocked: Callable[[], bool], wait: Callable[[], Awaitable[None]]) -> None:
        """Await `wait()`, a wait for this run; where a step does that for a run of its own, it may be parked meanwhile."""
        if self._parent is None:
            await wait()
        else:
            await self._parent.wait_for(self._as_run(), is_blocked, wait)

    # The slot

    async def wait_slot(self, step: str) -> None:
        """Return when the run may work, from whatever library: it has its slot, and so have the runs around it."""
        if self._hooks is not None or self._parent is not None:
            await await_in(self._home.backend, self._wait_slot, step)

    async def _wait_slot(self, step: str) -> None:
        if self._hooks is not None:
            await self._hooks.before_step(step)
        if self._parent is not None and (around := self.around) is not None:
            await around.wait_slot(self._parent.step)
