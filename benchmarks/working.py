"""The rounds and the tables of whole systems: a core, workers, and tasks of one step, beside the original."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from . import brokers, machine, report, servers, tasks

ORIGINAL = "original"
STACKS = (ORIGINAL, "http+sqlite", "redis+postgres", "nats+postgres", "rabbitmq+postgres")
DEFAULT_STACKS = STACKS[:3]
WARM_UP = 0.05
"""Tasks before the measured ones, as a share of them; at least one for each client."""
FLOWS = Path(__file__).with_name("flows.py")


@dataclass(frozen=True, slots=True)
class Sample:
    """One system under one load. CPU in seconds a task, of the core, of all workers together, and of everything on the
    machine. `busy`: the share of the whole machine that anybody used. `load`: what it was doing before."""

    stack: str
    workers: int
    round: int
    load: float
    rate: float
    p50: float
    p99: float
    failed: int
    lost: int
    first_failure: str
    core_cpu: float
    worker_cpu: float
    core_share: float
    busy: float
    machine_cpu: float
    generator_share: float
    memory_mib: float


def measure(name: str, running: servers.Stack, plan: tasks.Plan, round_: int) -> Sample:
    """Tasks are counted with those that failed or were lost: they cost something too."""
    warm = max(plan.clients, int(plan.tasks * WARM_UP))
    tasks.drive(tasks.Plan(plan.url, plan.service, plan.clients, warm, plan.seconds))
    programs = (running.core, *running.workers)
    load = machine.load_now()
    psutil.cpu_percent()
    before = [program.cpu_seconds() for program in programs]
    outcome = tasks.drive(plan)
    busy, processors = psutil.cpu_percent() / 100, psutil.cpu_count() or 1
    core, *others = (program.cpu_seconds() - earlier for program, earlier in zip(programs, before, strict=True))
    return Sample(
        stack=name,
        workers=len(running.workers),
        round=round_,
        load=load,
        rate=outcome.rate,
        p50=outcome.percentile(0.5),
        p99=outcome.percentile(0.99),
        failed=outcome.failed,
        lost=outcome.lost,
        first_failure=outcome.first_failure,
        core_cpu=core / plan.tasks,
        worker_cpu=sum(others) / plan.tasks,
        core_share=core / outcome.seconds,
        busy=busy,
        machine_cpu=busy * processors * outcome.seconds / plan.tasks,
        generator_share=outcome.generator_cpu / outcome.seconds,
        memory_mib=running.core.memory_mib(),
    )


def open_stack(name: str, service: str, workers: int) -> AbstractContextManager[servers.Stack]:
    """A system with a workflow on it: `hello` or `nap`."""
    if name == ORIGINAL:
        return servers.open_original(service, workers)
    target = f"{FLOWS}:nap" if service == "nap" else f"{servers.HELLO}:{service}"
    if name == "http+sqlite":
        return servers.open_stack(target, workers)
    return _open_with_broker(name.partition("+")[0], target, workers)


@contextmanager
def _open_with_broker(broker: str, target: str, workers: int) -> Iterator[servers.Stack]:
    with brokers.open_schema() as store, brokers.open_place(broker) as place:
        options = ("--queue", place.url, "--store", store)
        environment = {"CONTROL_PLANE_TOPIC_NAMESPACE": place.namespace}
        with servers.open_stack(target, workers, core_options=options, environment=environment) as running:
            yield running


def run_rounds(
    stacks: Sequence[str], workers: Sequence[int], clients: int, number: int, original_number: int, rounds: int
) -> Iterator[Sample]:
    """Number by number of workers; the systems take turns, each started fresh."""
    for count in workers:
        for round_ in range(rounds):
            for name in report.rotated(stacks, round_):
                with open_stack(name, "hello", count) as running:
                    size = original_number if name == ORIGINAL else number
                    sample = measure(name, running, tasks.Plan(running.url, "hello", clients, size), round_)
                print(progress(sample), file=sys.stderr, flush=True)
                yield sample


def feed(
    stacks: Sequence[str], workers: Sequence[int], nap: float, cap: int, seconds: float, rounds: int
) -> Iterator[Sample]:
    """More and more workers whose tasks wait more than they work, until more of them do not bring more."""
    for name in stacks:
        for round_ in range(rounds):
            best = 0.0
            for count in workers:
                with open_stack(name, "nap", count) as running:
                    possible = count * cap / nap
                    plan = tasks.Plan(
                        running.url, "nap", int(count * cap * 1.5), int(min(possible, 400) * seconds), nap
                    )
                    sample = measure(name, running, plan, round_)
                print(progress(sample), file=sys.stderr, flush=True)
                yield sample
                if sample.rate < best * 1.05:
                    break
                best = max(best, sample.rate)


def progress(sample: Sample) -> str:
    failed = f", {sample.failed} FAILED, {sample.lost} LOST: {sample.first_failure}" if sample.first_failure else ""
    return (
        f"round {sample.round + 1}, {sample.workers} workers, {sample.stack:18s}{sample.rate:8.1f}/s  CPU ms: core "
        f"{sample.core_cpu * 1000:6.2f} worker {sample.worker_cpu * 1000:6.2f}  p50 {sample.p50 * 1000:7.1f} "
        f"p99 {sample.p99 * 1000:7.1f} ms  load {sample.load}{failed}"
    )


# The report


def tables(samples: list[Sample]) -> Iterator[str]:
    """One for each number of workers."""
    head = [
        "",
        "tasks/s",
        "x original",
        "p50 ms",
        "p99 ms",
        "CPU ms: core",
        "workers",
        "machine",
        "failed",
        "lost",
        "load",
    ]
    for workers in dict.fromkeys(sample.workers for sample in samples):
        own = [sample for sample in samples if sample.workers == workers]
        rows = [_row(own, name) for name in STACKS if any(sample.stack == name for sample in own)]
        yield f"{workers} worker{'s' if workers > 1 else ''}\n\n{report.table(head, rows)}\n"
    for name in dict.fromkeys(sample.stack for sample in samples):
        yield costs([sample for sample in samples if sample.stack == name])


def _row(samples: list[Sample], name: str) -> list[str]:
    own = [sample for sample in samples if sample.stack == name]
    base = {sample.round: sample.rate for sample in samples if sample.stack == ORIGINAL}
    ratios = [sample.rate / base[sample.round] for sample in own if base.get(sample.round)]
    return [
        name,
        report.spread((sample.rate for sample in own), 1),
        "" if name == ORIGINAL else report.spread(ratios, 0),
        f"{statistics.median(sample.p50 for sample in own) * 1000:.0f}",
        f"{statistics.median(sample.p99 for sample in own) * 1000:.0f}",
        report.spread((sample.core_cpu * 1000 for sample in own), 1),
        report.spread((sample.worker_cpu * 1000 for sample in own), 1),
        report.spread((sample.machine_cpu * 1000 for sample in own), 1),
        str(sum(sample.failed for sample in own)),
        str(sum(sample.lost for sample in own)),
        f"{max(sample.load for sample in own):.1f}",
    ]


def costs(samples: list[Sample]) -> str:
    """What follows from the CPU of a task, of one system."""
    core = statistics.median(sample.core_cpu for sample in samples) * 1000
    worker = statistics.median(sample.worker_cpu for sample in samples) * 1000
    return (
        f"{samples[0].stack}: a task costs {core:.1f} ms CPU on the core and {worker:.1f} ms on its worker. So a core that "
        f"has a processor for itself decides {1000 / core:.0f} tasks/s at most, as many as {worker / core:.1f} workers "
        f"can do whose steps do nothing."
    )


def feed_tables(samples: list[Sample], nap: float, cap: int) -> Iterator[str]:
    """One for each system."""
    head = ["workers", "tasks/s", "of possible", "% of a processor, core", "CPU ms, core", "% of the machine", "load"]
    for name in dict.fromkeys(sample.stack for sample in samples):
        own = [sample for sample in samples if sample.stack == name]
        rows = []
        for count in dict.fromkeys(sample.workers for sample in own):
            some = [sample for sample in own if sample.workers == count]
            rows.append(
                [
                    str(count),
                    report.spread((sample.rate for sample in some), 0),
                    report.spread(sample.rate / (count * cap / nap) for sample in some),
                    report.spread((sample.core_share * 100 for sample in some), 0),
                    report.spread((sample.core_cpu * 1000 for sample in some), 1),
                    report.spread((sample.busy * 100 for sample in some), 0),
                    f"{max(sample.load for sample in some):.1f}",
                ]
            )
        title = f"{name}: tasks that wait {nap:g} s, {cap} at a time a worker ({cap / nap:g} tasks/s possible)"
        yield f"{title}\n\n{report.table(head, rows)}\n{limit(own)}\n"


def limit(samples: list[Sample]) -> str:
    """What kept the best of one system from being better."""
    best = max(samples, key=lambda sample: sample.rate)
    cores = psutil.cpu_count() or 1
    reached = f"most: {best.rate:.0f} tasks/s with {best.workers} workers; "
    if best.core_share > 0.85:
        return reached + f"the core's process was the limit ({best.core_share:.0%} of a processor)"
    if best.busy > 0.9:
        return reached + f"the machine was the limit (its {cores} processors were {best.busy:.0%} busy)"
    return reached + "more workers would bring more"
