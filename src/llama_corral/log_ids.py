"""Which request and which task the running code works for: context variables that log handlers read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

REQUEST_ID: ContextVar[str] = ContextVar("corral_request_id", default="-")
TASK_ID: ContextVar[str] = ContextVar("corral_task_id", default="-")


@contextmanager
def log_task(task_id: str) -> Iterator[None]:
    """Log lines written inside the block, and by tasks started in it, name this task."""
    token = TASK_ID.set(task_id)
    try:
        yield
    finally:
        TASK_ID.reset(token)
