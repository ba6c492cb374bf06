"""Instrumentation: what span and event handlers see of a run, which is what they see of upstream's.

One span a run, whose parent is the span of whoever started it, and one span a step call below it, with the same ids, tags,
arguments and events. Most programs attach no handler, and then nothing of this is made: `is_watched` asks the dispatcher.
"""

from __future__ import annotations

import functools
import inspect
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio

from .live_state import still
from .upstream import (
    BrokerState,
    Dispatcher,
    Event,
    NullEventHandler,
    NullSpanHandler,
    SpanCancelledEvent,
    SpanDropEvent,
    StartEvent,
    StopEvent,
    WaitingForEvent,
    Workflow,
    WorkflowCancelledByUser,
    WorkflowRunOutputEvent,
    WorkflowStepOutputEvent,
    active_instrument_tags,
    active_span_id,
    get_dispatcher,
    instrument_tags,
    summarize_event,
    workflow_dispatcher,
)

_runs = get_dispatcher("workflows.runtime.types.step_function")


def is_watched(dispatcher: Dispatcher = _runs) -> bool:
    """Whether any span or event handler would hear of what the dispatcher dispatches."""
    current = dispatcher
    while True:
        for handler in (*current.span_handlers, *current.event_handlers):
            if not isinstance(handler, (NullSpanHandler, NullEventHandler)):
                return True
        if not current.propagate:
            return False
        current = current.parent


def _run_workflow(init_state: Any, start_event: StartEvent | None = None, tags: dict[str, Any] | None = None) -> None:
    """Never called: its signature is that of the function whose arguments upstream shows in the run's span."""


_RUN_SIGNATURE = inspect.signature(_run_workflow)


def tag_run(run_id: str) -> None:
    """Tag what the caller's context dispatches from now on with the run's id, for handlers that are attached later."""
    active_instrument_tags.set({**active_instrument_tags.get(), "llamaindex.run_id": run_id})


class RunSpan:
    """The span of one run. Enter and exit it in the context of the run's steps, so that their spans are below it.

    Args:
        workflow: The workflow, shown as the span's instance.
        run_id: Tagged as `llamaindex.run_id`.
        init_state: Shown as an argument, as upstream does.
        start_event: Shown as an argument and summarized in the tags; None for a run that is resumed.
    """

    def __init__(
        self, workflow: Workflow, run_id: str, init_state: BrokerState, start_event: StartEvent | None
    ) -> None:
        self._workflow = workflow
        # Made where the run is started: the tags and the trace of whoever starts it are the run's context.
        with instrument_tags({**active_instrument_tags.get(), "llamaindex.run_id": run_id}):
            self._context = get_dispatcher().capture_propagation_context()
        self._arguments = _RUN_SIGNATURE.bind(still(init_state), start_event, self._context)
        self._id = f"{type(workflow).__name__}.run-{uuid.uuid4()}"
        self._input = {} if start_event is None else {"llamaindex.start_event": summarize_event(start_event)}

    def enter(self) -> None:
        get_dispatcher().restore_propagation_context(self._context)
        parent = active_span_id.get()
        active_span_id.set(self._id)
        with instrument_tags({**active_instrument_tags.get(), **self._input}):
            _runs.span_enter(id_=self._id, bound_args=self._arguments, instance=self._workflow, parent_id=parent)

    def exit(self, outcome: StopEvent | BaseException) -> None:
        """Leave the span as the run ended: a result, a cancellation that somebody asked for, or an error."""
        if isinstance(outcome, StopEvent):
            _runs.event(WorkflowRunOutputEvent(output=summarize_event(outcome)))
            self._exit(outcome)
        elif isinstance(outcome, WorkflowCancelledByUser):
            _runs.event(SpanCancelledEvent(reason="workflow cancelled by user"))
            self._exit(None)
        else:
            _runs.event(SpanDropEvent(span_id=self._id, err_str=str(outcome)))
            _runs.span_drop(id_=self._id, bound_args=self._arguments, instance=self._workflow, err=outcome)

    def _exit(self, result: StopEvent | None) -> None:
        _runs.span_exit(id_=self._id, bound_args=self._arguments, instance=self._workflow, result=result)


def step_dispatcher(workflow: Workflow) -> Dispatcher | None:
    """The dispatcher of the workflow's step spans, None where nobody listens to it."""
    dispatcher = workflow_dispatcher(workflow)
    return dispatcher if is_watched(dispatcher) else None


@contextmanager
def step_tags(event: Event) -> Iterator[None]:
    """Tag what is dispatched inside the block with the event that the step was given."""
    tags = {
        "llamaindex.step.input_event": type(event).__name__,
        "llamaindex.step.input_summary": summarize_event(event),
    }
    with instrument_tags({**active_instrument_tags.get(), **tags}):
        yield


def spanned(dispatcher: Dispatcher, function: Callable[..., Any]) -> Callable[..., Any]:
    """The step function inside a span of its own. A wait or a cancellation ends the span and is no error of it."""
    if not inspect.iscoroutinefunction(function):
        return _spanned_sync(dispatcher, function)
    stopped: list[BaseException] = []

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        try:
            result = await function(*args, **kwargs)
        except WaitingForEvent as waiting:
            stopped.append(waiting)
            return None
        except anyio.get_cancelled_exc_class() as cancelled:  # noqa: ASYNC103 -- raised below, outside of the span
            _runs.event(SpanCancelledEvent(reason="step cancelled"))
            stopped.append(cancelled)
            return None  # noqa: ASYNC104
        _tell_output(result)
        return result

    inner = dispatcher.span(call)

    async def outer(*args: Any, **kwargs: Any) -> Any:
        result = await inner(*args, **kwargs)
        if stopped:
            raise stopped.pop()
        return result

    return outer


def _spanned_sync(dispatcher: Dispatcher, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        _tell_output(result)
        return result

    return dispatcher.span(call)


def _tell_output(result: Any) -> None:
    if isinstance(result, Event):
        _runs.event(WorkflowStepOutputEvent(output=summarize_event(result)))
