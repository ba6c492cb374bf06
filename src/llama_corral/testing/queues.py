"""What every message queue must do: the contract suite of `llama_corral.abc.MessageQueue`.

Subclass it, say how a queue is opened, and mark the class for AnyIO's pytest plugin:

    @pytest.mark.anyio
    class TestMyQueue(MessageQueueContract):
        redelivery_timeout = 30.0

        @asynccontextmanager
        async def open_queue(self):
            async with MyQueue(URL) as queue:
                yield queue

Every test uses topics of its own, so that the suite can run against a broker that others use and that keeps what it
got.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from uuid import uuid4

import anyio
from anyio.lowlevel import checkpoint

from ..abc import Consumer, Delivery, MessageQueue, Subscription
from ..exceptions import QueueUnavailable
from ..protocol.messages import ActionTypes, QueueMessage
from ..queues.consumers import CallableMessageConsumer, RetryPolicy, register_consumer


@contextmanager
def _raises(kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


def numbered(number: int) -> QueueMessage:
    return QueueMessage(data={"number": number}, type="numbered", action=ActionTypes.NEW_TASK)


def numbers(deliveries: list[Delivery]) -> list[int]:
    return [delivery.message.data["number"] for delivery in deliveries]


class MessageQueueContract:
    """The suite. The attributes say what a broker needs; their values here fit a queue in memory."""

    patience = 10.0
    """Seconds until a message that must come is missing."""
    redelivery_timeout = 10.0
    """Seconds until what a departed consumer had open must have come back."""
    quiet = 0.0
    """Seconds without a message that prove that none comes, besides every task being blocked."""
    backlog = 500
    """How many messages the test of many messages publishes."""

    def open_queue(self) -> AbstractAsyncContextManager[MessageQueue]:
        """A connected queue."""
        raise NotImplementedError

    def open_peer(self, queue: MessageQueue) -> AbstractAsyncContextManager[MessageQueue]:
        """Another client of the same broker, as another process would be; the same object where there is no other."""
        return nullcontext(queue)

    # Helpers

    def topic(self, name: str = "numbered") -> str:
        return f"contract-{uuid4().hex}.{name}"

    async def settle(self) -> None:
        await anyio.wait_all_tasks_blocked()
        if self.quiet:
            await anyio.sleep(self.quiet)

    async def take(self, consumer: Consumer, count: int, *, timeout: float | None = None) -> list[Delivery]:
        """Exactly `count` deliveries, in the order of their arrival."""
        taken: list[Delivery] = []
        with anyio.fail_after(timeout or self.patience):
            while len(taken) < count:
                some = await consumer.receive(count - len(taken))
                assert 1 <= len(some) <= count - len(taken)
                taken += some
        return taken

    async def take_and_ack(self, consumer: Consumer, count: int, *, timeout: float | None = None) -> list[int]:
        taken = await self.take(consumer, count, timeout=timeout)
        for delivery in taken:
            await delivery.ack()
        return numbers(taken)

    async def assert_nothing(self, source: Consumer | Subscription) -> None:
        got: list[object] = []

        async def receive() -> None:
            got.append(await source.receive())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            await self.settle()
            tasks.cancel_scope.cancel()
        assert got == []

    # One message

    async def test_a_message_arrives_as_it_was(self) -> None:
        topic = self.topic()
        message = QueueMessage(
            publisher_id="püblisher",
            data={"text": "Llama 🦙\n\u2028\x00", "deep": [{"n": 1.5, "none": None}]},
            action=ActionTypes.TASK_STREAM,
            type="some.type",
        )
        async with self.open_queue() as queue, queue.consumer(topic) as consumer:
            await queue.publish(message, topic)
            [delivery] = await self.take(consumer, 1)
            assert delivery.message == message
            await delivery.ack()

    async def test_a_message_waits_for_its_first_consumer(self) -> None:
        topic = self.topic()
        async with self.open_queue() as queue:
            await queue.publish(numbered(1), topic)
            async with self.open_peer(queue) as peer, peer.consumer(topic) as consumer:
                assert await self.take_and_ack(consumer, 1) == [1]

    async def test_a_waiting_consumer_is_woken(self) -> None:
        topic = self.topic()
        got: list[int] = []
        async with self.open_queue() as queue, queue.consumer(topic) as consumer:

            async def receive() -> None:
                got.extend(await self.take_and_ack(consumer, 1))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(receive)
                await self.settle()
                await queue.publish(numbered(1), topic)
        assert got == [1]

    async def test_a_large_message(self) -> None:
        topic = self.topic()
        message = QueueMessage(data={"text": "ü" * 100_000, "more": "x" * 100_000})
        async with self.open_queue() as queue, queue.consumer(topic) as consumer:
            await queue.publish(message, topic)
            [delivery] = await self.take(consumer, 1)
            assert delivery.message.data == message.data
            await delivery.ack()

    # Many messages

    async def test_the_order_of_publication(self) -> None:
        topic = self.topic()
        async with self.open_queue() as queue, queue.consumer(topic) as consumer:
            for number in range(50):
                await queue.publish(numbered(number), topic)
            assert await self.take_and_ack(consumer, 50) == list(range(50))

    async def test_many_messages(self) -> None:
        topic = self.topic()
        got: list[int] = []
        async with self.open_queue() as queue, self.open_peer(queue) as peer, peer.consumer(topic) as consumer:

            async def receive() -> None:
                got.extend(await self.take_and_ack(consumer, self.backlog, timeout=self.patience * 3))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(receive)
                for number in range(self.backlog):
                    await queue.publish(numbered(number), topic)
            await self.assert_nothing(consumer)
        assert got == list(range(self.backlog))

    async def test_at_most_as_many_as_asked_for(self) -> None:
        topic = self.topic()
        async with self.open_queue() as queue, queue.consumer(topic) as consumer:
            for number in range(5):
                await queue.publish(numbered(number), topic)
            with anyio.fail_after(self.patience):
                some = await consumer.receive(2)
            assert numbers(some) == [0, 1][: len(some)]
            assert await self.take_and_ack(consumer, 5 - len(some)) == list(range(len(some), 5))

    async def test_each_message_goes_to_one_of_the_competing_consumers(self) -> None:
        topic = self.topic()
        got: list[int] = []
        async with self.open_queue() as queue, self.open_peer(queue) as peer:

            async def work(source: MessageQueue) -> None:
                async with source.consumer(topic) as consumer:
                    while True:
                        for delivery in await consumer.receive():
                            got.append(delivery.message.data["number"])
                            await delivery.ack()
                            if len(got) == 60:
                                tasks.cancel_scope.cancel()

            with anyio.fail_after(self.patience):
                async with anyio.create_task_group() as tasks:
                    for source in (queue, queue, peer):
                        tasks.start_soon(work, source)
                    for number in range(60):
                        await queue.publish(numbered(number), topic)
        assert sorted(got) == list(range(60))

    # Ack, nack, redelivery

    async def test_an_acked_message_does_not_come_back(self) -> None:
        topic = self.topic()
        async with self.open_queue() as queue:
            async with queue.consumer(topic) as consumer:
                await queue.publish(numbered(1), topic)
                [delivery] = await self.take(consumer, 1)
                await delivery.ack()
                await delivery.ack()
                await delivery.nack()
            async with queue.consumer(topic) as consumer:
                await self.assert_nothing(consumer)

    async def test_an_open_delivery_is_nobody_elses(self) -> None:
        topic = self.topic()
        async with self.open_queue() as queue, queue.consumer(topic) as first, queue.consumer(topic) as second:
            await queue.publish(numbered(1), topic)
            [delivery] = await self.take(first, 1)
            await self.assert_nothing(second)
            await delivery.ack()

    async def test_a_nacked_message_comes_back(self) -> None:
        topic = self.topic()
        async with self.open_queue() as queue, queue.consumer(topic) as consumer:
            await queue.publish(numbered(1), topic)
            for _ in range(5):
                [delivery] = await self.take(consumer, 1)
                await delivery.nack()
                await delivery.nack()
                await delivery.ack()  # too late
            [delivery] = await self.take(consumer, 1)
            assert delivery.redelivered
            await delivery.ack()
            await self.assert_nothing(consumer)

    async def test_what_a_consumer_had_open_comes_back_when_it_leaves(self) -> None:
        topic = self.topic()
        async with self.open_queue() as queue:
            async with queue.consumer(topic) as consumer:
                for number in range(4):
                    await queue.publish(numbered(number), topic)
                taken = await self.take(consumer, 4)
                await taken[1].ack()
            async with self.open_peer(queue) as peer, peer.consumer(topic) as consumer:
                again = await self.take(consumer, 3, timeout=self.redelivery_timeout)
                assert sorted(numbers(again)) == [0, 2, 3]
                assert all(delivery.redelivered for delivery in again)
                for delivery in again:
                    await delivery.ack()

    async def test_what_a_consumer_had_open_comes_back_when_it_is_cancelled(self) -> None:
        topic = self.topic()
        async with self.open_queue() as queue:
            await queue.publish(numbered(1), topic)

            async def work() -> None:
                async with queue.consumer(topic) as consumer:
                    await self.take(consumer, 1)
                    holding.set()
                    await anyio.sleep_forever()

            holding = anyio.Event()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(work)
                with anyio.fail_after(self.patience):
                    await holding.wait()
                tasks.cancel_scope.cancel()
            async with queue.consumer(topic) as consumer:
                assert await self.take_and_ack(consumer, 1, timeout=self.redelivery_timeout) == [1]

    # Groups, topics, broadcasts

    async def test_each_group_gets_each_message(self) -> None:
        topic = self.topic()
        async with self.open_queue() as queue, queue.consumer(topic, "a") as one, queue.consumer(topic, "b") as other:
            for number in range(3):
                await queue.publish(numbered(number), topic)
            assert await self.take_and_ack(one, 3) == [0, 1, 2]
            assert await self.take_and_ack(other, 3) == [0, 1, 2]
            await self.assert_nothing(one)

    async def test_a_known_group_misses_nothing_while_it_is_away(self) -> None:
        topic = self.topic()
        async with self.open_queue() as queue, queue.consumer(topic, "stays") as stays:
            async with queue.consumer(topic, "leaves"):
                pass
            await queue.publish(numbered(1), topic)
            assert await self.take_and_ack(stays, 1) == [1]
            async with queue.consumer(topic, "leaves") as back:
                assert await self.take_and_ack(back, 1) == [1]

    async def test_topics_do_not_mix(self) -> None:
        """Nor do namespaces: names that begin or end alike are different names."""
        base = self.topic("basic")
        other = [f"{base}2", f"other-{base}", base.upper(), self.topic("basic")]
        async with self.open_queue() as queue, queue.consumer(base) as consumer:
            for name in other:
                await queue.publish(numbered(9), name)
            await queue.publish(numbered(1), base)
            assert await self.take_and_ack(consumer, 1) == [1]
            await self.assert_nothing(consumer)
            for name in other:
                async with queue.consumer(name) as another:
                    assert await self.take_and_ack(another, 1) == [9]

    async def test_a_broadcast_reaches_whoever_listens_now(self) -> None:
        topic = self.topic()
        async with self.open_queue() as queue, self.open_peer(queue) as peer:
            await queue.broadcast(numbered(0), topic)  # nobody listens: no error, and nobody hears it later
            async with queue.subscribe(topic) as one, peer.subscribe(topic) as other, queue.consumer(topic) as consumer:
                await queue.broadcast(numbered(1), topic)
                for listener in (one, other):
                    with anyio.fail_after(self.patience):
                        assert (await listener.receive()).data == {"number": 1}
                await queue.publish(numbered(2), topic)  # a ticket is no broadcast, nor the other way round
                assert await self.take_and_ack(consumer, 1) == [2]
                await self.assert_nothing(one)
                await self.assert_nothing(consumer)

    # Cancellation, closing

    async def test_a_cancelled_receive_loses_nothing(self) -> None:
        topic = self.topic()
        got: list[int] = []
        async with self.open_queue() as queue, queue.consumer(topic) as consumer:

            async def receive() -> None:
                got.extend(await self.take_and_ack(consumer, 1))

            for number in range(20):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(receive)
                    await self.settle()
                    if number % 2:
                        tasks.cancel_scope.cancel()
                    # Cancelled in the moment of arrival, or waiting in vain beside a message that arrives.
                    with anyio.CancelScope(shield=True):
                        await queue.publish(numbered(number), topic)
                    tasks.cancel_scope.cancel()
            got += await self.take_and_ack(consumer, 20 - len(got), timeout=self.redelivery_timeout)
            await self.assert_nothing(consumer)
        assert sorted(got) == list(range(20))

    async def test_a_cancelled_publish_leaves_a_working_queue(self) -> None:
        topic = self.topic()
        async with self.open_queue() as queue, queue.consumer(topic) as consumer:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await queue.publish(numbered(1), topic)
            await queue.publish(numbered(2), topic)
            # Whether the first one went out is unknown; nothing else may come.
            got = await self.take_and_ack(consumer, 1)
            assert (got == [2]) or (got + await self.take_and_ack(consumer, 1) == [1, 2])
            await self.assert_nothing(consumer)

    async def test_cancelled_while_connecting(self) -> None:
        topic = self.topic()
        with anyio.CancelScope() as scope:
            scope.cancel()
            async with self.open_queue():
                await checkpoint()
        async with self.open_queue() as queue:
            for enter in (lambda: queue.consumer(topic), lambda: queue.subscribe(topic)):
                with anyio.CancelScope() as scope:
                    scope.cancel()
                    async with enter():
                        await checkpoint()
            await queue.publish(numbered(1), topic)
            async with queue.consumer(topic) as consumer:
                assert await self.take_and_ack(consumer, 1, timeout=self.redelivery_timeout) == [1]

    async def test_closing_ends_every_wait(self) -> None:
        topic = self.topic()
        ended: list[str] = []
        may_close, done = anyio.Event(), anyio.Event()

        async def own() -> None:
            async with self.open_queue() as queue:
                opened.append(queue)
                await may_close.wait()
            done.set()

        async def wait(source: Consumer | Subscription, name: str) -> None:
            with _raises(QueueUnavailable):
                await source.receive()
            ended.append(name)

        opened: list[MessageQueue] = []
        with anyio.fail_after(self.patience):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(own)
                await self.settle()
                [queue] = opened
                async with queue.consumer(topic) as consumer, queue.subscribe(topic) as listener:
                    async with anyio.create_task_group() as waits:
                        waits.start_soon(wait, consumer, "consumer")
                        waits.start_soon(wait, listener, "listener")
                        await self.settle()
                        may_close.set()
                        await done.wait()
                assert sorted(ended) == ["consumer", "listener"]
                with _raises(QueueUnavailable):
                    await queue.publish(numbered(1), topic)
                with _raises(QueueUnavailable):
                    await queue.broadcast(numbered(1), topic)

    # What is built on it

    async def test_what_fails_too_often_goes_to_the_dead_letters(self) -> None:
        topic = self.topic()
        dead = f"{topic.removesuffix('.numbered')}.dead_letter"
        good: list[int] = []

        last_one, left = anyio.Event(), list[int]()

        def handle(message: QueueMessage) -> None:
            if message.data["number"] == 1:
                raise ValueError("not this one")
            good.append(message.data["number"])
            if message.data["number"] == 3:
                last_one.set()

        consumer = CallableMessageConsumer("c", "numbered", handle)
        async with self.open_queue() as queue, queue.consumer(dead) as letters:
            policy = RetryPolicy(max_failures=3, first_pause=0.001, longest_pause=0.002)
            start = register_consumer(queue, consumer, topic, retry=policy)
            async with anyio.create_task_group() as tasks:
                await tasks.start(start)
                for number in range(3):
                    await queue.publish(numbered(number), topic)
                await queue.publish(QueueMessage(type="unknown"), topic)
                # Whichever comes first: what was nacked may come again behind the others.
                unknown, failed = sorted(await self.take(letters, 2), key=lambda each: each.message.data["failures"])
                # A letter comes before its message is acked. When the consumer handles another one, that is done.
                await queue.publish(numbered(3), topic)
                with anyio.fail_after(self.patience):
                    await last_one.wait()
                tasks.cancel_scope.cancel()
            assert failed.message.data["message"]["data"] == {"number": 1}
            assert failed.message.data["failures"] == 3
            assert unknown.message.data["message"]["type"] == "unknown"
            async with queue.consumer(topic) as rest, anyio.create_task_group() as tasks:

                async def receive() -> None:
                    while True:
                        left.extend(await self.take_and_ack(rest, 1))

                tasks.start_soon(receive)
                await self.settle()
                tasks.cancel_scope.cancel()
        assert sorted(good) == [0, 2, 3]
        assert left in ([], [3])  # the consumer may have been cancelled before its ack

    async def test_statistics(self) -> None:
        topic = self.topic()
        async with self.open_queue() as queue:
            await queue.publish(numbered(1), topic)
            topics = queue.statistics()["topics"]
            assert topics.get(topic, 1) == 1  # an adapter may not know, but it must not be wrong
