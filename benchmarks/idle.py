"""What a server costs that nobody uses: CPU and memory of `corral serve` with three services.

    python -m benchmarks.idle [--seconds 60] [--flavours anyio,asyncio] [--after-load] [--json FILE]

Aim: less than 0.5 % of one core.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from . import load, machine, report, servers

AIM = 0.5
SETTLE = 5.0
SERVICES = ("hello", "greeter", "welcomer")


def measure(flavour: servers.Flavour, seconds: float, *, after_load: bool) -> dict[str, Any]:
    """Let a server be, and look at its clock. With `after_load` it first worked, and has things to clean up."""
    with servers.open_corral(*(f"{name}={servers.HELLO}:hello" for name in SERVICES), flavour=flavour, cap=8) as server:
        if after_load:
            for name in SERVICES:
                load.drive(load.Plan(server.url, "run", name, 8, 2.0, 0.5, server.pid))
        time.sleep(SETTLE)
        switches, cpu, started = server.process.num_ctx_switches(), server.cpu_seconds(), time.perf_counter()
        time.sleep(seconds)
        passed = time.perf_counter() - started
        wakes = server.process.num_ctx_switches().voluntary - switches.voluntary
        return {
            "flavour": flavour,
            "after_load": after_load,
            "seconds": round(passed, 2),
            "cpu_percent": round((server.cpu_seconds() - cpu) / passed * 100, 3),
            "wakes_per_second": round(wakes / passed, 2),
            "memory_mib": round(server.memory_mib(), 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.idle", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--flavours", type=lambda text: text.split(","), default=["anyio", "asyncio"], metavar="F,F")
    parser.add_argument("--after-load", action="store_true", help="let each service work for two seconds before")
    parser.add_argument("--json", metavar="FILE", help="write everything measured here")
    args = parser.parse_args()
    results = [measure(flavour, args.seconds, after_load=args.after_load) for flavour in args.flavours]
    rows = [
        [
            f"{result['flavour']} steps",
            f"{result['cpu_percent']:.3f}",
            "yes" if result["cpu_percent"] < AIM else "NO",
            f"{result['wakes_per_second']:.1f}",
            f"{result['memory_mib']:.0f}",
        ]
        for result in results
    ]
    print(report.table(["three idle services", "% of one core", f"< {AIM} %", "wakes/s", "MiB"], rows))
    if args.json:
        report.write_json(args.json, {"machine": machine.describe(), "results": results})
    if not all(result["cpu_percent"] < AIM for result in results):
        print("more than the aim", file=sys.stderr)


if __name__ == "__main__":
    main()
