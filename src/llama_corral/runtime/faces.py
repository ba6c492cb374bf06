"""The faces of upstream's Context inside and outside a run of ours.

Upstream's faces start an asyncio task for every event that is sent or published. Ours act at once: sending and
publishing are synchronous, so there is nothing in flight when a step returns.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from .deadlines import carry_deadlines
from .inline import drive_inline
from .nesting import current_activity
from .state import RunStateStore
from .thread import in_abandoned_thread
from .upstream import (
    BaseSerializer,
    BrokerState,
    Event,
    ExternalContext,
    ExternalRunAdapter,
    InternalContext,
    InternalRunAdapter,
    RetryInfo,
    SnapshottableAdapter,
    StepId,
    StepWorkerStateContextVar,
    StopEvent,
    TickAddEvent,
    V2RuntimeCompatibilityShim,
    WaitResult,
    Workflow,
    WorkflowTick,
    validate_step_message,
)

if TYPE_CHECKING:
    from .run import Run


class StepFace(InternalContext[Any]):
    """What `ctx` shows inside a step."""

    def __init__(self, adapter: RunAdapter, workflow: Workflow, run: Run) -> None:
        super().__init__(adapter, workflow)
        self._run = run

    def send_event(self, message: Event, step: str | None = None) -> None:
        if step is not None:
            validate_step_message(self._workflow, step, message)
        if in_abandoned_thread():  # the run may still be unwinding; this came too late
            return
        step_id = StepId.root(step) if step is not None else None
        recovery_counts: dict[str, int] = {}
        emission = None
        sender = ""
        activity = current_activity()
        step_context = StepWorkerStateContextVar.get(None)
        # A step of another run, a child for one, may hold this context: its sends are no part of its own result.
        if step_context is not None and activity is not None and activity.run is self._run:
            sender = step_context.state.step_name
            recovery_counts = dict(step_context.retry.recovery_counts)
            # With its key in the step's result, a resumed run re-sends an event whose tick was lost, once.
            emission = step_context.record_send(message, step_id, recovery_counts)
        self._run.post_from_step(
            TickAddEvent(event=message, step_id=step_id, recovery_counts=recovery_counts, emission=emission), sender
        )

    def write_event_to_stream(self, ev: Event | None) -> None:
        if ev is not None and not in_abandoned_thread():
            self._run.publish(ev)

    def retry_info(self) -> RetryInfo:
        # Upstream reads the wall clock here; ours is the run's clock, so that tests can move it.
        retry = self._get_step_ctx(fn="retry_info").retry
        first = retry.first_attempt_at if retry.retry_number > 0 else 0.0
        failed_at = retry.last_failed_at
        return RetryInfo(
            retry_number=retry.retry_number,
            elapsed_seconds=max(0.0, self._run.now() - first) if first else 0.0,
            last_exception=retry.last_exception,
            last_failed_at=datetime.fromtimestamp(failed_at, tz=UTC) if failed_at is not None else None,
        )

    def _execute_task(self, coro: Coroutine[Any, Any, Any]) -> Any:
        return drive_inline(coro)

    def cancel_background_tasks(self) -> None:
        """Nothing to do: there are none."""


class OutsideFace(ExternalContext[Any, Any]):
    """What a Context shows while and after it was run, to whoever holds the run."""

    def _execute_task(self, coro: Coroutine[Any, Any, Any]) -> Any:
        return drive_inline(coro)

    @property
    def _state(self) -> BrokerState:
        # Upstream replays the run's whole tick log here; we keep the state itself and no log (P12).
        return self._run.broker_state

    @property
    def _run(self) -> Run:
        adapter = self._external_adapter
        assert isinstance(adapter, RunAdapter)
        return adapter._run

    def to_dict(self, serializer: BaseSerializer | None = None, *, include_state: bool = True) -> dict[str, Any]:
        snapshot = super().to_dict(serializer, include_state=include_state)
        if include_state:
            carry_deadlines(self._run.broker_state, self._run.deadlines, snapshot["state"])
        return snapshot


class RunAdapter(InternalRunAdapter, ExternalRunAdapter, SnapshottableAdapter, V2RuntimeCompatibilityShim):
    """The run as upstream's contexts want to see it, from both sides."""

    def __init__(self, run: Run) -> None:
        self._run = run

    @property
    def run_id(self) -> str:
        return self._run.run_id

    @property
    def init_state(self) -> BrokerState:
        return self._run.broker_state

    def replay(self) -> list[WorkflowTick]:
        return []

    async def write_to_event_stream(self, event: Event) -> None:
        self._run.publish(event)

    async def get_now(self) -> float:
        return self._run.now()

    async def send_event(self, tick: WorkflowTick) -> None:
        self._run.post_from_outside(tick)

    async def wait_receive(self, timeout_seconds: float | None = None) -> WaitResult:
        raise RuntimeError("this runtime has no mailbox to wait on")

    async def close(self) -> None:
        self._run.cancel()

    def get_state_store(self, namespace: tuple[str, ...] = ()) -> RunStateStore | None:
        return None if namespace else self._run.store

    def stream_published_events(self) -> AsyncGenerator[Event, None]:
        return _as_generator(self._run)

    async def get_result(self) -> StopEvent:
        return await self._run.wait_stop_event()

    def get_result_or_none(self) -> StopEvent | None:
        return self._run.stop_event

    @property
    def is_running(self) -> bool:
        return not self._run.is_done

    def abort(self) -> None:
        self._run.cancel()


async def _as_generator(run: Run) -> AsyncGenerator[Event, None]:  # noqa: ASYNC900 -- upstream wants one; it owns nothing
    async for event in run.events():
        yield event
