"""Leases: what clients that are heard of request by request have in their hands, without HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from llama_corral.abc import Consumer, MessageQueue
from llama_corral.exceptions import Conflict, QueueUnavailable
from llama_corral.protocol.queue_calls import Received
from llama_corral.queues import MemoryMessageQueue, leases
from llama_corral.queues.leases import Lease, LeasedQueue
from llama_corral.testing import FaultyMessageQueue
from llama_corral.testing.queues import numbered

pytestmark = pytest.mark.anyio


@pytest.fixture
async def queue() -> AsyncIterator[MemoryMessageQueue]:
    async with MemoryMessageQueue() as queue:
        yield queue


@asynccontextmanager
async def served(queue: MessageQueue, *, lease: float = 60.0, max_leases: int = 10) -> AsyncIterator[LeasedQueue]:
    leased = LeasedQueue(queue, lease=lease, max_leases=max_leases)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(leased.run)
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(10):  # noqa: ASYNC100 -- the block around the yield has them
            yield leased
        tasks.cancel_scope.cancel()


def numbers(answer: tuple[Received, ...]) -> list[int]:
    return [item.message.data["number"] for item in answer]


async def rest(queue: MessageQueue, count: int) -> list[int]:
    """What is in the line of the topic `t`."""
    async with queue.consumer("t") as consumer:
        found: list[int] = []
        with anyio.fail_after(5):
            while len(found) < count:
                for delivery in await consumer.receive(count - len(found)):
                    found.append(delivery.message.data["number"])
                    await delivery.ack()
        return found


@pytest.mark.promise("P2")
async def test_an_answer_can_be_asked_for_again(queue: MemoryMessageQueue) -> None:
    async with served(queue) as leased:
        lease = await leased.open_consumer("t", "default")
        for number in range(3):
            await queue.publish(numbered(number), "t")
        first = await lease.receive(1, 2)
        assert numbers(first) == [0, 1]
        assert await lease.receive(1, 5) == first
        await lease.settle([first[0].number], [])
        assert await lease.receive(1, 5) == first[1:]
        assert numbers(await lease.receive(2, 5)) == [2]
        for seq in (0, 1, 4, 10**30, -1):
            with pytest.raises(Conflict):
                await lease.receive(seq, 1)
        assert leased.statistics() == {"consumers": 1, "subscriptions": 0, "open": 2}


@pytest.mark.promise("P10")
@pytest.mark.parametrize("kind", ["consumer", "subscription"])
async def test_who_waits_hears_at_once_that_the_lease_has_ended(queue: MemoryMessageQueue, kind: str) -> None:
    link = FaultyMessageQueue(queue)
    async with served(link) as leased, anyio.create_task_group() as tasks:
        lease = await (leased.open_consumer("t", "g") if kind == "consumer" else leased.open_subscription("t"))

        async def wait() -> None:
            if kind == "consumer":
                with pytest.raises(QueueUnavailable):
                    await lease.receive(1, 1)
            else:
                assert await lease.receive(1, 1) == ()
                assert leased.get(lease.lease_id) is None

        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        await link.disconnect()


@pytest.mark.promise("P2")
async def test_a_cancelled_receive_keeps_its_answer_or_takes_nothing(queue: MemoryMessageQueue) -> None:
    async with served(queue) as leased:
        lease = await leased.open_consumer("t", "default")
        for number in range(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lease.receive, number + 1, 1)
                await anyio.wait_all_tasks_blocked()
                if number % 2:
                    tasks.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    await queue.publish(numbered(number), "t")
                tasks.cancel_scope.cancel()
            answer = await lease.receive(number + 1, 1)
            assert numbers(answer) == [number]
            await lease.settle([answer[0].number], [])


async def test_a_receive_that_comes_again_overtakes_the_one_that_waits(queue: MemoryMessageQueue) -> None:
    got: list[tuple[Received, ...]] = []

    async def receive(lease: Lease) -> None:
        got.append(await lease.receive(1, 1))

    async with served(queue) as leased:
        lease = await leased.open_consumer("t", "default")
        async with anyio.create_task_group() as tasks:
            for waiting in range(3):
                tasks.start_soon(receive, lease)
                await anyio.wait_all_tasks_blocked()
                assert got == [()] * waiting
            await queue.publish(numbered(1), "t")
        assert [numbers(answer) for answer in got] == [[], [], [1]]


@pytest.mark.promise("P2")
async def test_an_answer_that_nobody_takes_goes_back(queue: MemoryMessageQueue) -> None:
    async with served(queue) as leased:
        lease = await leased.open_consumer("t", "default")
        await queue.publish(numbered(1), "t")
        await lease.receive(1, 1)
        await lease.abandon(1)
        await lease.abandon(1)
        assert queue.waiting("t") == 1
        # Given up before it was answered, too: the call that comes late takes nothing.
        await lease.abandon(2)
        assert await lease.receive(2, 1) == ()
        answer = await lease.receive(3, 1)
        assert numbers(answer) == [1]
        assert answer[0].redelivered
        await lease.abandon(1)
        await lease.abandon(99)
        assert await lease.receive(3, 1) == answer


async def test_giving_up_ends_the_wait(queue: MemoryMessageQueue) -> None:
    async with served(queue) as leased:
        lease = await leased.open_consumer("t", "default")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lease.receive, 1, 1)
            await anyio.wait_all_tasks_blocked()
            await lease.abandon(1)
        await queue.publish(numbered(1), "t")
        assert numbers(await lease.receive(2, 1)) == [1]


@pytest.mark.promise("P2", "P8")
async def test_what_a_silent_client_had_open_comes_back(queue: MemoryMessageQueue) -> None:
    async with served(queue) as leased:
        lease = await leased.open_consumer("t", "default", 0.15)
        other = await leased.open_subscription("b", 0.15)
        for number in range(3):
            await queue.publish(numbered(number), "t")
        with lease.in_use():
            answer = await lease.receive(1, 2)
            await anyio.sleep(0.3)  # longer than the lease: a request is here
            assert leased.get(lease.lease_id) is lease
        await lease.settle([answer[0].number], [])
        await lease.ended.wait()
        await other.ended.wait()
        assert leased.get(lease.lease_id) is leased.get(other.lease_id) is None
        assert await rest(queue, 2) == [1, 2]
        assert leased.statistics() == {"consumers": 0, "subscriptions": 0, "open": 0}


@pytest.mark.promise("P2", "P8")
async def test_closing_gives_back_what_is_open_and_ends_the_wait(queue: MemoryMessageQueue) -> None:
    async with served(queue) as leased:
        lease = await leased.open_consumer("t", "default")
        await queue.publish(numbered(1), "t")
        await lease.receive(1, 1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lease.receive, 2, 1)
            await anyio.wait_all_tasks_blocked()
            await leased.close(lease)
        assert queue.waiting("t") == 1
        assert await lease.receive(2, 1) == ()
        await leased.close(lease)
        again = await leased.open_consumer("t", "default")
        assert numbers(await again.receive(1, 1)) == [1]
    assert queue.waiting("t") == 1  # the end of the server is the end of its leases


@pytest.mark.promise("P12")
async def test_limits(queue: MemoryMessageQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "MAX_OPEN", 3)
    monkeypatch.setattr(leases, "MAX_BATCH", 2)
    async with served(queue, max_leases=2) as leased:
        lease = await leased.open_consumer("t", "default", 10**9)
        assert lease.seconds == leases.LONGEST_LEASE
        assert (await leased.open_subscription("t", 0)).seconds == leases.SHORTEST_LEASE
        with pytest.raises(QueueUnavailable, match="2 consumers and subscriptions"):
            await leased.open_consumer("t", "default")
        for number in range(5):
            await queue.publish(numbered(number), "t")
        answer = await lease.receive(1, 99)
        assert numbers(answer) == [0, 1]
        assert numbers(await lease.receive(2, 99)) == [2]
        with pytest.raises(QueueUnavailable, match="3 deliveries"):
            await lease.receive(3, 99)
        await lease.settle([item.number for item in answer], [])
        assert numbers(await lease.receive(3, 99)) == [3, 4]


@pytest.mark.promise("P12")
async def test_a_subscription_keeps_a_bounded_number(
    queue: MemoryMessageQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BROADCAST_BUFFER", 3)
    async with served(queue) as leased:
        lease = await leased.open_subscription("b")
        for number in range(5):
            await queue.broadcast(numbered(number), "b")
            await anyio.wait_all_tasks_blocked()
        first = await lease.receive(1, 2)
        assert numbers(first) == [2, 3]
        assert await lease.receive(1, 2) == first
        assert numbers(await lease.receive(2, 2)) == [4]
        await lease.abandon(2)
        await lease.settle([0], [0])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lease.receive, 3, 2)
            await anyio.wait_all_tasks_blocked()
            await queue.broadcast(numbered(5), "b")
        assert numbers(await lease.receive(3, 2)) == [5]


class Failing(MemoryMessageQueue):
    """Its consumers fail as they are told."""

    def __init__(self, at_open: Exception | None, later: Exception | None) -> None:
        super().__init__()
        self._at_open = at_open
        self._later = later

    @asynccontextmanager
    async def consumer(self, topic: str, group: str = "default") -> AsyncIterator[Consumer]:  # type: ignore[override]
        if self._at_open is not None:
            raise self._at_open
        async with super().consumer(topic, group) as consumer:
            try:
                yield consumer
            finally:
                if self._later is not None:
                    raise self._later


async def test_a_queue_that_does_not_open() -> None:
    async with Failing(QueueUnavailable("no broker"), None) as queue, served(queue) as leased:
        with pytest.raises(QueueUnavailable, match="no broker"):
            await leased.open_consumer("t", "default")
        assert leased.statistics()["consumers"] == 0


async def test_a_failure_of_one_lease_is_nobody_elses(caplog: pytest.LogCaptureFixture) -> None:
    async with Failing(None, ValueError("a bug of the adapter")) as queue, served(queue) as leased:
        lease, other = await leased.open_consumer("t", "default"), await leased.open_consumer("t", "other")
        await leased.close(lease)
        await anyio.wait_all_tasks_blocked()
        assert "a bug of the adapter" in caplog.text
        assert leased.get(other.lease_id) is other


async def test_a_consumer_that_was_lost_ends_its_lease() -> None:
    async with anyio.create_task_group() as tasks:
        async with MemoryMessageQueue() as queue, anyio.create_task_group() as serving:
            leased = LeasedQueue(queue)
            serving.start_soon(leased.run)
            await anyio.wait_all_tasks_blocked()
            lease = await leased.open_consumer("t", "default")
            await queue.__aexit__()
            with pytest.raises(QueueUnavailable):
                await lease.receive(1, 1)
            await lease.ended.wait()
            await anyio.wait_all_tasks_blocked()
            assert leased.get(lease.lease_id) is None
            with pytest.raises(QueueUnavailable):
                await leased.open_consumer("t", "default")
            serving.cancel_scope.cancel()
        with pytest.raises(QueueUnavailable):
            await leased.open_consumer("t", "default")
        tasks.cancel_scope.cancel()
