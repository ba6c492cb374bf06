"""A task is cancelled at every moment of its life, and its service under it: one ending, and the right one (P1, P6)."""

from __future__ import annotations

import json
import logging
from collections import Counter as Count
from contextlib import suppress

import anyio
import anyio.abc
import pytest

from llama_corral.exceptions import Conflict

from ..moments import strike
from ..runtime.everything import RESULT, Everything, Ledger, ledger_of_the_run
from .link import ended
from .rig import living_tasks, until

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P1", "P6")]


async def run_and_answer(rig, ids):
    """A task to its ending, whatever becomes of it."""
    ids.append(await rig.submit())
    with suppress(Conflict):  # it has ended before it was asked
        await rig.answer(ids[0])
    return await rig.result(ids[0])


def everything(flavour, *, sends=True):
    ledger = Ledger()
    ledger_of_the_run.set(ledger)
    return Everything(ledger, flavour, sends=sends)


@pytest.mark.parametrize(("store", "stride", "least"), [("rig", 1, 50), ("file_rig", 3, 5)])
async def test_a_task_cancelled_at_every_moment(rig, file_rig, flavour, caplog, store, stride, least):
    """`least`: cancellations that must have come in time for the sweep to mean something. With a file, the store's thread
    decides how many do: half of them or fewer."""
    rig = {"rig": rig, "file_rig": file_rig}[store]
    workflow = everything(flavour)
    service = await rig.serve(workflow, cap=1)
    before = living_tasks()
    statuses: Count[str] = Count()
    ids: list[str] = []

    async def cancel() -> None:
        with suppress(Conflict):
            await rig.plane.cancel(ids[0])

    for moment in range(1, 2000, stride):
        ids.clear()
        with strike(moment, lambda: ids and rig.tasks.start_soon(cancel)) as moments:
            await run_and_answer(rig, ids)
            await until(lambda: not service.executions)
        record = await ended(rig, ids[0], "cancelled", "completed", service=service)
        statuses[record.status] += 1
        if record.status == "completed":
            assert json.loads(record.result) == RESULT
        await until(lambda: living_tasks() == before)
        if not moments.struck:
            break
    assert record.status == "completed"
    assert statuses["cancelled"] > least
    await until(lambda: workflow.ledger.began == workflow.ledger.ended)
    assert [each for each in caplog.records if each.levelno >= logging.ERROR] == []


@pytest.mark.promise("P7")
@pytest.mark.parametrize(("store", "stride"), [("rig", 5), ("file_rig", 15)])
async def test_a_service_cancelled_at_every_moment(rig, file_rig, flavour, caplog, store, stride):
    """Its task goes on elsewhere, or has ended."""
    rig = {"rig": rig, "file_rig": file_rig}[store]
    before = living_tasks()
    epochs: Count[int] = Count()
    ids: list[str] = []
    scopes: list[anyio.CancelScope] = []
    groups: list[anyio.abc.TaskGroup] = []

    async def serve_again(*, task_status) -> None:
        async with anyio.create_task_group() as tasks:
            scopes.append(tasks.cancel_scope)
            await rig.serve(everything(flavour, sends=False), tasks=tasks)
            task_status.started()
        await rig.serve(everything(flavour, sends=False), tasks=groups[-1])

    for moment in range(1, 2000, stride):
        scopes.clear()
        async with anyio.create_task_group() as second:
            groups.append(second)
            await second.start(serve_again)
            ids.clear()
            with strike(moment, lambda: scopes[0].cancel()) as moments:
                await run_and_answer(rig, ids)
            record = await ended(rig, ids[0], "completed")
            assert json.loads(record.result) == RESULT
            epochs[record.epoch] += 1
            scopes[0].cancel()
            second.cancel_scope.cancel()
        assert living_tasks() == before
        if not moments.struck:
            break
    assert record.epoch == 1
    assert epochs[2] > 50 / stride
    assert await rig.store.list_instances() == []
    assert [each for each in caplog.records if each.levelno >= logging.ERROR] == []
