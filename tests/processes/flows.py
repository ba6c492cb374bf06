"""What the processes run. A mark is a line in the file CORRAL_TEST_MARKS: each step appends one before it works."""

from __future__ import annotations

import os
import signal
import threading
import time

import anyio
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent


def mark(*words: object) -> None:
    # One write to a file opened for appending: lines of several processes do not mix.
    line = " ".join(map(str, (*words, os.getpid(), time.time()))) + "\n"
    descriptor = os.open(os.environ["CORRAL_TEST_MARKS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def marks_of(name: str) -> int:
    """How many there are."""
    with open(os.environ["CORRAL_TEST_MARKS"]) as file:
        return sum(line.startswith(f"{name} ") for line in file)


def die_at(stage: str) -> None:
    """The end of this process, if it is one that dies there."""
    if os.environ.get("CORRAL_TEST_DIE") == stage:
        os.kill(os.getpid(), signal.SIGKILL)


class Tick(Event):
    n: int


class Done(Event):
    n: int


class First(Event):
    name: str


class Second(Event):
    name: str


class Steps(Workflow):
    """Three steps. Each says that it begins and, as the last thing that it does, that it is done.

    With a `gate`, the second one works for ever if there is no such file.
    """

    @step
    async def one(self, ctx: Context, ev: StartEvent) -> First:
        await ctx.store.set("pause", ev.get("pause", 0.02))
        await ctx.store.set("gate", ev.get("gate"))
        await self.work(ctx, ev.name, 1)
        return First(name=ev.name)

    @step
    async def two(self, ctx: Context, ev: First) -> Second:
        await self.work(ctx, ev.name, 2)
        return Second(name=ev.name)

    @step
    async def three(self, ctx: Context, ev: Second) -> StopEvent:
        await self.work(ctx, ev.name, 3)
        return StopEvent(result=ev.name)

    async def work(self, ctx: Context, name: str, number: int) -> None:
        mark(name, number)
        ctx.write_event_to_stream(Tick(n=number))
        gate = await ctx.store.get("gate")
        if number == 2 and gate and not await anyio.Path(gate).exists():
            await anyio.sleep_forever()
        await anyio.sleep(await ctx.store.get("pause"))  # the work
        die_at(f"step {number}")
        ctx.write_event_to_stream(Done(n=number))


class Person(Workflow):
    """Works, then waits for a person, then works."""

    @step
    async def prepare(self, ev: StartEvent) -> First:
        mark(ev.name, "prepare")
        return First(name=ev.name)

    @step
    async def ask(self, ctx: Context, ev: First) -> StopEvent:
        mark(ev.name, "ask")
        answer = await ctx.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent(), timeout=None)
        mark(ev.name, "answered")
        return StopEvent(result=f"{ev.name}: {answer.response}")


class Ticking(Workflow):
    @step
    async def tick(self, ctx: Context, ev: StartEvent) -> StopEvent:
        for n in range(ev.events):
            ctx.write_event_to_stream(Tick(n=n))
            await anyio.sleep(0.005)  # the work
        return StopEvent(result=ev.events)


class Unending(Workflow):
    """The first attempt never ends and cannot be cancelled; the next one, in another process, ends at once."""

    def first_attempt(self, name: str) -> bool:
        mark(name, "begin")
        return marks_of(name) == 1


class Blocked(Unending):
    @step
    def hold(self, ctx: Context, ev: StartEvent) -> StopEvent:
        if self.first_attempt(ev.name):
            ctx.write_event_to_stream(Tick(n=0))
            threading.Event().wait()
        return StopEvent(result=ev.name)


class Deaf(Unending):
    @step
    async def hold(self, ctx: Context, ev: StartEvent) -> StopEvent:
        if self.first_attempt(ev.name):
            ctx.write_event_to_stream(Tick(n=0))
            while True:
                try:
                    await anyio.sleep_forever()
                except BaseException:  # noqa: ASYNC103 - what the test is about
                    time.sleep(0.01)  # noqa: ASYNC251 - or it would do nothing else
        return StopEvent(result=ev.name)


class Frozen(Unending):
    """Blocks the event loop itself."""

    @step
    async def freeze(self, ev: StartEvent) -> StopEvent:
        if self.first_attempt(ev.name):
            print("frozen", flush=True)
            threading.Event().wait()
        return StopEvent(result=ev.name)


steps = Steps(timeout=None)
person = Person(timeout=None)
ticking = Ticking(timeout=None)
blocked = Blocked(timeout=None)
deaf = Deaf(timeout=None)
frozen = Frozen(timeout=None)
