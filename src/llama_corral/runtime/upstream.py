"""Everything that the runtime takes from `workflows` (llama-index-workflows) stands in this module.

The public names are the package's API. The others are internals: upstream may move them, which is why pyproject bounds
the version and `tests/runtime/test_upstream.py` says clearly which name moved. Written against 2.26.1; works from 2.26.0 on,
and where that one differs it is said here.

What is taken is the pure half of upstream's broker: ticks, the reducer from state and tick to state and commands, the
state itself and its serialization. What runs them (loop, tasks, timers, locks, mailboxes) is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.dispatcher import Dispatcher, active_instrument_tags, instrument_tags
from llama_index_instrumentation.event_handlers import NullEventHandler
from llama_index_instrumentation.events.span import SpanDropEvent
from llama_index_instrumentation.span import active_span_id
from llama_index_instrumentation.span_handlers import NullSpanHandler

# Public API
from workflows import Context, Workflow

# Internals (a name that moves breaks here, at import, and in the contract test)
from workflows._event_matching import event_matches, step_accepts_event
from workflows._event_summary import summarize_event
from workflows.context import JsonSerializer
from workflows.context.context_types import SerializedContext
from workflows.context.external_context import ExternalContext
from workflows.context.internal_context import InternalContext
from workflows.context.pre_context import PreContext
from workflows.context.serializers import BaseSerializer
from workflows.context.state_store import DictState, InMemoryStateStore, infer_state_type, is_durable_serialized_state
from workflows.decorators import StepConfig
from workflows.errors import (
    ContextSerdeError,
    ContextStateError,
    WorkflowCancelledByUser,
    WorkflowRuntimeError,
    WorkflowTimeoutError,
    WorkflowValidationError,
)
from workflows.events import (
    Event,
    HumanResponseEvent,
    InputRequiredEvent,
    InternalDispatchEvent,
    StartEvent,
    StopEvent,
    UnhandledEvent,
    WorkflowIdleEvent,
)
from workflows.handler import WorkflowHandler
from workflows.plugins import basic_runtime
from workflows.retry_policy import RetryInfo, RetryPolicy
from workflows.runtime.control_loop.reduce import _decide_retry_delay as decide_retry_delay
from workflows.runtime.control_loop.reduce import _reduce_tick as reduce_tick
from workflows.runtime.runtime_decorators import BaseRuntimeDecorator
from workflows.runtime.types.commands import (
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
    WorkflowCommand,
)
from workflows.runtime.types.internal_state import BrokerConfig, BrokerState, InProgressState, InternalStepWorkerState
from workflows.runtime.types.plugin import (
    ExternalRunAdapter,
    InternalRunAdapter,
    RegisteredWorkflow,
    Runtime,
    SnapshottableAdapter,
    V2RuntimeCompatibilityShim,
    WaitResult,
    WeakIdentityKeyDictionary,
    _current_runtime,
)
from workflows.runtime.types.results import (
    AddWaiter,
    DeleteWaiter,
    InternalContextVar,
    RetryAttempt,
    RetryDecision,
    Returns,
    SentEvent,
    StepFunctionResult,
    StepWorkerContext,
    StepWorkerFailed,
    StepWorkerOutput,
    StepWorkerResult,
    StepWorkerStateContextVar,
    StepWorkerWaiter,
    WaitingForEvent,
)
from workflows.runtime.types.step_function import (
    SpanCancelledEvent,
    WorkflowRunOutputEvent,
    WorkflowStepOutputEvent,
)
from workflows.runtime.types.step_id import StepId
from workflows.runtime.types.ticks import (
    STAMPED_TICK_TYPES,
    TickAddEvent,
    TickCancelRun,
    TickIdleCheck,
    TickSessionStart,
    TickStepResult,
    TickTimeout,
    TickWaiterTimeout,
    TickWakeup,
    WorkflowTick,
)
from workflows.runtime.verbose import VerboseDecorator, _VerboseInternalRunAdapter

__all__ = (
    "STAMPED_TICK_TYPES",
    "AddWaiter",
    "BaseRuntimeDecorator",
    "BaseSerializer",
    "BrokerConfig",
    "BrokerState",
    "CommandCompleteRun",
    "CommandFailWorkflow",
    "CommandHalt",
    "CommandPublishEvent",
    "CommandQueueEvent",
    "CommandRunWorker",
    "CommandScheduleIdleCheck",
    "CommandScheduleTimeout",
    "CommandScheduleWaiterTimeout",
    "CommandScheduleWakeup",
    "Context",
    "ContextSerdeError",
    "ContextStateError",
    "DeleteWaiter",
    "DictState",
    "Dispatcher",
    "Event",
    "ExternalContext",
    "ExternalRunAdapter",
    "HumanResponseEvent",
    "InMemoryStateStore",
    "InProgressState",
    "InputRequiredEvent",
    "InternalContext",
    "InternalContextVar",
    "InternalDispatchEvent",
    "InternalRunAdapter",
    "InternalStepWorkerState",
    "JsonSerializer",
    "NullEventHandler",
    "NullSpanHandler",
    "PreContext",
    "RegisteredWorkflow",
    "RetryAttempt",
    "RetryDecision",
    "RetryInfo",
    "RetryPolicy",
    "Returns",
    "Runtime",
    "SentEvent",
    "SerializedContext",
    "SnapshottableAdapter",
    "SpanCancelledEvent",
    "SpanDropEvent",
    "StartEvent",
    "StepConfig",
    "StepFunctionResult",
    "StepId",
    "StepWorkerContext",
    "StepWorkerFailed",
    "StepWorkerOutput",
    "StepWorkerResult",
    "StepWorkerStateContextVar",
    "StepWorkerWaiter",
    "StopEvent",
    "TickAddEvent",
    "TickCancelRun",
    "TickIdleCheck",
    "TickSessionStart",
    "TickStepResult",
    "TickTimeout",
    "TickWaiterTimeout",
    "TickWakeup",
    "UnhandledEvent",
    "V2RuntimeCompatibilityShim",
    "WaitResult",
    "WaitingForEvent",
    "WeakIdentityKeyDictionary",
    "Workflow",
    "WorkflowCancelledByUser",
    "WorkflowCommand",
    "WorkflowHandler",
    "WorkflowIdleEvent",
    "WorkflowRunOutputEvent",
    "WorkflowRuntimeError",
    "WorkflowStepOutputEvent",
    "WorkflowTick",
    "WorkflowTimeoutError",
    "WorkflowValidationError",
    "active_instrument_tags",
    "active_span_id",
    "basic_runtime",
    "broker_config",
    "child_workflows",
    "context_parts",
    "context_with_face",
    "decide_retry_delay",
    "event_matches",
    "get_dispatcher",
    "has_default_runtime",
    "infer_state_type",
    "instrument_tags",
    "is_durable_serialized_state",
    "rebind",
    "reduce_tick",
    "restored_state",
    "resuming_ticks",
    "runtime_of",
    "set_default_runtime",
    "set_face",
    "stamped",
    "start_event_of",
    "step_accepts_event",
    "step_config",
    "step_functions",
    "step_version",
    "summarize_event",
    "validate_step_message",
    "validate_workflow",
    "verbose_adapter",
    "wait_of_handler",
    "workflow_concurrency",
    "workflow_dispatcher",
    "workflow_resources",
    "workflow_serializer",
    "workflow_timeout",
)


# Private attributes of upstream's objects are read here and nowhere else.


def context_with_face(face: Any) -> Context[Any]:
    """A Context that shows the given face (before, outside of or inside a run)."""
    return Context._create_face(face)


def set_face(context: Context[Any], face: Any) -> None:
    """Let an existing Context show another face: upstream does so when a run starts."""
    context._face = face


def context_parts(workflow: Workflow, context: Context[Any]) -> PreContext[Any]:
    """The start of a run from a Context: its configuration before the first run, or its state after the last one.

    Raises:
        ContextStateError: the context's run has not ended, or it is the context of a step.
    """
    face = context._face
    if isinstance(face, PreContext):
        return face
    if isinstance(face, ExternalContext):
        if face.is_running:
            raise ContextStateError("the context's run has not ended: wait for it, or use a context of its own")
        return PreContext(workflow=workflow, previous_context=face.to_dict(), serializer=face._serializer)
    raise ContextStateError("a step's own context cannot start a run")


def broker_config(workflow: Workflow) -> BrokerConfig:
    """The broker's view of the steps of a validated workflow. Upstream keeps it; 2.26.0 works it out each time."""
    kept = getattr(workflow, "_get_broker_config", None)
    return cast("BrokerConfig", kept()) if kept is not None else BrokerState.from_workflow(workflow).config


def restored_state(workflow: Workflow, pre: PreContext[Any]) -> BrokerState:
    """The state of a run that starts from what a context carries."""
    return BrokerState.from_serialized(pre.init_snapshot, workflow, pre.serializer)


def resuming_ticks(state: BrokerState) -> list[WorkflowTick]:
    """What starts the steps once more whose waiters are in a snapshot without what they required.

    Upstream starts them also where the same call is in the snapshot, at work or queued, and where the waiter has its
    answer: it would run twice.
    """
    for worker in state.workers.values():
        for waiter in worker.collected_waiters:
            if waiter.resolved_event is not None:
                waiter.has_requirements = False  # nobody needs to be asked what it required
    return [tick for tick in state.rehydrate_with_ticks() if not _is_under_way(state, tick)]


def _is_under_way(state: BrokerState, tick: WorkflowTick) -> bool:
    if not isinstance(tick, TickAddEvent) or tick.work_item_id is None:
        return False
    worker = state.workers[tick.step_id]
    known = {call.work_item_id for call in worker.in_progress} | {call.work_item_id for call in worker.queue}
    return tick.work_item_id in known


def start_event_of(workflow: Workflow, start_event: StartEvent | None, kwargs: dict[str, Any]) -> StartEvent:
    """The start event as `workflow.run()` would make it; raises as it does."""
    return workflow._get_start_event_instance(start_event, **kwargs)


def stamped(tick: WorkflowTick, now: float) -> WorkflowTick:
    """The tick with the time at which it is reduced, if it is of a kind that carries one and has none."""
    if type(tick) in STAMPED_TICK_TYPES and tick.stamped_at is None:  # type: ignore[union-attr]
        return tick.model_copy(update={"stamped_at": now})
    return tick


def step_functions(workflow: Workflow) -> dict[str, Any]:
    """Steps by name. Costly: it inspects the instance; ask once a workflow."""
    return dict(workflow._get_steps())


def step_config(function: Any) -> StepConfig:
    """What the @step decorator noted on a step function."""
    return cast("StepConfig", function._step_config)


def step_version(workflow: Workflow) -> int:
    """Grows when a free-function step is added to the workflow's class."""
    return type(workflow)._step_functions_version


def validate_workflow(workflow: Workflow) -> None:
    """Raise WorkflowValidationError for a workflow that `workflow.run()` would refuse; cached by upstream."""
    workflow._validate()


def validate_step_message(workflow: Workflow, step: str, message: Event) -> None:
    """Raise WorkflowRuntimeError if the step does not exist or does not accept the event."""
    workflow._validate_valid_step_message(step, message)


def workflow_timeout(workflow: Workflow) -> float | None:
    return workflow._timeout


def workflow_resources(workflow: Workflow) -> dict[str, Any]:
    """Resources made so far, by name: shared by all runs of the workflow."""
    return workflow._resource_manager.resources


def workflow_serializer(workflow: Workflow) -> BaseSerializer:
    """The workflow's own serializer, or the default with its event and state types allowed."""
    return workflow.runtime.get_serializer(workflow)


def workflow_dispatcher(workflow: Workflow) -> Dispatcher:
    """Where the spans of the workflow's steps are dispatched."""
    return workflow._dispatcher


def workflow_concurrency(workflow: Workflow) -> int | None:
    """`num_concurrent_runs`: how many runs of this instance may be active, None for any number."""
    return workflow._num_concurrent_runs


def verbose_adapter(workflow: Workflow, adapter: InternalRunAdapter) -> InternalRunAdapter | None:
    """For a workflow with `verbose=True` an adapter that prints upstream's lines and passes on to the given one."""
    runtime = workflow._runtime
    while isinstance(runtime, BaseRuntimeDecorator):
        if isinstance(runtime, VerboseDecorator):
            return _VerboseInternalRunAdapter(adapter, runtime._output)
        runtime = runtime._decorated
    return None


def child_workflows(workflow: Workflow) -> list[Workflow]:
    """Workflows that are attributes of the workflow and run on upstream's default runtime."""
    return [
        value
        for value in vars(workflow).values()
        if isinstance(value, Workflow) and _innermost(value._runtime) is basic_runtime
    ]


def _innermost(runtime: Runtime) -> Runtime:
    while type(runtime) is VerboseDecorator:
        runtime = runtime._decorated
    return runtime


def wait_of_handler() -> Callable[..., Any]:
    """What the task of a WorkflowHandler runs."""
    return WorkflowHandler._wait_for_result


def runtime_of(workflow: Workflow) -> Runtime:
    """The runtime that `workflow.run()` goes through."""
    return workflow._runtime


def rebind(workflow: Workflow, runtime: Runtime) -> None:
    """Let `workflow.run()` go through a runtime that stands in front of the one that it has. Upstream's own way refuses a
    workflow that has run, because another runtime would not know of its runs; one in front passes on what it is asked."""
    workflow._runtime = runtime


def set_default_runtime(runtime: Runtime) -> None:
    """The runtime of workflows that are made in the caller's context from now on, as upstream's `registering()` sets it."""
    _current_runtime.set(runtime)


def has_default_runtime() -> bool:
    """Whether the caller is inside of somebody's `registering()`."""
    return _current_runtime.get() is not None
