"""The queue in Redis and servers that are special: locked, encrypted, narrow, forgetful, hanging."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import anyio
import pytest

from llama_corral.abc import MessageQueue
from llama_corral.exceptions import QueueUnavailable, SetupError
from llama_corral.protocol.messages import QueueMessage
from llama_corral.queues import open_queue
from llama_corral.queues.redis import RedisMessageQueue
from llama_corral.testing.queues import numbered

from .test_redis import connect, redis_server, take, take_and_ack

pytestmark = pytest.mark.anyio


async def round_trip(queue: MessageQueue) -> None:
    async with queue.consumer("t") as consumer, queue.subscribe("t") as listener:
        await queue.publish(numbered(1), "t")
        assert await take_and_ack(consumer, 1) == [1]
        await queue.broadcast(numbered(2), "t")
        with anyio.fail_after(10):
            assert (await listener.receive()).data == {"number": 2}


# Who may


@pytest.mark.promise("P11")
async def test_a_password() -> None:
    async with redis_server(password="hunter2/ö:@") as server:
        async with open_queue(server.url) as queue:
            assert queue.durable
            await round_trip(queue)
        for user in ("", "hunter2@", ":hunter2@", "somebody:hunter2@"):
            with pytest.raises(SetupError, match="user or the password") as caught:
                async with open_queue(f"redis://{user}127.0.0.1:{server.port}"):
                    pass
            assert "hunter2" not in f"{caught.value} {caught.value.hint} {caught.value.fields}"


async def test_a_user_who_may_not_do_everything() -> None:
    """Without what Redis calls dangerous: nobody is told how durable it is, and reads that were abandoned end by
    themselves. What they bring comes back all the same."""
    all_keys = ("~corral:*", "&corral:*")
    users = ("--user", "worker", "on", ">w", *all_keys, "+@all", "-@dangerous")
    users += ("--user", "reader", "on", ">r", *all_keys, "+@read", "+@connection")
    async with redis_server(settings=users) as server:
        where = f"127.0.0.1:{server.port}"
        async with open_queue(f"redis://worker:w@{where}?lease=1") as queue:
            assert not queue.durable
            await round_trip(queue)
            async with queue.consumer("t") as consumer, queue.consumer("t") as other:
                with anyio.move_on_after(0.1):
                    await consumer.receive()
                await queue.publish(numbered(1), "t")
                await queue.publish(numbered(2), "t")
                assert sorted(await take_and_ack(consumer, 1) + await take_and_ack(other, 1)) == [1, 2]
        async with open_queue(f"redis://reader:r@{where}") as queue:
            with pytest.raises(SetupError, match="refuses"):
                await queue.publish(numbered(1), "t")
            with pytest.raises(SetupError, match="refuses"):
                async with queue.consumer("t"):
                    pass


# How to get there


def make_certificate(folder: Path) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make a certificate with")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subject = ["-subj", "/CN=corral", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["-out", str(certificate), "-keyout", str(key)]
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *made]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


async def test_tls(tmp_path: Path) -> None:
    async with redis_server(certificate=make_certificate(tmp_path), password="p") as server:
        async with open_queue(server.url) as queue:
            await round_trip(queue)
            await server.restart()
            await round_trip(queue)
        where = f"127.0.0.1:{server.port}"
        with pytest.raises(SetupError, match="TLS"):
            async with open_queue(f"rediss://:p@{where}"):
                pass
        with pytest.raises(QueueUnavailable):
            async with open_queue(f"redis://:p@{where}?patience=0.1"):
                pass
        async with open_queue(f"rediss://:p@{where}?ssl_cert_reqs=none") as queue:
            await round_trip(queue)


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with redis_server(unix_socket=path, password="p") as server:
        async with open_queue(f"unix://:p@{path}?db=3") as queue:
            await round_trip(queue)
        async with connect(f"{server.url}/3") as raw:
            assert await raw.create_request(b"DBSIZE") == 3  # the topic's groups and two streams


# What happens to servers


@pytest.mark.promise("P2", "P8")
async def test_connections_that_are_cut() -> None:
    async with redis_server() as server, connect(server.url) as raw:

        async def connections() -> int:
            return len((await raw.create_request(b"CLIENT LIST")).splitlines()) - 1

        async with open_queue(server.url) as queue, queue.consumer("t") as consumer, queue.subscribe("t") as listener:
            received: list[int] = []

            async def receive() -> None:
                received.extend(await take_and_ack(consumer, 1))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(receive)
                await raw.create_request(b"CLIENT KILL", b"TYPE", b"pubsub")
                await raw.create_request(b"CLIENT KILL", b"SKIPME", b"yes")
                await queue.publish(numbered(1), "t")
            assert received == [1]
            with anyio.fail_after(10), pytest.raises(QueueUnavailable, match="lost"):
                await listener.receive()
            await round_trip(queue)
            assert queue.statistics()["reconnects"] == 3
            assert await connections() == 3
        with anyio.fail_after(10):
            while await connections():
                pass  # the server has not noticed yet


async def test_a_server_that_lost_everything(caplog: pytest.LogCaptureFixture) -> None:
    policy = ("--maxmemory-policy", "allkeys-lru")
    async with redis_server(durable=False, settings=policy) as server, connect(server.url) as raw:
        async with open_queue(server.url) as queue, queue.consumer("t") as consumer:
            assert not queue.durable
            assert "maxmemory-policy" in caplog.text
            await queue.publish(numbered(0), "t")
            [gone] = await take(consumer, 1)
            received: list[int] = []

            async def receive() -> None:
                received.extend(await take_and_ack(consumer, 2))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(receive)
                await anyio.wait_all_tasks_blocked()
                await raw.create_request(b"FLUSHALL")
                await gone.ack()
                await queue.publish(numbered(1), "t")
                await queue.publish(numbered(2), "t")
            assert received == [1, 2]


async def test_a_server_without_memory() -> None:
    """It says so, and what is acknowledged makes room."""
    async with redis_server(durable=False, settings=("--maxmemory", "5mb")) as server:
        async with open_queue(server.url) as queue, queue.consumer("t") as consumer:
            published = []

            async def fill() -> None:
                for number in range(100):
                    await queue.publish(QueueMessage(data={"number": number, "text": "x" * 200_000}), "t")
                    published.append(number)

            with pytest.raises(QueueUnavailable, match="memory"):
                await fill()
            assert len(published) > 3
            assert await take_and_ack(consumer, len(published)) == published
            await round_trip(queue)


@pytest.mark.promise("P9")
async def test_a_server_that_hangs() -> None:
    """Nobody waits longer than they are willing to, and everything goes on when it does."""
    async with redis_server() as server:
        async with open_queue(f"{server.url}?patience=1") as queue:
            async with queue.consumer("t") as consumer:
                server.send_signal(signal.SIGSTOP)
                began = anyio.current_time()
                with pytest.raises(QueueUnavailable):
                    await queue.publish(numbered(1), "t")
                server.send_signal(signal.SIGCONT)
                # Whether the first one went out is unknown.
                await queue.publish(numbered(2), "t")
                assert (await take_and_ack(consumer, 1))[0] in (1, 2)
                server.send_signal(signal.SIGSTOP)
        assert anyio.current_time() - began < 20
        server.send_signal(signal.SIGCONT)


async def test_an_idle_connection_lives_longer_than_its_opening_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_corral.queues.redis_connection.CONNECT_TIME", 0.4)
    async with redis_server() as server, RedisMessageQueue.from_url(server.url) as queue:
        async with queue.consumer("t") as consumer:
            with anyio.move_on_after(0.6):
                await consumer.receive()
            await round_trip(queue)
        assert queue.statistics()["reconnects"] == 0
