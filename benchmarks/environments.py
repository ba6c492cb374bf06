"""Peers live in virtual environments of their own, made here on first use under `benchmarks/.envs` (not in git)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent / ".envs"
_VERSIONS = "import json, importlib.metadata as m; print(json.dumps({d.name: d.version for d in m.distributions()}))"


def python_with(name: str, requirement: str) -> Path:
    """The interpreter of the environment `name`, with `requirement` installed.

    The environment is made anew when the requirement or this interpreter's version changes.

    Raises:
        subprocess.CalledProcessError: pip could not install it; its output has been printed.
    """
    folder = ROOT / name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = f"{requirement} on {sys.version_info[:3]}"
    stamp = folder / "installed.txt"
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"making an environment with {requirement} ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", requirement], check=True)
        stamp.write_text(wanted)
    return python


def versions(python: Path) -> dict[str, str]:
    """What is installed in an environment."""
    done = subprocess.run([str(python), "-c", _VERSIONS], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return dict(sorted(found.items()))
