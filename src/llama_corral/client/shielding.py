"""Finish what was begun, within bounds, when a cancellation comes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

T = TypeVar("T")


async def finish(fn: Callable[[], Awaitable[T]], grace: float) -> T:
    """Await `fn()`. If this call is cancelled meanwhile, `fn` gets `grace` seconds to return before it is cancelled too;
    the cancellation then goes on, whatever came of it."""
    scope = anyio.CancelScope(shield=True)
    results: list[T] = []
    errors: list[Exception] = []

    async def work() -> None:
        with scope:
            try:
                results.append(await fn())
            except Exception as error:
                errors.append(error)  # kept out of the task group, which would wrap it
        done.set()

    done = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(work, name="shielded request")
        try:
            await done.wait()
        except BaseException:
            scope.deadline = anyio.current_time() + grace
            raise
    if errors:
        raise errors[0]
    return results[0]
