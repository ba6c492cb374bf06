"""One measurement of messages for `benchmarks.queues`, in a process of its own.

    python -m benchmarks.messages '{"kind": "redis", "floor": false, "backend": "trio", "consumers": 1, ...}'

Two parts. Throughput: `PUBLISHERS` tasks publish so many messages, each the next one when its last is confirmed; the
consumers receive up to `MOST` at a time and acknowledge them side by side, as a service does that has so many slots free.
Latency: one message at a time, from before it is published until it is received; the next one when it is acknowledged.

Prints what came out as JSON. A message that did not come ends it with exit code 1. `measure(order)` starts that process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from . import report
from .floors import HOSTED, Ack, Carrier, open_carrier

PUBLISHERS = 8
MOST = 8
WARM_UP = 0.05
"""Messages before the measured ones, as a share of them."""
PACED = 0.05
"""Messages of the latency part, as a share of those of the throughput part."""
PATIENCE = 60.0
TIME_LIMIT = 600.0


@dataclass(frozen=True, slots=True)
class Order:
    """`kind`: memory, http, redis, nats or rabbitmq. `floor`: the broker's client alone. `name`: of what nobody else
    uses."""

    kind: str
    floor: bool
    backend: str
    consumers: int
    messages: int
    url: str
    name: str


@dataclass(frozen=True, slots=True)
class Measured:
    """`rate`: messages a second, all of them published, received and acknowledged. `cpu_us`: of this process, a message.
    `again`: deliveries beyond the first."""

    rate: float
    cpu_us: float
    p50_ms: float
    p99_ms: float
    again: int


class Failed(Exception):
    """The measurement's process failed; it has said why."""


def measure(order: Order) -> Measured:
    """Carry out the order in a process of its own.

    Raises:
        Failed: messages were lost, or an error.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.messages", json.dumps(asdict(order))],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
        timeout=TIME_LIMIT,
    )
    if done.returncode:
        raise Failed(f"{order.kind}{', client alone' if order.floor else ''}, {order.backend}: see above")
    return Measured(**json.loads(done.stdout))


# In the process


class Counted:
    """The messages that consumers got, and who waits for them."""

    def __init__(self) -> None:
        self.sent: dict[int, float] = {}
        self.latency: dict[int, float] = {}
        self.acked = 0
        self._times: Counter[int] = Counter()
        self._wanted = 0
        self._all = anyio.Event()

    @property
    def again(self) -> int:
        return sum(self._times.values()) - len(self._times)

    def received(self, number: int) -> None:
        self._times[number] += 1
        self.latency.setdefault(number, time.perf_counter() - self.sent[number])

    def done(self) -> None:
        self.acked += 1
        if self.acked >= self._wanted and len(self._times) >= self._wanted:
            self._all.set()

    async def wait_acked(self, number: int) -> None:
        """Return when so many different messages, from the first on, were received and acknowledged."""
        self._wanted, self._all = number, anyio.Event()
        if self.acked < number or len(self._times) < number:
            with anyio.fail_after(PATIENCE + number / 50):
                await self._all.wait()


async def consume(carrier: Carrier, counted: Counted, *, task_status: anyio.abc.TaskStatus[None]) -> None:
    async def take(ack: Ack) -> None:
        await ack()
        counted.done()

    async with carrier.consumer() as receive:
        task_status.started()
        while True:
            got = await receive(MOST)
            for number, _ in got:
                counted.received(number)
            if len(got) == 1:
                await take(got[0][1])
                continue
            async with anyio.create_task_group() as acks:
                for _, ack in got:
                    acks.start_soon(take, ack)


async def publish_all(carrier: Carrier, counted: Counted, first: int, after: int) -> None:
    """The messages from `first` up to and without `after`."""
    numbers = iter(range(first, after))

    async def publish() -> None:
        for number in numbers:
            counted.sent[number] = time.perf_counter()
            await carrier.publish(number)

    async with anyio.create_task_group() as publishers:
        for _ in range(PUBLISHERS):
            publishers.start_soon(publish)


async def throughput(
    tasks: TaskGroup, carrier: Carrier, counted: Counted, first: int, after: int
) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    tasks.start_soon(publish_all, carrier, counted, first, after)
    await counted.wait_acked(after)
    return time.perf_counter() - wall, time.process_time() - cpu


async def carry_out(order: Order) -> Measured:
    counted = Counted()
    warm, paced = max(20, int(order.messages * WARM_UP)), max(20, int(order.messages * PACED))
    measured = warm + order.messages
    async with AsyncExitStack() as stack:
        if order.backend == "trio" and order.kind in HOSTED:
            from llama_corral.aio import open_asyncio_loop

            await stack.enter_async_context(open_asyncio_loop())
        carrier = await stack.enter_async_context(
            open_carrier(order.kind, floor=order.floor, url=order.url, name=order.name, messages=measured + paced)
        )
        async with anyio.create_task_group() as tasks:
            for _ in range(order.consumers):
                await tasks.start(lambda *, task_status: consume(carrier, counted, task_status=task_status))
            await throughput(tasks, carrier, counted, 0, warm)
            wall, cpu = await throughput(tasks, carrier, counted, warm, measured)
            for number in range(measured, measured + paced):
                await publish_all(carrier, counted, number, number + 1)
                await counted.wait_acked(number + 1)
            tasks.cancel_scope.cancel()
    latencies = sorted(counted.latency[number] for number in range(measured, measured + paced))
    return Measured(
        rate=order.messages / wall,
        cpu_us=cpu / order.messages * 1e6,
        p50_ms=report.percentile(latencies, 0.5) * 1000,
        p99_ms=report.percentile(latencies, 0.99) * 1000,
        again=counted.again,
    )


def main() -> None:
    order = Order(**json.loads(sys.argv[1]))
    json.dump(asdict(anyio.run(carry_out, order, backend=order.backend)), sys.stdout)


if __name__ == "__main__":
    main()
