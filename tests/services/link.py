"""The way from a service to its coordinator, on which a test holds what it likes; and how an ending looks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio

from llama_corral.exceptions import StoreUnavailable

from .rig import PATIENCE, Gate, until


class Link:
    """The way to the coordinator. A test holds calls on it, before the decider hears them or when it has decided."""

    def __init__(self, plane: Any) -> None:
        self.plane = plane
        self.endings: list[str] = []
        self.caught = 0
        self.gate = Gate()
        self.lost: list[str] = []
        self._holds: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.plane, name)
        if name not in ("claim", "report", "release", "pull"):
            return method

        async def call(*args: Any, **how: Any) -> Any:
            terminal = args[0].terminal if name == "report" else None
            kind = "ending" if terminal is not None else name
            await self._wait_here(kind, "before")
            if kind in self.lost:
                self.lost.remove(kind)
                raise StoreUnavailable("away")
            answer = await method(*args, **how)
            if terminal is not None and answer.status == "ok":
                self.endings.append(terminal.status.value)
            await self._wait_here(kind, "after")
            return answer

        return call

    async def _wait_here(self, kind: str, when: str) -> None:
        if (kind, when) in self._holds:
            self.caught += 1
            self.gate.changed()
            await self.gate.until(lambda: (kind, when) not in self._holds)

    @contextmanager
    def held(self, kind: str, when: str) -> Iterator[None]:
        """Inside the block such calls do not go on. `ending` is a report that carries one."""
        self._holds.append((kind, when))
        try:
            yield
        finally:
            self._holds.remove((kind, when))
            self.gate.changed()

    async def wait_caught(self, count: int = 1) -> None:
        with anyio.fail_after(PATIENCE):
            await self.gate.until(lambda: self.caught >= count)


async def ended(rig, task_id, *statuses, service=None):
    """The task's one ending, with a log without gaps and nothing left in its service."""
    record = await rig.result(task_id)
    assert record.status in statuses
    indices = [event.index for event in await rig.events(task_id)]
    assert indices == list(range(record.event_count))
    if record.status == "cancelled":
        assert (record.result, record.context_saved) == (None, None)
        assert record.error.type in ("TaskCancelled", "cancelled")
    if service is not None:
        await until(lambda: not service.executions and not service.statistics().working)
        assert service._limiter.statistics().tasks_waiting == 0
    assert await rig.plane.get_task(task_id) == record
    return record
