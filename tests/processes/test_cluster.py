"""Several control planes and workers of different capacities, while parts of them are killed and started again.

Every task ends, once; every stream is 0..n-1; no stored step is repeated; every answer of a person is taken once; the work
is shared by capacity; nothing is left behind.

`CORRAL_TEST_CLUSTER_TASKS=1000` runs the whole of the last one, with 20 kills; without, it is a shorter form.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import anyio
import pytest

from llama_corral.client import TaskEvent
from llama_corral.testing.children import Child
from llama_corral.testing.servers import NatsServer, PostgresServer, RabbitMQServer, RedisServer, ServerProcess

from ..queues.servers import own_server
from .cluster import CAPACITIES, LEASE, Break, Cluster, open_cluster
from .stored import Kill, check_against_kills, check_stream, times_to_next_attempt
from .support import Mark, all_tasks, check_streams, count_open, read_marks

pytestmark = [pytest.mark.process, pytest.mark.trio]

SHORT = 200
TASKS = int(os.environ.get("CORRAL_TEST_CLUSTER_TASKS", "200"))
QUEUE_LEASE = f"?lease={LEASE}"
POSTGRES, REDIS, NATS, RABBITMQ = (f"CORRAL_TEST_{name}_URL" for name in ("POSTGRES", "REDIS", "NATS", "RABBITMQ"))


@pytest.mark.promise("P1", "P2", "P3")
@pytest.mark.timeout(180)
async def test_http_and_sqlite(tmp_path: Path) -> None:
    async with open_cluster(tmp_path, SHORT) as cluster:
        await check_cluster(cluster, [cluster.stack.main])


@pytest.mark.promise("P1", "P2", "P3")
@pytest.mark.timeout(180)
async def test_http_and_postgresql(tmp_path: Path) -> None:
    async with (
        own_server(PostgresServer, POSTGRES) as database,
        open_cluster(tmp_path, SHORT, store_url=database.url) as cluster,
    ):
        await check_cluster(cluster, [cluster.stack.main])


@pytest.mark.promise("P1", "P2", "P3")
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("kind", "variable", "options"),
    [(NatsServer, NATS, QUEUE_LEASE), (RabbitMQServer, RABBITMQ, "")],
    ids=["nats", "rabbitmq"],
)
async def test_a_broker_and_postgresql(tmp_path: Path, kind: type[ServerProcess], variable: str, options: str) -> None:
    async with (
        own_server(kind, variable) as broker,
        own_server(PostgresServer, POSTGRES) as database,
        open_cluster(tmp_path, SHORT, store_url=database.url, queue_url=broker.url + options) as cluster,
    ):
        await check_cluster(cluster, [broker])


@pytest.mark.promise("P1", "P2", "P3")
@pytest.mark.timeout(600)
async def test_two_control_planes_on_redis_and_postgresql(tmp_path: Path) -> None:
    async with (
        own_server(RedisServer, REDIS) as broker,
        own_server(PostgresServer, POSTGRES) as database,
        open_cluster(tmp_path, TASKS, cores=2, store_url=database.url, queue_url=broker.url + QUEUE_LEASE) as cluster,
    ):
        await check_cluster(cluster, [cluster.stack.main, broker, database], kills=max(5, TASKS // 50))


async def check_cluster(cluster: Cluster, restarted: Sequence[Child], *, kills: int = 4) -> None:
    """Kill workers, some of them together with what is restarted, each of those once."""
    breaks: list[Break] = [cluster.kill_worker] * kills
    for number, child in enumerate(restarted, 1):
        breaks[number * kills // (len(restarted) + 1)] = partial(cluster.kill_worker, child)
    began = time.monotonic()
    await cluster.run_all(breaks)
    took = time.monotonic() - began
    streams = await check_tasks(cluster)
    assert len(cluster.kills) == kills
    await check_nothing_is_left(cluster)
    marks = read_marks(cluster.stack.folder)
    most = check_steps(cluster, streams, marks)
    resumed = sum(event.type == "RunResumed" for events in streams.values() for event in events)
    waits = sorted(times_to_next_attempt(marks, cluster.kills))
    shares = cluster.shares([mark.pid for mark in marks if mark.at < cluster.broken_at])
    print(
        f"\n{cluster.count} tasks, {len(cluster.people)} of them with a person, in {took:.1f} s; {kills} kills of workers, "
        f"restarts: {', '.join(child.name for child in restarted)}; {resumed} attempts went on; from kill to the next "
        f"attempt: median {statistics.median(waits):.2f} s, longest {waits[-1]:.2f} s of {len(waits)}\n"
        f"{len(marks)} steps ran, {again(marks)} of them again, {again(marks) - again(marks, cluster.kills)} without a "
        f"kill; done of what capacity is worth: {shown(shares, '.2f')}; most at a time: {shown(most, 'd')}"
    )
    # Were all workers alike, these would be 2.3, 1.2 and 0.6.
    assert shares[CAPACITIES[0]] < 1.9, shares
    assert shares[CAPACITIES[-1]] > 0.65, shares


async def check_tasks(cluster: Cluster) -> dict[str, list[TaskEvent]]:
    """Records, streams and answers, whichever control plane is asked."""
    tasks = [client.task(name) for name, client in zip(cluster.names, itertools.cycle(cluster.clients))]
    endings = await check_streams(tasks)
    records = {name: record for name, (record, _) in endings.items()}
    expected = {name: name for name in cluster.names} | {name: f"{name}: yes, {name}" for name in cluster.people}
    assert {task_id: record.value for task_id, record in records.items()} == expected
    for client in cluster.clients:
        assert Counter(info.task_id for info in await all_tasks(client)) == Counter(cluster.names)
    assert await cluster.answered() == Counter(cluster.people)
    streams = {name: events for name, (_, events) in endings.items()}
    assert cluster.live == {name: streams[name] for name in cluster.live}
    assert cluster.endings == {name: records[name] for name in cluster.endings}
    return streams


async def check_nothing_is_left(cluster: Cluster) -> None:
    for client in cluster.clients:
        assert await count_open(client) == 0
    # Who was killed last is missed after a lease; usually that is over by now.
    await anyio.sleep(max(0.0, cluster.kills[-1].at + 4 * LEASE - time.time()))
    await cluster.stop_workers()
    assert not await cluster.read_tickets()
    for table in ("instances", "task_inbox", "checkpoints", "dead_letters"):
        assert not await cluster.read_rows(f"SELECT * FROM corral_{table}"), table


def check_steps(cluster: Cluster, streams: Mapping[str, Sequence[TaskEvent]], marks: Sequence[Mark]) -> dict[int, int]:
    """No step is begun again that the store had as done, and no worker has more in work than it may: how many it had."""
    by_name: dict[str, list[Mark]] = {name: [] for name in cluster.names}
    for mark in marks:
        by_name[mark.name].append(mark)
    for name, events in streams.items():
        check_stream(events, {1, 2, 3, 4} if name in cluster.people else {1, 2, 3})
        check_against_kills(name, events, by_name[name], cluster.kills)
    most = cluster.most_at_once(by_name.values())
    assert all(0 < most[capacity] <= capacity for capacity in CAPACITIES), most
    return most


def shown(numbers: Mapping[int, float], how: str) -> str:
    return ", ".join(f"{capacity}: {number:{how}}" for capacity, number in numbers.items())


def again(marks: Sequence[Mark], kills: Sequence[Kill] | None = None) -> int:
    """How many steps were begun again; with `kills`: where it was a killed worker that had begun them before."""
    killed = None if kills is None else {kill.pid for kill in kills}
    begun: dict[tuple[str, str], int] = {}
    found = 0
    for mark in marks:
        before = begun.get((mark.name, mark.step))
        found += before is not None and (killed is None or before in killed)
        begun[mark.name, mark.step] = mark.pid
    return found
