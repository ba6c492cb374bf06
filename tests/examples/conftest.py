"""Every example runs on upstream's own asyncio runtime and on ours: both backends, both step flavours."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import anyio
import pytest
from workflows import Context, Workflow
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent

from llama_corral.runtime import open_run

E = TypeVar("E", bound=Event)


class Engine(NamedTuple):
    """Who runs the workflow, on which backend, and with which step flavour (None: upstream)."""

    backend: str
    flavour: Any


ENGINES = {
    "upstream": Engine("asyncio", None),
    "trio-anyio": Engine("trio", "anyio"),
    "trio-asyncio": Engine("trio", "asyncio"),
    "asyncio": Engine("asyncio", "anyio"),
}


@dataclass
class Outcome:
    result: Any
    events: list[Event]

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]


RunExample = Callable[..., Awaitable[Outcome]]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return ENGINES[request.param]


@pytest.fixture
def anyio_backend(engine: Engine) -> str:
    return engine.backend


@pytest.fixture
def run_example(engine: Engine) -> RunExample:
    """`await run_example(workflow, answers=(...), context=None, **start)`: each answer to the next question in turn."""

    async def run_it(
        workflow: Workflow, *, answers: Iterable[str] = (), context: Context[Any] | None = None, **start: Any
    ) -> Outcome:
        left = iter(answers)
        events: list[Event] = []

        def reply(event: Event) -> HumanResponseEvent | None:
            events.append(event)
            if not isinstance(event, InputRequiredEvent):
                return None
            answer = next(left, None)
            assert answer is not None, f"no answer is left for {event!r}"
            return HumanResponseEvent(response=answer)

        with anyio.fail_after(20):  # pytest-timeout cannot end a test that hangs on Trio
            if engine.flavour is None:
                handler = workflow.run(ctx=context, **start)
                async for event in handler.stream_events():
                    if answer := reply(event):
                        handler.ctx.send_event(answer)
                result = await handler
            else:
                async with open_run(workflow, context=context, flavour=engine.flavour, **start) as run:
                    async for event in run.events():
                        if answer := reply(event):
                            run.send_event(answer)
                    result = await run.result()
        assert list(left) == [], "answers that nobody asked for"
        return Outcome(result, events)

    return run_it


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks up a name or connects fails the test; the event loops' own socket pairs stay allowed."""
    import socket

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"the network was used: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    real_connect = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            refuse(address)
        real_connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
