"""Everything that the runtime takes from `workflows` (llama-index-workflows) stands in this module.

The public names are the package's API. The others are internals: upstream may move them, which is why pyproject bounds
the version and `tests/runtime/test_upstream.py` says clearly which name moved. Written against 2.26.

What is taken is the pure half of upstream's broker: ticks, the reducer from state and tick to state and commands, the
state itself and its serialization. What runs them (loop, tasks, timers, locks, mailboxes) is ours.
"""

from __future__ import annotations

from typing import Any, cast

# Public API
from workflows import Context, Workflow

# Internals (a name that moves breaks here, at import, and in the contract test)
from workflows._event_matching import event_matches, step_accepts_event
from workflows.context import JsonSerializer
from workflows.context.context_types import SerializedContext
from workflows.context.external_context import ExternalContext
from workflows.context.internal_context import InternalContext
from workflows.context.pre_context import PreContext
from workflows.context.serializers import BaseSerializer
from workflows.context.state_store import InMemoryStateStore, infer_state_type, is_durable_serialized_state
from workflows.decorators import StepConfig
from workflows.errors import (
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
from workflows.retry_policy import RetryInfo, RetryPolicy
from workflows.runtime.control_loop.reduce import _decide_retry_delay as decide_retry_delay
from workflows.runtime.control_loop.reduce import _reduce_tick as reduce_tick
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
from workflows.runtime.types.internal_state import BrokerState, InProgressState
from workflows.runtime.types.plugin import (
    ExternalRunAdapter,
    InternalRunAdapter,
    SnapshottableAdapter,
    V2RuntimeCompatibilityShim,
    WaitResult,
    WeakIdentityKeyDictionary,
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

__all__ = (
    "STAMPED_TICK_TYPES",
    "AddWaiter",
    "BaseSerializer",
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
    "ContextStateError",
    "DeleteWaiter",
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
    "JsonSerializer",
    "PreContext",
    "RetryAttempt",
    "RetryDecision",
    "RetryInfo",
    "RetryPolicy",
    "Returns",
    "SentEvent",
    "SerializedContext",
    "SnapshottableAdapter",
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
    "WorkflowIdleEvent",
    "WorkflowRuntimeError",
    "WorkflowTick",
    "WorkflowTimeoutError",
    "WorkflowValidationError",
    "broker_state",
    "context_parts",
    "context_with_face",
    "decide_retry_delay",
    "event_matches",
    "infer_state_type",
    "is_durable_serialized_state",
    "reduce_tick",
    "resuming_ticks",
    "set_face",
    "stamped",
    "start_event_of",
    "step_accepts_event",
    "step_config",
    "step_functions",
    "step_version",
    "validate_step_message",
    "validate_workflow",
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


def broker_state(workflow: Workflow, pre: PreContext[Any] | None) -> BrokerState:
    """The state a run starts from: fresh, or what a context carries."""
    if pre is None:
        return BrokerState.from_workflow(workflow)
    state = BrokerState.from_serialized(pre.init_snapshot, workflow, pre.serializer)
    for worker in state.workers.values():
        for waiter in worker.collected_waiters:
            # It requires nothing any more: nobody needs to ask its step (see `resuming_ticks`).
            if waiter.resolved_event is not None:
                waiter.has_requirements = False
    return state


def resuming_ticks(state: BrokerState) -> list[WorkflowTick]:
    """What starts the steps once more whose waiters are in a snapshot without what they required.

    Upstream starts them also where the same call is in the snapshot, at work or queued: it would run twice.
    """
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
    if isinstance(tick, STAMPED_TICK_TYPES) and tick.stamped_at is None:
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
