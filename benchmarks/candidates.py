"""Who runs the workflows of `benchmarks.runtime`: this project and upstream, on each event loop.

A process that measures imports what its candidate needs and no more: importing trio-asyncio changes asyncio, so whatever
is measured on plain asyncio must never have seen it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import anyio
import anyio.lowlevel
from workflows import Workflow
from workflows.events import Event

Result = dict[str, Any]
Take = Callable[[Event], None]
Starts = list[dict[str, Any]]


class OpenRuns(ABC):
    """Runs that were started and have not been awaited."""

    @abstractmethod
    def send(self, index: int, event: Event) -> None:
        """Send one of them an event."""

    @abstractmethod
    async def results(self) -> list[Any]:
        """Wait for all, in the order in which they were started."""


class Side(ABC):
    """One way to run a workflow, called from the event loop that the candidate opened."""

    has_slots = False
    """Whether `run_all` can bound runs by a capacity limiter."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Around everything else. Workflows that are made inside the block are the side's."""
        yield

    @abstractmethod
    async def checkpoint(self) -> None:
        """What a step awaits to let others run."""

    @abstractmethod
    async def run(self, workflow: Workflow, **start: Any) -> Any:
        """The result of a run, in the shortest way there is."""

    @abstractmethod
    async def run_handled(self, workflow: Workflow, **start: Any) -> Any:
        """The same through an object that could also stream the run's events, send it some and cancel it."""

    @abstractmethod
    async def stream(self, workflow: Workflow, take: Take, **start: Any) -> Any:
        """Hand every published event to `take`, then return the result."""

    @abstractmethod
    async def run_all(self, workflow: Workflow, starts: Starts, slots: int | None) -> list[Any]:
        """The results of many runs, all started at once. `slots`: under a capacity limiter of so many."""

    @abstractmethod
    def open_runs(
        self, workflows: Sequence[Workflow], starts: Starts, *, driven: bool
    ) -> AbstractAsyncContextManager[OpenRuns]:
        """Start a run of each workflow. `driven`: as an owner does that keeps no task of its own for each."""

    # What a measurement needs that takes its time

    @abstractmethod
    async def sleep(self, seconds: float) -> None: ...

    @abstractmethod
    def new_event(self) -> Any:
        """An event with `set` and `wait`."""

    async def inside(self, measurement: Callable[[], Awaitable[Result]]) -> Result:
        """Await the measurement where `open_runs` can be called."""
        return await measurement()


class Handlers(OpenRuns):
    """Upstream's."""

    def __init__(self, handlers: list[Any]) -> None:
        self._handlers = handlers

    def send(self, index: int, event: Event) -> None:
        self._handlers[index].ctx.send_event(event)

    async def results(self) -> list[Any]:
        return [await handler for handler in self._handlers]


class Upstream(Side):
    """`workflow.run()` and its handler."""

    async def checkpoint(self) -> None:
        await asyncio.sleep(0)  # noqa: TID251 -- asyncio's checkpoint

    async def run(self, workflow: Workflow, **start: Any) -> Any:
        return await workflow.run(**start)

    async def run_handled(self, workflow: Workflow, **start: Any) -> Any:
        return await workflow.run(**start)

    async def stream(self, workflow: Workflow, take: Take, **start: Any) -> Any:
        handler = workflow.run(**start)
        async for event in handler.stream_events():
            take(event)
        return await handler

    async def run_all(self, workflow: Workflow, starts: Starts, slots: int | None) -> list[Any]:
        handlers = [workflow.run(**start) for start in starts]
        return [await handler for handler in handlers]

    @asynccontextmanager
    async def open_runs(
        self, workflows: Sequence[Workflow], starts: Starts, *, driven: bool
    ) -> AsyncIterator[Handlers]:
        yield Handlers([workflow.run(**start) for workflow, start in zip(workflows, starts, strict=True)])

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)  # noqa: TID251 -- the time is what is measured

    def new_event(self) -> Any:
        return asyncio.Event()


class HostedUpstream(Upstream):
    """Upstream in an asyncio loop inside Trio: one hop into it for each call."""

    def __init__(self) -> None:
        import trio_asyncio

        self._hop: Callable[..., Any] = trio_asyncio.aio_as_trio

    async def run(self, workflow: Workflow, **start: Any) -> Any:
        return await self._hop(super().run)(workflow, **start)

    async def run_handled(self, workflow: Workflow, **start: Any) -> Any:
        return await self._hop(super().run_handled)(workflow, **start)

    async def stream(self, workflow: Workflow, take: Take, **start: Any) -> Any:
        return await self._hop(super().stream)(workflow, take, **start)

    async def run_all(self, workflow: Workflow, starts: Starts, slots: int | None) -> list[Any]:
        results: list[Any] = await self._hop(super().run_all)(workflow, starts, slots)
        return results

    async def inside(self, measurement: Callable[[], Awaitable[Result]]) -> Result:
        result: Result = await self._hop(measurement)()
        return result


class Structured(Upstream):
    """The same calls, on this project's drop-in for upstream's runtime."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        from llama_corral.runtime import StructuredRuntime

        async with StructuredRuntime() as runtime:
            with runtime.registering():
                yield


class Runs(OpenRuns):
    """Ours."""

    def __init__(self, count: int) -> None:
        self.runs: list[Any] = [None] * count

    def send(self, index: int, event: Event) -> None:
        self.runs[index].send_event(event)

    async def results(self) -> list[Any]:
        return [await run.result() for run in self.runs]


class Ours(Side):
    """`run_workflow` and `open_run`."""

    has_slots = True

    def __init__(self, flavour: Literal["anyio", "asyncio"], *, on_trio: bool) -> None:
        from llama_corral import runtime

        self._runtime = runtime
        self._flavour = flavour
        self._speaks_asyncio = flavour == "asyncio" or not on_trio

    async def checkpoint(self) -> None:
        if self._speaks_asyncio:
            await asyncio.sleep(0)  # noqa: TID251 -- asyncio's checkpoint
        else:
            await anyio.lowlevel.checkpoint()

    async def run(self, workflow: Workflow, **start: Any) -> Any:
        return await self._runtime.run_workflow(workflow, flavour=self._flavour, **start)

    async def run_handled(self, workflow: Workflow, **start: Any) -> Any:
        async with self._runtime.open_run(workflow, flavour=self._flavour, **start) as run:
            return await run.result()

    async def stream(self, workflow: Workflow, take: Take, **start: Any) -> Any:
        async with self._runtime.open_run(workflow, flavour=self._flavour, **start) as run:
            async for event in run.events():
                take(event)
            return await run.result()

    async def run_all(self, workflow: Workflow, starts: Starts, slots: int | None) -> list[Any]:
        limiter = anyio.CapacityLimiter(slots) if slots else None
        results: list[Any] = [None] * len(starts)

        async def one(index: int, start: dict[str, Any]) -> None:
            if limiter is None:
                results[index] = await self.run(workflow, **start)
                return
            slot = self._runtime.Slot(limiter)
            hooks = self._runtime.SlotHooks(slot)
            try:
                results[index] = await self._runtime.run_workflow(workflow, flavour=self._flavour, hooks=hooks, **start)
            finally:
                slot.release()

        async with anyio.create_task_group() as tasks:
            for index, start in enumerate(starts):
                tasks.start_soon(one, index, start)
        return results

    @asynccontextmanager
    async def open_runs(self, workflows: Sequence[Workflow], starts: Starts, *, driven: bool) -> AsyncIterator[Runs]:
        opened = Runs(len(starts))
        options = self._runtime.RunOptions(flavour=self._flavour)

        async def keep_open(index: int, workflow: Workflow, start: dict[str, Any]) -> None:
            async with self._runtime.open_run(workflow, flavour=self._flavour, **start) as run:
                opened.runs[index] = run
                await run.result()

        async with anyio.create_task_group() as tasks:
            for index, (workflow, start) in enumerate(zip(workflows, starts, strict=True)):
                if driven:
                    run = opened.runs[index] = self._runtime.make_run(workflow, start_kwargs=start, options=options)
                    tasks.start_soon(run.drive)
                else:
                    tasks.start_soon(keep_open, index, workflow, start)
            yield opened

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)

    def new_event(self) -> Any:
        return anyio.Event()


# Event loops. Each runs `main(side)` to its end and returns what it returns.

Main = Callable[[Side], Awaitable[Result]]
Loop = Callable[[Main, Callable[[], Side]], Result]


def on_asyncio(main: Main, make: Callable[[], Side]) -> Result:
    return _on_plain_loop(main, make, None)


def on_uvloop(main: Main, make: Callable[[], Side]) -> Result:
    import uvloop

    return _on_plain_loop(main, make, uvloop.new_event_loop)


def _on_plain_loop(main: Main, make: Callable[[], Side], loop_factory: Callable[[], Any] | None) -> Result:
    async def entry() -> Result:
        return await main(make())

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        result = runner.run(entry())
    assert "trio_asyncio" not in sys.modules, "asyncio was not plain asyncio"
    return result


def on_trio(main: Main, make: Callable[[], Side]) -> Result:
    import trio

    async def entry() -> Result:
        return await main(make())

    return trio.run(entry)


def on_trio_with_asyncio(main: Main, make: Callable[[], Side]) -> Result:
    """Trio with an asyncio loop in it, opened as this project opens it."""
    import trio

    from llama_corral.aio import open_asyncio_loop

    async def entry() -> Result:
        async with open_asyncio_loop():
            return await main(make())

    return trio.run(entry)


def on_trio_asyncio(main: Main, make: Callable[[], Side]) -> Result:
    """Trio with an asyncio loop in it, as trio-asyncio gives it to anybody."""
    import trio
    import trio_asyncio

    async def entry() -> Result:
        async with trio_asyncio.open_loop():
            return await main(make())

    return trio.run(entry)


@dataclass(frozen=True, slots=True)
class Candidate:
    """`needs`: modules without which it is skipped."""

    title: str
    loop: Loop
    side: Callable[[], Side]
    needs: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


BASE = "upstream"
CANDIDATES = {
    "trio": Candidate("Trio, anyio steps", on_trio, lambda: Ours("anyio", on_trio=True)),
    "trio-hosted": Candidate("Trio, asyncio steps", on_trio_with_asyncio, lambda: Ours("asyncio", on_trio=True)),
    "asyncio": Candidate("asyncio", on_asyncio, lambda: Ours("anyio", on_trio=False)),
    "uvloop": Candidate("uvloop", on_uvloop, lambda: Ours("anyio", on_trio=False), ("uvloop",)),
    "structured": Candidate("asyncio, StructuredRuntime", on_asyncio, Structured),
    "structured-uvloop": Candidate("uvloop, StructuredRuntime", on_uvloop, Structured, ("uvloop",)),
    BASE: Candidate("upstream, asyncio", on_asyncio, Upstream),
    "upstream-uvloop": Candidate("upstream, uvloop", on_uvloop, Upstream, ("uvloop",)),
    "upstream-hosted": Candidate("upstream, in trio-asyncio", on_trio_asyncio, HostedUpstream),
}
