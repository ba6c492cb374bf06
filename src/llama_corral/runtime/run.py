"""One run of a workflow: upstream's pure reducer driven inside one task group.

Ticks are reduced where they arise, in sync code (`RunCore`): in the task of the step that ended, in the task that sent an
event. So there is no loop task to wake for each of them. One driver task owns the run's task group and its timers, and
reduces what comes from where the task group cannot be touched: code of the other library in the same thread. Worker
threads hop into the loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import Context as ContextVars
from contextvars import copy_context
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel

from ..aio import caller_library, in_foreign_library
from ..exceptions import MailboxFull, RunClosed
from .core import RunCore
from .faces import OutsideFace, RunAdapter, StepFace
from .hooks import RunHooks
from .mailbox import FromOutside
from .options import INTERNAL_MAILBOX, RunOptions, RunStatistics
from .registry import RegisteredWorkflow, register
from .state import RunStateStore, open_state
from .step import StepCall, call_step, result_tick
from .stream import Bell, EventReader
from .upstream import (
    BrokerState,
    CommandRunWorker,
    Context,
    Event,
    InProgressState,
    PreContext,
    StartEvent,
    StepId,
    StopEvent,
    TickAddEvent,
    TickCancelRun,
    TickSessionStart,
    TickStepResult,
    TickTimeout,
    Workflow,
    WorkflowRuntimeError,
    WorkflowTick,
    context_with_face,
    resuming_ticks,
    validate_step_message,
    workflow_serializer,
    workflow_timeout,
)


class Run(RunCore):
    """A run of a workflow. Made by `open_run`; `drive` must be running for anything to happen."""

    def __init__(
        self,
        workflow: Workflow,
        *,
        start_event: StartEvent | None,
        pre: PreContext[Any] | None = None,
        run_id: str | None = None,
        hooks: RunHooks | None = None,
        options: RunOptions | None = None,
    ) -> None:
        super().__init__(workflow, pre=pre, run_id=run_id, hooks=hooks, options=options)
        self._registered: RegisteredWorkflow = register(workflow)
        self.store: RunStateStore = open_state(workflow, self._registered.state_type, pre)
        self._start_event = start_event
        self._serializer = pre.serializer if pre is not None else None
        self._adapter = RunAdapter(self)
        self._step_context: Context[Any] = context_with_face(StepFace(self._adapter, workflow, self))
        self._outside_context: Context[Any] | None = None

        self._backend = caller_library() or "asyncio"
        self._thread = threading.get_ident()
        self._token = anyio.lowlevel.current_token()
        self._vars: ContextVars | None = None
        self._driven = False
        self._wake = anyio.Event()
        self._closed = False
        self._on_closed = Bell()

    # Looking at it

    @property
    def is_done(self) -> bool:
        """True from the ending on, whether with a result or not. Steps that were still working may be unwinding."""
        return self._outcome is not None

    @property
    def is_idle(self) -> bool:
        """True while no step is working and only an outside event or a timer can change that."""
        return self._idle and self._outcome is None

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
        if self._outside_context is None:
            self._outside_context = context_with_face(self.outside_face())
        return self._outside_context

    def adopt_context(self, context: Context[Any]) -> None:
        """Let the Context that the run was started with show this run from now on."""
        self._outside_context = context

    def outside_face(self) -> OutsideFace:
        """A face for a Context that is to show this run from outside."""
        return OutsideFace(self.workflow, self._adapter, self._serializer or workflow_serializer(self.workflow))

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

    def now(self) -> float:
        """Seconds since the epoch, moved by the backend's clock."""
        if threading.get_ident() != self._thread:
            return float(anyio.from_thread.run_sync(self.now, token=self._token))
        return super().now()

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
        while not self._closed:
            await self._on_closed.wait()
        stop = self.stop_event
        assert stop is not None
        return stop

    async def result(self) -> Any:
        """What `await workflow.run()` returns: the stop event's result, or the stop event if it is of an own class.

        Raises:
            WorkflowTimeoutError, WorkflowCancelledByUser, RunClosed, and what a step raised.
        """
        stop = await self.wait_stop_event()
        return stop.result if type(stop) is StopEvent else stop

    def events(self) -> EventReader:
        """Published events from the first one in the ring on, until the run has ended. Any number of readers."""
        return EventReader(self._stream, self.run_id)

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
        if threading.get_ident() != self._thread:
            self._from_thread(self._post_here, tick)
        else:
            self._post_here(tick)

    def _post_here(self, tick: WorkflowTick | FromOutside) -> None:
        if self._outcome is not None:
            return  # the late result of an abandoned step: nobody waits for it
        self._buffer.append(tick)
        if in_foreign_library(self._backend):
            self._wake.set()  # its task group cannot be touched from here: the driver reduces
        else:
            self._drain()

    def _from_thread(self, function: Callable[[Any], None], argument: Any) -> None:
        try:
            anyio.from_thread.run_sync(function, argument, token=self._token)
        except anyio.RunFinishedError as exc:
            if self._outcome is None:
                raise RunClosed(f"run {self.run_id} was closed", run_id=self.run_id) from exc

    def publish(self, event: Event) -> None:
        """Publish an event to the hooks and the readers. Dropped once the run has ended."""
        if threading.get_ident() != self._thread:
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
            async with anyio.create_task_group() as self._tasks:
                self._vars = copy_context()
                self._begin()
                while self._outcome is None:
                    with anyio.CancelScope(deadline=self._next_deadline()) as self._timer_scope:
                        await self._wake.wait()
                    self._timer_scope = None
                    self._wake = anyio.Event()
                    self._buffer.extend(self._timers.take_due(self.now()))
                    self._drain()
                self._tasks.cancel_scope.cancel()
        finally:
            self._close()

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
        self._buffer.extend(resuming_ticks(self.broker_state))
        if self._start_event is not None:
            self._buffer.append(TickAddEvent(event=self._start_event, stamped_at=start))
        self._buffer.extend(early)
        self._drain()

    def _close(self) -> None:
        if self._outcome is None:
            self._outcome = RunClosed(f"run {self.run_id} was closed before it ended", run_id=self.run_id)
            # What is coming from outside stays with what is held: its owner may hand it to whoever resumes the run.
            for item in self._buffer:
                if isinstance(item, FromOutside):
                    self._held.add(item)
        self._tasks = None
        self._buffer.clear()
        self._stream.close()
        self._closed = True
        self._on_closed.ring()

    # Steps

    def _start_step(self, command: CommandRunWorker) -> None:
        assert self._tasks is not None
        assert self._vars is not None
        worker = self._in_progress(command)
        self._working += 1
        self._idle = False
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
        broker = self.broker_state
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
        name = str(command.step_id)
        # A step that swallows its cancellation returns an event like any other; what that starts ends here.
        await anyio.lowlevel.checkpoint_if_cancelled()
        if self._hooks is not None:
            await self._hooks.before_step(name)
        outputs = await call_step(
            StepCall(
                workflow=self.workflow,
                spec=self._registered.steps[name],
                context=self._step_context,
                command=command,
                worker=worker,
                flavour=self.options.flavour,
                backend=self._backend,
                limiter=self.options.sync_limiter,
                now=self.now,
            )
        )
        policy = self._broker(command.invocation_namespace).workers[command.step_id].config.retry_policy
        return result_tick(command, worker, outputs, policy=policy, run_id=self.run_id, now=self.now())
