"""Waits for what tasks here and far away come to. All of them follow an event log."""

from __future__ import annotations

import anyio

from llama_corral.client import Client, TaskInfo
from llama_corral.protocol.records import StoredEvent

from ..services.rig import PATIENCE, Rig


async def wait_status(rig: Rig, task_id: str, status: str) -> None:
    """Until a task here has the status."""
    with anyio.fail_after(PATIENCE), rig.plane.open_log(task_id, statuses=True) as log:
        async for page in log:
            if page.record.status == status:
                return
    raise AssertionError(f"it ended as {(await rig.plane.get_task(task_id)).status}")


async def wait_event(rig: Rig, task_id: str, name: str, index: int = 0) -> StoredEvent:
    """The event of a task here that is the n-th of its type, once it is published."""
    found = []
    with anyio.fail_after(PATIENCE), rig.plane.open_log(task_id) as log:
        async for page in log:
            found += [event for event in page.events if event.type == name]
            if len(found) > index:
                return found[index]
    raise AssertionError(f"it ended as {(await rig.plane.get_task(task_id)).status}")


async def far_task(client: Client, service: str, before: set[str]) -> TaskInfo:
    """The one task of a service far away that was not there before."""
    (found,) = [task for task in await client.tasks(service=service) if task.task_id not in before]
    return found


async def far_tasks(client: Client, service: str) -> set[str]:
    return {task.task_id for task in await client.tasks(service=service, limit=1000)}


async def wait_far_status(client: Client, task_id: str, *statuses: str) -> str:
    """Until a task far away has one of the statuses, which may be the ending."""
    with anyio.fail_after(PATIENCE):
        async with client.task(task_id).events(follow_status=True) as events:
            while (item := await events.receive()) is not None:
                if item in statuses:
                    return str(item)
        assert events.record is not None
        assert events.record.status in statuses, events.record
        return events.record.status
