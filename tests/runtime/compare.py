"""The same workflow on upstream's own runtime and on ours, told as an observer from outside sees it.

Upstream's runtime needs asyncio, so its run has a loop and a thread of its own, whatever the test runs on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.to_thread
from pydantic import BaseModel
from workflows import Workflow
from workflows.events import Event, StepState, StepStateChanged, WorkflowIdleEvent

from llama_corral.runtime import open_run

CANCEL = object()
"""In a script: cancel the run."""

PATIENCE = 5.0
"""Seconds for one run, so that a run that hangs fails its test by name."""

MEASURED = {"elapsed_seconds", "failed_at"}
"""Fields of events that no two runs agree on."""

NOT_TOLD: Any = object()


@dataclass(frozen=True, eq=False)
class Case:
    """A workflow, what happens to it, and how that ends.

    Attributes:
        make: Gives a fresh workflow.
        start: Fields of the start event.
        script: What is sent from outside, in order: after an event of this type, these events or CANCEL.
        reply: What is sent from outside at each published event, besides.
        result: What the run returns, or
        error: the type of what it raises.
        match: Is part of the error's text.
        parallel: Steps work side by side, so that their events interleave as the scheduler pleases.
        cut: The run ends while steps work, so that only its last event is the same.
        words: Whether the text of an error is part of what is the same.
        name: What the case shows, beyond its workflow.
    """

    make: Callable[[], Workflow]
    start: dict[str, Any] = field(default_factory=dict)
    script: Sequence[tuple[type[Event], Any]] = ()
    reply: Callable[[Event], Sequence[Event]] = lambda event: ()
    result: Any = NOT_TOLD
    error: type[BaseException] | None = None
    match: str = ""
    parallel: bool = False
    cut: bool = False
    words: bool = True
    name: str = ""

    def __str__(self) -> str:
        return "-".join(part for part in (getattr(self.make, "__name__", ""), self.name) if part)


@dataclass(frozen=True)
class Told:
    """How a run ended, and its published events, internal ones included."""

    outcome: tuple[str, Any]
    error: BaseException | None
    events: list[str]


async def check(case: Case, flavour: str) -> None:
    """The case ends as it says, and both runtimes tell the same of it."""
    ours = await on_ours(case, flavour)
    if case.error is not None:
        assert type(ours.error) is case.error
        assert case.match in str(ours.error)
    elif case.result is not NOT_TOLD:
        assert ours.outcome == ("returned", told_value(case.result))
    theirs = await on_upstream(case)
    assert ours.outcome == theirs.outcome
    assert ours.events == theirs.events


async def on_ours(case: Case, flavour: str) -> Told:
    left = list(case.script)
    events = []
    with anyio.fail_after(PATIENCE):
        async with open_run(case.make(), flavour=flavour, internal_events=True, **case.start) as run:
            async for event in run.events():
                events.append(event)
                for item in (*_due(left, event), *case.reply(event)):
                    run.cancel() if item is CANCEL else run.send_event(item)
            return await _told(case, run.result(), events)


_upstreams: dict[Case, Told] = {}


async def on_upstream(case: Case) -> Told:
    """Upstream's own run of the case; made once for all configurations."""
    if case not in _upstreams:
        _upstreams[case] = await anyio.to_thread.run_sync(lambda: asyncio.run(run_on_upstream(case)))
    return _upstreams[case]


async def run_on_upstream(case: Case) -> Told:
    left = list(case.script)
    events = []
    async with asyncio.timeout(PATIENCE):
        handler = case.make().run(**case.start)
        async for event in handler.stream_events(expose_internal=True):
            events.append(event)
            for item in (*_due(left, event), *case.reply(event)):
                if item is CANCEL:
                    await handler.cancel_run()
                else:
                    handler.ctx.send_event(item)
        return await _told(case, handler, events)


def _due(left: list[tuple[type[Event], Any]], event: Event) -> list[Any]:
    if not left or not isinstance(event, left[0][0]):
        return []
    items = left.pop(0)[1]
    return items if isinstance(items, list) else [items]


async def _told(case: Case, result: Awaitable[Any], events: list[Event]) -> Told:
    outcome, error = await told_outcome(case, result)
    if case.cut:
        events = events[-1:]
    told = [told_event(event, case) for event in events if not (case.parallel and depends_on_speed(event))]
    return Told(outcome, error, sorted(told) if case.parallel else told)


async def told_outcome(case: Case, result: Awaitable[Any]) -> tuple[tuple[str, Any], BaseException | None]:
    try:
        return ("returned", told_value(await result)), None
    except Exception as exc:
        return ("raised", told_error(exc, words=case.words)), exc


def depends_on_speed(event: Event) -> bool:
    """Whether a call has to queue, and whether the run is idle in between, depends on how many others are at work."""
    if isinstance(event, StepStateChanged):
        return event.step_state is StepState.PREPARING
    return isinstance(event, WorkflowIdleEvent)


def told_event(event: Event, case: Case) -> str:
    fields = {name: getattr(event, name) for name in type(event).model_fields} | dict(event.items())
    # Which of its workers a step uses depends on which call ends first.
    hidden = MEASURED | ({"worker_id"} if case.parallel else set())
    told = [f"{name}={told_value(value, words=case.words)!r}" for name, value in fields.items() if name not in hidden]
    if getattr(event, "result", None) is not None:
        told.append(f"result={told_value(event.result)!r}")
    return f"{type(event).__name__}({', '.join(told)})"


def told_value(value: Any, *, words: bool = True) -> Any:
    if isinstance(value, BaseException):
        return told_error(value, words=words)
    if isinstance(value, BaseModel):
        return type(value).__name__, value.model_dump()
    return value


def told_error(exc: BaseException, *, words: bool) -> Any:
    return (type(exc).__name__, *([str(exc)] if words else []))
