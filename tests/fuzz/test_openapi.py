"""schemathesis over `/openapi.json` of every server: no 5xx, no hang, and every answer as the document has it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import DEPTH, PATIENCE, Served

HERE = Path(__file__).parent

pytestmark = [pytest.mark.promise("P9"), pytest.mark.process, pytest.mark.timeout(120 + 600 * (DEPTH > 1) * DEPTH)]


def run_schemathesis(served: Served, ids: dict[str, list[str]], tmp_path: Path, examples: int) -> None:
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "schemathesis.toml")),
        *("run", f"{served.url}/openapi.json", "--max-examples", str(examples * DEPTH)),
        *("--seed", "1", "--request-timeout", str(PATIENCE), "--continue-on-failure", "--output-sanitize", "false"),
    ]
    if DEPTH == 1:
        command += ["--no-shrink"]
    env = {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "SCHEMATHESIS_HOOKS": "schemathesis_hooks",
        "CORRAL_FUZZ_URL": served.url,
        "CORRAL_FUZZ_IDS": json.dumps(ids),
    }
    ran = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    (tmp_path / "schemathesis.log").write_text(ran.stdout + ran.stderr)
    assert ran.returncode == 0, f"{ran.stdout[-20_000:]}\n{ran.stderr[-2000:]}"
    assert re.search(r"[1-9]\d* generated", ran.stdout), ran.stdout


def test_the_control_plane(plane: Served, tmp_path: Path) -> None:
    ids: dict[str, list[str]] = {"session_id": ["s0"], "task_id": [], "service_name": ["echo", "ask"]}
    with plane.client() as client:
        client.put("/sessions/s0").raise_for_status()
        for number in range(4):
            options = {"session_id": "s0", "task_id": f"t{number}"}
            client.post("/services/echo/run", params=options, json={"count": number}).raise_for_status()
            ids["task_id"].append(options["task_id"])
    run_schemathesis(plane, ids, tmp_path, 4)
    with plane.client() as client:
        assert client.post("/services/echo/run", json={"count": 1}).json()["status"] == "completed"


def test_a_service(service: Served, tmp_path: Path) -> None:
    run_schemathesis(service, {}, tmp_path, 20)
    with service.client() as client:
        assert client.get("/ready").status_code == 200
