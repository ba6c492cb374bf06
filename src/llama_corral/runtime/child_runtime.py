"""Plain `await OtherWorkflow().run()` inside of a step: the run belongs to the run of that step.

Upstream starts such a run as a task that nobody owns. Workflows that a step makes, and those that are attributes of a
workflow that runs here, get a runtime that starts their runs inside of the step's run, and everywhere else does what
upstream's does.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from ..aio import caller_library, free_tasks_of
from ..exceptions import FlavourError
from .launch import Launch
from .live_state import fresh_state
from .nesting import current_activity
from .upstream import (
    BaseRuntimeDecorator,
    BaseSerializer,
    BrokerState,
    ExternalRunAdapter,
    StartEvent,
    Workflow,
    basic_runtime,
    child_workflows,
    has_default_runtime,
    rebind,
    runtime_of,
    set_default_runtime,
    wait_of_handler,
)

if TYPE_CHECKING:
    from .run import Run


class NestingRuntime(BaseRuntimeDecorator):
    """Upstream's runtime, except for runs that a step of ours starts."""

    def run_workflow(
        self,
        run_id: str,
        workflow: Workflow,
        init_state: BrokerState,
        start_event: StartEvent | None = None,
        serialized_state: dict[str, Any] | None = None,
        serializer: BaseSerializer | None = None,
    ) -> ExternalRunAdapter:
        launch = Launch(run_id, workflow, init_state, start_event, serialized_state, serializer)
        child = start_as_child(launch)
        if child is not None:
            return child
        return super().run_workflow(run_id, workflow, init_state, start_event, serialized_state, serializer)

    def track_workflow(self, workflow: Workflow) -> None:
        """Nothing to note: nothing is launched, and one runtime is shared by everything that nests."""

    def untrack_workflow(self, workflow: Workflow) -> None:
        """Nothing was noted."""


_nesting = NestingRuntime(basic_runtime)

# A handler waits in a task of its own for its run, which may outlive the step that started it, and ends with it.
free_tasks_of(wait_of_handler())


def bind_children(workflow: Workflow) -> None:
    """Let runs of workflows that are attributes of this one belong to the run of the step that starts them."""
    for child in child_workflows(workflow):
        runtime = runtime_of(child)
        rebind(child, _nesting if runtime is basic_runtime else NestingRuntime(runtime))


def nest_by_default() -> None:
    """The same for workflows that are made in the caller's context, unless somebody chose a runtime for them."""
    if not has_default_runtime():
        set_default_runtime(_nesting)


def start_child_run(workflow: Workflow, start_event: StartEvent) -> Run | None:
    """Start a run inside of the run whose step the caller is, in either library; None where the caller is no step, or its
    run is ending."""
    activity = current_activity()
    if activity is None or activity.run is None or caller_library() is None:
        return None
    bind_children(workflow)
    return activity.run.start_child(Launch(secrets.token_hex(8), workflow, fresh_state(workflow), start_event))


def start_as_child(launch: Launch) -> ExternalRunAdapter | None:
    """Start a run inside of the run whose step the caller is; None where the caller is no step, or its run is ending.

    Raises:
        FlavourError: the step speaks Trio, in which upstream's handler cannot be awaited.
    """
    activity = current_activity()
    library = caller_library()
    if activity is None or activity.run is None or library is None:
        return None
    if library == "trio":
        raise FlavourError(
            f"step {activity.step!r} speaks Trio and cannot await {launch.workflow.workflow_name}.run(): upstream's "
            "handler is made of asyncio tasks",
            hint="await run_workflow(workflow, ...) or use open_run; or set the step flavour to 'asyncio'",
            step=activity.step,
            flavour="anyio",
        )
    bind_children(launch.workflow)
    child = activity.run.start_child(launch)
    return child.adapter if child is not None else None
