"""The queue in RabbitMQ: the contract of every broker, against real servers, and what it promises beyond that."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import shutil
import signal
import subprocess
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlencode, urlsplit
from uuid import uuid4

import aio_pika
import anyio
import pytest
import sniffio
from anyio.from_thread import BlockingPortal, start_blocking_portal
from pydantic import SecretStr

from llama_corral.abc import Consumer, Delivery, MessageQueue
from llama_corral.aio import hosted_tasks, open_asyncio_loop
from llama_corral.aio.client import open_asyncio_side
from llama_corral.exceptions import QueueUnavailable, SetupError, TooLarge
from llama_corral.protocol import topics
from llama_corral.protocol.messages import QueueMessage
from llama_corral.queues import open_queue, rabbitmq_consumer, rabbitmq_subscription, rabbitmq_topology
from llama_corral.queues.rabbitmq_address import RabbitMQAddress
from llama_corral.queues.rabbitmq_subscription import ReceivingChannel
from llama_corral.queues.rabbitmq_topology import TICKETS, queue_name, topic_key
from llama_corral.testing.brokers import BrokerContract
from llama_corral.testing.queues import numbered, numbers
from llama_corral.testing.servers import RabbitMQServer
from llama_corral.testing.servers.base import free_port

from .servers import own_server, shared_url

pytestmark = pytest.mark.anyio

VARIABLE = "CORRAL_TEST_RABBITMQ_URL"
SETTINGS = ("max_message_size = 400000",)


class Node:
    """A node for all tests that break one: it takes seconds to boot. It lives in an event loop of its own, from the first
    test on that needs it."""

    def __init__(self, portal: BlockingPortal, stack: contextlib.ExitStack, certificate: tuple[Path, Path]) -> None:
        self._portal = portal
        self._certificate = certificate
        self._stack = stack
        self._server: RabbitMQServer | None = None

    @property
    def server(self) -> RabbitMQServer:
        assert self._server is not None
        return self._server

    @property
    def url(self) -> str:
        return self.server.url

    async def ensure(self) -> None:
        """Running, and ready."""
        if self._server is None:
            await anyio.to_thread.run_sync(self._make)
        elif not self._server.running:
            await self.start()

    async def start(self) -> None:
        await self._call(self.server.start)

    async def restart(self) -> None:
        await self._call(self.server.restart)

    def kill(self) -> None:
        self.server.kill()

    async def wait_exit(self) -> int:
        return int(await self._call(self.server.wait_exit))

    async def _call(self, fn: Callable[[], Awaitable[Any]]) -> Any:
        return await anyio.to_thread.run_sync(self._portal.call, fn)

    async def control(self, *arguments: str) -> str:
        return str(await self._call(partial(self.server.control, *arguments)))

    def _make(self) -> None:
        context = own_server(RabbitMQServer, VARIABLE, certificate=self._certificate, settings=SETTINGS)
        self._server = self._stack.enter_context(self._portal.wrap_async_context_manager(context))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("certificate")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subject = ["-subj", "/CN=corral", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["-out", str(certificate), "-keyout", str(key)]
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *made]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@pytest.fixture(scope="module")
def node(certificate: tuple[Path, Path]) -> Iterator[Node]:
    with start_blocking_portal("trio") as portal, contextlib.ExitStack() as stack:
        yield Node(portal, stack, certificate)


@pytest.fixture
def url() -> str:
    return shared_url("RabbitMQ", VARIABLE, "amqp://guest:guest@127.0.0.1:5672/")


@pytest.fixture
async def tidy(url: str, anyio_backend: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Deletes the queues that the test has declared, except those that others use too."""
    names: dict[str, None] = {}

    def noted(topic: str, group: str) -> str:
        name = queue_name(topic, group)
        if topic != topics.dead_letter(topics.DEFAULT_NAMESPACE):
            names[name] = None
        return name

    monkeypatch.setattr(rabbitmq_topology, "queue_name", noted)
    yield
    async with client(url) as do:
        for name in names:
            await do(partial(_delete, name))


@asynccontextmanager
async def client(url: str) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """aio-pika, as another program would use it: `await do(function of a channel)`."""
    async with open_asyncio_side("raw") as side:
        connection = await side.call(partial(aio_pika.connect, url))

        async def use(fn: Callable[[Any], Awaitable[Any]]) -> Any:
            async with connection.channel() as channel:
                return await fn(channel)

        try:
            yield partial(side.call, use)
        finally:
            await side.call(connection.close)  # noqa: ASYNC102 - of a server that is there


@pytest.mark.promise("P2", "P6", "P8", "P12")
class TestContract(BrokerContract):
    @pytest.fixture(autouse=True)
    def _use(self, url: str, node: Node, tidy: None) -> None:
        self.url = url
        self.node = node
        self.topics: list[str] = []

    def topic(self, name: str = "numbered") -> str:
        self.topics.append(super().topic(name))
        return self.topics[-1]

    def make_queue(self, url: str) -> MessageQueue:
        return open_queue(url) if url == self.url else self._make_settled(url)  # type: ignore[return-value]

    @asynccontextmanager
    async def _make_settled(self, url: str) -> AsyncIterator[MessageQueue]:
        """A queue on the node that is killed. RabbitMQ writes down which quorum queues it has when nothing has changed for
        half a second; killed before, it never finds a leader for those that are missing there."""
        async with open_queue(f"{url}?patience=3") as queue:
            for topic in self.topics:
                async with queue.consumer(topic):
                    pass
            await anyio.sleep(1)
            yield queue

    @asynccontextmanager
    async def open_server(self) -> AsyncIterator[Node]:
        await self.node.ensure()
        yield self.node

    async def publish_raw(self, topic: str, body: bytes) -> bool:
        async def publish(channel: Any) -> None:
            exchange = await channel.get_exchange(TICKETS, ensure=False)
            await exchange.publish(aio_pika.Message(body), topic_key(topic))

        async with client(self.url) as do:
            await do(publish)
        return True

    async def test_a_server_that_is_not_there(self) -> None:
        """Entering the queue says so, in time. No node is killed for it."""
        with anyio.fail_after(self.restart_patience), pytest.raises(QueueUnavailable, match="is away"):
            async with open_queue(f"amqp://user:hunter2@127.0.0.1:{free_port()}?patience=0.5"):
                pass


async def _delete(name: str, channel: Any) -> None:
    await channel.queue_delete(name)


@pytest.fixture
def topic(tidy: None) -> str:
    """One that nobody else uses."""
    return f"rabbit-{uuid4().hex}.t"


async def take(consumer: Consumer, count: int, most: int = 1) -> list[Delivery]:
    """Received and acked."""
    taken: list[Delivery] = []
    with anyio.fail_after(15):
        while len(taken) < count:
            for delivery in await consumer.receive(min(most, count - len(taken))):
                taken.append(delivery)
                await delivery.ack()
    return taken


async def assert_nothing(consumer: Consumer) -> None:
    with anyio.move_on_after(0.3):
        raise AssertionError(f"got {numbers(await consumer.receive())}")


async def publish_all(queue: MessageQueue, topic: str, count: int) -> None:
    """In this order, many on their way at a time."""
    async with anyio.create_task_group() as tasks:
        for number in range(count):
            tasks.start_soon(queue.publish, numbered(number), topic)


async def publish_serially(queue: MessageQueue, topic: str, count: int) -> None:
    for number in range(count):
        await queue.publish(numbered(number), topic)


# Names and addresses


def test_the_name_of_a_queue_can_be_read() -> None:
    name = queue_name("ns.svc/ü:1", "my group")
    assert name == "llama_corral:my%20group:ns.svc%2F%C3%BC%3A1"
    assert [unquote(part) for part in name.split(":")] == ["llama_corral", "my group", "ns.svc/ü:1"]


def test_names_have_an_end() -> None:
    topics = [f"{'ü' * 500}.{number}" for number in range(3)] + ["x" * 150, "x" * 151, "x" * 152]
    names = {queue_name(topic, group) for topic in topics for group in ("default", "g" * 300, "g" * 301)}
    assert len(names) == 18
    assert max(len(name.encode()) for name in names) <= 255
    assert max(len(topic_key(topic)) for topic in topics) <= 255


def test_what_a_url_says() -> None:
    address = RabbitMQAddress.from_url("amqp://us%40er:p%2Fw%3A@one:1,two/a%2Fb%20c?heartbeat=3&name=x")
    assert address.hosts == ("one:1", "two")
    assert address.vhost == "a/b c"
    assert (address.user, address.password) == ("us@er", SecretStr("p/w:"))
    assert str(address) == "one:1, two (virtual host a/b c)"
    assert "us@er" not in repr(address)
    assert "p/w" not in repr(address)
    assert address.client_url("two") == "amqp://us%40er:p%2Fw%3A@two/a%2Fb%20c?heartbeat=3&name=x"
    for url in ("amqp://h", "amqp://h/", "amqp://h/%2F"):
        assert RabbitMQAddress.from_url(url).vhost == "/"
    assert RabbitMQAddress.from_url("amqps://h").tls is not None


@pytest.mark.parametrize(
    "url",
    [
        "amqp://u:hunter2@",
        "amqp://u:hunter2@h?prefech=1",
        "amqp://u:hunter2@h?prefetch=-1",
        "amqp://u:hunter2@h?max_messages=0",
        "amqp://u:hunter2@h?patience=x",
        "amqp://u:hunter2@h?heartbeat=hunter2",
        "amqps://u:hunter2@h?cafile=/nowhere",
    ],
)
def test_a_url_that_cannot_be_used(url: str) -> None:
    with pytest.raises(SetupError) as caught:
        open_queue(url)
    assert "hunter2" not in f"{caught.value} {caught.value.hint} {caught.value.fields}"


# Who may


@pytest.mark.promise("P11")
async def test_nobody_is_told_who_we_are(url: str, topic: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    host = urlsplit(url).netloc.rpartition("@")[2]
    for what, wrong in (
        ("user or the password", f"amqp://hunter1:hunter2@{host}/"),
        ("virtual host", with_vhost(url, "hunter-none")),
    ):
        with pytest.raises(SetupError, match=what) as caught:
            async with open_queue(wrong):
                pass
        assert not {"hunter1", "hunter2"} & set(re.findall(r"\w+", "".join(traceback.format_exception(caught.value))))
    async with open_queue(url) as queue:
        await queue.publish(numbered(1), topic)
    assert "hunter1" not in caplog.text
    assert "hunter2" not in caplog.text
    assert "guest" not in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.promise("P11")
async def test_a_user_who_may_not_do_everything(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    await node.ensure()
    name = f"hunter-{uuid4().hex}"
    await node.control("add_user", name, "x")
    await node.control("set_permissions", name, "^llama_corral", "^llama_corral", "")
    async with opened(node):  # the exchanges are there
        pass
    async with open_queue(node.url.replace("guest:guest", f"{name}:x")) as queue:
        with pytest.raises(SetupError, match="refuses access to exchange 'llama_corral'") as caught:
            async with queue.consumer("t"):
                pass
    assert name not in "".join(traceback.format_exception(caught.value))
    assert name not in caplog.text


def with_vhost(url: str, name: str) -> str:
    return urlsplit(url)._replace(path=f"/{name}").geturl()


async def test_the_client_of_others_logs_as_before(url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with open_queue(url):
        pass
    with contextlib.suppress(Exception):
        async with client(f"amqp://127.0.0.1:{free_port()}"):
            pass
    assert [record.name for record in caplog.records] == ["aiormq.connection"]


# Where messages go


async def test_what_nobody_waits_for_waits_for_the_default_group(url: str, topic: str) -> None:
    """And only until another group is known: then it does not fill up any more."""
    async with open_queue(url) as queue:
        await queue.publish(numbered(1), topic)
        async with queue.consumer(topic, "a") as known:
            await queue.publish(numbered(2), topic)
            assert numbers(await take(known, 1)) == [2]
        async with queue.consumer(topic) as consumer:
            assert numbers(await take(consumer, 1)) == [1]
            await queue.publish(numbered(3), topic)
            assert numbers(await take(consumer, 1)) == [3]
            await assert_nothing(consumer)


async def test_a_queue_that_somebody_deleted(url: str, topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is declared again by whoever publishes in vain, and found again by a consumer that waits."""
    monkeypatch.setattr(rabbitmq_consumer, "REATTACHED_AFTER", 0.5)
    async with open_queue(url) as queue, client(url) as do:
        await queue.publish(numbered(1), topic)
        await do(partial(_delete, queue_name(topic, "default")))
        await queue.publish(numbered(2), topic)
        async with queue.consumer(topic) as consumer:
            assert numbers(await take(consumer, 1)) == [2]
            async with anyio.create_task_group() as tasks:

                async def receive() -> None:
                    got.extend(numbers(await take(consumer, 1)))

                got: list[int] = []
                tasks.start_soon(receive)
                await assert_waiting(do, queue_name(topic, "default"))
                await do(partial(_delete, queue_name(topic, "default")))
                await queue.publish(numbered(3), topic)
            assert got == [3]


@pytest.mark.promise("P2", "P12")
async def test_a_consumer_outlives_the_cancellation_of_its_client(
    url: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it ends what waits for a server that hangs, on a connection that is given up."""
    unsubscribe = ReceivingChannel.unsubscribe

    async def cancelled(channel: ReceivingChannel, tag: str) -> None:
        monkeypatch.setattr(ReceivingChannel, "unsubscribe", unsubscribe)
        channel.connection.drop()
        raise asyncio.CancelledError

    async with open_queue(url) as queue, queue.consumer(topic) as consumer:
        monkeypatch.setattr(ReceivingChannel, "unsubscribe", cancelled)
        await queue.publish(numbered(1), topic)
        assert numbers(await take(consumer, 1)) == [1]


async def assert_waiting(do: Callable[..., Awaitable[Any]], queue: str) -> None:
    """Return when somebody consumes it."""

    async def look(channel: Any) -> int:
        return int((await channel.get_queue(queue)).declaration_result.consumer_count)

    with anyio.fail_after(10):
        while not await do(look):  # noqa: ASYNC110 - the server tells nobody
            await anyio.sleep(0.01)


@pytest.mark.promise("P12")
async def test_a_full_queue(url: str, topic: str, caplog: pytest.LogCaptureFixture) -> None:
    async with open_queue(with_options(url, max_messages=3)) as queue:
        taken = 0
        with contextlib.suppress(QueueUnavailable):
            for _ in range(20):  # RabbitMQ takes a few more than it was told
                await queue.publish(numbered(taken), topic)
                taken += 1
        assert 3 <= taken < 20
        with pytest.raises(QueueUnavailable, match="full"):
            await queue.publish(numbered(9), topic)
        assert queue.statistics()["refused"] == 2
        async with queue.consumer(topic) as consumer:
            assert numbers(await take(consumer, taken)) == list(range(taken))
        await queue.publish(numbered(7), topic)
    async with open_queue(with_options(url, max_messages=5)) as queue, queue.consumer(topic) as consumer:
        assert numbers(await take(consumer, 1)) == [7]


def with_options(url: str, **options: object) -> str:
    return f"{url}?{urlencode(options)}"


async def test_many_are_on_their_way_at_a_time(url: str, topic: str) -> None:
    async with open_queue(url) as queue, queue.consumer(topic) as consumer:
        await publish_all(queue, topic, 200)
        assert sorted(numbers(await take(consumer, 200, most=50))) == list(range(200))
        assert queue.statistics()["published"] == 200


async def test_many_begin_at_a_time(url: str, topic: str, caplog: pytest.LogCaptureFixture) -> None:
    """With a topic that nobody knows yet."""
    got: list[int] = []

    async def consume() -> None:
        async with queue.consumer(topic) as consumer:
            while True:
                got.extend(numbers(await take(consumer, 1)))
                if len(got) == 20:
                    tasks.cancel_scope.cancel()

    async with open_queue(url) as queue, anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(consume)
        tasks.start_soon(publish_all, queue, topic, 20)
    assert sorted(got) == list(range(20))
    assert caplog.records == []


# Who gets them


async def test_a_busy_consumer_keeps_nothing_from_others(url: str, topic: str) -> None:
    """What it acked made no room for another message while it does not receive."""
    async with open_queue(url) as queue, queue.consumer(topic) as busy, queue.consumer(topic) as idle:
        await publish_all(queue, topic, 2)
        await take(busy, 2)
        await publish_all(queue, topic, 5)
        taken = await take(idle, 5)
        assert sorted(numbers(taken)) == [0, 1, 2, 3, 4]
        assert not any(delivery.redelivered for delivery in taken)


@pytest.mark.parametrize("prefetch", [0, 32])
async def test_what_a_quick_consumer_got_ahead_is_given_back(url: str, topic: str, prefetch: int) -> None:
    async with open_queue(with_options(url, prefetch=prefetch)) as queue:
        async with queue.consumer(topic) as quick, queue.consumer(topic) as other:
            await publish_all(queue, topic, 60)
            first = await take(quick, 30)
            rest = await take(other, 30)
            assert sorted(numbers(first) + numbers(rest)) == list(range(60))
            await assert_nothing(quick)
            if not prefetch:
                assert not any(delivery.redelivered for delivery in rest)


async def test_more_in_hand_than_was_asked_for_at_once(url: str, topic: str) -> None:
    """A consumer that keeps its deliveries open gets more all the same."""
    async with open_queue(url) as queue, queue.consumer(topic) as consumer:
        await publish_all(queue, topic, 150)
        in_hand: list[Delivery] = []
        with anyio.fail_after(15):
            while len(in_hand) < 150:
                in_hand += await consumer.receive(3)
        assert sorted(numbers(in_hand)) == list(range(150))
        for delivery in in_hand:
            await delivery.nack()
        again = await take(consumer, 150, most=50)
        assert sorted(numbers(again)) == list(range(150))
        assert all(delivery.redelivered for delivery in again)


async def test_a_fault_of_ours_is_no_hang(
    url: str, topic: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(consumer: Consumer) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(rabbitmq_consumer.RabbitMQConsumer, "_feed_once", fail)
    async with open_queue(url) as queue, queue.consumer(topic) as consumer:
        with anyio.fail_after(10), pytest.raises(QueueUnavailable, match="failed"):
            await consumer.receive()
    assert "ZeroDivisionError" in caplog.text


# A server that does not do what it should


@asynccontextmanager
async def opened(node: Node, **options: object) -> AsyncIterator[MessageQueue]:
    await node.ensure()
    async with open_queue(with_options(node.url, **{"patience": 1, **options})) as queue:
        yield queue


async def test_a_message_that_is_too_large(node: Node) -> None:
    """Whoever publishes beside it has no part in it."""
    large = QueueMessage(data={"text": "x" * 500_000})
    async with opened(node, patience=10) as queue, queue.consumer("large") as consumer:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(publish_all, queue, "large", 30)
            with pytest.raises(TooLarge):
                await queue.publish(large, "large")
        got = set[int]()
        while got != set(range(30)):
            got.update(numbers(await take(consumer, 1)))


@pytest.mark.promise("P9", "P12")
async def test_a_server_whose_memory_is_full(node: Node) -> None:
    """Publishing says so; what waits can be worked off."""
    name = f"memory-{uuid4().hex}"
    async with opened(node) as queue, queue.consumer(name) as consumer:
        await publish_all(queue, name, 3)
        await node.control("set_vm_memory_high_watermark", "0.000001")
        try:
            with pytest.raises(QueueUnavailable, match="memory or disk"):
                await queue.publish(numbered(9), name)
            assert sorted(numbers(await take(consumer, 3))) == [0, 1, 2]
        finally:
            with anyio.CancelScope(shield=True):
                await node.control("set_vm_memory_high_watermark", "0.4")
        await queue.publish(numbered(4), name)


@pytest.mark.promise("P6")
async def test_a_server_that_hangs(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving the queue takes its time, but not for ever, and leaves nothing behind."""
    monkeypatch.setattr(rabbitmq_subscription, "CLOSING_TIME", 0.2)
    async with open_asyncio_loop():
        before = tasks_of_asyncio()
        try:
            async with opened(node) as queue, queue.consumer("hangs") as consumer, queue.subscribe("hangs"):
                await queue.publish(numbered(1), "hangs")
                [delivery] = await consumer.receive()
                node.server.send_signal(signal.SIGSTOP)
                with pytest.raises(QueueUnavailable, match="did not answer"):
                    await publish_serially(queue, "hangs", 100)  # it may not stop at once
                await delivery.ack()
                left = anyio.current_time()
            assert anyio.current_time() - left < 10
            assert tasks_of_asyncio() == before
        finally:
            node.server.send_signal(signal.SIGCONT)


def tasks_of_asyncio() -> set[str]:
    if sniffio.current_async_library() == "trio":
        return {name for name, _ in hosted_tasks()}
    return {task.get_name() for task in asyncio.all_tasks()}


async def test_tls(node: Node, certificate: tuple[Path, Path]) -> None:
    await node.ensure()
    trusting = with_options(node.server.tls_url, cafile=certificate[0])
    async with open_queue(trusting) as queue, queue.consumer("tls") as consumer:
        await queue.publish(numbered(1), "tls")
        assert numbers(await take(consumer, 1)) == [1]
    with pytest.raises(SetupError, match="not trusted"):
        async with open_queue(node.server.tls_url):
            pass
    with pytest.raises(SetupError, match="No TLS"):
        async with open_queue(node.url.replace("amqp:", "amqps:")):
            pass
    with pytest.raises(QueueUnavailable):
        async with open_queue(with_options(node.server.tls_url.replace("amqps:", "amqp:"), patience=0.5)):
            pass


async def test_the_nodes_of_a_cluster(node: Node) -> None:
    """One that is away is no reason to wait."""
    await node.ensure()
    async with open_queue(node.url.replace("@", f"@127.0.0.1:{free_port()},")) as queue:
        await queue.publish(numbered(1), "cluster")
