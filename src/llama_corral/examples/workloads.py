"""Synthetic work for benchmarks and tests: one workflow, its load chosen by the start arguments.

    waits    how often to wait for a person: each wait publishes a `Waiting` and takes one `HumanResponseEvent`
    events   how many `Tick` events to publish, `payload` characters each
    sleep_ms how long to wait without work, as for a remote call
    cpu_ms   how much processor time to burn, in a worker thread (a sync step)

They happen in this order. The result is a `LoadDone`. With no arguments it is a run of one step that does nothing.
"""

from __future__ import annotations

import time

import anyio
from pydantic import Field
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent


class Load(StartEvent):
    """What a run does; see the module."""

    waits: int = Field(default=0, ge=0)
    events: int = Field(default=0, ge=0)
    payload: int = Field(default=0, ge=0)
    sleep_ms: float = Field(default=0, ge=0)
    cpu_ms: float = Field(default=0, ge=0)


class Waiting(InputRequiredEvent):
    """The run waits for answer `number`, counted from 1."""

    prefix: str
    number: int


class Tick(Event):
    """Published event `number`, counted from 1."""

    number: int
    payload: str = ""


class Burn(Event):
    """The processor's part of a load."""

    load: Load


class LoadDone(StopEvent):
    """The load that was worked off. `cpu_ms` is what was really burnt, never less than what was asked for."""

    waits: int = 0
    events: int = 0
    sleep_ms: float = 0
    cpu_ms: float = 0


class WorkloadWorkflow(Workflow):
    """Takes a `Load`, works it off, answers with a `LoadDone`."""

    def __init__(self) -> None:
        super().__init__(timeout=None)

    @step
    async def work(self, ctx: Context, ev: Load) -> Burn | LoadDone:
        # Waiting comes first: what stands before it in a step is done again when the answer arrives.
        for number in range(1, ev.waits + 1):
            await ctx.wait_for_event(
                HumanResponseEvent,
                waiter_event=Waiting(prefix="Go on?", number=number),
                waiter_id=f"wait-{number}",
                timeout=None,
            )
        for number in range(1, ev.events + 1):
            ctx.write_event_to_stream(Tick(number=number, payload="x" * ev.payload))
        if ev.sleep_ms:
            await anyio.sleep(ev.sleep_ms / 1000)
        if ev.cpu_ms:
            return Burn(load=ev)
        return LoadDone(waits=ev.waits, events=ev.events, sleep_ms=ev.sleep_ms)

    @step
    def burn(self, ev: Burn) -> LoadDone:
        load = ev.load
        start = time.thread_time()
        while (burnt := (time.thread_time() - start) * 1000) < load.cpu_ms:
            pass
        return LoadDone(waits=load.waits, events=load.events, sleep_ms=load.sleep_ms, cpu_ms=burnt)


workload = WorkloadWorkflow()
