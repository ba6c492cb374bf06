"""What brokers and workers give and cost: messages, tasks, and how many workers one control plane feeds.

    python -m benchmarks.queues messages [--queues redis,nats] [--consumers 1,4] [--messages 10000] [--json FILE]
    python -m benchmarks.queues tasks [--stacks original,http+sqlite] [--workers 1,2,4] [--json FILE]
    python -m benchmarks.queues feed [--stacks http+sqlite] [--workers 1,2,4,6,8] [--json FILE]

`messages`: each adapter beside the broker's client alone. `tasks`: a core and workers beside llama_deploy 0.6.1 with its
simple queue. `feed`: workers are added until they bring nothing. Candidates take turns, in another order every round; ratios
compare within a round. `--quick`: one short round. Servers are found by the variables that the tests use.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from . import brokers, carrying, machine, messages, report, working

PACKAGES = (*machine.OURS, "coredis", "nats-py", "aio-pika", "psycopg", "httpx")
QUICK = 0.1

Samples = list[Any]


def run_messages(args: argparse.Namespace) -> Iterator[Any]:
    kinds = brokers.available(args.queues)
    number = int(args.messages * args.share)
    return carrying.run_rounds(kinds, args.consumers, args.backends, number, args.rounds)


def run_tasks(args: argparse.Namespace) -> Iterator[Any]:
    number, original = int(args.tasks * args.share), max(args.clients, int(args.original_tasks * args.share))
    stacks = brokers.available(args.stacks)
    return working.run_rounds(stacks, args.workers, args.clients, number, original, args.rounds)


def run_feed(args: argparse.Namespace) -> Iterator[Any]:
    stacks, seconds = brokers.available(args.stacks), args.seconds * args.share
    return working.feed(stacks, args.workers, args.nap, args.cap, seconds, args.rounds)


def tables(args: argparse.Namespace, samples: Samples) -> Iterator[str]:
    if args.part == "messages":
        return carrying.tables(samples)
    return working.tables(samples) if args.part == "tasks" else working.feed_tables(samples, args.nap, args.cap)


# The command


def words(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser of `name,name`."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"no {name!r}; there are {', '.join(known)}")
        return names

    return parse


def numbers(text: str) -> list[int]:
    """`1,4` as numbers."""
    return [int(part) for part in text.split(",")]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.queues", description=__doc__.partition("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--rounds", type=int, default=3)
    shared.add_argument("--quick", action="store_true", help="one round of a tenth of the work")
    shared.add_argument("--json", metavar="FILE", help="write everything measured here")

    some = parts.add_parser("messages", parents=[shared], help="each adapter beside the broker's client alone")
    _add_names(some, "--queues", carrying.KINDS, carrying.KINDS)
    _add_names(some, "--backends", carrying.BACKENDS, carrying.BACKENDS)
    some.add_argument("--consumers", type=numbers, default=[1, 4], metavar="N,N")
    some.add_argument("--messages", type=int, default=10_000, help="of a measurement")
    some.set_defaults(run=run_messages)

    some = parts.add_parser("tasks", parents=[shared], help="whole systems beside the original")
    _add_names(some, "--stacks", working.STACKS, working.DEFAULT_STACKS)
    some.add_argument("--workers", type=numbers, default=[1, 2, 4], metavar="N,N")
    some.add_argument("--clients", type=int, default=16, help="tasks in flight")
    some.add_argument("--tasks", type=int, default=3_000, help="of a measurement")
    some.add_argument("--original-tasks", type=int, default=60, help="of one of the original, which takes longer")
    some.set_defaults(run=run_tasks)

    some = parts.add_parser("feed", parents=[shared], help="workers are added until they bring nothing")
    _add_names(some, "--stacks", working.STACKS[1:], ["http+sqlite"])
    some.add_argument("--workers", type=numbers, default=[1, 2, 4, 6, 8, 12], metavar="N,N")
    some.add_argument("--nap", type=float, default=0.2, help="seconds that a task waits")
    some.add_argument("--seconds", type=float, default=8.0, help="of a measurement, about")
    some.set_defaults(run=run_feed, cap=8)  # the default of a worker
    args = parser.parse_args(argv)
    args.share = QUICK if args.quick else 1.0
    args.rounds = 1 if args.quick else args.rounds
    return args


def _add_names(parser: argparse.ArgumentParser, name: str, known: Sequence[str], default: Sequence[str]) -> None:
    parser.add_argument(name, type=words(known), default=list(default), metavar="NAME,NAME", help=", ".join(known))


def main() -> None:
    args = arguments()
    description = {"machine": machine.describe(PACKAGES), "load_before": machine.load_now()}
    samples: Samples = []
    try:
        for sample in args.run(args):
            samples.append(sample)  # kept if a later one fails
    except messages.Failed as failed:
        sys.exit(str(failed))
    finally:
        if args.json:
            options = {key: value for key, value in vars(args).items() if key not in {"json", "run"}}
            everything = {**description, "options": options, "samples": [asdict(sample) for sample in samples]}
            report.write_json(args.json, everything)
    print_report(args, samples, description)
    if any(getattr(sample, "failed", 0) or getattr(sample, "lost", 0) for sample in samples if _ours(sample)):
        raise SystemExit("wrong answers, or tasks without an ending: see above")


def _ours(sample: Any) -> bool:
    return getattr(sample, "stack", None) != working.ORIGINAL


def print_report(args: argparse.Namespace, samples: Samples, description: dict[str, Any]) -> None:
    machine_ = description["machine"]
    print(f"\n{machine_['processor']}, {machine_['cores']} cores, {machine_['python']}; load before: ", end="")
    print(f"{description['load_before']}; {args.rounds} rounds; median (least-greatest)\n")
    for table in tables(args, samples):
        print(table)


if __name__ == "__main__":
    main()
