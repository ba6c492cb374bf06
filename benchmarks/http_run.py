"""Requests a second, CPU a request and latency of a one-step workflow through HTTP, beside llama-agents-server.

    python -m benchmarks.http_run [--rounds 3] [--seconds 5] [--connections 1,16] [--caps 8,64] [--json FILE]

In every round all servers are started fresh and get the same load one after the other, in another order. Ratios compare
with the peer in the same round: the machine's speed drifts between rounds, much less within one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, get_args

from . import environments, load, machine, report, servers

SERVICE = "hello"
WARM_UP = 1.0
PEER_PACKAGES = ("llama-agents-server", "llama-index-workflows", "starlette", "uvicorn", "uvloop", "httptools", "h11")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A server in one configuration and a way through it. `store`: of the peer; ours is always on disk."""

    scenario: load.Scenario
    flavour: servers.Flavour | None = None
    cap: int | None = None
    store: servers.PeerStore | None = None

    @property
    def name(self) -> str:
        if self.store is not None:
            return f"llama-agents-server, {self.store} store"
        return f"{self.scenario}, {self.flavour} steps, cap {self.cap}"

    @property
    def server_key(self) -> tuple[Any, ...]:
        return (self.flavour, self.cap, self.store)


@dataclass(frozen=True, slots=True)
class Sample:
    """One candidate under one load in one round."""

    candidate: str
    connections: int
    round: int
    requests: int
    seconds: float
    failures: int
    first_failure: str
    rps: float
    cpu_ms: float
    cpu_share: float
    p50_ms: float
    p99_ms: float
    memory_mib: float
    generator_cpu_share: float


PEERS = {store: Candidate("peer", store=store) for store in get_args(servers.PeerStore)}


def candidates(caps: Iterable[int], *, peers: bool, flavours: Iterable[servers.Flavour]) -> list[Candidate]:
    ours: list[Candidate] = []
    for flavour in flavours:
        for cap in caps:
            ours += [Candidate("run", flavour, cap), Candidate("session", flavour, cap)]
    return [*(PEERS.values() if peers else ()), *ours]


def measure(candidate: Candidate, server: servers.Server, connections: int, seconds: float, round_: int) -> Sample:
    plan = load.Plan(
        url=server.url,
        scenario=candidate.scenario,
        service=SERVICE,
        connections=connections,
        seconds=seconds,
        warm_up=WARM_UP,
        server_pid=server.pid,
    )
    done = load.drive(plan)
    return Sample(
        candidate=candidate.name,
        connections=connections,
        round=round_,
        requests=done.operations,
        seconds=done.seconds,
        failures=done.failures,
        first_failure=done.first_failure,
        rps=done.operations / done.seconds,
        cpu_ms=done.server_cpu / max(1, done.operations) * 1000,
        cpu_share=done.server_cpu / done.seconds,
        p50_ms=done.percentile(0.5) * 1000,
        p99_ms=done.percentile(0.99) * 1000,
        memory_mib=server.memory_mib(),
        generator_cpu_share=done.generator_cpu / done.seconds,
    )


def run_round(
    round_: int, chosen: list[Candidate], connections: list[int], seconds: float, results: list[Sample]
) -> None:
    """Start every server, give each its loads in the round's order, stop them."""
    with ExitStack() as stack:
        running: dict[tuple[Any, ...], servers.Server] = {}
        for candidate in chosen:
            if candidate.server_key not in running:
                running[candidate.server_key] = stack.enter_context(_open(candidate))
        for number in report.rotated(connections, round_):
            for candidate in report.rotated(chosen, round_):
                sample = measure(candidate, running[candidate.server_key], number, seconds, round_)
                results.append(sample)
                print(_progress(sample), file=sys.stderr, flush=True)


def _open(candidate: Candidate) -> Any:
    if candidate.store is not None:
        return servers.open_peer(candidate.store, name=SERVICE)
    assert candidate.flavour is not None
    assert candidate.cap is not None
    return servers.open_corral(f"{SERVICE}={servers.HELLO}:hello", flavour=candidate.flavour, cap=candidate.cap)


def _progress(sample: Sample) -> str:
    failed = f", {sample.failures} FAILED: {sample.first_failure}" if sample.failures else ""
    return (
        f"round {sample.round + 1}, {sample.connections:3d} connections, {sample.candidate:36s}"
        f"{sample.rps:8.1f}/s {sample.cpu_ms:6.2f} ms CPU  p50 {sample.p50_ms:6.2f} p99 {sample.p99_ms:7.2f} ms{failed}"
    )


# The report


def ratios(samples: list[Sample], candidate: str, connections: int, base: Candidate) -> list[float]:
    """Throughput over that of a peer under the same load, for each round in which both were measured."""
    rates = {(sample.candidate, sample.round): sample.rps for sample in samples if sample.connections == connections}
    return [
        rate / rates[base.name, round_]
        for (name, round_), rate in rates.items()
        if name == candidate and rates.get((base.name, round_))
    ]


def tables(samples: list[Sample], names: list[str], connections: list[int]) -> Iterator[str]:
    head = ["", "requests/s", "x memory peer", "x SQLite peer", "CPU ms", "p50 ms", "p99 ms", "MiB", "failed"]
    for number in connections:
        rows: list[list[str]] = []
        for name in names:
            own = [sample for sample in samples if sample.candidate == name and sample.connections == number]
            rows.append(
                [
                    name,
                    report.spread((sample.rps for sample in own), 0),
                    *(report.spread(ratios(samples, name, number, PEERS[store])) for store in PEERS),
                    report.spread(sample.cpu_ms for sample in own),
                    f"{statistics.median(sample.p50_ms for sample in own):.1f}",
                    f"{statistics.median(sample.p99_ms for sample in own):.1f}",
                    f"{statistics.median(sample.memory_mib for sample in own):.0f}",
                    str(sum(sample.failures for sample in own)),
                ]
            )
        yield f"{number} connection{'s' if number > 1 else ''}\n\n{report.table(head, rows)}\n"


def numbers(text: str) -> list[int]:
    """`1,16` as numbers."""
    return [int(part) for part in text.split(",")]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http_run", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement, after the warm-up")
    parser.add_argument("--connections", type=numbers, default=[1, 16], metavar="N,N")
    parser.add_argument("--caps", type=numbers, default=[8, 64], metavar="N,N")
    parser.add_argument("--flavours", type=lambda text: text.split(","), default=["anyio", "asyncio"], metavar="F,F")
    parser.add_argument("--no-peers", action="store_true", help="measure only this project")
    parser.add_argument("--json", metavar="FILE", help="write everything measured here")
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    chosen = candidates(args.caps, peers=not args.no_peers, flavours=args.flavours)
    description = {"machine": machine.describe(), "load_before": machine.load_now()}
    if not args.no_peers:
        installed = environments.versions(servers.peer_python())
        description["peer_packages"] = {name: installed[name] for name in PEER_PACKAGES if name in installed}
    samples: list[Sample] = []
    for round_ in range(args.rounds):
        run_round(round_, chosen, args.connections, args.seconds, samples)
    machine_ = description["machine"]
    print(f"\n{machine_['processor']}, {machine_['cores']} cores, {machine_['python']}; load before: ", end="")
    print(f"{description['load_before']}; {args.rounds} rounds of {args.seconds:g} s; median (least-greatest)\n")
    for text in tables(samples, [candidate.name for candidate in chosen], args.connections):
        print(text)
    if args.json:
        options = {key: value for key, value in vars(args).items() if key != "json"}
        report.write_json(
            args.json, {**description, "options": options, "samples": [asdict(sample) for sample in samples]}
        )
    failures = sum(sample.failures for sample in samples)
    if failures:
        sys.exit(f"{failures} answers were wrong")


if __name__ == "__main__":
    main()
