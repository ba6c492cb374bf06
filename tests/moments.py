"""Strikes at the n-th moment of what a block does: for tests that cancel something everywhere.

A moment is the begin or the end of one step of a task that was started in the block, as the event loop sees it: just
before the task goes on, when what it waited for has come, and just after, when it has begun to wait for the next thing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import sniffio
import trio
from trio._core import _run as trio_run


class Moments:
    """Counts moments and strikes at one of them. `struck` tells whether it came to that."""

    def __init__(self, strike_at: int, act: Callable[[], None], *, keep_on: bool) -> None:
        self.count = 0
        self.struck = False
        self.error: Exception | None = None
        self._strike_at = strike_at
        self._act = act
        self._keep_on = keep_on

    def pass_by(self) -> None:
        self.count += 1
        if self.count == self._strike_at or (self.struck and self._keep_on):
            self.struck = True
            try:
                self._act()
            except Exception as exc:  # neither loop would pass it on to the test
                self.error = exc


@contextmanager
def strike(at: int, act: Callable[[], None], *, keep_on: bool = False, seed: int = 0) -> Iterator[Moments]:
    """Call `act` at the n-th moment, from 1, of the tasks that are started in the block; `keep_on`: and at each later one.

    Trio runs what is ready in an order of chance; within the block it is the same for the same seed.
    """
    moments = Moments(at, act, keep_on=keep_on)
    with _in_trio(moments, seed) if sniffio.current_async_library() == "trio" else _in_asyncio(moments):
        yield moments
    if moments.error is not None:
        raise moments.error


@contextmanager
def _in_trio(moments: Moments, seed: int) -> Iterator[None]:
    class Steps(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            if task not in before:
                moments.pass_by()

        def after_task_step(self, task: trio.lowlevel.Task) -> None:
            if task not in before:
                moments.pass_by()

    before = set(_below(trio.lowlevel.current_root_task()))
    steps = Steps()
    chance, trio_run._r = trio_run._r, random.Random(seed)
    trio.lowlevel.add_instrument(steps)
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(steps)
        trio_run._r = chance


@contextmanager
def _in_asyncio(moments: Moments) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    before = asyncio.all_tasks()
    call_soon = loop.call_soon

    def counting(callback: Any, *args: Any, context: Any = None) -> Any:
        task = getattr(callback, "__self__", None)
        if not isinstance(task, asyncio.Task) or task in before:
            return call_soon(callback, *args, context=context)

        def step() -> None:
            moments.pass_by()
            callback(*args)
            moments.pass_by()

        return call_soon(step, context=context)

    loop.call_soon = counting
    try:
        yield
    finally:
        del loop.call_soon


def living_tasks() -> set[Any]:
    """Every task of the running loop: Trio's whole tree, or asyncio's set."""
    if sniffio.current_async_library() == "asyncio":
        return set(asyncio.all_tasks())
    return set(_below(trio.lowlevel.current_root_task()))


def _below(task: trio.lowlevel.Task | None) -> Iterator[trio.lowlevel.Task]:
    if task is not None:
        yield task
        for nursery in task.child_nurseries:
            for child in nursery.child_tasks:
                yield from _below(child)
