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


class Pause(Event):
    """Wait for answer `number` of a load."""

    number: int
    load: Load


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
    async def begin(self, ctx: Context, ev: Load) -> Pause | Burn | LoadDone:
        return Pause(number=1, load=ev) if ev.waits else await self._work(ctx, ev)

    @step
    async def pause(self, ctx: Context, ev: Pause) -> Pause | Burn | LoadDone:
        waiting = Waiting(prefix="Go on?", number=ev.number)
        await ctx.wait_for_event(HumanResponseEvent, waiter_event=waiting, timeout=None)
        if ev.number < ev.load.waits:
            return Pause(number=ev.number + 1, load=ev.load)
        return await self._work(ctx, ev.load)

    async def _work(self, ctx: Context, load: Load) -> Burn | LoadDone:
        for number in range(1, load.events + 1):
            ctx.write_event_to_stream(Tick(number=number, payload="x" * load.payload))
        if load.sleep_ms:
            await anyio.sleep(load.sleep_ms / 1000)
        if load.cpu_ms:
            return Burn(load=load)
        return LoadDone(waits=load.waits, events=load.events, sleep_ms=load.sleep_ms)

    @step
    def burn(self, ev: Burn) -> LoadDone:
        load = ev.load
        start = time.thread_time()
        while (burnt := (time.thread_time() - start) * 1000) < load.cpu_ms:
            pass
        return LoadDone(waits=load.waits, events=load.events, sleep_ms=load.sleep_ms, cpu_ms=burnt)


workload = WorkloadWorkflow()
