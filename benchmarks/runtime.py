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
from .candidates import BASE, CANDIDATES, Result
from .measuring import Failed, Order, measure
from .workloads import WAITING, WORKLOADS

EVERYTHING = {**WORKLOADS, **WAITING}
PACKAGES = (*machine.OURS, "llama-index-instrumentation", "uvloop")
QUICK = 0.1


@dataclass(frozen=True, slots=True)
class Sample:
    """One candidate's measurement of one workload in one round. `result`: what `measuring` printed."""

    workload: str
    candidate: str
    spans: bool
    round: int
    result: Result


Value = Callable[[Result], float]


def rate(result: Result) -> float:
    return float(result["units"] / result["wall"])


def cpu_us(result: Result) -> float:
    return float(result["cpu"] / result["units"] * 1e6)


def kilobytes(result: Result) -> float:
    return float(result["bytes_a_run"] / 1000)


def idle_percent(result: Result) -> float:
    return float(result["idle_cpu"] / result["idle_wall"] * 100)


def start_us(result: Result) -> float:
    return float(result["start_cpu"] / result["runs"] * 1e6)


def answer_us(result: Result) -> float:
    return float(result["answer_cpu"] / result["runs"] * 1e6)


def run_rounds(args: argparse.Namespace) -> Iterator[Sample]:
    """Workload by workload, so that what is compared was measured within seconds."""
    for workload in args.workloads:
        turns = [(candidate, spans) for spans in _spans(args, workload) for candidate in args.candidates]
        for round_ in range(args.rounds if workload in WORKLOADS else min(args.rounds, args.waiting_rounds)):
            for candidate, spans in report.rotated(turns, round_):
                order = Order(candidate, workload, spans=spans, share=args.share, seconds=args.seconds)
                sample = Sample(workload, candidate, spans, round_, measure(order))
                print(_progress(sample), file=sys.stderr, flush=True)
                yield sample


def _spans(args: argparse.Namespace, workload: str) -> list[bool]:
    """Runs that wait are measured without handlers only: what handlers see comes before and after."""
    return list(args.spans) if workload in WORKLOADS else [False]


def _progress(sample: Sample) -> str:
    result = sample.result
    what = f"round {sample.round + 1}, {sample.workload:14s} {sample.candidate:17s}"
    if sample.workload in WAITING:
        return f"{what} {kilobytes(result):7.1f} kB {idle_percent(result):7.3f} % CPU"
    return f"{what} {cpu_us(result):9.1f} us CPU {rate(result):9.0f}/s{', spans' if sample.spans else ''}"


# The report


def ratios(samples: list[Sample], candidate: str, value: Value) -> list[float]:
    """A value over upstream's, for each round in which both were measured."""
    base = {sample.round: value(sample.result) for sample in samples if sample.candidate == BASE}
    own = {sample.round: value(sample.result) for sample in samples if sample.candidate == candidate}
    return [own[round_] / base[round_] for round_ in own if round_ in base]


def table(samples: list[Sample], unit: str) -> str:
    """Of the samples of one workload, with or without spans."""
    head = ["", f"{unit}s/s", f"CPU us/{unit}", "x upstream's rate", f"x {unit}s for the CPU"]
    rows = [
        [
            CANDIDATES[name].title,
            report.spread((rate(result) for result in own), 0),
            report.spread((cpu_us(result) for result in own), 1),
            report.spread(ratios(samples, name, rate)),
            report.spread(ratios(samples, name, lambda result: 1 / cpu_us(result))),
        ]
        for name, own in _by_candidate(samples).items()
    ]
    return report.table(head, rows)


def waiting_table(samples: list[Sample]) -> str:
    """Of the samples of one workload whose runs wait."""
    head = ["", "kB/run", "x upstream's", "% of a core meanwhile", "CPU us/run to start", "CPU us/run to answer"]
    rows = [
        [
            CANDIDATES[name].title,
            report.spread((kilobytes(result) for result in own), 1),
            report.spread(ratios(samples, name, kilobytes)),
            report.spread((idle_percent(result) for result in own), 3),
            report.spread((start_us(result) for result in own), 0),
            report.spread((answer_us(result) for result in own), 0),
        ]
        for name, own in _by_candidate(samples).items()
    ]
    return report.table(head, rows)


def _by_candidate(samples: list[Sample]) -> dict[str, list[Result]]:
    grouped: dict[str, list[Result]] = {name: [] for name in CANDIDATES}
    for sample in samples:
        grouped[sample.candidate].append(sample.result)
    return {name: own for name, own in grouped.items() if own}


def seen_differently(samples: list[Sample]) -> list[str]:
    """What handlers saw of one operation, where candidates show them something else than upstream on asyncio does."""
    seen = {sample.candidate: _counts(sample.result["seen"]) for sample in samples}
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
        for spans in _spans(args, name):
            own = [sample for sample in samples if sample.workload == name and sample.spans is spans]
            if name in WAITING:
                runs = own[0].result["runs"]
                print(f"\n{runs:,} {WAITING[name].title}\n\n{waiting_table(own)}")
                continue
            handlers = ", span and event handler attached" if spans else ""
            print(f"\n{WORKLOADS[name].title}{handlers}\n\n{table(own, WORKLOADS[name].unit)}")
            for line in seen_differently(own) if spans else []:
                print(line)


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
    workloads, candidates = chosen("workload", EVERYTHING), chosen("candidate", CANDIDATES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--workloads", type=workloads, default=list(EVERYTHING), metavar="W,W", help=", ".join(EVERYTHING)
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
    parser.add_argument("--waiting-rounds", type=int, default=2, help="at most so many of what waits: it takes long")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to look at the CPU while runs wait")
    parser.add_argument("--quick", action="store_true", help="one round of a tenth of the work, and two seconds")
    parser.add_argument("--profile", nargs=2, metavar=("WORKLOAD", "CANDIDATE"), help="only show where its CPU goes")
    parser.add_argument("--lines", type=int, default=40, help="of the profile")
    parser.add_argument("--json", metavar="FILE", help="write everything measured here")
    args = parser.parse_args(argv)
    args.share = QUICK if args.quick else 1.0
    if args.quick:
        args.rounds, args.seconds = 1, 2.0
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
