"""`corral serve` and `corral demo` as real processes: readiness, signals, and one line for what an operator can mend."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

CORRAL = [sys.executable, "-m", "llama_corral.cli"]
HELLO = "llama_corral.examples.hello:hello"

pytestmark = pytest.mark.process


def run(*arguments: str, folder: Path, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CORRAL, *arguments], cwd=folder, capture_output=True, text=True, timeout=timeout)


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [*CORRAL, "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            assert ready.startswith("corral ready at http://127.0.0.1:"), ready or process.communicate()[1]
            yield process, ready.split()[-1]
        finally:
            process.kill()


def ended(process: subprocess.Popen[str], *, timeout: float = 20.0) -> tuple[int, str]:
    assert process.stderr is not None
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, errors


@pytest.mark.parametrize("received", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.promise("P7", "P8")
def test_serves_until_a_signal(tmp_path: Path, received: signal.Signals) -> None:
    with serving(tmp_path, HELLO, "again=llama_corral.examples.hello:hello") as (process, url):
        with httpx.Client(base_url=url) as client:
            assert client.post("/services/hello/run", json={"name": "Ada"}).json()["result"] == "Hello, Ada!"
            assert client.post("/services/again/run", json={}).status_code == 200
        assert (tmp_path / "corral.db").exists()
        process.send_signal(received)
        code, errors = ended(process)
    assert code == 0, errors
    assert "Traceback" not in errors


STUBBORN = """
import anyio
from workflows import Workflow, step
from workflows.events import StartEvent, StopEvent

class Stubborn(Workflow):
    @step
    async def hold(self, ev: StartEvent) -> StopEvent:
        with anyio.CancelScope(shield=True):
            await anyio.sleep_forever()
        return StopEvent()

stubborn = Stubborn(timeout=None)
"""


@pytest.mark.promise("P7")
def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(STUBBORN)
    with serving(tmp_path, "app:stubborn", "--step-flavour", "anyio") as (process, url):
        httpx.post(f"{url}/services/stubborn/run?detach=true", json={}).raise_for_status()
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        while "stopping" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 128 + signal.SIGTERM


@pytest.mark.promise("P7")
def test_a_stuck_step_does_not_keep_the_process(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(STUBBORN)
    arguments = ("app:stubborn", "--step-flavour", "anyio", "--drain-timeout", "0", "--stuck-after", "0.2")
    with serving(tmp_path, *arguments) as (process, url):
        httpx.post(f"{url}/services/stubborn/run?detach=true", json={}).raise_for_status()
        process.send_signal(signal.SIGTERM)
        code, errors = ended(process, timeout=40)
    assert code == 70, errors
    assert "hold" in errors  # the stack of the stuck step


@pytest.mark.promise("P2")
def test_survives_sigkill_and_restart_on_the_same_file(tmp_path: Path) -> None:
    with serving(tmp_path, "llama_corral.examples.form:form", HELLO) as (process, url):
        done = httpx.post(f"{url}/services/hello/run", json={"name": "Ada"}).json()
        process.kill()
        process.wait(timeout=10)
    with serving(tmp_path, "llama_corral.examples.form:form", HELLO) as (_, url):
        record = httpx.get(f"{url}/tasks/{done['task_id']}").json()
        assert record["status"] == "completed"


def test_a_token_is_asked_for(tmp_path: Path) -> None:
    with serving(tmp_path, HELLO, "--token", "s3cret") as (_, url):
        assert httpx.get(f"{url}/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            refused = httpx.get(f"{url}/services", headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "unauthorized"
        assert httpx.get(f"{url}/services", headers={"Authorization": "Bearer s3cret"}).status_code == 200


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode not in (0, 1), done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("corral: ")]
    assert len(lines) == 1, done.stderr
    for part in parts:
        assert part in lines[0]


@pytest.mark.promise("P9")
def test_a_bad_target_is_one_line(tmp_path: Path) -> None:
    refused(run("serve", "nonsense", "--port", "0", folder=tmp_path), "'nonsense' is no target", "module:attribute")


@pytest.mark.promise("P9")
def test_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused(run("serve", HELLO, "--port", port, folder=tmp_path), port, "in use")


@pytest.mark.promise("P9")
def test_a_store_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, " * 100)
    refused(run("serve", HELLO, "--port", "0", "--store", "sqlite:///text.db", folder=tmp_path), "text.db")
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE things (id)")
    refused(run("serve", HELLO, "--port", "0", "--store", "sqlite:///other.db", folder=tmp_path), "other.db")
    refused(run("serve", HELLO, "--port", "0", "--store", "sqlite:///no/such.db", folder=tmp_path), "does not exist")
    refused(run("serve", HELLO, "--port", "0", "--store", "nonsense", folder=tmp_path), "sqlite:///")
    with serving(tmp_path, HELLO) as (process, _):
        refused(run("serve", HELLO, "--port", "0", folder=tmp_path), str(process.pid))


@pytest.mark.promise("P9")
def test_bad_options(tmp_path: Path) -> None:
    for arguments in (["--step-flavour", "vanilla"], ["--port", "99999"], ["--max-concurrent-tasks", "0"]):
        done = run("serve", HELLO, *arguments, folder=tmp_path)
        assert done.returncode == 2
        assert arguments[0] in done.stderr
    done = run("serve", HELLO, "--port", "0", "--token", " ", folder=tmp_path)
    refused(done, "token")


def test_demo_on_the_texts_of_the_package(tmp_path: Path) -> None:
    done = run("demo", folder=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "found 6 files" in done.stdout
    assert "keywords: " in done.stdout
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_demo_on_given_files(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "one.txt").write_text(
        "Llamas graze on the high plain. A herd keeps together. The herd follows the leader."
    )
    (texts / "two.txt").write_bytes(bytes(range(256)))
    done = run("demo", str(texts), "--sentences", "2", folder=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "one.txt" in done.stdout
    assert "skipped" in done.stdout
    refused(run("demo", "no/such/path", folder=tmp_path), "no/such/path")


def test_demo_asks_for_approval(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        [*CORRAL, "demo", "--approve"],
        cwd=tmp_path,
        env=environment,
        input="perhaps\nyes\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "please answer" in done.stdout
    assert done.stdout.rstrip().endswith("approved")
