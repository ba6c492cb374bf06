"""How programs begin: they wait for what they need, say so once, and end where only a person can help."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
from pydantic import SecretStr

from llama_corral import starting
from llama_corral.abc import MessageQueue
from llama_corral.client import Client
from llama_corral.deploy import (
    Core,
    DeployOptions,
    ServiceOptions,
    Worker,
    WorkerOptions,
    deploy_all,
    deploy_core,
    deploy_worker,
    deploy_workflow,
)
from llama_corral.examples.hello import hello
from llama_corral.exceptions import QueueUnavailable, SetupError, StoreUnavailable, Unavailable
from llama_corral.protocol.calls import QueueInfo
from llama_corral.queues import open_queue
from llama_corral.queues.http import HttpMessageQueue
from llama_corral.services import WorkflowServiceConfig
from llama_corral.settings import QueueSettings, ServerSettings
from llama_corral.starting import add_credentials, enter_patiently, open_workers_queue, try_patiently
from llama_corral.testing.servers import PostgresServer, RedisServer

from .queues.servers import own_server
from .threaded import Threaded, open_core

REDIS = "CORRAL_TEST_REDIS_URL"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "MAX_RETRY_DELAY", 0.05)


# Trying again


@pytest.mark.anyio
@pytest.mark.promise("P9")
async def test_it_is_tried_until_it_works_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    attempts = 0

    async def attempt() -> str:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise StoreUnavailable("The store is away", hint="Start it.")
        if attempts < 4:
            raise ExceptionGroup("of a task group", [ExceptionGroup("", [QueueUnavailable("The queue is away")])])
        return "up"

    assert await try_patiently(attempt, "everything", anyio.Event()) == "up"
    assert caplog.messages == ["waiting for everything, trying again and again: The store is away (Start it.)"]


@pytest.mark.anyio
async def test_it_is_said_again_after_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "REMINDER", 0.0)
    attempts = iter(range(3))

    async def attempt() -> int:
        if (number := next(attempts)) < 2:
            raise Unavailable(f"away {number}")
        return number

    assert await try_patiently(attempt, "it", anyio.Event()) == 2
    assert [message[-6:] for message in caplog.messages] == ["away 0", "away 1"]


@pytest.mark.anyio
@pytest.mark.promise("P7")
async def test_a_stop_ends_the_waiting() -> None:
    stop = anyio.Event()

    async def attempt() -> None:
        stop.set()
        raise Unavailable("away")

    assert await try_patiently(attempt, "it", stop) is None
    assert await try_patiently(attempt, "it", stop) is None


@pytest.mark.anyio
@pytest.mark.promise("P9")
@pytest.mark.parametrize(
    "error", [SetupError("mend it"), ExceptionGroup("", [Unavailable("away"), ValueError("wrong")])]
)
async def test_other_errors_come_out(error: Exception) -> None:
    async def attempt() -> None:
        raise error

    with pytest.RaisesGroup(pytest.RaisesExc((SetupError, ValueError)), allow_unwrapped=True):
        await try_patiently(attempt, "it", anyio.Event())


@pytest.mark.anyio
async def test_each_attempt_enters_a_new_block_and_leaves_what_it_opened() -> None:
    log: list[str] = []

    @asynccontextmanager
    async def make() -> AsyncIterator[int]:
        log.append("open")
        try:
            if len(log) == 1:
                raise Unavailable("away")
            yield len(log)
        finally:
            log.append("close")

    async with AsyncExitStack() as stack:
        assert await enter_patiently(stack, make, "it", anyio.Event()) == 3
        assert log == ["open", "close", "open"]
    assert log == ["open", "close", "open", "close"]


@pytest.mark.parametrize(
    ("url", "user", "password", "full"),
    [
        ("redis://host:1/0", None, "p@ss", "redis://:p%40ss@host:1/0"),
        ("redis://ada@host", "other", "x", "redis://ada:x@host"),
        ("redis://:own@host", "ada", "x", "redis://:own@host"),
        ("nats://one:1,two:2", "ada", "x", "nats://ada:x@one:1,two:2"),
        ("redis://host", None, None, "redis://host"),
        ("http://host:8000", "ada", "x", "http://host:8000"),
        ("memory://", "ada", "x", "memory://"),
        ("sqlite:///file.db", None, "x", "sqlite:///file.db"),
        ("postgresql://ada@host/db?sslmode=require", None, "x", "postgresql://ada:x@host/db?sslmode=require"),
    ],
)
def test_credentials_from_the_environment(url: str, user: str | None, password: str | None, full: str) -> None:
    assert add_credentials(url, user, None if password is None else SecretStr(password)) == full


@pytest.mark.promise("P11")
def test_options_show_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CORRAL_QUEUE_PASSWORD", "CORRAL_STORE_PASSWORD"):
        monkeypatch.setenv(name, "hunter2")
    url = "redis://:hunter2@host"
    for options in (
        DeployOptions(store_url="postgresql://a:hunter2@host/db", queue_url=url),
        WorkerOptions(queue_url=url),
    ):
        assert options.queue_credentials.queue_password == SecretStr("hunter2")
        assert "hunter2" not in repr(options)


# The queue of a worker


class Link:
    """A control plane that says where its queue is."""

    def __init__(self, queue_url: str | None, url: str = "http://core:8000") -> None:
        self.info = QueueInfo(queue_url, "ns")
        self.url = url
        self.urls = (url,)
        self.asked: list[str] = []

    async def ask(self, method: str, path: str, read: Any) -> Any:
        self.asked.append(path)
        return self.info if path.endswith("queue") else b""


class Options:
    token = None

    def __init__(self, queue_url: str | None = None) -> None:
        self.queue_url = queue_url
        self.queue_credentials = QueueSettings(queue_user="ada", queue_password=SecretStr("hunter2"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """What was opened: each URL with its namespace. The first attempt of each fails."""
    urls: list[tuple[str, str | None]] = []

    def make(url: str, *, token: Any, namespace: str | None = None) -> Any:
        @asynccontextmanager
        async def entered() -> AsyncIterator[str]:
            urls.append((url, namespace))
            if len(urls) == 1:
                raise QueueUnavailable("refused")
            yield url

        return entered()

    monkeypatch.setattr(starting, "open_queue", make)
    return urls


async def open_for(link: Link, options: Options) -> Any:
    async with AsyncExitStack() as stack:
        return await open_workers_queue(stack, link, options, anyio.Event())  # type: ignore[arg-type]


@pytest.mark.anyio
@pytest.mark.promise("P11")
async def test_a_worker_adds_its_own_credentials(
    opened: list[tuple[str, str | None]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert await open_for(Link("redis://broker:6379"), Options()) == "redis://ada:hunter2@broker:6379"
    assert opened == [("redis://ada:hunter2@broker:6379", "ns")] * 2
    assert "waiting for the queue redis://broker:6379, trying" in caplog.text
    assert "hunter2" not in caplog.text


@pytest.mark.anyio
async def test_a_workers_own_url_is_taken(opened: list[tuple[str, str | None]]) -> None:
    assert await open_for(Link("redis://broker:6379"), Options("nats://tunnel")) == "nats://ada:hunter2@tunnel"


@pytest.mark.anyio
async def test_the_queue_of_the_control_plane_itself() -> None:
    async with Client("http://core:8000") as client:
        link = Link(None)
        assert isinstance(await open_for(link, Options()), HttpMessageQueue)
        assert link.asked == ["/ready", "/instances/queue"]
        assert client.url == link.url


@pytest.mark.anyio
@pytest.mark.promise("P9")
async def test_a_name_of_the_control_planes_own_machine(
    opened: list[tuple[str, str | None]], caplog: pytest.LogCaptureFixture
) -> None:
    await open_for(Link("redis://localhost:6379"), Options())
    assert "--queue URL" in caplog.text
    caplog.clear()
    opened.clear()
    await open_for(Link("redis://localhost:6379", "http://127.0.0.1:8000"), Options())
    assert "--queue URL" not in caplog.text


@pytest.mark.anyio
@pytest.mark.promise("P9")
@pytest.mark.parametrize("url", ["memory://", "kafka://broker", "redis://broker:nonsense"])
async def test_a_url_of_no_use_is_refused_before_anybody_is_asked(url: str) -> None:
    link = Link(None)
    with pytest.raises(SetupError):
        await open_for(link, Options(url))
    assert link.asked == []


# With real servers


def core_options(folder: Path, queue_url: str, **changes: Any) -> DeployOptions:
    given = {"store_url": f"sqlite:///{folder}/corral.db", "queue_url": queue_url, "settings": ServerSettings(port=0)}
    return DeployOptions(**given | changes)


@pytest.mark.trio
@pytest.mark.promise("P9")
@pytest.mark.parametrize("what", ["redis", "postgres"])
async def test_a_core_that_is_started_before_what_it_needs(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    make, variable = (RedisServer, REDIS) if what == "redis" else (PostgresServer, "CORRAL_TEST_POSTGRES_URL")
    async with own_server(make, variable) as server:  # type: ignore[type-var]
        await server.stop()
        if what == "redis":
            options = core_options(tmp_path, f"{server.url}?patience=0.1")
        else:
            options = core_options(tmp_path, "memory://", store_url=server.url)
        said = trio.Event()
        starting.logger.addFilter(note := lambda record: (said.set(), True)[1])
        stop = trio.Event()
        try:
            async with trio.open_nursery() as nursery:

                async def start() -> None:
                    core: Core = await nursery.start(partial(deploy_core, options, stop=stop))
                    assert core.url
                    stop.set()

                nursery.start_soon(start)
                await said.wait()
                await server.start()
        finally:
            starting.logger.removeFilter(note)
    assert caplog.text.count("waiting for the database and the broker") == 1
    if what == "postgres":
        assert server.password not in caplog.text
        assert caplog.text.count("not sealed") == 1
        assert "no other control plane may use the store" in caplog.text


@pytest.mark.trio
@pytest.mark.promise("P7")
@pytest.mark.parametrize("program", ["core", "all"])
async def test_a_program_that_is_stopped_while_it_waits(tmp_path: Path, program: str) -> None:
    async with own_server(RedisServer, REDIS) as server:
        await server.stop()
        options = core_options(tmp_path, f"{server.url}?patience=0.1")
        stop, said = trio.Event(), trio.Event()
        starting.logger.addFilter(note := lambda record: (said.set(), True)[1])
        try:
            async with trio.open_nursery() as nursery:
                if program == "core":
                    nursery.start_soon(partial(deploy_core, options, stop=stop))
                else:
                    nursery.start_soon(partial(deploy_all, {"hello": hello}, options, stop=stop))
                await said.wait()
                stop.set()
        finally:
            starting.logger.removeFilter(note)


@pytest.mark.trio
@pytest.mark.promise("P9", "P11")
async def test_a_core_that_the_broker_refuses(tmp_path: Path) -> None:
    async with own_server(RedisServer, REDIS, password="open sesame") as server:
        bare = server.url.replace(":open%20sesame@", "")
        for url, credentials in (
            (bare, QueueSettings()),
            (bare, QueueSettings(queue_password=SecretStr("open barley"))),
        ):
            with pytest.raises(SetupError) as refused:
                await deploy_core(core_options(tmp_path, url, queue_credentials=credentials))
            assert "barley" not in f"{refused.value} {refused.value.hint} {refused.value.fields}"
        good = QueueSettings(queue_password=SecretStr("open sesame"))
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            core: Core = await nursery.start(
                partial(deploy_core, core_options(tmp_path, bare, queue_credentials=good), stop=stop)
            )
            service = WorkflowServiceConfig(service_name="hello")
            running = await nursery.start(
                partial(deploy_workflow, hello, service, core, ServiceOptions(step_flavour="anyio"))
            )
            async with Client(core.url) as client:
                assert await client.run("hello", name="Ada") == "Hello, Ada!"
                config = await client.http.request("GET", "/queue_config")
                assert config["RedisMessageQueueConfig"] == {"type": "redis", "url": bare}
                status = await client.status()
                assert (status["store"], status["queue"], status["control_planes"]) == ("sqlite", "redis", 1)
            running.stop()
            stop.set()


@asynccontextmanager
async def two_planes(queue: MessageQueue, url: str) -> AsyncIterator[Threaded]:
    async with open_core(
        count=2, queue=queue, queue_url=url, heartbeat_interval=0.2, lease=5.0, topic_namespace="ns"
    ) as core:
        yield core


@pytest.mark.anyio
@pytest.mark.promise("P2", "P3", "P11")
@pytest.mark.parametrize("over", ["broker", "http"])
async def test_workers_of_two_control_planes(over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One learns the broker, without its password, and has that itself; one that cannot reach it uses the control planes."""
    monkeypatch.setattr("llama_corral.queues.http.MOVE_AFTER", 0.2)
    async with own_server(RedisServer, REDIS, password="sesame") as server:
        async with two_planes(open_queue(server.url, namespace="ns"), server.url) as core:
            urls = ",".join(core.urls)
            options = WorkerOptions(
                control_plane_url=urls,
                step_flavour="anyio",
                queue_url=urls if over == "http" else None,
                queue_credentials=QueueSettings(queue_password=SecretStr("sesame"))
                if over == "broker"
                else QueueSettings(),
            )
            if over == "broker":
                with pytest.raises(SetupError):
                    await deploy_worker({"hello": hello}, WorkerOptions(control_plane_url=urls, step_flavour="anyio"))
            stop = anyio.Event()
            async with anyio.create_task_group() as tasks, Client(urls) as client, Client(core.urls[1]) as other:
                worker: Worker = await tasks.start(partial(deploy_worker, {"hello": hello}, options, stop=stop))
                assert isinstance(worker.services["hello"].message_queue, HttpMessageQueue) is (over == "http")
                for each in (client, other):
                    assert await each.run("hello", name="Ada") == "Hello, Ada!"
                await core.ones[0].kill()
                for each in (client, other):
                    assert await each.run("hello", name="Bob") == "Hello, Bob!"
                stop.set()
