"""`RemoteWorkflow`, and the handler of a run of it.

It is a workflow of two steps: one starts a task and follows its event stream, the other hands on what comes from outside.
So it can be used wherever a workflow can: by a step, by `run_workflow` and `open_run`, or served itself.
"""

# ruff: noqa: RUF100 - flake8-async has rules that ruff does not have or has switched off

from __future__ import annotations

import copy
import logging
import math
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, Self, TypeVar
from weakref import WeakKeyDictionary

from llama_index_instrumentation.dispatcher import active_instrument_tags
from pydantic import TypeAdapter
from workflows import Context, Workflow, step
from workflows.events import Event, InternalDispatchEvent, StartEvent, StopEvent
from workflows.handler import WorkflowHandler

from ..aio import await_in, caller_library
from ..client import Client
from ..exceptions import BadInput, FlavourError, RunClosed, UsageError
from ..http_urls import check_urls
from ..runtime import Run, RunHandler, current_activity, speaks, start_child_run
from ..settings import ClientSettings
from .call import Call, Caller, Following
from .events import EventTypes, RemoteEvent, ended_with, start_arguments

logger = logging.getLogger(__name__)

T = TypeVar("T")


class RemoteWorkflow(Workflow):
    """A service of a control plane as a workflow.

        class Report(Workflow):
            def __init__(self, digest: RemoteWorkflow) -> None:
                super().__init__(timeout=None)
                self.digest = digest

            @step
            async def write(self, ctx: Context, ev: StartEvent) -> StopEvent:
                handler = self.digest.run(topic=ev.topic)
                async for event in handler.stream_events():
                    ctx.write_event_to_stream(event)
                return StopEvent(result=await handler)

    In a step of either flavour `run` starts the remote run at once, inside of the step's run, and returns a `RemoteHandler`.
    Elsewhere `run_workflow` and `open_run` take it as they take any workflow, on Trio and on asyncio, and on asyncio plain
    `await remote.run(...)` works as upstream's does.

    While the remote run waits (for a person, a timer, its turn) the step that awaits it is idle, and so is its run if no
    other step works. Cancelling the await, or the end of the run around, cancels the remote task. Where the run around is
    handed on to another instance, or its process dies, the remote run goes on: the step that runs again finds it.

    Args:
        service_name: The service.
        client: How its control plane is reached. A `Client` whose block is open: its owner closes it, after the last call.
            A function that makes one: each call has a client of its own, which it closes. A URL, or several as `Client`
            takes them: likewise, with the token in `CORRAL_TOKEN`, and a call goes on once a server is back, however long
            that takes.
        events: Event classes that the remote run publishes. Events of other classes come as `RemoteEvent`.
        result_type: What the result, which comes as JSON, is to be: anything that pydantic can validate; with a class of
            stop events the result is the event, as upstream has it.
        session_id: Run in this session of the control plane (see `in_session`); otherwise each run has its own.
        timeout: Seconds after which a remote run ends as timed out, counted from when it was accepted.

    Raises:
        BadInput: an event class that is none, or two of one name; a URL that is none.
    """

    def __init__(
        self,
        service_name: str,
        client: Client | str | Sequence[str] | Callable[[], Client],
        *,
        events: Iterable[type[Event]] = (),
        result_type: Any = None,
        session_id: str | None = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__(timeout=None, workflow_name=f"remote {service_name}")
        self.service_name = service_name
        self._types = EventTypes(events)
        self._events = [*self._events, *self._types]  # where it is served itself, those may be sent to it
        self._client = client if isinstance(client, Client) or callable(client) else _client_of(client)
        self._result_type = None if result_type is None else TypeAdapter(result_type)
        self._session_id = session_id
        self._time_limit = timeout
        self._calls: WeakKeyDictionary[Run, Call] = WeakKeyDictionary()
        self._calls_upstream: dict[str, Call] = {}  # of runs of upstream's runtime, by their ids
        self._callers: WeakKeyDictionary[Run, Caller] = WeakKeyDictionary()

    def in_session(self, session_id: str | None) -> Self:
        """The same workflow, whose runs are in that session; None: each in one of its own. Runs of one session on one
        service share their Context, and by default wait for each other."""
        other = copy.copy(self)
        other._session_id = session_id
        return other

    def run(
        self, ctx: Context[Any] | None = None, start_event: StartEvent | None = None, **kwargs: Any
    ) -> WorkflowHandler:
        """Start a run of the service.

        Args:
            ctx: Not for remote runs: their context stays where they run. Use a session.
            start_event: The start event; or give its fields as further keyword arguments.
            kwargs: Also `run_id`, a name for this call: the same name again is the same remote run, whoever calls.

        Raises:
            BadInput: a context is given.
            FlavourError: the caller is a sync step, or speaks Trio and is no step.
            RunClosed: the run around is ending.
        """
        if ctx is not None:
            raise BadInput(
                f"{self.workflow_name} takes no Context: that of a remote run stays where it runs",
                hint="Runs of one session share one: remote.in_session(session_id).run(...).",
            )
        name = kwargs.pop("run_id", None)
        if current_activity() is not None and caller_library() is not None:
            run = start_child_run(self, self._get_start_event_instance(start_event, **kwargs))
            if run is None:
                raise RunClosed(
                    f"{self.workflow_name} cannot run: the run around is ending",
                    hint="in the clean-up of a step, await run_workflow(...)",
                )
            return RemoteHandler(self, run, self._call_of(run, name))
        if caller_library() == "asyncio":
            handler = super().run(start_event=start_event, **kwargs)
            self._calls_upstream[handler.run_id] = Call(handler.run_id, name)  # its steps have not begun
            return handler
        raise FlavourError(
            f"{self.workflow_name}.run() is for async steps, and for asyncio",
            hint="await run_workflow(workflow, ...) or use open_run; in a sync step through anyio.from_thread.run",
        )

    async def send_event(self, event: Event, *, run_id: str | None = None) -> None:
        """Send an event to the remote run that the caller's run has open. For a step that is given what a person answers
        while another one follows the remote run:

            @step(num_workers=1)  # one answer after the other
            async def answer(self, ev: HumanResponseEvent) -> None:
                await self.form.send_event(ev)

        Where none was started yet, as may be in a run that has just been resumed, it waits for one.

        Args:
            run_id: That of the handler, where several are open.

        Raises:
            BadInput: several are open and none is named; the remote workflow refuses the event; the caller is no step.
            Conflict: the remote run has ended.
            Unavailable: it may or may not have arrived if the field `sent` is true.
        """
        activity = current_activity()
        if activity is None or activity.run is None:
            raise BadInput(
                "only a step can send an event to the remote run that its run has open",
                hint="Elsewhere use send_event of the handler, or of the run.",
            )
        await self.send_to(await self._caller_of(activity.run).wait_call(run_id), event)

    async def send_to(self, call: Call, event: Event) -> None:
        """Send an event to the remote run of a call, once there is one."""
        task_id = await call.wait_task()

        async def send(client: Client) -> None:
            if isinstance(event, RemoteEvent):
                await client.task(task_id).send_event(event.name, event.fields)
            else:
                await client.task(task_id).send_event(event)

        await self._reach(send)

    async def _reach(self, ask: Callable[[Client], Awaitable[T]]) -> T:
        """Ask the control plane, in the library that the client lives in."""
        if isinstance(self._client, Client):
            return await await_in(self._client.library or caller_library() or "asyncio", ask, self._client)
        async with self._client() as client:
            return await ask(client)

    # The steps are thin: a service that holds a remote workflow takes what they name for types that may be sent to it.

    @speaks("anyio")
    @step(num_workers=1, accept_event_subclasses=True)
    async def follow(self, ctx: Context, ev: StartEvent) -> StopEvent:
        """Start the remote run and follow it to its end."""
        stop: StopEvent = await self._follow(ctx.write_event_to_stream, ev)
        return stop

    @speaks("anyio")
    @step(num_workers=1, accept_event_subclasses=True)
    async def forward(self, ev: Event) -> None:
        """Hand outside events on, one after the other."""
        await _forward(self, self._call_here(), ev)

    async def _follow(self, publish: Callable[[Any], None], start: Any) -> Any:
        activity = current_activity()
        run = activity.run if activity is not None else None
        call = self._call_here()
        following = Following(
            call,
            self.service_name,
            start_arguments(start),
            self._types,
            publish,
            identity=run.identity if run is not None else None,
            is_handed_on=lambda: run is not None and run.is_handed_on,
            session_id=self._session_id,
            time_limit=self._time_limit,
        )
        try:
            record, last = await self._reach(following.follow)
        finally:
            call.end()
            self._calls_upstream.pop(call.run_id, None)
        return ended_with(record, last, self._types, self._result_type)

    def _call_here(self) -> Call:
        """The call whose step the caller is."""
        activity = current_activity()
        if activity is not None and activity.run is not None and activity.run.workflow is self:
            return self._call_of(activity.run)
        run_id = str(active_instrument_tags.get()["llamaindex.run_id"])
        return self._calls_upstream.setdefault(run_id, Call(run_id))

    def _call_of(self, run: Run, name: str | None = None) -> Call:
        call = self._calls.get(run)
        if call is None:
            call = self._calls_upstream.pop(run.run_id, None) or Call(run.run_id, name)
            self._calls[run] = call
            if run.around is not None:
                self._caller_of(run.around).add(call)
        return call

    def _caller_of(self, run: Run) -> Caller:
        return self._callers.setdefault(run, Caller())


class RemoteHandler(RunHandler):
    """The handler of a remote run, for the step that started it. As upstream's, and:

    Its stream has what the remote run publishes, without the event that ends it: how it ended is for `await handler` to say,
    and the rest can be published in turn. It is read no faster than the step takes it, as long as nobody awaits the result.

    Cancelling `await handler` cancels the remote run. As a block (`async with handler:`) it does so whenever the block is
    left before the remote run has ended.
    """

    def __init__(self, workflow: RemoteWorkflow, run: Run, call: Call) -> None:
        super().__init__(run)
        self._remote = workflow
        self._call = call

    async def stop_event_result(self) -> StopEvent:
        """What ended the remote run, as an event. Raises as `await handler`:

        Raises:
            TaskFailed: the remote workflow raised; the field `error` has type, message and step of what.
            RemoteCancelled, RemoteTimedOut: somebody cancelled it, its time was over.
            BadInput: it refused its start arguments, or its result is not of `result_type`.
            NotFound: there is no such service or session.
            Unavailable: the control plane is away.
        """
        self._call.awaited += 1
        self._call.changed.ring()
        try:
            return await super().stop_event_result()
        finally:
            self._call.awaited -= 1

    def stream_events(self, expose_internal: bool = False) -> AsyncIterator[Event]:  # type: ignore[override]
        """What the remote run publishes. `expose_internal`: also upstream's internal events of the run that follows it."""
        reader = _Reader(super().stream_events(expose_internal), self._call)
        self._call.reader = weakref.ref(reader)
        return reader

    async def send_event(self, event: Event, step: str | None = None) -> None:
        """Send an event to the remote run, whether it waits for one already or not.

        Raises:
            BadInput: the remote workflow knows no such event, or its fields are wrong; a step is named.
            Conflict: the remote run has ended.
            Unavailable: it may or may not have arrived if the field `sent` is true.
        """
        if step is not None:
            raise BadInput("an event is sent to a remote run, not to a step of it", hint="Leave step out.")
        await self._remote.send_to(self._call, event)


class _Reader(AsyncIterator[Event]):
    """The events of a call, without the one that ends the run which follows it."""

    def __init__(self, events: AsyncIterator[Event], call: Call) -> None:
        self.taken = 0
        self._events = events
        self._call = call

    async def __anext__(self) -> Event:
        while True:
            event = await anext(self._events)
            if not isinstance(event, InternalDispatchEvent):
                self.taken += 1
                self._call.changed.ring()
            if not isinstance(event, StopEvent):
                return event


async def _forward(workflow: RemoteWorkflow, call: Call, event: Event) -> None:
    if isinstance(event, StartEvent):
        return
    try:
        await workflow.send_to(call, event)
    except UsageError as error:
        # Whoever sent it has gone: an event that nothing takes is no failure of the run.
        logger.warning("%s: an outside %s was not taken: %s", workflow.workflow_name, type(event).__name__, error)


def _client_of(url: str | Sequence[str]) -> Callable[[], Client]:
    urls = check_urls(url)
    return lambda: Client(urls, token=ClientSettings().token, reconnect_for=math.inf)
