"""What the library leaves alone: the program around it is somebody else's."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio

from llama_corral.deploy import Deployment, DeployOptions, deploy_all
from llama_corral.examples.hello import hello
from llama_corral.settings import ServerSettings

IMPORT = """
import json, logging, os, signal, sys, warnings
def state():
    handlers = {name: [str(h) for h in logging.getLogger(name).handlers] for name in (None, "llama_corral")}
    signals = {str(number): str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    level = logging.getLogger("llama_corral").level
    return [handlers, level, signals, dict(os.environ), sys.path[:], len(warnings.filters)]
before = state()
import llama_corral, llama_corral.control_plane, llama_corral.client, llama_corral.queues, llama_corral.stores
import llama_corral.protocol, llama_corral.web, llama_corral.settings
after = state()
print(json.dumps([before, after]))
"""


@pytest.mark.process
def test_importing_it_changes_nothing(tmp_path: Path) -> None:
    """No handler, no level, no signal, no variable, no path: those are the program's."""
    ran = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, cwd=tmp_path, check=True)
    before, after = json.loads(ran.stdout)
    assert before == after
    assert ran.stderr == ""


@pytest.mark.trio
async def test_serving_leaves_signals_and_environment_alone_and_logs_no_content(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also at the lowest level: what tasks are given and what comes out is not for logs."""
    caplog.set_level(logging.DEBUG, "llama_corral")
    stop = trio.Event()
    options = DeployOptions(
        store_url=f"sqlite:///{tmp_path}/corral.db", settings=ServerSettings(port=0, access_log=True)
    )
    environment = dict(os.environ)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with trio.open_nursery() as nursery:
        deployment: Deployment = await nursery.start(partial(deploy_all, {"hello": hello}, options, stop=stop))
        async with httpx.AsyncClient(base_url=deployment.url, timeout=20) as client:
            made = await client.put("/sessions/s")
            await client.post("/sessions/s/state", json={"secret": "hunter2"})
            found = await client.post(
                "/services/hello/run", params={"session_id": "s", "task_id": "t"}, json={"name": "hunter2"}
            )
            refused = await client.post("/services/hello/run", json={"name": ["hunter2"]})
            events = await client.get("/tasks/t/events")
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        stop.set()
    assert (made.status_code, found.status_code, refused.status_code) == (201, 200, 422)
    assert "hunter2" in found.text
    assert "hunter2" in events.text
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("llama_corral")]
    assert ours
    assert not [line for line in ours if "hunter2" in line]
    assert dict(os.environ) == environment


@pytest.mark.trio
@pytest.mark.promise("P11")
async def test_no_route_brings_code(tmp_path: Path) -> None:
    """What is served is chosen where the process is started: nothing is deployed, installed or imported by a request."""
    stop = trio.Event()
    options = DeployOptions(store_url=f"sqlite:///{tmp_path}/corral.db", settings=ServerSettings(port=0))
    async with trio.open_nursery() as nursery:
        deployment: Deployment = await nursery.start(partial(deploy_all, {"hello": hello}, options, stop=stop))
        async with httpx.AsyncClient(base_url=deployment.url) as client:
            document = (await client.get("/openapi.json")).json()
        stop.set()
    operations = [
        (method, path, operation) for path, found in document["paths"].items() for method, operation in found.items()
    ]
    assert not [path for _, path, _ in operations if "deploy" in path]
    kinds = {kind for _, _, each in operations for kind in each.get("requestBody", {}).get("content", {})}
    assert kinds == {"application/json"}
