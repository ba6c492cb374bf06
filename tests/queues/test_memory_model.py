"""Any sequence of operations on the memory queue against a model: nothing lost, nothing doubled, the order kept."""

from __future__ import annotations

from contextlib import AsyncExitStack

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_corral.abc import Consumer, Delivery
from llama_corral.queues import MemoryMessageQueue
from llama_corral.testing.queues import numbered

OPERATIONS = ("publish", "receive", "receive and cancel", "ack", "nack", "join", "leave")
steps = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 5)), max_size=60)


class Model:
    """One topic, one group. Keeps what is acked and what is in whose hands, and lets the queue tell the rest."""

    def __init__(self, queue: MemoryMessageQueue) -> None:
        self.queue = queue
        self.published = 0
        self.acked: list[int] = []
        self.members: list[tuple[AsyncExitStack, Consumer, list[Delivery]]] = []

    async def run(self, operation: str, choice: int) -> None:
        if operation == "publish":
            await self.queue.publish(numbered(self.published), "t")
            self.published += 1
        elif operation == "join":
            stack = AsyncExitStack()
            consumer = await stack.enter_async_context(self.queue.consumer("t"))
            self.members.append((stack, consumer, []))
        elif self.members:
            await self.act(operation, self.members[choice % len(self.members)], choice)

    async def act(self, operation: str, member: tuple[AsyncExitStack, Consumer, list[Delivery]], choice: int) -> None:
        stack, consumer, hands = member
        if operation == "receive":
            if self.queue.waiting("t"):
                got = await consumer.receive(choice + 1)
                numbers = [delivery.message.data["number"] for delivery in got]
                assert numbers == sorted(numbers)
                hands += got
        elif operation == "receive and cancel":
            await self.receive_and_cancel(consumer, hands, publish=choice % 2 == 0)
        elif operation == "leave":
            self.members.remove(member)
            await stack.aclose()
        elif hands:
            delivery = hands.pop(choice % len(hands))
            if operation == "ack":
                self.acked.append(delivery.message.data["number"])
                await delivery.ack()
            else:
                await delivery.nack()

    async def receive_and_cancel(self, consumer: Consumer, hands: list[Delivery], *, publish: bool) -> None:
        async def receive() -> None:
            hands.extend(await consumer.receive())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
            if publish:
                self.queue.publish_nowait(numbered(self.published), "t")
                self.published += 1

    async def finish(self) -> None:
        in_hands = sum(len(hands) for _, _, hands in self.members)
        assert self.queue.waiting("t") + in_hands + len(self.acked) == self.published
        for stack, _, _ in self.members:
            await stack.aclose()
        async with self.queue.consumer("t") as last:
            rest = await last.receive(self.published + 1) if self.queue.waiting("t") else []
            numbers = [delivery.message.data["number"] for delivery in rest]
            assert numbers == sorted(set(range(self.published)) - set(self.acked))
            for delivery in rest:
                await delivery.ack()
        line = self.queue.statistics()
        assert line["topics"].get("t", 0) == line["open"].get("t", 0) == 0
        # The limit counts exactly what is there: all of it is free again.
        for number in range(100):
            self.queue.publish_nowait(numbered(number), "t")


@pytest.mark.promise("P2", "P12")
@pytest.mark.parametrize("backend", ["trio", "asyncio"])
@settings(max_examples=60, deadline=None)
@given(todo=steps)
def test_any_sequence_of_operations(backend: str, todo: list[tuple[str, int]]) -> None:
    async def main() -> None:
        async with MemoryMessageQueue(max_messages=100) as queue:
            model = Model(queue)
            for operation, choice in todo:
                await model.run(operation, choice)
            await model.finish()

    anyio.run(main, backend=backend)
