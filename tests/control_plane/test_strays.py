"""Tasks that an instance owns and does not know of."""

from __future__ import annotations

import anyio
import pytest

from llama_corral.control_plane.leases import Strays
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import HeldTask

from .corral import Corral, open_corral


def test_one_heartbeat_proves_nothing() -> None:
    strays = Strays(5.0)
    a, b, newer = HeldTask("a", 1), HeldTask("b", 1), HeldTask("a", 2)
    assert strays.lost("i", [a, b], 0.0) == []
    assert strays.lost("i", [a, b], 4.9) == []  # a repeated heartbeat is not the next one
    assert strays.lost("i", [a], 5.0) == [a]
    assert strays.lost("i", [b], 6.0) == []  # it was known in between
    assert strays.lost("other", [b], 11.0) == []
    assert strays.lost("i", [b, newer], 11.0) == [b]
    assert strays.lost("i", [a, newer], 15.0) == []
    strays.forget("i")
    assert strays.lost("i", [newer], 30.0) == []


def test_heartbeats_that_others_heard_prove_nothing() -> None:
    strays = Strays(5.0)
    a = HeldTask("a", 1)
    assert strays.lost("i", [a], 0.0) == []
    assert strays.lost("i", [a], 5.1) == []  # in between it may have been named to another control plane
    assert strays.lost("i", [a], 10.0) == []
    assert strays.lost("i", [a], 10.1) == [a]
    assert strays.lost("gone", [a], 11.0) == []
    assert strays.lost("i", [], 16.1) == []
    assert strays._seen == {}


def test_nothing_is_kept_of_instances_without_strays() -> None:
    strays = Strays(5.0)
    for number in range(100):
        strays.lost(f"i{number}", [HeldTask("a", 1)], 0.0)
        strays.lost(f"i{number}", [], 1.0)
    assert strays._seen == {}


@pytest.mark.anyio
@pytest.mark.promise("P1", "P2")
async def test_a_stray_is_given_to_others_and_what_is_named_stays(anyio_backend: str) -> None:
    async with open_corral(heartbeat_interval=0.1, lease=0.5) as corral:
        service = await corral.service(register=False)
        service.instance_id = "far"
        lost = await corral.elsewhere("svc", service)
        kept = await corral.elsewhere("svc", service)
        held = [HeldTask(kept.task_id, kept.epoch)]
        assert (await corral.plane.heartbeat("far", held)).strays == ()
        assert (await corral.plane.get_task(lost.task_id)).owner == "far"
        while (record := await corral.plane.get_task(lost.task_id)).owner == "far":
            await anyio.sleep(0.02)
            await corral.plane.heartbeat("far", held)
        assert (record.status, record.attempts, record.owner) == (TaskStatus.QUEUED, 1, None)
        assert (await corral.message("svc")).data["task_id"] == lost.task_id
        assert (await corral.plane.get_task(kept.task_id)).owner == "far"
        assert (await service.complete(lost)).status == "fenced"


@pytest.mark.anyio
async def test_an_answer_on_its_way_is_no_stray(corral: Corral) -> None:
    service = await corral.service(register=False)
    service.instance_id = "far"
    claim = await corral.elsewhere("svc", service)
    await corral.plane.heartbeat("far", ())
    await corral.plane.heartbeat("far", ())
    assert (await corral.plane.get_task(claim.task_id)).owner == "far"
