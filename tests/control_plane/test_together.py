"""Tasks of one session that are added while others end: nobody overwrites what somebody else wrote."""

from __future__ import annotations

import anyio
import pytest

from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import TaskFilter

from .corral import Corral

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P1")]

COUNT = 40


@pytest.mark.parametrize("policy", ["enqueue", "concurrent"])
async def test_all_are_listed_and_every_result_stays(corral: Corral, policy: str) -> None:
    service = await corral.service(slots=COUNT)
    await corral.plane.sessions.create("s", policy=policy)  # type: ignore[arg-type]
    added: list[str] = []

    async def add(number: int) -> None:
        added.append((await corral.plane.submit("svc", {"n": number}, session_id="s")).task_id)
        await corral.plane.sessions.merge_state("s", {f"key{number}": number})

    async def work() -> None:
        for number in range(COUNT):
            if policy == "enqueue" and number:
                claim = await service.take_ticket(corral.queue)
                assert claim is not None
            else:
                claim = await service.wait_claim()
            await service.complete(claim, claim.task_id)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work)
        for number in range(COUNT):
            tasks.start_soon(add, number)

    session = await corral.plane.sessions.get("s")
    assert sorted(session.task_ids) == sorted(added)
    assert await corral.plane.sessions.state("s") == {f"key{number}": number for number in range(COUNT)}
    records = await corral.plane.list_tasks(TaskFilter(session_id="s"))
    assert {(record.task_id, record.status, record.result) for record in records} == {
        (task_id, TaskStatus.COMPLETED, f'"{task_id}"') for task_id in added
    }
