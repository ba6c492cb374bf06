"""A task group that belongs to a block."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.abc


@asynccontextmanager
async def open_owned_tasks() -> AsyncIterator[anyio.abc.TaskGroup]:
    """A task group whose tasks end with the block: they are cancelled when it is left, however it is left.

    What the block raises passes through as it is: a task group would wrap it in a group, and it is nobody's child's.
    """
    error: BaseException | None = None
    async with anyio.create_task_group() as tasks:
        try:
            yield tasks
        except (Exception, KeyboardInterrupt, SystemExit) as exc:
            error = exc
        finally:
            tasks.cancel_scope.cancel()
    if error is not None:
        try:
            raise error
        finally:
            del error  # its traceback holds this frame
