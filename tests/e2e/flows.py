"""What the served processes run. A mark is a line in the file CORRAL_E2E_MARKS."""

from __future__ import annotations

import os
import sys
import threading
import time

import anyio
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

working = highest = 0
lock = threading.Lock()


class Tick(Event):
    n: int


def mark(name: str) -> None:
    with open(os.environ["CORRAL_E2E_MARKS"], "a") as file:
        file.write(f"{name} {time.time()}\n")


def count(by: int) -> None:
    global working, highest
    with lock:
        working += by
        highest = max(highest, working)


class Hello(Workflow):
    @step
    async def hello(self, ev: StartEvent) -> StopEvent:
        return StopEvent(result="hello")


class Work(Workflow):
    """Works for a while."""

    @step
    async def work(self, ev: StartEvent) -> StopEvent:
        count(1)
        try:
            await anyio.sleep(0.04)  # the work, longer than it takes to bring four of them
        finally:
            count(-1)
        return StopEvent(result=highest)


class Person(Workflow):
    """Waits for a person, then works for a while."""

    @step
    async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
        answer = await ctx.wait_for_event(
            HumanResponseEvent, waiter_event=InputRequiredEvent(), timeout=ev.get("patience")
        )
        count(1)
        try:
            await anyio.sleep(0.005)  # the work
        finally:
            count(-1)
        return StopEvent(result=[answer.response, highest])


class Stuck(Workflow):
    """Publishes three events and never ends."""

    @step
    async def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
        try:
            for n in range(3):
                ctx.write_event_to_stream(Tick(n=n))
            await anyio.sleep_forever()
        finally:
            mark(ev.name)
        return StopEvent()


class StuckInThread(Workflow):
    @step
    def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
        for n in range(3):
            ctx.write_event_to_stream(Tick(n=n))
        threading.Event().wait(0.5)  # what cannot be cancelled
        mark(ev.name)
        return StopEvent()


class Ticking(Workflow):
    @step
    async def tick(self, ctx: Context, ev: StartEvent) -> StopEvent:
        for n in range(ev.events):
            ctx.write_event_to_stream(Tick(n=n))
            await anyio.sleep(0.005)  # the work
        return StopEvent(result=ev.events)


class Counter(Workflow):
    @step
    async def add(self, ctx: Context, ev: StartEvent) -> StopEvent:
        seen = [*await ctx.store.get("seen", default=[]), ev.number]
        await ctx.store.set("seen", seen)
        await anyio.sleep(0.05)  # the work
        if ev.get("fail"):
            raise ValueError("asked to fail")
        return StopEvent(result=seen)


class Poison(Workflow):
    """Raises what is no Exception."""

    @step
    async def take(self, ctx: Context, ev: StartEvent) -> StopEvent:
        if ev.kind == "exit":
            sys.exit("no key")
        if ev.kind == "group":
            raise BaseExceptionGroup("mixed", [SystemExit(), ValueError()])
        if ev.kind == "base":
            raise type("Odd", (BaseException,), {})("odd")
        ctx.write_event_to_stream(Tick(n=0))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.break_down)
            await anyio.sleep_forever()
        return StopEvent()

    async def break_down(self) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("the clean-up broke")


hello = Hello()
work = Work(timeout=None)
person = Person(timeout=None)
stuck = Stuck(timeout=None)
thread = StuckInThread(timeout=None)
ticking = Ticking(timeout=None)
counter = Counter(timeout=None)
poison = Poison(timeout=None)
