"""Calling coroutine functions that never suspend from sync code."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any


def drive_inline(coro: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that never suspends, here and now. Upstream wraps calls that only need a plain function in one."""
    try:
        coro.send(None)
    except StopIteration as stop:
        return stop.value
    coro.close()
    raise RuntimeError("a coroutine of the run's adapter suspended; it must not")
