"""The queue in memory: the contract of every queue, and what it promises beyond that."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import pytest

from llama_corral.abc import MessageQueue
from llama_corral.exceptions import QueueUnavailable
from llama_corral.queues import MemoryMessageQueue
from llama_corral.testing.queues import MessageQueueContract, numbered, numbers

pytestmark = pytest.mark.anyio


@pytest.mark.promise("P2", "P6", "P8", "P12")
class TestContract(MessageQueueContract):
    @asynccontextmanager
    async def open_queue(self) -> AsyncIterator[MessageQueue]:
        async with MemoryMessageQueue() as queue:
            yield queue


@pytest.fixture
async def queue() -> AsyncIterator[MemoryMessageQueue]:
    async with MemoryMessageQueue(max_messages=5, max_topics=3, broadcast_buffer=2) as queue:
        yield queue


@pytest.mark.promise("P12")
async def test_a_full_topic_refuses_and_says_what_to_do(queue: MemoryMessageQueue) -> None:
    async with queue.consumer("t") as consumer:
        for number in range(5):
            await queue.publish(numbered(number), "t")
        with pytest.raises(QueueUnavailable) as caught:
            await queue.publish(numbered(5), "t")
        assert "max_messages" in str(caught.value.hint)
        assert caught.value.fields == {"topic": "t", "limit": 5}
        # What is open counts too: only an ack makes room.
        taken = await consumer.receive(5)
        with pytest.raises(QueueUnavailable):
            queue.publish_nowait(numbered(5), "t")
        await taken[0].ack()
        await taken[1].nack()
        queue.publish_nowait(numbered(5), "t")
        assert queue.statistics()["refused"] == 2


@pytest.mark.promise("P12")
async def test_a_full_group_keeps_the_message_from_all_groups(queue: MemoryMessageQueue) -> None:
    async with queue.consumer("t", "slow"), queue.consumer("t", "fast") as fast:
        for number in range(5):
            await queue.publish(numbered(number), "t")
            [delivery] = await fast.receive()
            await delivery.ack()
        with pytest.raises(QueueUnavailable):
            await queue.publish(numbered(5), "t")
        assert queue.waiting("t", "fast") == 0
        assert queue.waiting("t", "slow") == 5


@pytest.mark.promise("P12")
async def test_idle_topics_are_forgotten_when_there_are_too_many(queue: MemoryMessageQueue) -> None:
    async with queue.consumer("kept by its consumer"):
        await queue.publish(numbered(1), "kept by its message")
        for number in range(20):
            async with queue.consumer(f"idle {number}"):
                pass
        assert set(queue.statistics()["topics"]) >= {"kept by its consumer", "kept by its message"}
        await queue.publish(numbered(1), "third")
        with pytest.raises(QueueUnavailable, match="3 topics"):
            await queue.publish(numbered(1), "fourth")


async def test_what_comes_back_stands_in_front_in_order(queue: MemoryMessageQueue) -> None:
    async with queue.consumer("t") as consumer:
        for number in range(5):
            await queue.publish(numbered(number), "t")
        taken = await consumer.receive(4)
        for index in (2, 0, 3, 1):
            await taken[index].nack()
        again = await consumer.receive(5)
        assert numbers(again) == [0, 1, 2, 3, 4]
        assert [delivery.redelivered for delivery in again] == [True, True, True, True, False]


@pytest.mark.promise("P10")
async def test_waiting_consumers_are_served_in_the_order_in_which_they_came(queue: MemoryMessageQueue) -> None:
    served: list[tuple[str, int]] = []

    async def serve(name: str) -> None:
        async with queue.consumer("t") as consumer:
            for _ in range(2):
                [delivery] = await consumer.receive(5)
                served.append((name, delivery.message.data["number"]))
                await delivery.ack()

    async with anyio.create_task_group() as tasks:
        for name in "abc":
            tasks.start_soon(serve, name)
            await anyio.wait_all_tasks_blocked()
        for number in range(6):
            await queue.publish(numbered(number), "t")
            await anyio.wait_all_tasks_blocked()
    assert served == [("a", 0), ("b", 1), ("c", 2), ("a", 3), ("b", 4), ("c", 5)]


@pytest.mark.promise("P2", "P6")
async def test_a_message_that_nobody_saw_is_not_marked_and_keeps_its_place(queue: MemoryMessageQueue) -> None:
    async with queue.consumer("t") as consumer:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consumer.receive)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
            queue.publish_nowait(numbered(0), "t")  # goes into the hands of the task that is being cancelled
            queue.publish_nowait(numbered(1), "t")
            assert queue.waiting("t") == 1
        taken = await consumer.receive(5)
        assert numbers(taken) == [0, 1]
        assert not any(delivery.redelivered for delivery in taken)


@pytest.mark.promise("P2")
async def test_a_message_given_back_goes_to_who_waits(queue: MemoryMessageQueue) -> None:
    got: list[int] = []

    async def wait() -> None:
        async with queue.consumer("t") as other:
            got.extend(numbers(await other.receive()))

    async with anyio.create_task_group() as tasks:
        async with queue.consumer("t") as consumer:
            await queue.publish(numbered(7), "t")
            await consumer.receive()
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
    assert got == [7]


@pytest.mark.promise("P6")
async def test_a_consumer_that_leaves_ends_the_waits_of_its_other_tasks(queue: MemoryMessageQueue) -> None:
    ended: list[str] = []

    async with anyio.create_task_group() as tasks:
        async with queue.consumer("t") as stays:
            async with AsyncExitStack() as block:
                leaves = await block.enter_async_context(queue.consumer("t"))

                async def wait(name: str) -> None:
                    with pytest.raises(QueueUnavailable):
                        await leaves.receive()
                    ended.append(name)

                tasks.start_soon(wait, "has been handed a message")
                await anyio.wait_all_tasks_blocked()
                tasks.start_soon(wait, "waits")
                await anyio.wait_all_tasks_blocked()
                queue.publish_nowait(numbered(1), "t")
            await anyio.wait_all_tasks_blocked()
            assert sorted(ended) == ["has been handed a message", "waits"]
            assert numbers(await stays.receive()) == [1]
            with pytest.raises(QueueUnavailable):
                await leaves.receive()


async def test_two_consumers_race_for_one_message(queue: MemoryMessageQueue) -> None:
    got: list[int] = []

    async def race() -> None:
        async with queue.consumer("t") as consumer:
            [delivery] = await consumer.receive()
            got.append(delivery.message.data["number"])
            await delivery.ack()

    await queue.publish(numbered(0), "t")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(race)
        tasks.start_soon(race)
        await anyio.wait_all_tasks_blocked()
        assert got == [0]
        await queue.publish(numbered(1), "t")
    assert got == [0, 1]


@pytest.mark.promise("P12")
async def test_a_slow_listener_loses_the_oldest(queue: MemoryMessageQueue) -> None:
    async with queue.subscribe("t") as slow, queue.subscribe("t") as fast:
        for number in range(5):
            await queue.broadcast(numbered(number), "t")
            assert (await fast.receive()).data["number"] == number
        assert [(await slow.receive()).data["number"] for _ in range(2)] == [3, 4]
        assert (slow.lost, fast.lost) == (3, 0)
        assert queue.statistics()["lost_broadcasts"] == 3
    assert queue.statistics()["subscriptions"] == {}


async def test_two_tasks_of_one_listener(queue: MemoryMessageQueue) -> None:
    got: list[int] = []
    async with queue.subscribe("t") as listener, anyio.create_task_group() as tasks:

        async def listen() -> None:
            got.append((await listener.receive()).data["number"])

        tasks.start_soon(listen)
        tasks.start_soon(listen)
        await anyio.wait_all_tasks_blocked()
        await queue.broadcast(numbered(1), "t")
        await anyio.wait_all_tasks_blocked()
        assert got == [1]
        await queue.broadcast(numbered(2), "t")
    assert got == [1, 2]


@pytest.mark.promise("P9")
async def test_a_queue_outside_its_block_says_so() -> None:
    queue = MemoryMessageQueue()
    with pytest.raises(QueueUnavailable, match="not entered"):
        await queue.publish(numbered(1), "t")
    async with queue:
        pass
    with pytest.raises(QueueUnavailable, match="closed"):
        await queue.publish(numbered(1), "t")
    with pytest.raises(QueueUnavailable, match="closed"):
        async with queue.consumer("t"):
            pass
    with pytest.raises(RuntimeError):
        async with queue:
            pass


@pytest.mark.promise("P6")
async def test_settling_after_the_queue_was_closed_does_nothing() -> None:
    async with anyio.create_task_group() as tasks:
        closing = anyio.Event()
        queue = MemoryMessageQueue()

        async def own(*, task_status: anyio.abc.TaskStatus[None]) -> None:
            async with queue:
                task_status.started()
                await closing.wait()

        await tasks.start(own)
        async with queue.consumer("t") as consumer:
            await queue.publish(numbered(1), "t")
            await queue.publish(numbered(2), "t")
            acked, nacked = await consumer.receive(2)
            closing.set()
            await anyio.wait_all_tasks_blocked()
            await acked.ack()
            await nacked.nack()
            assert queue.statistics()["topics"] == {}


async def test_statistics_and_waiting(queue: MemoryMessageQueue) -> None:
    assert queue.waiting("t") == 0
    for number in range(3):
        await queue.publish(numbered(number), "t")
    assert queue.waiting("t") == 3
    async with queue.consumer("t") as consumer, queue.subscribe("b"):
        await consumer.receive(2)
        statistics = queue.statistics()
        assert statistics["topics"] == {"t": 1}
        assert statistics["open"] == {"t": 2}
        assert statistics["consumers"] == {"t": 1}
        assert statistics["subscriptions"] == {"b": 1}
        assert statistics["published"] == 3
        assert queue.waiting("t") == 1
        assert queue.waiting("t", "unknown") == 0


async def test_limits_are_checked(queue: MemoryMessageQueue) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        MemoryMessageQueue(max_messages=0)
    async with queue.consumer("t") as consumer:
        with pytest.raises(ValueError, match="at least 1"):
            await consumer.receive(0)


@pytest.mark.promise("P2")
async def test_an_acked_handle_of_an_earlier_delivery_does_nothing(queue: MemoryMessageQueue) -> None:
    async with queue.consumer("t") as second:
        async with queue.consumer("t") as first:
            await queue.publish(numbered(1), "t")
            [old] = await first.receive()
        [new] = await second.receive()
        await old.ack()
        await new.nack()
        assert numbers(await second.receive()) == [1]
