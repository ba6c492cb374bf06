"""`open_run` and `run_workflow`: a workflow's run as a block."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio

from ..aio import caller_library, open_asyncio_loop
from .checks import check_run
from .child_runtime import bind_children
from .deadlines import carried_deadlines
from .hooks import RunHooks
from .live_state import fresh_state, live
from .options import DEFAULT_EVENT_BUFFER, DEFAULT_MAILBOX, RunOptions, StepFlavour
from .run import Run
from .scope import open_owned_tasks
from .state import open_state
from .upstream import (
    Context,
    StartEvent,
    Workflow,
    context_parts,
    restored_state,
    set_face,
    start_event_of,
    validate_workflow,
)


def make_run(
    workflow: Workflow,
    *,
    start_event: StartEvent | None = None,
    context: Context[Any] | None = None,
    run_id: str | None = None,
    hooks: RunHooks | None = None,
    options: RunOptions | None = None,
    start_kwargs: dict[str, Any] | None = None,
) -> Run:
    """A run that is ready to be driven: for owners that drive it themselves. See `open_run` for the parameters.

    Raises:
        WorkflowValidationError, WorkflowRuntimeError, ContextStateError: as upstream's `workflow.run()`.
        FlavourError: an agent that cannot work in the step flavour.
    """
    validate_workflow(workflow)
    bind_children(workflow)
    pre = context_parts(workflow, context) if context is not None else None
    resumed = pre is not None and pre.is_running
    start = None if resumed else start_event_of(workflow, start_event, start_kwargs or {})
    run = Run(
        workflow,
        state=fresh_state(workflow) if pre is None else live(restored_state(workflow, pre)),
        store=open_state(workflow, None, None)
        if pre is None
        else open_state(workflow, pre.serialized_state, pre.serializer),
        start_event=start,
        serializer=None if pre is None else pre.serializer,
        deadlines=None if pre is None else carried_deadlines(pre.init_snapshot.state),
        run_id=run_id,
        hooks=hooks,
        options=options,
    )
    check_run(run, start)
    if context is not None:
        set_face(context, run.outside_face())
        run.adopt_context(context)
    return run


@asynccontextmanager
async def open_run(
    workflow: Workflow,
    *,
    start_event: StartEvent | None = None,
    context: Context[Any] | None = None,
    run_id: str | None = None,
    flavour: StepFlavour = "anyio",
    event_buffer: int = DEFAULT_EVENT_BUFFER,
    mailbox: int = DEFAULT_MAILBOX,
    internal_events: bool = False,
    hooks: RunHooks | None = None,
    sync_limiter: anyio.CapacityLimiter | None = None,
    **start_kwargs: Any,
) -> AsyncIterator[Run]:
    """Run a workflow inside the block. Leaving the block cancels whatever is still running and waits until it unwound.

    Args:
        workflow: The workflow. Any number of runs of it may be open.
        start_event: The start event; or give its fields as further keyword arguments.
        context: Start with this Context's state, or resume the run that was snapshotted in it. It shows this run
            afterwards, so that it can be used for a next one.
        run_id: An id for logs and retry jitter; made up if None.
        flavour: What async step bodies speak on Trio: "anyio" (AnyIO, Trio, httpx) or "asyncio" (any asyncio library,
            hosted in trio-asyncio; the current loop is used, or one is opened around the run).
        event_buffer: Published events kept for readers; the oldest fall out, and late readers get EventsLost.
        mailbox: Outside events held until something takes them; beyond it `send_event` raises MailboxFull.
        internal_events: Also publish upstream's internal events (step state changes, idleness, unhandled events).
        hooks: What an owner decides and hears (`RunHooks`), for example a slot under a capacity limiter.
        sync_limiter: Bounds the threads of sync steps; by default one limiter of 40 for all runs of the event loop.

    Yields:
        The `Run`. It never blocks if nobody reads its events or awaits its result.

    Raises:
        WorkflowValidationError, WorkflowRuntimeError, ContextStateError: before the run starts, as upstream's `run()`.
        FlavourError: before the run starts, for an agent that cannot work in the flavour.
        What the block raises passes through as it is, not in an exception group.
    """
    options = RunOptions(flavour, event_buffer, mailbox, internal_events, sync_limiter)
    async with AsyncExitStack() as stack:
        if flavour == "asyncio" and caller_library() == "trio":
            await stack.enter_async_context(open_asyncio_loop())
        run = make_run(
            workflow,
            start_event=start_event,
            context=context,
            run_id=run_id,
            hooks=hooks,
            options=options,
            start_kwargs=start_kwargs,
        )
        tasks = await stack.enter_async_context(open_owned_tasks())
        tasks.start_soon(run.drive, name=f"run {run.run_id} of {workflow.workflow_name}")
        yield run


async def run_workflow(
    workflow: Workflow,
    *,
    start_event: StartEvent | None = None,
    context: Context[Any] | None = None,
    run_id: str | None = None,
    flavour: StepFlavour = "anyio",
    hooks: RunHooks | None = None,
    **start_kwargs: Any,
) -> Any:
    """Run a workflow to its end and return its result. Cancelling the call cancels the run and waits until it unwound.

    Takes and raises what `open_run` takes and raises, and raises what the workflow raised.
    """
    options = RunOptions(flavour, event_buffer=0)
    async with AsyncExitStack() as stack:
        if flavour == "asyncio" and caller_library() == "trio":
            await stack.enter_async_context(open_asyncio_loop())
        run = make_run(
            workflow,
            start_event=start_event,
            context=context,
            run_id=run_id,
            hooks=hooks,
            options=options,
            start_kwargs=start_kwargs,
        )
        await run.drive()
        return await run.result()
