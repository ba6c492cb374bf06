"""The runtime alone: what runs, steps and events cost, beside upstream's own runtime, on each event loop.

    python -m benchmarks.runtime [--rounds 5] [--workloads chain,stream] [--candidates trio,upstream] [--json FILE]
    python -m benchmarks.runtime --profile chain trio

No service, store or HTTP. Every measurement has a process of its own; in every round the candidates take turns, in
another order. Ratios compare with upstream on asyncio in the same round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from . import machine, report
from .candidates import BASE, CANDIDATES
from .measuring import Failed, Order, measure
from .workloads import WORKLOADS

PACKAGES = (*machine.OURS, "llama-index-instrumentation", "uvloop")
QUICK = 0.1


@dataclass(frozen=True, slots=True)
class Sample:
    """One candidate's measurement of one workload in one round. `seen`: spans and instrumentation events of one
    operation, if handlers were attached."""

    workload: str
    candidate: str
    spans: bool
    round: int
    units: int
    wall: float
    cpu: float
    seen: dict[str, float]

    @property
    def rate(self) -> float:
        return self.units / self.wall

    @property
    def cpu_us(self) -> float:
        return self.cpu / self.units * 1e6


def run_rounds(args: argparse.Namespace) -> Iterator[Sample]:
    """Workload by workload, so that what is compared was measured within seconds."""
    turns = [(candidate, spans) for spans in args.spans for candidate in args.candidates]
    for workload in args.workloads:
        for round_ in range(args.rounds):
            for candidate, spans in report.rotated(turns, round_):
                order = Order(candidate, workload, spans=spans, share=args.share)
                sample = Sample(workload, candidate, spans, round_, **measure(order))
                print(_progress(sample), file=sys.stderr, flush=True)
                yield sample


def _progress(sample: Sample) -> str:
    with_spans = ", spans" if sample.spans else ""
    return (
        f"round {sample.round + 1}, {sample.workload:14s} {sample.candidate:16s} {sample.cpu_us:9.1f} us CPU "
        f"{sample.rate:9.0f}/s{with_spans}"
    )


# The report


def ratios(samples: list[Sample], candidate: str, value: Callable[[Sample], float]) -> list[float]:
    """A value over upstream's, for each round in which both were measured."""
    base = {sample.round: value(sample) for sample in samples if sample.candidate == BASE}
    return [
        value(sample) / base[sample.round]
        for sample in samples
        if sample.candidate == candidate and sample.round in base
    ]


def table(samples: list[Sample], candidates: list[str], unit: str) -> str:
    """Of the samples of one workload, with or without spans."""
    head = ["", f"{unit}s/s", f"CPU us/{unit}", "x upstream's rate", f"x {unit}s for the CPU"]
    rows: list[list[str]] = []
    for name in candidates:
        own = [sample for sample in samples if sample.candidate == name]
        rows.append(
            [
                CANDIDATES[name].title,
                report.spread((sample.rate for sample in own), 0),
                report.spread((sample.cpu_us for sample in own), 1),
                report.spread(ratios(samples, name, lambda sample: sample.rate)),
                report.spread(ratios(samples, name, lambda sample: 1 / sample.cpu_us)),
            ]
        )
    return report.table(head, rows)


def seen_differently(samples: list[Sample]) -> list[str]:
    """What handlers saw of one operation, where candidates show them something else than upstream on asyncio does."""
    seen = {sample.candidate: _counts(sample.seen) for sample in samples}
    others: dict[str, list[str]] = {}
    for name, counts in seen.items():
        if counts != seen.get(BASE, counts):
            others.setdefault(counts, []).append(name)
    return [
        f"not at parity: handlers saw {counts} of {', '.join(names)}, and {seen[BASE]} of {BASE}"
        for counts, names in others.items()
    ]


def _counts(seen: dict[str, float]) -> str:
    return ", ".join(f"{count:g} {name}" for name, count in seen.items()) or "nothing"


def print_report(samples: list[Sample], args: argparse.Namespace, description: dict[str, Any]) -> None:
    machine_ = description["machine"]
    print(f"\n{machine_['processor']}, {machine_['cores']} cores, {machine_['python']}; load before: ", end="")
    print(f"{description['load_before']}; {args.rounds} rounds; median (least-greatest)")
    for name in args.workloads:
        for spans in args.spans:
            own = [sample for sample in samples if sample.workload == name and sample.spans is spans]
            handlers = ", span and event handler attached" if spans else ""
            print(f"\n{WORKLOADS[name].title}{handlers}\n\n{table(own, args.candidates, WORKLOADS[name].unit)}")
            if spans:
                print(*seen_differently(own), sep="\n")


# The command


def chosen(what: str, known: dict[str, Any]) -> Callable[[str], list[str]]:
    """A parser of `name,name`."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"no {what} {name!r}; there are {', '.join(known)}")
        return names

    return parse


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtime", description=__doc__.partition("\n")[0])
    workloads, candidates = chosen("workload", WORKLOADS), chosen("candidate", CANDIDATES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--workloads", type=workloads, default=list(WORKLOADS), metavar="W,W", help=", ".join(WORKLOADS)
    )
    parser.add_argument(
        "--candidates", type=candidates, default=list(CANDIDATES), metavar="C,C", help=", ".join(CANDIDATES)
    )
    parser.add_argument(
        "--spans",
        type=lambda text: {"without": [False], "with": [True], "both": [False, True]}[text],
        default=[False, True],
        metavar="without|with|both",
        help="with a span handler and an event handler attached, without, or (default) one after the other",
    )
    parser.add_argument("--quick", action="store_true", help="one round of a tenth of the work")
    parser.add_argument("--profile", nargs=2, metavar=("WORKLOAD", "CANDIDATE"), help="only show where its CPU goes")
    parser.add_argument("--lines", type=int, default=40, help="of the profile")
    parser.add_argument("--json", metavar="FILE", help="write everything measured here")
    args = parser.parse_args(argv)
    args.share = QUICK if args.quick else 1.0
    args.rounds = 1 if args.quick else args.rounds
    return args


def available(names: list[str]) -> list[str]:
    """Without those whose modules are not installed; says which."""
    for name in names:
        if missing := CANDIDATES[name].missing():
            print(f"without {name}: {', '.join(missing)} is not installed", file=sys.stderr)
    return [name for name in names if not CANDIDATES[name].missing()]


def main() -> None:
    args = arguments()
    if args.profile:
        workload, candidate = args.profile
        measure(Order(candidate, workload, spans=args.spans == [True], share=args.share, profile=args.lines))
        return
    args.candidates = available(args.candidates)
    description = {"machine": machine.describe(PACKAGES), "load_before": machine.load_now()}
    samples: list[Sample] = []
    try:
        for sample in run_rounds(args):
            samples.append(sample)  # noqa: PERF402 -- kept if a later one fails
    except Failed as failed:
        sys.exit(str(failed))
    finally:
        if args.json:
            options = {key: value for key, value in vars(args).items() if key != "json"}
            report.write_json(
                args.json, {**description, "options": options, "samples": [asdict(sample) for sample in samples]}
            )
    print_report(samples, args, description)


if __name__ == "__main__":
    main()
