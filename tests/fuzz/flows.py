"""The workflows that are fuzzed: every kind of start argument, a stream, a person to wait for, a failure."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent


class Place(BaseModel):
    name: str
    parts: list[Place] = []


class Typed(StartEvent):
    """One field of each kind."""

    count: int = Field(0, ge=-5, le=50)
    name: str = "world"
    ratio: float | None = None
    when: datetime | None = None
    kind: Literal["a", "b"] = "a"
    place: Place | None = None
    tags: dict[str, list[int]] = Field(default={})
    raw: bytes = b""


class Progress(Event):
    n: int


class EchoFlow(Workflow):
    """Streams `count` events and answers what it was given."""

    @step
    async def echo(self, ev: Typed, ctx: Context) -> StopEvent:
        for n in range(ev.count):
            ctx.write_event_to_stream(Progress(n=n))
        if ev.name == "fail":
            raise ValueError("the llama refused to move")
        return StopEvent(result=ev.model_dump(mode="json", exclude={"raw"}))


class AskFlow(Workflow):
    """Waits for a person, but not for long."""

    @step
    async def ask(self, ev: StartEvent, ctx: Context) -> StopEvent:
        ctx.write_event_to_stream(InputRequiredEvent(prefix="?"))
        answer = await ctx.wait_for_event(HumanResponseEvent)
        return StopEvent(result=answer.response)
