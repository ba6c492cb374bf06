"""Does a served process stay as it is? Many small tasks through `corral serve`, and what is left of them.

    python -m benchmarks.service_soak [--tasks 100000] [--retention 20] [--flavour anyio] [--json FILE]

Load comes in windows: two of `POST /services/hello/run`, then one of tasks in sessions, whose contexts are stored. After
each window it notes resident memory, the size of the store's files and how many tasks are kept. Retention is short, so that
most of what ends is removed while the rest still runs.

Afterwards every answer must have been right, no task may be without an ending, nothing may be left of a removed task, and in
the second half neither memory nor the store may have grown by more than a tenth over the first; else the exit code is 1.
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from . import load, machine, report, servers

WINDOW = 15.0
CONNECTIONS = 16
SERVICE = "hello"
ENDED = "('completed', 'failed', 'cancelled', 'timed_out')"
QUESTIONS = {
    "tasks": "SELECT count(*) FROM corral_tasks",
    "open": f"SELECT count(*) FROM corral_tasks WHERE status NOT IN {ENDED}",
    "orphaned events": "SELECT count(*) FROM corral_task_events WHERE task_no NOT IN (SELECT no FROM corral_tasks)",
    "orphaned inbox": "SELECT count(*) FROM corral_task_inbox WHERE task_no NOT IN (SELECT no FROM corral_tasks)",
    "orphaned checkpoints": "SELECT count(*) FROM corral_checkpoints WHERE task_no NOT IN (SELECT no FROM corral_tasks)",
}


@dataclass(frozen=True, slots=True)
class Look:
    """The state after a window. Sizes in MiB; `tasks` so far, `kept` in the store now."""

    tasks: int
    per_second: float
    memory: float
    store: float
    kept: int


def ask(store: Path) -> dict[str, int]:
    """What the file says. Reading does not need the lock that the server holds."""
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as connection:
        return {name: connection.execute(question).fetchone()[0] for name, question in QUESTIONS.items()}


def size(store: Path) -> float:
    """The file and its write-ahead log, in MiB."""
    return sum(path.stat().st_size for path in store.parent.glob(f"{store.name}*")) / 2**20


def soak(tasks: int, retention: float, flavour: servers.Flavour) -> tuple[list[Look], int, dict[str, int]]:
    """The looks, the number of wrong answers, and what the store held at the end."""
    target = f"{SERVICE}={servers.HELLO}:hello"
    looks: list[Look] = []
    failures = done = 0
    options = ("--retention", f"{retention:g}")
    with servers.open_corral(target, flavour=flavour, cap=8, options=options) as server:
        assert server.store is not None
        while done < tasks:
            scenario: load.Scenario = "session" if len(looks) % 3 == 2 else "run"
            result = load.drive(load.Plan(server.url, scenario, SERVICE, CONNECTIONS, WINDOW, 0.0, server.pid))
            done += result.operations
            failures += result.failures
            if result.failures:
                print(f"{result.failures} wrong answers, the first: {result.first_failure}", file=sys.stderr)
            rate = result.operations / result.seconds
            looks.append(Look(done, rate, server.memory_mib(), size(server.store), ask(server.store)["tasks"]))
            seen = looks[-1]
            print(
                f"{seen.tasks:7} tasks, {seen.per_second:5.0f}/s: {seen.memory:6.1f} MiB resident, "
                f"{seen.store:6.1f} MiB of store, {seen.kept} kept",
                flush=True,
            )
        # The connections of the last window left without their answers; their tasks are cancelled and then removed.
        deadline = time.monotonic() + 3 * retention + 60
        while (left := ask(server.store))["tasks"] and time.monotonic() < deadline:
            time.sleep(1)
    return looks, failures, left


def growth(looks: list[Look], name: str) -> float:
    """By how much the greatest of the second half is above that of the first, as a share. The first look is warm-up."""
    values = [getattr(one, name) for one in looks[1:]]
    half = len(values) // 2
    return float(max(values[half:]) / max(values[:half]) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service_soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--retention", type=float, default=20.0, help="seconds that an ended task is kept")
    parser.add_argument("--flavour", choices=("anyio", "asyncio"), default="anyio")
    parser.add_argument("--json", metavar="FILE", help="write everything measured here")
    args = parser.parse_args()
    looks, failures, left = soak(args.tasks, args.retention, args.flavour)
    grown = {name: growth(looks, name) for name in ("memory", "store")} if len(looks) > 4 else {}
    print(f"left in the store: {left}; grown: {', '.join(f'{name} {share:+.1%}' for name, share in grown.items())}")
    if args.json:
        everything = {"looks": [asdict(one) for one in looks], "failures": failures, "left": left, "grown": grown}
        report.write_json(args.json, {"machine": machine.describe(), **everything})
    if failures or any(left.values()) or any(share > 0.1 for share in grown.values()):
        raise SystemExit("wrong answers, something left behind, or growth: see above")


if __name__ == "__main__":
    main()
