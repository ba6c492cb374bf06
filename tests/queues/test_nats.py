"""Queues in a NATS server: what every broker must do, and what is peculiar to this one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlencode, urlsplit

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream
from nats.aio.client import Client

from llama_corral.abc import Consumer
from llama_corral.aio import hosted_tasks, open_asyncio_loop
from llama_corral.aio.client import AsyncioSide, open_asyncio_side
from llama_corral.exceptions import BadInput, QueueUnavailable, SetupError, TooLarge
from llama_corral.protocol import topics
from llama_corral.protocol.messages import QueueMessage
from llama_corral.queues import nats_link, open_queue
from llama_corral.queues.nats import NatsMessageQueue
from llama_corral.queues.nats_link import Pending
from llama_corral.queues.nats_stream import token_of
from llama_corral.queues.urls import with_credentials, without_credentials
from llama_corral.supervision import open_support_group
from llama_corral.testing.brokers import BrokerContract
from llama_corral.testing.children import Child
from llama_corral.testing.servers import NatsServer, ServerMissingError
from llama_corral.testing.servers.base import free_port

pytestmark = pytest.mark.anyio

URL = os.environ.get("CORRAL_TEST_NATS_URL", "nats://127.0.0.1:4222")


def _needs_nats() -> None:
    parts = urlsplit(URL)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 4222), timeout=2).close()
    except OSError:
        pytest.skip(f"no NATS at {parts.hostname}:{parts.port}: set CORRAL_TEST_NATS_URL")


@asynccontextmanager
async def open_server(**options: object) -> AsyncIterator[NatsServer]:
    with TemporaryDirectory() as folder:
        async with open_support_group() as group:
            try:
                server = NatsServer(group, Path(folder), **options)  # type: ignore[arg-type]
            except ServerMissingError:
                pytest.skip("no nats-server to start: install it, beside CORRAL_TEST_NATS_URL")
            await server.start()
            yield server


class RawClient:
    """nats-py, as another program would use it."""

    def __init__(self, side: AsyncioSide) -> None:
        self.side = side
        self.client = Client()

    async def call(self, subject: str, body: bytes = b"", headers: dict[str, str] | None = None) -> dict[str, Any]:
        """What JetStream answers."""

        async def request() -> bytes:
            return (await self.client.request(subject, body, timeout=5, headers=headers)).data

        found: dict[str, Any] = json.loads(await self.side.call(request))
        return found


@asynccontextmanager
async def client(url: str = URL) -> AsyncIterator[RawClient]:
    async with open_asyncio_side("raw") as side:
        raw = RawClient(side)

        async def connect() -> None:
            await raw.client.connect(url)

        await side.call(connect)
        try:
            yield raw
        finally:
            await side.call(raw.client.close)  # noqa: ASYNC102 -- of a server that is there


class TestContract(BrokerContract):
    url = f"{URL}?lease=2&patience=3"

    @pytest.fixture(autouse=True)
    def shared_server(self) -> None:
        _needs_nats()

    def open_server(self) -> AbstractAsyncContextManager[Child]:
        return open_server()

    def _url_of(self, server: Child) -> str:
        assert isinstance(server, NatsServer)
        return f"{server.url}?lease=2&patience=3"

    async def publish_raw(self, topic: str, body: bytes) -> bool:
        async with client() as raw:
            await raw.call(f"corral.q.{token_of(topic)}", body)
        return True


def nats_queue(url: str, **options: Any) -> NatsMessageQueue:
    return NatsMessageQueue.from_url(f"{url}?{urlencode({'lease': 2, 'patience': 3, **options})}")


def numbered(number: int) -> QueueMessage:
    return QueueMessage(data={"number": number})


async def take(consumer: Consumer, count: int, seconds: float = 5) -> list[int]:
    got: list[int] = []
    with anyio.fail_after(seconds):
        while len(got) < count:
            for delivery in await consumer.receive(count - len(got)):
                got.append(delivery.message.data["number"])
                await delivery.ack()
    return got


async def take_nothing(consumer: Consumer, seconds: float = 0.2) -> None:
    with anyio.move_on_after(seconds):
        raise AssertionError(await consumer.receive())


def shown(error: BaseException) -> str:
    """All that a log or an answer may show of an error and what caused it."""
    own = f"{error!r} {error} {getattr(error, 'hint', '')} {getattr(error, 'fields', '')}"
    return own if error.__cause__ is None else f"{own} {shown(error.__cause__)}"


@pytest.fixture
async def server() -> AsyncIterator[NatsServer]:
    async with open_server() as found:
        yield found


# Groups


@pytest.mark.promise("P2")
async def test_the_first_group_inherits_what_was_there(server: NatsServer) -> None:
    """Whatever its name; others get what is published from then on."""
    async with nats_queue(server.url) as queue:
        await queue.publish(numbered(1), "t")
        async with queue.consumer("t", "ünusual, name.>") as first, queue.consumer("t", "default") as second:
            await queue.publish(numbered(2), "t")
            assert await take(first, 2) == [1, 2]
            assert await take(second, 1) == [2]


@pytest.mark.promise("P2")
async def test_a_publisher_hears_of_a_new_group(server: NatsServer) -> None:
    """Also one that has published before, in another process; and one that comes later."""
    async with nats_queue(server.url) as queue, nats_queue(server.url) as other:
        async with queue.consumer("t", "a") as a:
            for number in range(20):
                await other.publish(numbered(number), "t")
                async with queue.consumer("t", f"b{number}"):
                    pass
            await other.publish(numbered(20), "t")
            assert await take(a, 21) == list(range(21))
            for number in range(20):
                async with queue.consumer("t", f"b{number}") as b:
                    assert await take(b, 20 - number) == list(range(number + 1, 21))
        async with nats_queue(server.url) as late:
            await late.publish(numbered(30), "t")
        async with queue.consumer("t", "b7") as b:
            assert await take(b, 1) == [30]


async def test_topics_are_any_text(server: NatsServer) -> None:
    names = ["a.b", "a b", "a", "A", "ä🦙", "a.>", "*", "%", "=25", "", " ", "x" * 1000, "x" * 1001, "a+b", "a+", "\n"]
    assert len({token_of(name) for name in names}) == len(names)
    async with nats_queue(server.url) as queue:
        for number, name in enumerate(names):
            async with queue.subscribe(name) as listener:
                await queue.publish(numbered(number), name)
                await queue.broadcast(numbered(number), name)
                with anyio.fail_after(5):
                    assert (await listener.receive()).data == {"number": number}
        for number, name in enumerate(names):
            async with queue.consumer(name, name) as consumer:
                assert await take(consumer, 1) == [number]


# Publishing


@pytest.mark.promise("P2")
async def test_a_repeated_publish_is_one_message(server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server took it, and its answer was lost."""
    monkeypatch.setattr(nats_link, "ANSWER_TIME", 0.3)
    async with nats_queue(server.url) as queue, queue.consumer("t") as consumer:
        await queue.publish(numbered(0), "t")
        connection = queue.link.connection
        assert connection is not None
        ask, sent = connection.ask, 0

        async def lossy(*request: Any) -> Pending:
            nonlocal sent
            sent += 1
            pending = await ask(*request)
            if sent == 1:
                pending.forget()
            return pending

        monkeypatch.setattr(connection, "ask", lossy)
        await queue.publish(numbered(1), "t")
        assert sent == 2
        await queue.publish(numbered(2), "t")
        assert await take(consumer, 3) == [0, 1, 2]
        await take_nothing(consumer)


async def test_a_message_published_twice_comes_twice(server: NatsServer) -> None:
    """As from the dead letters, by a person: the server must not take it for a repetition."""
    async with nats_queue(server.url) as queue, queue.consumer("t") as consumer:
        message = numbered(1)
        for _ in range(2):
            await queue.publish(message, "t")
            assert await take(consumer, 1) == [1]


@pytest.mark.promise("P12")
async def test_a_full_stream(server: NatsServer) -> None:
    async with nats_queue(server.url, max_messages=3) as queue, queue.consumer("t") as consumer:
        for number in range(3):
            await queue.publish(numbered(number), "t")
        with anyio.fail_after(1), pytest.raises(QueueUnavailable, match="full") as caught:
            await queue.publish(numbered(3), "t")
        assert caught.value.hint
        assert await take(consumer, 3) == [0, 1, 2]
        refused = 1
        while True:  # until the server has worked on the acks
            try:
                await queue.publish(numbered(4), "t")
            except QueueUnavailable:
                refused += 1
            else:
                break
        assert await take(consumer, 1) == [4]
        assert queue.statistics()["refused"] == refused
        assert queue.statistics()["published"] == 4


@pytest.mark.promise("P9")
async def test_a_message_that_is_too_large(server: NatsServer) -> None:
    async with nats_queue(server.url) as queue, queue.consumer("t") as consumer:
        for size in (2**20 - 1000, 2**20, 2**21):
            message = QueueMessage(data={"number": size, "text": "x" * size})
            for send in (queue.publish, queue.broadcast):
                if size < 2**20:
                    await send(message, "t")
                else:
                    with pytest.raises(TooLarge) as caught:
                        await send(message, "t")
                    assert caught.value.fields["limit"] == 2**20
        assert await take(consumer, 1) == [2**20 - 1000]
        with pytest.raises(BadInput):
            await queue.publish(QueueMessage(data={"text": "\ud800"}), "t")
        assert queue.statistics()["reconnects"] == 0


async def test_the_largest_message(server: NatsServer) -> None:
    """To the byte: one more, and the server would end the connection."""
    async with nats_queue(server.url) as queue, queue.consumer("t") as consumer:
        taken, refused = 2**20 - 1000, 2**20
        while refused - taken > 1:
            size = (taken + refused) // 2
            try:
                await queue.publish(QueueMessage(id_="i", data={"number": 1, "text": "x" * size}), "t")
            except TooLarge:
                refused = size
            else:
                taken = size
                assert await take(consumer, 1) == [1]
        assert queue.statistics()["reconnects"] == 0


# Receiving


async def test_an_open_delivery_outlives_its_lease(server: NatsServer) -> None:
    """As long as its consumer lives."""
    async with nats_queue(server.url, lease=0.5) as queue, nats_queue(server.url) as other:
        async with queue.consumer("t") as first, other.consumer("t") as second:
            await queue.publish(numbered(1), "t")
            [delivery] = await first.receive()
            await take_nothing(second, seconds=1.5)
            await delivery.ack()
            await take_nothing(second, seconds=0.6)


async def test_a_consumer_that_does_not_wait_any_more_keeps_nothing(server: NatsServer) -> None:
    """What was asked for and not waited for goes to another consumer, at once, however much it was."""
    async with nats_queue(server.url, lease=60) as queue, queue.consumer("t") as first:
        with anyio.move_on_after(0.1):
            await first.receive(50)
        async with queue.consumer("t") as second:
            for number in range(10):
                await queue.publish(numbered(number), "t")
            assert sorted(await take(second, 10)) == list(range(10))
        with anyio.move_on_after(0.1):
            await first.receive()
        async with nats_queue(server.url) as other, other.consumer("t") as third:
            with anyio.move_on_after(0.1):
                await third.receive()
        await queue.publish(numbered(10), "t")
        assert await take(first, 1) == [10]


async def test_several_tasks_receive_from_one_consumer(server: NatsServer) -> None:
    got: list[int] = []
    async with nats_queue(server.url) as queue, queue.consumer("t") as consumer:

        async def work() -> None:
            while len(got) < 30:
                for delivery in await consumer.receive(3):
                    got.append(delivery.message.data["number"])
                    await delivery.ack()
            tasks.cancel_scope.cancel()

        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(work)
                for number in range(30):
                    await queue.publish(numbered(number), "t")
        assert sorted(got) == list(range(30))
        with pytest.raises(ValueError, match="at least 1"):
            await consumer.receive(0)


@pytest.mark.promise("P2")
async def test_dead_letters_that_are_full(server: NatsServer, caplog: pytest.LogCaptureFixture) -> None:
    """What nobody can read stays where it is, and what can be read is worked on."""
    async with nats_queue(server.url, lease=0.5, max_messages=2) as queue, queue.consumer("t") as consumer:
        async with client(server.url) as raw:
            await raw.call("corral.q.t", b"{no message")
        await queue.publish(numbered(1), "t")
        assert await take(consumer, 1) == [1]
        assert "dead letters take nothing" in caplog.text
        async with queue.consumer(topics.dead_letter(topics.DEFAULT_NAMESPACE)) as letters:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(consumer.receive)
                with anyio.fail_after(5):
                    [letter] = await letters.receive()
                tasks.cancel_scope.cancel()
        assert letter.message.data["topic"] == "t"


# The server goes and comes back


@pytest.mark.promise("P2", "P8")
async def test_an_ack_while_the_server_is_away(server: NatsServer) -> None:
    async with nats_queue(server.url, lease=60) as queue, queue.consumer("t") as consumer:
        for number in range(2):
            await queue.publish(numbered(number), "t")
        acked, nacked = [*await consumer.receive(), *await consumer.receive()]
        await server.stop()  # in order: killed, it may have forgotten what it delivered
        while queue.statistics()["connected"]:  # what is sent before it notices may be lost
            await anyio.wait_all_tasks_blocked()
        await acked.ack()
        await nacked.nack()
        await server.start()
        assert await take(consumer, 1) == [1]
        async with client(server.url) as raw:
            with anyio.fail_after(5):
                while (await raw.call("$JS.API.STREAM.INFO.corral"))["state"]["messages"]:
                    await anyio.wait_all_tasks_blocked()
        assert queue.statistics()["reconnects"] == 1
        assert queue.statistics()["connected"]


@pytest.mark.promise("P2")
async def test_a_server_that_lost_its_data(server: NatsServer) -> None:
    """With the connection, or below it: all is made anew, also for who waits."""
    got: list[int] = []
    async with nats_queue(server.url, patience=10) as queue, anyio.create_task_group() as tasks:

        async def work(group: str) -> None:
            async with queue.consumer("t", group) as consumer:
                ready.append(group)
                while True:
                    got.extend(await take(consumer, 1, seconds=30))

        async def arrive(number: int) -> None:
            with anyio.fail_after(10):
                while got.count(number) < 2:
                    await queue.publish(numbered(number), "t")
                    await anyio.wait_all_tasks_blocked()

        ready: list[str] = []
        for group in "ab":
            tasks.start_soon(work, group)
        await arrive(1)
        server.kill()
        await server.wait_exit()
        shutil.rmtree(server.folder / "jetstream")
        await server.start()
        await arrive(2)
        async with client(server.url) as raw:
            assert (await raw.call("$JS.API.STREAM.DELETE.corral"))["success"]
        await arrive(3)
        tasks.cancel_scope.cancel()


@pytest.mark.promise("P6")
async def test_leaving_while_the_server_stalls(server: NatsServer) -> None:
    with anyio.fail_after(20):
        async with nats_queue(server.url) as queue:
            async with queue.consumer("t") as consumer, queue.subscribe("b"):
                await queue.publish(numbered(1), "t")
                [delivery] = await consumer.receive()
                server.send_signal(signal.SIGSTOP)
                await delivery.ack()
                with anyio.move_on_after(0.1):
                    await queue.publish(numbered(2), "t")
                with anyio.move_on_after(0.1):
                    await consumer.receive()
    server.send_signal(signal.SIGCONT)


@pytest.mark.promise("P6")
async def test_nothing_is_left_running(server: NatsServer, anyio_backend_name: str) -> None:
    def tasks() -> set[str]:
        if anyio_backend_name == "trio":
            return {name for name, _ in hosted_tasks()}
        return {task.get_name() for task in asyncio.all_tasks()}

    async with open_asyncio_loop():
        before = tasks()
        for ending in ("alive", "killed"):
            async with nats_queue(server.url) as queue, queue.consumer("t") as consumer, queue.subscribe("b"):
                await queue.publish(numbered(1), "t")
                await consumer.receive()
                assert not tasks() <= before
                if ending == "killed":
                    server.kill()
                    await server.wait_exit()
            assert tasks() <= before  # those of the server end with it
        with pytest.raises(QueueUnavailable):
            async with nats_queue(server.url, patience=0.3):
                pass
        assert tasks() <= before


# Entering


async def test_credentials(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with open_server(options=("--user", "llama", "--pass", "hunter2/@")) as server:
        host = server.url.removeprefix("nats://")
        async with open_queue(f"nats://llama:hunter2%2F%40@{host}") as queue:
            await queue.publish(numbered(1), "t")
            assert "hunter2" not in f"{queue!r} {vars(queue)} {queue.statistics()}"
        for wrong in ("llama:hunter3@", "hunter3@", ""):
            with anyio.fail_after(5), pytest.raises(SetupError, match="refuses") as caught:
                async with open_queue(f"nats://{wrong}{host}"):
                    pass
            assert "hunter" not in shown(caught.value)
    async with open_server(options=("--auth", "hunter2")) as server:
        host = server.url.removeprefix("nats://")
        for right in ("hunter2@", ":hunter2@"):
            async with open_queue(f"nats://{right}{host}") as queue:
                await queue.publish(numbered(1), "t")
    assert "hunter" not in caplog.text


async def test_permissions(tmp_path: Path) -> None:
    """What the user may not do is said, not only that there was no answer."""
    config = tmp_path / "nats.conf"
    config.write_text(
        'authorization { users: [{user: llama, password: x, permissions: {publish: {deny: "corral.q.closed"}}}] }'
    )
    async with open_server(options=("-c", str(config))) as server:
        url = server.url.replace("nats://", "nats://llama:x@")
        async with nats_queue(url, patience=1) as queue:
            await queue.publish(numbered(1), "open")
            with pytest.raises(QueueUnavailable) as caught:
                await queue.publish(numbered(1), "closed")
            assert "corral.q.closed" in str(caught.value.hint)


async def test_a_server_without_jetstream() -> None:
    async with open_server(jetstream=False) as server:
        with anyio.fail_after(2), pytest.raises(SetupError, match="JetStream is not enabled") as caught:
            async with nats_queue(server.url):
                pass
        assert "-js" in str(caught.value.hint)


@pytest.mark.promise("P8")
async def test_what_is_there_already(server: NatsServer) -> None:
    """It is used as it is, or refused; never changed."""
    stream = {"name": "corral", "subjects": ["corral.q.>", "corral.g.>"], "retention": "workqueue", "max_msgs": 5}
    other = [{**stream, "retention": "limits"}, {**stream, "subjects": ["corral.q.>"]}]
    async with client(server.url) as raw:
        for config in other:
            await raw.call("$JS.API.STREAM.CREATE.corral", json.dumps(config).encode())
            before = await raw.call("$JS.API.STREAM.INFO.corral")
            with pytest.raises(SetupError, match="there already"):
                async with nats_queue(server.url):
                    pass
            async with nats_queue(server.url, stream="ours") as queue:
                await queue.publish(numbered(1), "t")
            assert await raw.call("$JS.API.STREAM.INFO.corral") == before
            await raw.call("$JS.API.STREAM.DELETE.corral")
        await raw.call("$JS.API.STREAM.CREATE.corral", json.dumps({**stream, "storage": "memory"}).encode())
        before = await raw.call("$JS.API.STREAM.INFO.corral")
        async with nats_queue(server.url, lease=7) as queue:
            assert not queue.durable
            async with queue.consumer("t"):
                pass
        async with nats_queue(server.url, lease=8) as queue, queue.consumer("t") as consumer:
            assert consumer.lease == 7
        after = await raw.call("$JS.API.STREAM.INFO.corral")
        assert after["config"] == before["config"]
        assert after["state"]["consumer_count"] == 1


async def test_what_the_server_cannot_do(server: NatsServer) -> None:
    with pytest.raises(SetupError, match="replicas"):
        async with nats_queue(server.url, replicas=3):
            pass


async def test_one_of_several_servers(server: NatsServer) -> None:
    async with nats_queue(f"nats://127.0.0.1:{free_port()},127.0.0.1:{server.port}") as queue:
        await queue.publish(numbered(1), "t")


async def test_a_domain(tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text(f"jetstream {{ domain: hub, store_dir: {tmp_path} }}")
    async with open_server(jetstream=False, options=("-c", str(config))) as server:
        async with nats_queue(server.url, domain="hub") as queue, queue.consumer("t") as consumer:
            await queue.publish(numbered(1), "t")
            [delivery] = await consumer.receive()
            assert not delivery.redelivered
            await delivery.nack()
            [delivery] = await consumer.receive()
            assert delivery.redelivered
            await delivery.ack()
            for number in range(5):
                await queue.publish(numbered(number), "t")
            assert await take(consumer, 5) == list(range(5))
        with pytest.raises((SetupError, QueueUnavailable)):
            async with nats_queue(server.url, domain="elsewhere", patience=1):
                pass


async def test_it_is_used_inside_its_block(server: NatsServer) -> None:
    queue = nats_queue(server.url)
    for _ in range(2):
        for use in (queue.publish, queue.broadcast):
            with pytest.raises(QueueUnavailable):
                await use(numbered(1), "t")
        for block in (queue.consumer("t"), queue.subscribe("t")):
            with pytest.raises(QueueUnavailable):
                async with block:
                    pass
        if queue.statistics()["published"] == 0:
            async with queue:
                await queue.publish(numbered(1), "t")
    with pytest.raises(RuntimeError):
        async with queue:
            pass


# TLS


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificate")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout key.pem -out cert.pem"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command.split(), *names], cwd=folder, check=True, capture_output=True)
    return folder


async def test_tls(certificate: Path) -> None:
    options = ("--tls", "--tlscert", str(certificate / "cert.pem"), "--tlskey", str(certificate / "key.pem"))
    async with open_server(options=options) as server:
        for scheme in ("tls", "nats"):  # the server demands it
            url = server.url.replace("nats", scheme)
            async with nats_queue(url, ca=certificate / "cert.pem") as queue, queue.consumer("t") as consumer:
                await queue.publish(numbered(1), "t")
                assert await take(consumer, 1) == [1]
            with pytest.raises(SetupError, match="not trusted"):
                async with nats_queue(url):
                    pass


@pytest.mark.promise("P11")
async def test_no_credentials_without_tls_where_it_is_a_must() -> None:
    """Somebody in between could leave it out of what the server offers."""
    heard = bytearray()

    async def serve(stream: SocketStream) -> None:
        with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            async with stream:
                await stream.send(b'INFO {"server_id":"x","version":"2.9.10","max_payload":1048576,"headers":true}\r\n')
                while True:
                    heard.extend(await stream.receive())

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        port = listener.extra(SocketAttribute.local_port)
        with pytest.raises(SetupError, match="no TLS"):
            async with nats_queue(f"tls://llama:hunter2@127.0.0.1:{port}"):
                pass
        tasks.cancel_scope.cancel()
    assert heard == b""


# Broadcasts


@pytest.mark.promise("P12")
async def test_a_slow_listener_loses_the_oldest(server: NatsServer) -> None:
    async with nats_queue(server.url, broadcast_buffer=3) as queue, queue.subscribe("t") as listener:
        async with queue.subscribe("t") as last, client(server.url) as raw:
            await raw.side.call(raw.client.publish, "corral.b.t", b"{no message")
            await raw.side.call(raw.client.flush)
            for number in range(10):
                await queue.broadcast(numbered(number), "t")
            while (await last.receive()).data["number"] != 9:
                pass
        assert [(await listener.receive()).data["number"] for _ in range(3)] == [7, 8, 9]
        assert queue.statistics()["lost_broadcasts"] == 7
        assert queue.statistics()["broadcasts"] == 10


# URLs


@pytest.mark.promise("P9", "P11")
@pytest.mark.parametrize(
    "url",
    [
        "nats://llama:hunter2@host/path",
        "nats://llama:hunter2@host?hunter=2",
        "nats://llama:hunter2@host?lease=0",
        "nats://llama:hunter2@host?lease=nan",
        "nats://llama:hunter2@host?lease=1e9",
        "nats://llama:hunter2@host?max_messages=hunter2",
        "nats://llama:hunter2@host?stream=a.b",
        "nats://llama:hunter2@host?stream=",
        "nats://llama:hunter2@host?ca=/nowhere",
        "nats://llama:hunter2@host?creds=/nowhere",
        f"nats://llama:hunter2@host?creds={os.__file__}",
        "nats://llama:hunter2@host,:hunter2",
        "nats://llama:hunter2@host,other:port",
        "nats://",
        "tls://llama:hunter2@",
    ],
)
def test_urls_that_cannot_be_used(url: str) -> None:
    with pytest.raises(SetupError) as caught:
        open_queue(url)
    assert "hunter2" not in f"{shown(caught.value)}"


def test_urls() -> None:
    queue = NatsMessageQueue.from_url(
        "tls://llama:hunter2@one,[::1],three:4333?lease=5&max_messages=7&patience=1.5&replicas=3&stream=S-1_x&domain=hub"
    )
    assert str(queue.address) == "one:4222, [::1]:4222, three:4333"
    assert queue.address.tls
    assert queue.address.user == "llama"
    assert queue.lease == 5
    assert queue.patience == 1.5
    assert queue.stream.name == "S-1_x"
    assert "hunter2" not in f"{queue.address!r}"
    assert NatsMessageQueue.from_url("nats://hunter2@host").address.token is not None
    assert without_credentials("nats://llama:hunter2@a:1,b:2?lease=5") == "nats://a:1,b:2?lease=5"
    assert with_credentials("nats://a:1,b:2", "llama", "hunter2") == "nats://llama:hunter2@a:1,b:2"


def test_a_credentials_file(tmp_path: Path) -> None:
    """It needs a package that is not among ours."""
    creds = tmp_path / "user.creds"
    creds.write_text("-----BEGIN NATS USER JWT-----\nx\n-----BEGIN USER NKEY SEED-----\nSUx\n")
    if find_spec("nkeys") is not None:
        assert nats_queue("nats://host", creds=creds).address.creds == str(creds)
    else:
        with pytest.raises(SetupError, match="needs the package nkeys"):
            nats_queue("nats://host", creds=creds)
