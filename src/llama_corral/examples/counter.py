"""A counter that remembers: state that one run of a session leaves for the next.

Two runs with the same context (of the library) or in the same session (of a service) share the store of the context:

    counter by=1   ->  {"count": 1, "history": [1]}
    counter by=5   ->  {"count": 6, "history": [1, 5]}

A service stores the context together with the result of a completed run, so a run that failed counts nothing.
"""

from __future__ import annotations

from pydantic import BaseModel, Field
from workflows import Context, Workflow, step
from workflows.events import StartEvent, StopEvent

HISTORY = 100
"""How many of the last amounts are remembered: what a session keeps should not grow for ever."""


class Count(StartEvent):
    """How much to add."""

    by: int = 1


class Counted(StopEvent):
    """The sum of all runs so far, and what the last of them added, oldest first."""

    count: int
    history: list[int]

    def __str__(self) -> str:
        return str(self.count)


class CounterState(BaseModel):
    """What the session remembers. Every field has a default: this is how a new session starts."""

    count: int = 0
    history: list[int] = Field(default_factory=list)


class CounterWorkflow(Workflow):
    """Takes `by` (1), adds it to the session's count, and answers with a `Counted`."""

    @step
    async def add(self, ctx: Context[CounterState], ev: Count) -> Counted:
        async with ctx.store.edit_state() as state:
            state.count += ev.by
            state.history = [*state.history, ev.by][-HISTORY:]
            return Counted(count=state.count, history=state.history)


counter = CounterWorkflow()
