"""Commands as real processes: terminals, pipes, signals, what is imported."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llama_corral.client import SyncClient

CORRAL = [sys.executable, "-m", "llama_corral.cli"]
TIME = 20.0

pytestmark = pytest.mark.process


def read_until(descriptor: int, mark: bytes) -> bytes:
    """What arrives on a terminal until `mark`, or until it hangs up."""
    seen = b""
    give_up = time.monotonic() + TIME
    while mark not in seen:
        ready, _, _ = select.select([descriptor], [], [], give_up - time.monotonic())
        assert ready, f"no {mark!r} in {seen!r}"
        try:
            seen += os.read(descriptor, 4096)
        except OSError:
            break
    return seen


@contextmanager
def at_a_terminal(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A command whose three streams are a terminal, and our end of it."""
    ours, theirs = pty.openpty()
    command = [*CORRAL, *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        try:
            yield process, ours
        finally:
            process.kill()
            os.close(ours)


def test_a_conversation_at_a_terminal(server: str) -> None:
    with at_a_terminal("run", "form", "-a", "item=alpaca") as (process, terminal):
        read_until(terminal, b"What is your name? ")
        os.write(terminal, b"Ada\n")
        read_until(terminal, b"How many alpacas would you like? ")
        os.write(terminal, b"3\n")
        read_until(terminal, b"Order 3 x alpaca for Ada? ")
        os.write(terminal, b"yes\n")
        assert b"3 x alpaca for Ada (confirmed)" in read_until(terminal, b"(confirmed)\r\n")
        assert process.wait(TIME) == 0


def test_a_conversation_through_pipes(server: str) -> None:
    ended = subprocess.run(
        [*CORRAL, "run", "form", "--json"], input="Ada\nfour\n4\nno\n", capture_output=True, text=True, timeout=TIME
    )
    assert ended.returncode == 0, ended.stderr
    record = [json.loads(line) for line in ended.stdout.splitlines()][-1]
    assert record["result"] == {"item": "llama", "name": "Ada", "quantity": 4, "confirmed": False}
    assert "What is your name?" in ended.stderr


@pytest.mark.promise("P6")
@pytest.mark.parametrize("how", ["terminal", "pipe"])
def test_ctrl_c_cancels_the_task(server: str, client: SyncClient, how: str) -> None:
    session = client.sessions.create()
    arguments = ("run", "stuck", "--session", session.id)
    if how == "terminal":
        with at_a_terminal(*arguments) as (process, terminal):
            read_until(terminal, b"Tick")
            process.send_signal(signal.SIGINT)
            assert b"cancelling the task" in read_until(terminal, b"was cancelled")
            code = process.wait(TIME)
    else:
        with subprocess.Popen([*CORRAL, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert b"Tick" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=TIME)
            assert b"cancelling the task" in errors
            assert b"Traceback" not in errors
            code = process.returncode
    assert code == 130
    (info,) = session.tasks()
    assert info.status == "cancelled"


def test_ctrl_c_while_the_server_is_gone_does_not_claim_to_have_told_it(tmp_path: Path) -> None:
    serve = [*CORRAL, "serve", "form=llama_corral.examples.form:form", "--port", "0"]
    with subprocess.Popen(serve, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            command = [*CORRAL, "run", "form", "--url", url]
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            ) as run:
                assert run.stdout is not None
                assert run.stdin is not None
                assert b"Question" in run.stdout.readline()
                process.kill()
                process.wait()
                run.send_signal(signal.SIGINT)
                assert run.stderr is not None
                errors = run.stderr.read()
                assert run.wait(TIME) == 130
        finally:
            process.kill()
    assert b"has been told" not in errors
    assert b"could not be told" in errors
    assert b"Traceback" not in errors


def test_a_reader_that_leaves(server: str) -> None:
    command = f"{' '.join(CORRAL)} run ticking -a events=2000 | head -1; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=TIME)
    first, code = ended.stdout.splitlines()
    assert first.split()[:2] == ["0", "Tick"]
    assert code == "1"
    assert "Traceback" not in ended.stderr


IMPORTS = """
import sys, time
started = time.perf_counter()
from llama_corral.cli.app import run
code = run(["status", "--json"])
heavy = {"workflows", "llama_index", "trio", "httpx", "rich", "sqlalchemy", "quart", "hypercorn"} & set(sys.modules)
print(code, sorted(heavy), f"{time.perf_counter() - started:.2f}", file=sys.stderr)
"""


def test_a_small_command_imports_little(server: str) -> None:
    started = time.perf_counter()
    ended = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=TIME)
    code, *heavy, inside = ended.stderr.split()
    print(f"corral status: {time.perf_counter() - started:.2f} s, of which {inside} s are ours")
    assert (code, heavy) == ("0", ["[]"])
    assert "hello" in json.loads(ended.stdout)["services"]
