"""What the figures were measured on, in words that do not say whose machine it is."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

OURS = (
    "llama-corral",
    "llama-index-workflows",
    "llama-index-core",
    "anyio",
    "trio",
    "trio-asyncio",
    "hypercorn",
    "quart",
    "quart-trio",
    "h11",
    "pydantic",
    "sqlalchemy",
)


def describe(packages: Iterable[str] = OURS) -> dict[str, Any]:
    """Processor, memory, Python and the versions of packages in this environment."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": {name: version for name in packages if (version := _version(name))},
    }


def load_now() -> float:
    """Processes that wanted to run, averaged over the last minute: what else the machine is doing."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else float("nan")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
