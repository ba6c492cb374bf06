"""What the adapter of a message broker must do beside `MessageQueueContract`: a server that restarts, consumers that are
killed, messages that nobody can read.

    @pytest.mark.anyio
    class TestRedis(BrokerContract):
        url = "redis://127.0.0.1:6379"

        @asynccontextmanager
        async def open_server(self):
            async with open_support_group() as group:
                server = RedisServer(group, folder)
                await server.start()
                yield server
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import anyio

from ..abc import Consumer, MessageQueue
from ..exceptions import QueueUnavailable
from ..protocol import topics
from ..queues import open_queue
from ..supervision import open_support_group
from .children import Child
from .queues import MessageQueueContract, _raises, numbered

_HOLDER: Final = """
import sys, anyio
from llama_corral.queues import open_queue

async def main(url, topic):
    async with open_queue(url) as queue, queue.consumer(topic) as consumer:
        [delivery] = await consumer.receive()
        print("holding", delivery.message.data["number"], flush=True)
        await anyio.sleep_forever()

anyio.run(main, *sys.argv[1:], backend="trio")
"""


class BrokerContract(MessageQueueContract):
    """The suite for queues that a server keeps. Tests that only use it share `url`; those that break it start their own."""

    url: str
    """Where `open_queue` finds the server that all tests share. A process that is killed uses it as it is, so it says a
    short lease where there is one."""
    redelivery_timeout = 15.0
    quiet = 0.1
    restart_patience = 30.0
    """Seconds in which everything must work again after a restart of the server."""

    @asynccontextmanager
    async def open_queue(self) -> AsyncIterator[MessageQueue]:
        async with self.make_queue(self.url) as queue:
            yield queue

    def open_peer(self, queue: MessageQueue) -> AbstractAsyncContextManager[MessageQueue]:
        return self.open_queue()

    def make_queue(self, url: str) -> MessageQueue:
        """A queue on a server, not entered. What a killed consumer had open must come back in `redelivery_timeout`: give
        it a short lease where it has one."""
        return open_queue(url)

    def open_server(self) -> AbstractAsyncContextManager[Child]:
        """A server of the test's own, started; its `url` says where."""
        raise NotImplementedError

    async def publish_raw(self, topic: str, body: bytes) -> bool:
        """Put something into a topic past the adapter, as another program would. False: the server takes nothing but
        messages."""
        return False

    def _url_of(self, server: Child) -> str:
        url: str = getattr(server, "url")  # noqa: B009 - each kind of child has its own
        return url

    # The server that all share

    async def test_what_a_killed_process_had_open_comes_back(self) -> None:
        topic = self.topic()
        with TemporaryDirectory() as folder:
            async with open_support_group() as group, self.open_queue() as queue:
                async with queue.consumer(topic):  # its group is known
                    pass
                holder = Child(group, "holder", (sys.executable, "-c", _HOLDER, self.url, topic), Path(folder), {})
                await holder.launch()
                await queue.publish(numbered(7), topic)
                await holder.wait_output("holding 7")
                holder.kill()
                await holder.wait_exit()
                async with queue.consumer(topic) as consumer:
                    assert await self.take_and_ack(consumer, 1, timeout=self.redelivery_timeout) == [7]

    async def test_two_namespaces_share_a_server(self) -> None:
        one, other = (topics.topic(self.topic("ns"), "svc") for _ in range(2))
        async with self.open_queue() as queue, self.open_peer(queue) as peer:
            async with queue.consumer(one) as ours, peer.consumer(other) as theirs, peer.subscribe(other) as hears:
                await queue.publish(numbered(1), one)
                await peer.publish(numbered(2), other)
                await queue.broadcast(numbered(3), one)
                assert await self.take_and_ack(ours, 1) == [1]
                assert await self.take_and_ack(theirs, 1) == [2]
                await self.assert_nothing(ours)
                await self.assert_nothing(theirs)
                await self.assert_nothing(hears)

    async def test_what_nobody_can_read_goes_to_the_dead_letters(self) -> None:
        """Of the namespace that the queue was opened for, and once."""
        topic = self.topic()
        async with self.open_queue() as queue, queue.consumer(topic) as consumer:
            if not await self.publish_raw(topic, b"{no message"):
                return
            async with queue.consumer(topics.dead_letter(topics.DEFAULT_NAMESPACE)) as letters:
                await queue.publish(numbered(1), topic)
                assert await self.take_and_ack(consumer, 1) == [1]
                with anyio.fail_after(self.patience):
                    while True:  # others use it too
                        [letter] = await letters.receive()
                        await letter.ack()
                        if letter.message.data.get("topic") == topic:
                            break
            assert letter.message.data["raw"] == "{no message"
            assert letter.message.data["reason"]
            await self.assert_nothing(consumer)

    # A server of the test's own

    async def test_a_restart_in_the_middle(self) -> None:
        """Whoever waits goes on without opening anything again. What was published comes, once or again, where the queue
        is durable; what is published after the restart comes in any case."""
        topic = self.topic()
        count, published, got = 120, set[int](), set[int]()
        enough, restarted = anyio.Event(), anyio.Event()
        async with self.open_server() as server, self.make_queue(self._url_of(server)) as queue:

            async def publish() -> None:
                for number in range(count):
                    while number not in published:
                        try:
                            await queue.publish(numbered(number), topic)
                        except QueueUnavailable:
                            await anyio.sleep(0.05)
                        else:
                            published.add(number)
                    if number == count // 3:
                        enough.set()
                    if number == count // 2:
                        await restarted.wait()

            async def receive() -> None:
                async with queue.consumer(topic) as consumer:
                    while not expected <= got:
                        for delivery in await consumer.receive(5):
                            got.add(delivery.message.data["number"])
                            await delivery.ack()

            expected = set(range(count)) if queue.durable else set(range(count // 2 + 1, count))
            with anyio.fail_after(self.restart_patience):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(receive)
                    tasks.start_soon(publish)
                    await enough.wait()
                    server.kill()
                    await server.wait_exit()
                    await server.start()
                    restarted.set()
            assert expected <= got

    async def test_durable_is_what_it_says(self) -> None:
        topic = self.topic()
        async with self.open_server() as server, self.make_queue(self._url_of(server)) as queue:
            await queue.publish(numbered(1), topic)
            await server.restart()
            with anyio.fail_after(self.restart_patience):
                await self._publish_patiently(queue, 2, topic)
                async with queue.consumer(topic) as consumer:
                    got = [number for _ in range(2 if queue.durable else 1) for number in await self._one(consumer)]
            assert got == ([1, 2] if queue.durable else [2])

    async def test_while_the_server_is_away(self) -> None:
        """Publishing waits or says so, a subscription says that it may have missed something, and leaving does not hang."""
        topic = self.topic()
        async with self.open_server() as server:
            with anyio.fail_after(self.restart_patience):
                async with self.make_queue(self._url_of(server)) as queue:
                    async with queue.subscribe(topic) as listener:
                        server.kill()
                        await server.wait_exit()
                        with anyio.move_on_after(1):
                            with _raises(QueueUnavailable):
                                await queue.publish(numbered(1), topic)
                        await server.start()
                        with _raises(QueueUnavailable):
                            await listener.receive()
                    await self._broadcast_patiently(queue, topic)
                    async with queue.consumer(topic), queue.subscribe(topic):
                        server.kill()
                        await server.wait_exit()

    async def test_a_server_that_is_not_there(self) -> None:
        """Entering the queue says so, in time."""
        async with self.open_server() as server:
            server.kill()
            await server.wait_exit()
            with anyio.fail_after(self.restart_patience), _raises(QueueUnavailable):
                async with self.make_queue(self._url_of(server)):
                    raise AssertionError("there is nothing to be connected to")

    async def _one(self, consumer: Consumer) -> list[int]:
        return await self.take_and_ack(consumer, 1, timeout=self.restart_patience)

    async def _publish_patiently(self, queue: MessageQueue, number: int, topic: str) -> None:
        while True:
            try:
                await queue.publish(numbered(number), topic)
            except QueueUnavailable:
                await anyio.sleep(0.05)
            else:
                return

    async def _broadcast_patiently(self, queue: MessageQueue, topic: str) -> None:
        """Until one arrives at a subscription that was opened again."""
        while True:
            try:
                async with queue.subscribe(topic) as listener:
                    await queue.broadcast(numbered(5), topic)
                    assert (await listener.receive()).data == {"number": 5}
                    return
            except QueueUnavailable:
                await anyio.sleep(0.05)
