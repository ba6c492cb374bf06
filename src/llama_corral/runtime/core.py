"""The deciding half of a run: upstream's reducer, the ticks that wait for it, timers, published events, the outcome.

    state, commands = reduce(tick, state)

Everything here is sync. Rules: `_drain` is the only place that reduces, it never runs twice at once, and after `_outcome`
is set no tick is reduced and nothing is published.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from abc import abstractmethod
from collections import deque
from types import TracebackType

import anyio
import anyio.abc

from .deadlines import Deadlines, WaiterKey
from .home import Home
from .hooks import RunHooks
from .live_state import LiveBrokerState
from .mailbox import (
    FromOutside,
    Held,
    can_take,
    forget_waiter,
    has_completed,
    has_failed_for_good,
    hide_answered,
    show_answered,
    unhandled,
)
from .nesting import current_activity
from .options import RunOptions
from .stream import EventRing
from .timers import Timers
from .upstream import (
    AddWaiter,
    BrokerState,
    CommandCompleteRun,
    CommandFailWorkflow,
    CommandHalt,
    CommandPublishEvent,
    CommandQueueEvent,
    CommandRunWorker,
    CommandScheduleIdleCheck,
    CommandScheduleTimeout,
    CommandScheduleWaiterTimeout,
    CommandScheduleWakeup,
    DeleteWaiter,
    Event,
    InternalDispatchEvent,
    StopEvent,
    TickAddEvent,
    TickCancelRun,
    TickIdleCheck,
    TickStepResult,
    TickTimeout,
    TickWaiterTimeout,
    TickWakeup,
    Workflow,
    WorkflowCommand,
    WorkflowRuntimeError,
    WorkflowTick,
    reduce_tick,
    stamped,
)
from .verbose import Narrator, narrator_of

logger = logging.getLogger(__name__)

# Time stamps are floats of seconds since the epoch, whose last bit is a quarter of a microsecond. Waking up a little
# late makes sure that what a timer was for is due by then, also under a clock that stands still in between.
LATE = 1e-6
IDLE_CHECK = TickIdleCheck()


class RunCore:
    """What a run decides. `Run` adds the tasks, the steps and the public side."""

    def __init__(
        self,
        workflow: Workflow,
        *,
        state: LiveBrokerState,
        run_id: str | None,
        hooks: RunHooks | None,
        options: RunOptions | None,
        home: Home | None,
        deadlines: Deadlines | None = None,
    ) -> None:
        self.workflow = workflow
        self.run_id = run_id or secrets.token_hex(8)
        self.options = options or RunOptions()
        self.broker_state: BrokerState = state
        self._hooks = hooks
        self._narrator: Narrator | None = narrator_of(workflow)
        self.identity = hooks.identity if hooks is not None else None
        """See `RunHooks`. A run of a step has one that follows from that of the run around it."""
        self._parent = current_activity()
        if self._parent is not None:
            made = self._parent.add_child(self)
            self.identity = self.identity or made
        # Time stamps are wall-clock and persisted; durations obey the backend's clock, which tests may move.
        self._home = home or Home.here()
        self._clock = self._home.clock
        self._epoch = time.time() - self._clock()

        self._tasks: anyio.abc.TaskGroup | None = None
        self._begun = False
        self._buffer: deque[WorkflowTick | FromOutside] = deque()
        self._held = Held()
        self._idle_check_due = False
        self._draining = False
        self._is_leaving = False
        self._timers = Timers()
        self.deadlines: Deadlines = deadlines or {}
        self._timer_scope: anyio.CancelScope | None = None
        self._working = 0
        self._parked = 0
        self._idle = False
        self._ticks = 0
        self._stream = EventRing(self.options.event_buffer)
        self._told = 0  # events published by the time when a step call last ended
        self._outcome: StopEvent | BaseException | None = None
        self._traceback: TracebackType | None = None

    @abstractmethod
    def _start_step(self, command: CommandRunWorker) -> None: ...

    @property
    def is_idle(self) -> bool:
        """True while no step is working and only an outside event or a timer can change that."""
        return self._idle and self._outcome is None

    @property
    def next_timer(self) -> float | None:
        """When the run's next timer is due (seconds since the epoch): a waiter's or the workflow's timeout, or a step's
        retry. None if it has none."""
        at = self._timers.next_at()
        return None if math.isinf(at) else at

    @property
    def has_half_sent(self) -> bool:
        """Whether a step that is at work has sent events. A run that goes on from a snapshot of this moment starts that
        step again, which sends them again, beside what has come of them."""
        return any(call.received for worker in self.broker_state.workers.values() for call in worker.in_progress)

    @property
    def half_told(self) -> int:
        """How many of the latest published events are of steps that are still at work: of all that was published since a
        step call last ended. A run that goes on from a snapshot of this moment publishes them again."""
        at_work = any(worker.in_progress for worker in self.broker_state.workers.values())
        return self._stream.published - self._told if at_work else 0

    def now(self) -> float:
        """Seconds since the epoch, moved by the backend's clock."""
        return self._epoch + self._clock()

    def _drain(self) -> None:
        """Reduce what is buffered, and what that leads to. Sync: no tick is ever half reduced."""
        if self._draining or self._tasks is None or not self._may_begin():
            return
        self._draining = True
        try:
            while self._outcome is None:
                item = self._next_item()
                if item is not None:
                    self._reduce(item)
                elif self._idle or self._is_leaving or self._is_at_work():
                    return
                else:
                    self._become_idle()  # a hook may send an event: look again
        except Exception as exc:
            self._fail(exc)
        finally:
            self._draining = False

    def _may_begin(self) -> bool:
        """Whether ticks are reduced yet. A run that waits for its turn can be cancelled, and nothing else."""
        if not self._begun:
            cancel = next((item for item in self._buffer if isinstance(item, TickCancelRun)), None)
            if cancel is None:
                return False
            self._begun = True
            self._buffer.appendleft(cancel)
        return True

    def _become_idle(self) -> None:
        self._idle = True
        if self._hooks is not None:
            self._hooks.on_idle()
        self._tell_parent()

    def _end_idleness(self) -> None:
        if self._idle:
            self._idle = False
            self._tell_parent()

    def _is_at_work(self) -> bool:
        """Whether a step works, and does not only wait for an idle run of its own."""
        return self._working > self._parked

    @abstractmethod
    def _tell_parent(self) -> None:
        """The run has become idle, works again, or has ended."""

    def _next_item(self) -> WorkflowTick | FromOutside | None:
        # Held events go first: they came before whatever came since.
        held = self._held.take(self.broker_state)
        if held is not None:
            return held
        if self._buffer:
            return self._buffer.popleft()
        if self._idle_check_due:
            self._idle_check_due = False
            return IDLE_CHECK
        return None

    def _reduce(self, item: WorkflowTick | FromOutside) -> None:
        if isinstance(item, FromOutside):
            if not can_take(self.broker_state, item.tick):
                self._held.add(item)
                return
            tick: WorkflowTick = item.tick
        else:
            tick = item
        commands = self._reduced(tick)
        if type(tick) is TickStepResult:
            self._note_waiters(tick)  # before anything is published: whoever hears it may take a snapshot
        for command in commands:
            self._obey(command)
            if self._outcome is not None:
                return
        if type(tick) is TickStepResult:
            self._told = self._stream.published
            if self._hooks is not None and has_completed(tick, commands):
                self._hooks.on_step_done()

    def _reduced(self, tick: WorkflowTick) -> list[WorkflowCommand]:
        now = self.now()
        before = self.broker_state
        hidden = hide_answered(before) if type(tick) is TickAddEvent else None
        self.broker_state, commands = reduce_tick(stamped(tick, now), before, now, run_id=self.run_id)
        if hidden:
            show_answered(self.broker_state, hidden)
        self._ticks += 1
        if self._narrator is not None:
            self._narrator.tick(tick)
        return commands

    def _note_waiters(self, tick: TickStepResult) -> None:
        for result in tick.result:
            if isinstance(result, AddWaiter):
                self._held.look_again = True
                key = (tick.invocation_namespace, tick.step_id, result.waiter_id)
                # Upstream times a waiter where it is new. One that a resumed run had is timed where its step asks again.
                if result.timeout is not None and key not in self._timers:
                    self._time_waiter(key, self.deadlines.get(key, self.now() + result.timeout))
            elif isinstance(result, DeleteWaiter):
                key = (tick.invocation_namespace, tick.step_id, result.waiter_id)
                self._timers.discard(key)
                self.deadlines.pop(key, None)
                if has_failed_for_good(tick):
                    forget_waiter(self.broker_state, tick.step_id, result.waiter_id)

    def _time_waiter(self, key: WaiterKey, at: float) -> None:
        namespace, step_id, waiter_id = key
        tick = TickWaiterTimeout(step_id=step_id, waiter_id=waiter_id, invocation_namespace=namespace)
        self.deadlines[key] = at  # until its step has seen it: a snapshot may be taken before
        self._timers.schedule(at, tick, key)
        self._rearm()

    def _obey(self, command: WorkflowCommand) -> None:
        if isinstance(command, CommandPublishEvent):
            if isinstance(command.event, StopEvent):
                self._report_untaken()  # readers may stop at the stop event
            self._publish_here(command.event)
        elif isinstance(command, CommandRunWorker):
            self._start_step(command)
        elif isinstance(command, CommandQueueEvent):
            self._buffer.append(
                TickAddEvent(
                    event=command.event,
                    step_id=command.step_id,
                    origin_namespace=command.origin_namespace,
                    recovery_counts=dict(command.recovery_counts),
                    scope_path=command.scope_path,
                    emission=command.emission,
                    stamped_at=self.now(),
                )
            )
        elif isinstance(command, CommandScheduleIdleCheck):
            self._idle_check_due = True
        elif isinstance(command, CommandCompleteRun):
            self._finish(command.result)
        elif isinstance(command, (CommandFailWorkflow, CommandHalt)):
            self._finish(command.exception)
        else:
            self._obey_timer(command)

    def _obey_timer(self, command: WorkflowCommand) -> None:
        if isinstance(command, CommandScheduleWaiterTimeout):
            return  # _note_waiters did it
        if isinstance(command, CommandScheduleTimeout):
            self._timers.schedule(command.at_time, TickTimeout(timeout=command.timeout))
        elif isinstance(command, CommandScheduleWakeup):
            self._timers.schedule(command.at_time, TickWakeup(due=command.at_time))
        else:
            raise WorkflowRuntimeError(f"the broker gave a command this runtime does not know: {command!r}")
        self._rearm()

    def _rearm(self) -> None:
        """Let the driver's wait end when the next timer is due."""
        if self._timer_scope is not None:
            self._timer_scope.deadline = self._next_deadline()

    def _next_deadline(self) -> float:
        return self._timers.next_at() - self._epoch + LATE

    # Ending it

    def _finish(self, outcome: StopEvent | BaseException) -> None:
        self._report_untaken()
        self._outcome = outcome
        if isinstance(outcome, BaseException):
            self._traceback = outcome.__traceback__
        self._stream.close()
        if self._tasks is not None:
            self._tasks.cancel_scope.cancel()
        self._tell_parent()

    def _fail(self, exc: Exception) -> None:
        """End the run with an error that is not a step's: a hook's, or a fault of the broker or of this runtime."""
        if self._outcome is not None:
            return
        logger.error("run %s of %s failed inside the runtime", self.run_id, self.workflow.workflow_name, exc_info=exc)
        self._finish(exc)

    def _report_untaken(self) -> None:
        """Say which outside events nothing took, now that nothing will."""
        untaken = self._held.take_all()
        if self._buffer:
            untaken.extend(item for item in self._buffer if isinstance(item, FromOutside))
            self._buffer = deque(item for item in self._buffer if not isinstance(item, FromOutside))
        for item in untaken:
            name = type(item.tick.event).__name__
            logger.warning("run %s ended without taking an outside %s", self.run_id, name)
            try:
                self._publish_here(unhandled(item.tick, idle=self._idle))
            except Exception:
                logger.exception("a hook of run %s refused an event", self.run_id)

    def _publish_here(self, event: Event) -> None:
        if self._outcome is not None:
            return
        if self._narrator is not None:
            self._narrator.event(event)
        # Not isinstance: pydantic makes that a call in Python, and this is done for every event.
        if InternalDispatchEvent in type(event).__mro__ and not self.options.internal_events:
            return
        if self._hooks is not None:
            self._hooks.on_event(event)
        if self._outcome is None:  # the hook may have cancelled the run, whose last event is out by then
            self._stream.append(event)
