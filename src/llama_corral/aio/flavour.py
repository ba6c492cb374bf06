"""Which library the caller is running under, told without a checkpoint and cheaply enough for every event.

On Trio an asyncio-flavoured caller runs inside trio-asyncio's loop: it is in the same thread and in a Trio task, but
`await` speaks asyncio there. trio-asyncio tells sniffio, and sniffio's thread-local is what we read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import sniffio
import trio


def caller_library() -> str | None:
    """ "trio", "asyncio", or None outside of both (a worker thread, for one)."""
    try:
        return sniffio.current_async_library()
    except sniffio.AsyncLibraryNotFoundError:
        return None


def in_foreign_library(backend: str) -> bool:
    """Whether the caller, in the thread of a `backend` loop, must not use that backend's primitives directly.

    That is so where Trio hosts an asyncio loop: in asyncio-flavoured code about what lives in Trio, and in Trio code
    about what lives in that loop.
    """
    return (sniffio.thread_local.name == "trio") != (backend == "trio")


def library_clock() -> Callable[[], float]:
    """The clock of the caller's library, callable from any code in the caller's thread, whatever its library."""
    if caller_library() == "trio":
        return trio.current_time
    return asyncio.get_running_loop().time


def current_task_identity() -> Any:
    """An object that is the same for every call from one task and different between tasks, in either library."""
    if caller_library() == "trio":
        return trio.lowlevel.current_task()
    return asyncio.current_task()


def is_blocked_on(task: Any, other: asyncio.Future[Any]) -> bool:
    """Whether an asyncio task is suspended on just that future, as `await other` leaves it. False if that cannot be told:
    the task is Trio's, or awaits the future through something else (`asyncio.wait_for`, `gather`)."""
    return getattr(task, "_fut_waiter", None) is other
