"""Whoever follows a task's status hears when it waits and when it works again, also from another control plane."""

from __future__ import annotations

import anyio
import pytest

from .corral import open_corral

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P10")]


@pytest.mark.parametrize("where", ["here", "elsewhere"])
async def test_waiting_is_news_without_an_event(where: str) -> None:
    async with open_corral(alone=False) as corral, corral.another_plane() as other:
        plane, service = corral.plane, await corral.service(slots=1)
        task_id = (await plane.submit("svc", {})).task_id
        claim = await service.wait_claim()
        told: list[str] = []
        changed = anyio.Event()

        async def follow() -> None:
            nonlocal changed
            log = (plane if where == "here" else other).open_log(task_id, statuses=True)
            async for _ in log:
                assert log.status is not None
                told.append(log.status.value)
                changed.set()
                changed = anyio.Event()

        async def until(*expected: str) -> None:
            with anyio.fail_after(8):
                while told != list(expected):
                    await changed.wait()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            await until("running")
            await service.report(claim, waiting=True)
            await until("running", "waiting")
            await service.report(claim, waiting=False)
            await until("running", "waiting", "running")
            await service.complete(claim)
        assert told[3:] == ["completed"]


async def test_a_claim_is_news_to_the_readers_of_this_process() -> None:
    async with open_corral() as corral:
        plane, service = corral.plane, await corral.service()
        task_id = (await plane.submit("svc", {})).task_id
        told: list[str] = []

        async def follow() -> None:
            log = plane.open_log(task_id, statuses=True)
            async for _ in log:
                told.append(str(log.status))  # noqa: PERF401 - each as it comes

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            await anyio.wait_all_tasks_blocked()
            claim = await service.take_ticket(corral.queue)
            assert claim is not None
            await anyio.wait_all_tasks_blocked()
            assert told == ["queued", "running"]
            await service.complete(claim)
