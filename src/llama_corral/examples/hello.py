"""The smallest example: one step that greets.

    result = await run_workflow(hello, name="Trio")     # "Hello, Trio!"

Served: `corral serve llama_corral.examples.hello:hello`.
"""

from __future__ import annotations

from workflows import Workflow, step
from workflows.events import StartEvent, StopEvent


class Greet(StartEvent):
    """Whom to greet."""

    name: str = "world"


class HelloWorkflow(Workflow):
    """Takes `name`, answers with a greeting (a string)."""

    @step
    async def greet(self, ev: Greet) -> StopEvent:
        return StopEvent(result=f"Hello, {ev.name}!")


hello = HelloWorkflow()
