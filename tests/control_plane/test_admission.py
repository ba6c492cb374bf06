"""How many tasks may wait for a service, and what that costs."""

from __future__ import annotations

import anyio
import httpx
import pytest

from llama_corral.control_plane import acceptance, admission
from llama_corral.control_plane.admission import Admission
from llama_corral.exceptions import TooManyTasks
from llama_corral.protocol.lifecycle import TaskStatus

from .corral import open_corral
from .server import open_web


class Counting:
    """A service whose tasks a test counts as `Acceptance` does."""

    def __init__(self, limit: int) -> None:
        self.admission = Admission(limit)
        self.waiting = self.counts = 0

    def submit(self, now: float) -> bool:
        taken = self.admission.take("svc")
        if not taken and self.admission.may_count("svc", now):
            self.counts += 1
            taken = self.admission.counted("svc", self.waiting, now)
        self.waiting += taken
        return taken


@pytest.mark.promise("P12")
def test_the_limit_is_exact_and_counting_is_rare() -> None:
    service = Counting(1000)
    assert sum(service.submit(0.0) for _ in range(1500)) == 1000
    assert service.counts == 2
    # One out, one in, at the limit: it opens again with some room only, and is not counted at every request.
    accepted = 0
    for step in range(2000):
        service.waiting -= 1
        accepted += service.submit(step / 100)
        assert service.waiting <= 1000
    assert service.counts <= 2 + 20 + accepted / 50
    assert accepted > 1500


@pytest.mark.promise("P12")
def test_small_limits_no_limit_and_many_services(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(Counting(3).submit(0.0) for _ in range(5)) == 5
    service = Counting(3)
    assert [service.submit(0.0) for _ in range(5)] == [True] * 3 + [False] * 2
    service.waiting -= 1
    assert not service.submit(0.5)
    assert service.submit(1.0)
    unlimited = Counting(0)
    assert all(unlimited.submit(0.0) for _ in range(100))
    assert unlimited.counts == 0
    monkeypatch.setattr(admission, "MAX_SERVICES", 2)
    several = Admission(10)
    for name in "abc":
        assert several.counted(name, 0, 0.0)
    assert several.take("b")
    assert several.take("c")
    assert not several.take("a")


@pytest.mark.anyio
@pytest.mark.promise("P9", "P12")
async def test_a_full_service_refuses_and_loses_nothing(anyio_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "RECOUNT_AFTER", 0.0)
    async with open_corral(max_queued_tasks=3) as corral:
        service = await corral.service()
        await corral.service("other")
        first = await corral.plane.submit("svc", {}, task_id="first")
        for _ in range(2):
            await corral.plane.submit("svc", {})
        for _ in range(3):
            with pytest.raises(TooManyTasks, match="svc") as full:
                await corral.plane.submit("svc", {})
            assert full.value.fields["retry_after"] >= 1
        # The answer to the first request was lost: repeating it adds nothing.
        assert not (await corral.plane.submit("svc", {}, task_id="first")).created
        assert (await corral.plane.submit("other", {})).status is TaskStatus.QUEUED
        assert (await corral.store.count_tasks())["svc"] == {"queued": 3}
        claim = await service.take_ticket(corral.queue)
        assert claim is not None
        assert claim.task_id == first.task_id
        await corral.plane.submit("svc", {})
        with pytest.raises(TooManyTasks):
            await corral.plane.submit("svc", {})


@pytest.mark.anyio
@pytest.mark.promise("P12")
async def test_many_at_once_do_not_share_a_budget(anyio_backend: str) -> None:
    async with open_corral(max_queued_tasks=5) as corral:
        await corral.service()
        refused = 0

        async def submit() -> None:
            nonlocal refused
            try:
                await corral.plane.submit("svc", {})
            except TooManyTasks:
                refused += 1

        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(submit)
        assert refused == 15
        assert await corral.store.count_queued("svc") == 5


@pytest.mark.anyio
async def test_a_message_waits_while_its_service_is_full(anyio_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from .test_messages import new_task

    monkeypatch.setattr(admission, "RECOUNT_AFTER", 0.0)
    monkeypatch.setattr("llama_corral.control_plane.inbound.FIRST_RETRY", 0.01)
    async with open_corral(max_queued_tasks=1) as corral:
        service = await corral.service()
        own = corral.topic("control_plane")
        for task_id in ("a", "b"):
            await corral.queue.publish(new_task(task_id, "svc"), own)
        for task_id in ("a", "b"):
            claim = await service.take_ticket(corral.queue)
            assert claim is not None
            assert claim.task_id == task_id
        assert await corral.plane.list_dead_letters() == []


@pytest.mark.trio
@pytest.mark.promise("P9")
async def test_a_full_service_over_http() -> None:
    async with open_web(max_queued_tasks=1) as web:
        await web.service()
        await web.client.put("/sessions/s")
        await web.client.post("/services/svc/run", params={"detach": True}, json={})

        def check(answer: httpx.Response) -> None:
            assert answer.status_code == 429
            assert answer.json()["error"]["code"] == "too_many_tasks"
            assert int(answer.headers["retry-after"]) == round(2 * acceptance.RECOUNT_AFTER)

        check(await web.client.post("/services/svc/run", params={"detach": True}, json={}))
        check(await web.client.post("/services/svc/run", json={}))
        check(await web.client.post("/sessions/s/tasks", json={"agent_id": "svc", "input": "{}"}))
        assert (await web.client.get("/sessions/s/tasks")).json() == []
