"""`corral serve` as its users meet it: a process, a port, a file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

TIME = 30.0
ANSWER = "workflows.events.HumanResponseEvent"
FLOWS = ("hello", "work", "person", "stuck", "thread", "ticking", "counter", "poison")


class Corral:
    """A served process and what can be asked of it. Started again, it finds its old port and file."""

    def __init__(self, folder: Path, options: tuple[str, ...], module: str, names: tuple[str, ...]) -> None:
        self.marks = folder / "marks"
        self.marks.touch()
        self._folder = folder
        self._options = options
        self._targets = [f"{name}={Path(__file__).with_name(module)}:{name}" for name in names]
        self._port = 0
        self.start()
        self.http = httpx.Client(base_url=self.url, timeout=TIME)

    def start(self) -> None:
        places = ["--port", str(self._port), "--store", f"sqlite:///{self._folder / 'corral.db'}"]
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llama_corral.cli", "serve", *self._targets, *places, *self._options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "CORRAL_E2E_MARKS": str(self.marks)},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("corral ready at "), self.log
        self.url = line.split()[-1]
        self._port = int(self.url.rpartition(":")[2])

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        code = self.process.wait(TIME)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text()

    @property
    def cleaned(self) -> dict[str, float]:
        """When which clean-up ran."""
        return {name: float(at) for name, at in map(str.split, self.marks.read_text().splitlines())}

    # Requests

    def run(self, service: str, body: Any = None, **query: Any) -> httpx.Response:
        return self.http.post(f"/services/{service}/run", json=body or {}, params=query)

    def begin(self, service: str, body: Any = None) -> str:
        return self.run(service, body, detach=True).raise_for_status().json()["task_id"]

    def add(self, session: str, service: str, body: Any = None) -> str:
        task = {"agent_id": service, "input": json.dumps(body or {})}
        return self.http.post(f"/sessions/{session}/tasks", json=task).raise_for_status().json()

    def result(self, task: str) -> Any:
        return self.http.get(f"/tasks/{task}/result", params={"wait": TIME}).json()

    def get(self, task: str) -> Any:
        return self.http.get(f"/tasks/{task}").json()

    def cancel(self, task: str) -> httpx.Response:
        return self.http.post(f"/tasks/{task}/cancel")

    def answer(self, task: str, event: Any = None) -> httpx.Response:
        if event is None:
            event = {"__is_pydantic": True, "value": {"_data": {"response": "yes"}}, "qualified_name": ANSWER}
        body = {"agent_id": "", "event_obj_str": json.dumps(event)}
        return self.http.post(f"/tasks/{task}/send_event", json=body)

    def wait_event(self, task: str, index: int = 0) -> None:
        """Until the task has published so many events."""
        assert [index] == self.read(task, index, 1)[0]

    def read(self, task: str, start: int = 0, limit: int | None = None) -> tuple[list[int], str | None]:
        """Indices of events from one on until the stream ends or breaks, and how it ended."""
        seen: list[int] = []
        try:
            with self.http.stream("GET", f"/tasks/{task}/events", params={"from": start}) as stream:
                for line in stream.iter_lines():
                    if line.startswith("id: "):
                        seen.append(int(line[4:]))
                        if len(seen) == limit:
                            return seen, None
                    if line in ("event: end", "event: drain"):
                        return seen, line[7:]
        except httpx.HTTPError:
            return seen, "broken"
        return seen, None

    def busy(self) -> dict[str, int]:
        """How many tasks have not ended, by service."""
        services = self.http.get("/status").json()["services"]
        open_tasks = {n: s["held"] + s["queued"] + s["running"] + s["waiting"] for n, s in services.items()}
        return {name: number for name, number in open_tasks.items() if number}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Corral]]:
    """Serves the flows with these options, once a test."""
    served: list[Corral] = []

    def start(*options: str, module: str = "flows.py", names: tuple[str, ...] = FLOWS) -> Corral:
        served.append(Corral(tmp_path, options, module, names))
        return served[-1]

    yield start
    for corral in served:
        corral.http.close()
        if corral.process.poll() is None:
            corral.stop(signal.SIGKILL)
