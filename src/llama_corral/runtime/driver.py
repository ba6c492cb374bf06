"""The acting half of a run: one task group, the step calls in it, the timers, and the ways in from everywhere.

Ticks are reduced where they arise, in sync code (`RunCore`): in the task of the step that ended, in the task that sent an
event. So there is no loop task to wake for each of them. One driver task owns the run's task group and its timers, and
does what must be done from where the task group cannot be touched: code of the other library in the same thread. Worker
threads hop into the loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import Context as ContextVars
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

import anyio
import anyio.from_thread
import anyio.lowlevel

from ..aio import Bell, in_foreign_library
from ..exceptions import MailboxFull, RunClosed
from .child_runtime import nest_by_default
from .deadlines import Deadlines, timed_at_once
from .faces import RunAdapter, StepFace
from .family import RunFamily
from .home import Home
from .hooks import RunHooks
from .live_state import LiveBrokerState
from .mailbox import FromOutside
from .nesting import StepActivity
from .options import INTERNAL_MAILBOX, RunOptions
from .registry import register, turns_of
from .spans import RunSpan, is_watched, tag_run
from .state import RunStateStore, fresh_store
from .step import StepCall, call_step, result_tick
from .upstream import (
    BaseSerializer,
    BrokerState,
    CommandRunWorker,
    Context,
    Event,
    InProgressState,
    StartEvent,
    TickAddEvent,
    TickSessionStart,
    TickStepResult,
    TickTimeout,
    Workflow,
    WorkflowRuntimeError,
    WorkflowTick,
    context_with_face,
    resuming_ticks,
    workflow_timeout,
)

if TYPE_CHECKING:
    from .run import Run


class RunDriver(RunFamily):
    """What a run does. `Run` adds the public side."""

    def __init__(
        self,
        workflow: Workflow,
        *,
        state: LiveBrokerState,
        store: RunStateStore | None,
        start_event: StartEvent | None,
        serializer: BaseSerializer | None = None,
        run_id: str | None = None,
        hooks: RunHooks | None = None,
        options: RunOptions | None = None,
        home: Home | None = None,
        deadlines: Deadlines | None = None,
    ) -> None:
        super().__init__(
            workflow, state=state, run_id=run_id, hooks=hooks, options=options, home=home, deadlines=deadlines
        )
        self._store = store
        self._serializer = serializer
        self._start_event = start_event
        self._registered = register(workflow)
        self._turns = turns_of(workflow, self._registered)
        self._has_turn = False
        self._span = RunSpan(workflow, self.run_id, state, start_event) if is_watched() else None
        face = StepFace(self.adapter, workflow, self._as_run())
        self._step_context: Context[Any] | None = context_with_face(face)

        self._vars: ContextVars | None = None
        self._driven = False
        self._closed = False
        self._on_closed = Bell()

    @property
    def adapter(self) -> RunAdapter:
        """The run as upstream's contexts and handlers want to see it."""
        return RunAdapter(self._as_run())

    @property
    def store(self) -> RunStateStore:
        """`ctx.store` of the run. Made when it is first asked for: it costs a tenth of a small run, and many ask never."""
        if self._store is None:
            self._store = fresh_store(self._registered.state_type)
        return self._store

    def now(self) -> float:
        """Seconds since the epoch, moved by the backend's clock."""
        if threading.get_ident() != self._home.thread:
            return float(anyio.from_thread.run_sync(self.now, token=self._home.token))
        return super().now()

    # Ticks from everywhere

    def post_from_outside(self, tick: WorkflowTick) -> None:
        """A tick from outside of the run. Raises as `send_event` does."""
        if self._outcome is not None:
            raise RunClosed(f"run {self.run_id} has ended and takes no more events", run_id=self.run_id)
        if not isinstance(tick, TickAddEvent):
            self._post(tick)
            return
        if len(self._held) + len(self._buffer) >= self.options.mailbox:
            raise MailboxFull(
                f"run {self.run_id} holds {self.options.mailbox} events that it has not taken",
                hint="send again when it has taken some, or raise mailbox",
                run_id=self.run_id,
            )
        self._post(FromOutside(tick))

    def post_from_step(self, tick: WorkflowTick, step: str) -> None:
        """An event that a step sent. Raises MailboxFull in the step where too many wait."""
        waiting = len(self._buffer) + sum(len(worker.queue) for worker in self.broker_state.workers.values())
        if waiting >= INTERNAL_MAILBOX:
            raise MailboxFull(
                f"step {step!r} of run {self.run_id} sent an event while {waiting} wait that no step has taken",
                hint="give the receiving step more workers, or send fewer at a time",
                run_id=self.run_id,
                step=step,
            )
        self._post(tick)

    def _post(self, tick: WorkflowTick | FromOutside) -> None:
        if threading.get_ident() != self._home.thread:
            self._from_thread(self._post_here, tick)
        else:
            self._post_here(tick)

    def _post_here(self, tick: WorkflowTick | FromOutside) -> None:
        if self._outcome is not None:
            return  # the late result of an abandoned step: nobody waits for it
        self._buffer.append(tick)
        self._drain_soon()

    def _from_thread(self, function: Callable[[Any], None], argument: Any) -> None:
        try:
            anyio.from_thread.run_sync(function, argument, token=self._home.token)
        except anyio.RunFinishedError as exc:
            if self._outcome is None:
                raise RunClosed(f"run {self.run_id} was closed", run_id=self.run_id) from exc

    def publish(self, event: Event) -> None:
        """Publish an event to the hooks and the readers. Dropped once the run has ended."""
        if threading.get_ident() != self._home.thread:
            self._from_thread(self._publish_here, event)
        else:
            self._publish_here(event)

    # Driving it

    async def drive(self) -> None:
        """Run until the end. Everything that the run starts is inside; cancelling the caller cancels all of it.

        Never raises what the workflow raised: that is the outcome. Returns when every step has unwound.
        """
        if self._driven:
            raise RuntimeError(f"run {self.run_id} was already driven")
        self._driven = True
        try:
            if self._parent is None or self._parent.run is None or self._adopted_by is not None:
                await self._drive()
            else:
                await self._drive_in_step(self._parent.run)
        finally:
            if self._has_turn and self._turns is not None:
                self._turns.release()
            self._close()

    async def _drive_in_step(self, parent: Run) -> None:
        """Drive in a task of the step that started the run."""
        # In the other library it ends with its step; and what the clean-up of a step runs, that ends.
        if in_foreign_library(parent.home.backend) or parent.is_ending:
            await self.wait_as_parent(self._is_open, self._drive)
        else:  # whatever task this is, a thread's for one, it does not outlive the run around
            with anyio.CancelScope() as scope, parent.until_end(scope):
                await self.wait_as_parent(self._is_open, self._drive)

    async def _drive(self) -> None:
        async with anyio.create_task_group() as self._tasks:
            self._wake = anyio.Event()
            # The run's own copy: what is set for its steps is nothing to the caller's task.
            self._vars = copy_context()
            self._vars.run(self._set_variables)
            try:
                self._start()
                while self._outcome is None:
                    with anyio.CancelScope(deadline=self._next_deadline()) as self._timer_scope:
                        await self._wake.wait()
                    self._timer_scope = None
                    self._wake = anyio.Event()
                    self._start_adopted()
                    self._buffer.extend(self._timers.take_due(self.now()))
                    self._drain()
            finally:
                self._dismiss()
                self._tasks.cancel_scope.cancel()
                if self._hooks is not None and (self._working or self._adopted or self._until_end):
                    self._hooks.on_unwinding()
        if self._until_end:
            await self._wait_children()

    def _is_open(self) -> bool:
        return not self._closed

    def _set_variables(self) -> None:
        nest_by_default()
        if self._span is not None:
            self._span.enter()
        else:
            tag_run(self.run_id)

    def _start(self) -> None:
        assert self._tasks is not None
        if self._turns is None:
            self._begin()
        elif self._turns.acquire_nowait():
            self._has_turn = True
            self._begin()
        else:
            self._tasks.start_soon(self._wait_turn, self._turns, name=f"turn of run {self.run_id}")
            self._become_idle()
            self._drain()  # it may have been cancelled before it was driven

    async def _wait_turn(self, turns: Any) -> None:
        await turns.acquire()
        self._has_turn = True
        self._begin()

    def _begin(self) -> None:
        """The opening ticks, in upstream's order, before whatever was sent while the run was not yet driven."""
        start = self.now()
        early = list(self._buffer)
        self._buffer.clear()
        self._buffer.append(TickSessionStart(stamped_at=start))
        timeout = workflow_timeout(self.workflow)
        if timeout is not None:
            remaining = timeout - self.broker_state.elapsed_alive
            if remaining <= 0:
                self._buffer.append(TickTimeout(timeout=timeout))
            else:
                self._timers.schedule(start + remaining, TickTimeout(timeout=timeout))
        for key, at in timed_at_once(self.broker_state, self.deadlines).items():
            self._time_waiter(key, at)
        self._buffer.extend(resuming_ticks(self.broker_state))
        if self._start_event is not None:
            self._buffer.append(TickAddEvent(event=self._start_event, stamped_at=start))
        self._buffer.extend(early)
        self._begun = True
        self._drain()
        self._rearm()

    def _close(self) -> None:
        if self._outcome is None:
            self._outcome = RunClosed(f"run {self.run_id} was closed before it ended", run_id=self.run_id)
            # What is coming from outside stays with what is held: its owner may hand it to whoever resumes the run.
            for item in self._buffer:
                if isinstance(item, FromOutside):
                    self._held.add(item)
        self._tasks = None
        # A run that has ended is part of no cycle: it goes when its last user does, and not when garbage is collected.
        self._step_context = None
        self._hooks = None
        self._buffer.clear()
        self._stream.close()
        if self._span is not None and self._vars is not None:
            self._vars.run(self._span.exit, self._outcome)
        self._closed = True
        self._on_closed.ring()
        if self._parent is not None:
            self._parent.remove_child(self)
        if self._adopted_by is not None:
            self._adopted_by.adopted_ended(self)
            self._adopted_by = None

    def close_undriven(self) -> None:
        """End a run that nobody will drive."""
        if not self._driven:
            self._driven = True
            self._close()

    # Steps

    def _start_step(self, command: CommandRunWorker) -> None:
        assert self._tasks is not None
        assert self._vars is not None
        if self._is_leaving:  # cancelled from outside: the task group takes nobody in any more
            return
        worker = self._in_progress(command)
        self._working += 1
        self._end_idleness()
        # A task inherits the context variables of whoever starts it. Steps get the run's, not those of whoever happened
        # to send the event.
        self._vars.run(self._tasks.start_soon, self._work, command, worker)

    def _in_progress(self, command: CommandRunWorker) -> InProgressState:
        broker = self._broker(command.invocation_namespace)
        for worker in broker.workers[command.step_id].in_progress:
            if worker.invocation_id == command.invocation_id:
                return worker
        raise WorkflowRuntimeError(f"the broker lost invocation {command.invocation_id} of step {command.step_id}")

    def _broker(self, namespace: tuple[str, ...]) -> BrokerState:
        broker: BrokerState = self.broker_state
        for segment in namespace:
            broker = broker.children[segment]
        return broker

    async def _work(self, command: CommandRunWorker, worker: InProgressState) -> None:
        """The task of one step call. Ends with its result reduced, or cancelled without a trace."""
        try:
            tick = await self._call(command, worker)
        except Exception as exc:  # not the step's own: that is in its result
            self._fail(exc)
            return
        finally:
            self._working -= 1
        self._post_here(tick)

    async def _call(self, command: CommandRunWorker, worker: InProgressState) -> TickStepResult:
        # A step that swallows its cancellation returns an event like any other; what that starts ends here.
        await anyio.lowlevel.checkpoint_if_cancelled()
        name = str(command.step_id)
        if self._hooks is not None or self._parent is not None:
            await self._wait_slot(name)
        assert self._step_context is not None
        spec = self._registered.steps[name]
        if not spec.is_async:
            self.store  # noqa: B018 -- made here, and not by two threads at once
        call = "/".join((*command.invocation_namespace, f"{worker.work_item_id}.{worker.attempts}"))
        activity = StepActivity(self._as_run(), name, call, threaded=not spec.is_async)
        try:
            outputs = await call_step(
                StepCall(
                    workflow=self.workflow,
                    run_id=self.run_id,
                    spec=spec,
                    context=self._step_context,
                    command=command,
                    worker=worker,
                    flavour=spec.flavour or self.options.flavour,
                    backend=self._home.backend,
                    limiter=self.options.sync_limiter,
                    now=self.now,
                    activity=activity,
                )
            )
        finally:
            activity.close()
        policy = self._broker(command.invocation_namespace).workers[command.step_id].config.retry_policy
        return result_tick(command, worker, outputs, policy=policy, run_id=self.run_id, now=self.now())
