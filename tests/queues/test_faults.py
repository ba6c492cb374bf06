"""The fault injector: transparent until a fault is planned, and then exactly that fault."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from llama_corral.abc import MessageQueue
from llama_corral.exceptions import QueueUnavailable
from llama_corral.queues import MemoryMessageQueue
from llama_corral.testing import FaultyMessageQueue, MessageQueueContract
from llama_corral.testing.queues import numbered, numbers


@pytest.mark.anyio
@pytest.mark.promise("P2")
class TestContractWithoutFaults(MessageQueueContract):
    @asynccontextmanager
    async def open_queue(self) -> AsyncIterator[MessageQueue]:
        async with FaultyMessageQueue(MemoryMessageQueue()) as queue:
            yield queue


@pytest.fixture
async def queue() -> AsyncIterator[FaultyMessageQueue]:
    async with FaultyMessageQueue(MemoryMessageQueue()) as queue:
        yield queue


async def publish(queue: MessageQueue, *which: int) -> None:
    for number in which:
        await queue.publish(numbered(number), "t")


async def waiting(queue: MessageQueue) -> list[int]:
    async with queue.consumer("t") as consumer:
        if not queue.statistics()["topics"].get("t"):
            return []
        return numbers(await consumer.receive(100))


@pytest.mark.anyio
async def test_drop_and_duplicate(queue: FaultyMessageQueue) -> None:
    fault = queue.drop(times=2, topic="t")
    queue.duplicate(topic="t")
    await queue.publish(numbered(9), "other")
    await publish(queue, 0, 1, 2, 3)
    assert await waiting(queue) == [2, 2, 3]
    assert fault.applied == 2
    assert queue.statistics()["faults"] == {"drop": 2, "duplicate": 1}


@pytest.mark.anyio
async def test_refuse_and_lose_the_answer(queue: FaultyMessageQueue) -> None:
    queue.refuse()
    queue.lose_answer()
    for number in range(2):
        with pytest.raises(QueueUnavailable):
            await publish(queue, number)
    assert await waiting(queue) == [1]


@pytest.mark.parametrize(
    ("order", "expected"), [("kept", [3, 0, 1, 2]), ("reversed", [3, 2, 1, 0]), (7, None)], ids=str
)
@pytest.mark.anyio
async def test_delay_and_reorder(queue: FaultyMessageQueue, order: str | int, expected: list[int] | None) -> None:
    queue.delay(times=3)
    await publish(queue, 0, 1, 2, 3)
    assert queue.statistics()["held"] == 3
    assert await queue.release(order=order) == 3  # type: ignore[arg-type]
    got = await waiting(queue)
    assert sorted(got) == [0, 1, 2, 3]
    assert expected is None or got == expected


@pytest.mark.anyio
async def test_release_one_by_one(queue: FaultyMessageQueue) -> None:
    fault = queue.delay()
    await publish(queue, 0, 1)
    assert await queue.release(count=1) == 1
    assert await waiting(queue) == [0]
    fault.stop()
    await publish(queue, 2)
    assert await queue.release() == 1
    assert await waiting(queue) == [0, 2, 1]


@pytest.mark.anyio
async def test_hang_until_released(queue: FaultyMessageQueue) -> None:
    async with anyio.create_task_group() as tasks:
        with queue.hang("publish", topic="t") as hang:
            tasks.start_soon(publish, queue, 1)
            await hang.reached.wait()
            await anyio.wait_all_tasks_blocked()
            assert queue.statistics()["published"] == 0
    assert await waiting(queue) == [1]


@pytest.mark.anyio
async def test_a_hanging_call_can_be_cancelled(queue: FaultyMessageQueue) -> None:
    await publish(queue, 1)
    async with queue.consumer("t") as consumer:
        with queue.hang("receive") as hang:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(consumer.receive)
                await hang.reached.wait()
                tasks.cancel_scope.cancel()
        assert numbers(await consumer.receive()) == [1]


@pytest.mark.anyio
async def test_a_dropped_ack_brings_the_message_back(queue: FaultyMessageQueue) -> None:
    await publish(queue, 1)
    queue.drop("ack")
    async with queue.consumer("t") as consumer:
        [delivery] = await consumer.receive()
        await delivery.ack()
    assert await waiting(queue) == [1]


@pytest.mark.anyio
async def test_a_cut_connection(queue: FaultyMessageQueue) -> None:
    failed: list[str] = []

    async def wait(receive: object, name: str) -> None:
        with pytest.raises(QueueUnavailable):
            await receive()  # type: ignore[operator]
        failed.append(name)

    await publish(queue, 1)
    async with queue.consumer("t") as consumer, queue.subscribe("t") as listener:
        [delivery] = await consumer.receive()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, consumer.receive, "consumer")
            tasks.start_soon(wait, listener.receive, "listener")
            await anyio.wait_all_tasks_blocked()
            await queue.disconnect()
        assert sorted(failed) == ["consumer", "listener"]
        with pytest.raises(QueueUnavailable):
            await publish(queue, 2)
        with pytest.raises(QueueUnavailable):
            await delivery.ack()
        queue.reconnect()
        with pytest.raises(QueueUnavailable):
            await consumer.receive()
        assert await waiting(queue) == [1]


@pytest.mark.anyio
async def test_broadcasts_can_get_lost(queue: FaultyMessageQueue) -> None:
    queue.drop("broadcast")
    async with queue.subscribe("t") as listener:
        await queue.broadcast(numbered(0), "t")
        queue.delay("broadcast", times=1)
        await queue.broadcast(numbered(1), "t")
        await queue.broadcast(numbered(2), "t")
        assert (await listener.receive()).data == {"number": 2}
        await queue.release()
        queue.refuse("hear")
        with pytest.raises(QueueUnavailable):
            await listener.receive()
        assert (await listener.receive()).data == {"number": 1}


def test_a_fault_that_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="receive"):
        FaultyMessageQueue(MemoryMessageQueue()).duplicate("receive")
