"""The rounds and the tables of messages: each adapter beside the broker's client alone."""

from __future__ import annotations

import statistics
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from . import brokers, machine, messages, report, servers
from .floors import HOSTED

KINDS = ("memory", "http", "redis", "nats", "rabbitmq")
BACKENDS = ("trio", "asyncio")
ALONE = {
    "memory": "memory stream of AnyIO",
    "http": "httpx, one POST",
    "redis": "coredis",
    "nats": "nats-py",
    "rabbitmq": "aio-pika",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter, or the client alone, on a backend."""

    kind: str
    floor: bool
    backend: str

    @property
    def name(self) -> str:
        return f"{ALONE[self.kind] if self.floor else self.kind}, {self.backend}"

    @property
    def base(self) -> Candidate:
        """What it is compared with: the client alone on the same backend, or where it does not run there, on asyncio."""
        return Candidate(self.kind, True, "asyncio" if self.kind in HOSTED else self.backend)


@dataclass(frozen=True, slots=True)
class Sample:
    """One candidate in one round. `load`: what the machine was doing before it."""

    candidate: Candidate
    consumers: int
    round: int
    load: float
    measured: messages.Measured


def candidates(kind: str, backends: Sequence[str]) -> list[Candidate]:
    adapters = [Candidate(kind, False, backend) for backend in backends]
    return [*adapters, *dict.fromkeys(one.base for one in adapters)]


def run_rounds(
    kinds: Sequence[str], consumers: Sequence[int], backends: Sequence[str], number: int, rounds: int
) -> Iterator[Sample]:
    """Broker by broker, so that what is compared was measured within seconds."""
    for kind in kinds:
        turns = [(candidate, count) for count in consumers for candidate in candidates(kind, backends)]
        with ExitStack() as stack:
            core = stack.enter_context(servers.open_core()).url if kind == "http" else "memory://"
            for round_ in range(rounds):
                for candidate, count in report.rotated(turns, round_):
                    load = machine.load_now()
                    sample = Sample(candidate, count, round_, load, _measure(candidate, count, number, core))
                    print(_progress(sample), file=sys.stderr, flush=True)
                    yield sample


def _measure(candidate: Candidate, consumers: int, number: int, core: str) -> messages.Measured:
    def measure(url: str, name: str) -> messages.Measured:
        order = messages.Order(candidate.kind, candidate.floor, candidate.backend, consumers, number, url, name)
        return messages.measure(order)

    if candidate.kind not in brokers.VARIABLES:
        return measure(core, f"corral-bench-{uuid.uuid4().hex[:12]}")
    with brokers.open_place(candidate.kind) as place:
        return measure(place.alone if candidate.floor else place.url, place.namespace)


def _progress(sample: Sample) -> str:
    one = sample.measured
    return (
        f"round {sample.round + 1}, {sample.consumers} consumers, {sample.candidate.name:32s}{one.rate:9.0f}/s "
        f"{one.cpu_us:7.1f} us CPU  p50 {one.p50_ms:6.2f} p99 {one.p99_ms:7.2f} ms  load {sample.load}"
    )


def tables(samples: list[Sample]) -> Iterator[str]:
    """One for each number of consumers of each kind."""
    head = ["", "messages/s", "x alone", "CPU us", "x alone", "p50 ms", "p99 ms", "again", "load"]
    for kind, consumers in dict.fromkeys((sample.candidate.kind, sample.consumers) for sample in samples):
        own = [sample for sample in samples if (sample.candidate.kind, sample.consumers) == (kind, consumers)]
        rows = [_row(own, candidate) for candidate in dict.fromkeys(sample.candidate for sample in own)]
        rows.sort(key=lambda row: row[0])
        yield f"{kind}, {consumers} consumer{'s' if consumers > 1 else ''}\n\n{report.table(head, rows)}\n"


def _row(samples: list[Sample], candidate: Candidate) -> list[str]:
    by_round = {sample.round: sample for sample in samples if sample.candidate == candidate}
    base = {sample.round: sample.measured for sample in samples if sample.candidate == candidate.base}
    own = [sample.measured for sample in by_round.values()]
    pairs = [(sample.measured, base[round_]) for round_, sample in by_round.items() if round_ in base]
    return [
        candidate.name,
        report.spread((one.rate for one in own), 0),
        "" if candidate.floor else report.spread(one.rate / alone.rate for one, alone in pairs),
        report.spread((one.cpu_us for one in own), 0),
        "" if candidate.floor else report.spread((one.cpu_us / alone.cpu_us for one, alone in pairs), 1),
        f"{statistics.median(one.p50_ms for one in own):.2f}",
        f"{statistics.median(one.p99_ms for one in own):.2f}",
        str(sum(one.again for one in own)),
        f"{max(sample.load for sample in by_round.values()):.1f}",
    ]
