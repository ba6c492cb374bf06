"""The queue in NATS: servers that go away, that want to know who we are, and that are not as they should be."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream, TaskStatus

from llama_corral.aio import hosted_tasks, open_asyncio_loop
from llama_corral.exceptions import QueueUnavailable, SetupError
from llama_corral.queues import open_queue
from llama_corral.queues.nats import NatsMessageQueue
from llama_corral.queues.urls import with_credentials, without_credentials
from llama_corral.testing.servers import NatsServer
from llama_corral.testing.servers.base import free_port

from .nats_tools import client, nats_queue, nats_server, numbered, shown, take

pytestmark = pytest.mark.anyio


@pytest.fixture
async def server(anyio_backend: str) -> AsyncIterator[NatsServer]:
    async with nats_server() as found:
        yield found


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
    got: set[tuple[str, int]] = set()
    async with nats_queue(server.url, patience=10) as queue, anyio.create_task_group() as tasks:

        async def work(group: str, *, task_status: TaskStatus[None]) -> None:
            async with queue.consumer("t", group) as consumer:
                task_status.started()
                while True:
                    got.update((group, number) for number in await take(consumer, 1, seconds=30))

        async def arrive(number: int) -> None:
            with anyio.fail_after(10):
                while not {("a", number), ("b", number)} <= got:
                    await queue.publish(numbered(number), "t")
                    await anyio.wait_all_tasks_blocked()

        for group in "ab":
            await tasks.start(work, group)
        await arrive(1)
        server.kill()
        await server.wait_exit()
        shutil.rmtree(server.folder / "jetstream")
        await server.start()
        await arrive(2)
        async with client(server.url) as raw:
            assert (await raw.call("$JS.API.STREAM.DELETE.corral"))["success"]
            await arrive(3)
            # Who publishes from elsewhere may know it like this.
            group_b = await raw.call("$JS.API.CONSUMER.INFO.corral.t+b")
            assert group_b["config"]["filter_subject"] == "corral.q.t.b"
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
    async with nats_server(options=("--user", "llama", "--pass", "hunter2/@")) as server:
        host = server.url.removeprefix("nats://")
        async with open_queue(f"nats://llama:hunter2%2F%40@{host}") as queue:
            await queue.publish(numbered(1), "t")
            assert "hunter2" not in f"{queue!r} {vars(queue)} {queue.statistics()}"
        for wrong in ("llama:hunter3@", "hunter3@", ""):
            with anyio.fail_after(5), pytest.raises(SetupError, match="refuses") as caught:
                async with open_queue(f"nats://{wrong}{host}"):
                    pass
            assert "hunter" not in shown(caught.value)
    async with nats_server(options=("--auth", "hunter2")) as server:
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
    async with nats_server(options=("-c", str(config))) as server:
        url = server.url.replace("nats://", "nats://llama:x@")
        async with nats_queue(url, patience=1) as queue:
            await queue.publish(numbered(1), "open")
            with pytest.raises(QueueUnavailable) as caught:
                await queue.publish(numbered(1), "closed")
            assert "corral.q.closed" in str(caught.value.hint)


async def test_a_server_without_jetstream() -> None:
    async with nats_server(jetstream=False) as server:
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
    async with nats_server(jetstream=False, options=("-c", str(config))) as server:
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
    async with nats_server(options=options) as server:
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
