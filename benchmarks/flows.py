"""Workflows that the benchmarks serve beside the examples."""

from __future__ import annotations

import asyncio

from workflows import Workflow, step
from workflows.events import StartEvent, StopEvent


class Nap(StartEvent):
    """How long to sleep."""

    seconds: float = 0.1


class NapWorkflow(Workflow):
    """A step that waits for something else than the processor, as a call of a model does."""

    @step
    async def sleep(self, ev: Nap) -> StopEvent:
        await asyncio.sleep(ev.seconds)  # noqa: TID251 -- it stands for a call of an asyncio library
        return StopEvent(result=f"{ev.seconds:g}")


nap = NapWorkflow()
