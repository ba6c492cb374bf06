"""Plain `workflow.run()` under structured concurrency: a drop-in for upstream's runtime on asyncio.

Upstream's runtime starts a run as an asyncio task that belongs to nobody. Here it belongs to a block.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel

from ..aio import caller_library
from ..exceptions import FlavourError, RunClosed
from .child_runtime import bind_children, start_as_child
from .faces import RunAdapter
from .home import Home
from .launch import Launch
from .nesting import current_activity
from .options import DEFAULT_EVENT_BUFFER, DEFAULT_MAILBOX, RunOptions
from .registry import register
from .run import Run
from .scope import open_owned_tasks
from .stream import Bell
from .upstream import (
    BaseSerializer,
    BrokerState,
    ExternalRunAdapter,
    InternalRunAdapter,
    RegisteredWorkflow,
    Runtime,
    StartEvent,
    StopEvent,
    Workflow,
)


class StructuredRuntime(anyio.AsyncContextManagerMixin, Runtime):
    """Runs upstream's plain `workflow.run()` inside a block, on asyncio.

        async with StructuredRuntime() as runtime:
            workflow = MyWorkflow(runtime=runtime)      # or: with runtime.registering(): workflow = MyWorkflow()
            handler = workflow.run(topic="llamas")
            async for event in handler.stream_events(): ...
            result = await handler

    Leaving the block cancels the runs that have not ended and waits until they have unwound: nothing is left behind. Their
    handlers raise RunClosed then. A workflow that a step runs belongs to the run of that step.

    On Trio there is no plain `run()`, because upstream's handler is made of asyncio tasks: use `open_run`.

    Args:
        event_buffer: Published events kept for a handler's stream; a later reader gets EventsLost.
        mailbox: Outside events held until something takes them.
        sync_limiter: Bounds the threads of sync steps.
        default_serializer: As upstream's runtimes take it.
    """

    def __init__(
        self,
        *,
        event_buffer: int = DEFAULT_EVENT_BUFFER,
        mailbox: int = DEFAULT_MAILBOX,
        sync_limiter: anyio.CapacityLimiter | None = None,
        default_serializer: BaseSerializer | None = None,
    ) -> None:
        super().__init__(default_serializer=default_serializer)
        self._options = RunOptions("asyncio", event_buffer, mailbox, internal_events=True, sync_limiter=sync_limiter)
        self._home: Home | None = None
        self._tasks: anyio.abc.TaskGroup | None = None
        self._runs: dict[str, Run] = {}
        self._handlers = 0
        self._handlers_done = Bell()

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncIterator[StructuredRuntime]:
        if caller_library() == "trio":
            raise FlavourError(
                "StructuredRuntime runs on asyncio: upstream's handlers are made of asyncio tasks",
                hint="on Trio use open_run or run_workflow",
            )
        try:
            async with open_owned_tasks() as tasks:
                self._home, self._tasks = Home.here(), tasks
                self._launched = True
                try:
                    yield self
                finally:
                    self._tasks = None
                    self._launched = False
        finally:
            await self._wait_handlers()  # noqa: ASYNC102 -- shielded inside, bounded by the runs' end, which was above

    async def _wait_handlers(self) -> None:
        """Upstream's handlers wait for their result in tasks of their own: let these end."""
        with anyio.CancelScope(shield=True):
            while self._handlers:
                await self._handlers_done.wait()
            await anyio.lowlevel.checkpoint()

    def run_workflow(
        self,
        run_id: str,
        workflow: Workflow,
        init_state: BrokerState,
        start_event: StartEvent | None = None,
        serialized_state: dict[str, Any] | None = None,
        serializer: BaseSerializer | None = None,
    ) -> ExternalRunAdapter:
        """Start a run. Upstream's `workflow.run()` calls this.

        Raises:
            RunClosed: the runtime's block is not open.
        """
        launch = Launch(run_id, workflow, init_state, start_event, serialized_state, serializer)
        if (child := start_as_child(launch)) is not None:
            return child
        if self._tasks is None or self._home is None or self._home.thread != threading.get_ident():
            raise RunClosed(
                f"{workflow.workflow_name} cannot run: its runtime is not open in this thread",
                hint="run it inside of `async with StructuredRuntime() as runtime:`",
            )
        if run_id in self._runs:
            raise RuntimeError(f"a run with id {run_id!r} is going on")
        bind_children(workflow)
        run = self._runs[run_id] = launch.make(Run, self._options, self._home)
        self._tasks.start_soon(self._drive, run, name=f"run {run_id} of {workflow.workflow_name}")
        return _HandlerAdapter(run, self)

    async def _drive(self, run: Run) -> None:
        try:
            await run.drive()
        finally:
            del self._runs[run.run_id]

    async def wait_result(self, run: Run) -> StopEvent:
        """What a handler's task waits for."""
        self._handlers += 1
        try:
            return await run.wait_stop_event()
        finally:
            self._handlers -= 1
            if not self._handlers:
                self._handlers_done.ring()

    def get_internal_adapter(self, workflow: Workflow) -> InternalRunAdapter:
        activity = current_activity()
        if activity is None or activity.run is None:
            raise RuntimeError("an internal adapter is to be had inside of a step only")
        return activity.run.adapter

    def get_external_adapter(self, run_id: str) -> ExternalRunAdapter:
        if run_id not in self._runs:
            raise RuntimeError(f"no run with id {run_id!r} is going on")
        return _HandlerAdapter(self._runs[run_id], self)

    def register(self, workflow: Workflow) -> RegisteredWorkflow:
        """Look at the workflow once. Nothing has to be registered: the first run does it too."""
        register(workflow)
        return RegisteredWorkflow(workflow=workflow, workflow_run_fn=_driven_here, steps={})


def _driven_here(init_state: Any, start_event: Any = None, tags: Any = None) -> Any:  # noqa: ARG001
    raise RuntimeError("StructuredRuntime drives its runs itself")


class _HandlerAdapter(RunAdapter):
    """A run as one of upstream's handlers sees it."""

    def __init__(self, run: Run, runtime: StructuredRuntime) -> None:
        super().__init__(run)
        self._runtime = runtime

    async def get_result(self) -> StopEvent:
        return await self._runtime.wait_result(self._run)
